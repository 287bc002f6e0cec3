"""Programs train or predict: dropout and batch statistics belong to training, and nothing asked of a fit moves them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrolvm
from pyrolvm import LatentVariableModel, data_plate
from pyrolvm.inference.posterior.evidence import evidence_table

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 0.5, 1, 3])
QUIET = {"progress": False, "engine": "eager"}


class Modern(LatentVariableModel):
    """A VAE whose encoder has batch normalisation and dropout: all of it in one file."""

    def __init__(self, data_dim: int = 5, latent_dim: int = 2) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(
            nn.Linear(data_dim, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2 * latent_dim)
        )
        self.decoder = nn.Linear(latent_dim, data_dim)

    def model(self, x=None):
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(self.decoder.weight.new_zeros(self.latent_dim), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x=None):
        with self.data_plate(x):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 1e-3).to_event(1))


@pytest.fixture(name="fitted")
def _fitted():
    torch.manual_seed(0)
    return pyrolvm.fit(Modern(), X, num_steps=80, batch_size=20, learning_rate=0.02, **QUIET)


def buffers(model):
    return {n: b.clone() for n, b in model.named_buffers()}


def asked(fitted):
    fitted.encode(X)
    fitted.reconstruct(X)
    fitted.posterior(X, 3)
    fitted.predict(X, 3)
    fitted.sample(4)
    for method in ("importance", "iwae", "prior"):
        fitted.log_evidence(X, method, 10)


def test_questions_use_running_statistics_and_leave_them(fitted):
    before = buffers(fitted.model)
    asked(fitted)
    assert all(torch.equal(b, before[n]) for n, b in fitted.model.named_buffers())
    assert fitted.model.training  # as the user left it


def test_codes_do_not_depend_on_the_seed_or_on_the_other_rows(fitted):
    whole = fitted.encode(X)
    assert torch.equal(fitted.encode(X, seed=1), whole)
    torch.testing.assert_close(torch.cat([fitted.encode(part) for part in X.split(7)]), whole)
    torch.testing.assert_close(fitted.encode(X[3:4]), whole[3:4])  # one row: batch statistics would not exist


def test_predictions_are_those_of_the_module_in_eval_mode(fitted):
    code = fitted.encode(X)
    fitted.model.eval()
    wanted = fitted.model.encoder(X).chunk(2, -1)[0]
    torch.testing.assert_close(code, wanted)
    assert not fitted.model.training
    fitted.encode(X)
    assert not fitted.model.training  # left as found


def test_evidence_of_the_fit_is_that_of_the_network_in_eval_mode(fitted):
    """log p(x) = log N(x; b, W W' + I): by importance sampling with the eval-mode guide as proposal."""
    W, b = fitted.model.decoder.weight.detach(), fitted.model.decoder.bias.detach()
    exact = dist.MultivariateNormal(b, W @ W.T + torch.eye(5)).log_prob(X)
    table = evidence_table(fitted.pair(X), "importance", 4000)
    difference = (torch.tensor(table.log_evidence.to_numpy()) - exact).mean().item()
    assert abs(difference) < 4 * math.sqrt((table.standard_error**2).sum()) / len(X)


def test_training_uses_batch_statistics_and_moves_the_running_ones():
    torch.manual_seed(0)
    model = Modern()
    before = buffers(model)
    pyrolvm.fit(model, X, num_steps=3, batch_size=20, **QUIET)
    norm = model.encoder[1]
    assert norm.num_batches_tracked == before["encoder.1.num_batches_tracked"] + 3  # trial runs leave no trace
    assert not torch.equal(norm.running_mean, before["encoder.1.running_mean"])


def test_modules_that_the_user_froze_in_eval_mode_stay_there():
    torch.manual_seed(0)
    model = Modern()
    model.encoder[1].eval()
    before = buffers(model)
    pyrolvm.fit(model, X, num_steps=3, batch_size=20, **QUIET)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_held_out_rows_leave_no_trace_in_the_fit():
    fits = []
    for scale in (1.0, 30.0):
        torch.manual_seed(0)
        held_out = scale * X[:10]
        options = {"num_steps": 20, "batch_size": 20, "validation": held_out, "validate_every": 5}
        fits.append(pyrolvm.fit(Modern(), X, **options, **QUIET))
    for first, second in zip(*(f.program.tensors().values() for f in fits), strict=True):
        assert torch.equal(first, second)


def test_networks_that_functions_register_predict_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * torch.ones(5), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with data_plate(x):
            pyro.sample("z", dist.Normal(net(x).squeeze(-1), 0.5))

    fitted = pyrolvm.fit(model, X, guide=guide, num_steps=5, batch_size=20, **QUIET)
    before = buffers(net)
    assert torch.equal(fitted.encode(X, seed=0), fitted.encode(X, seed=1))
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
    assert net.training


def test_saved_and_loaded_it_predicts_the_same(fitted, tmp_path):
    again = pyrolvm.load(fitted.save(tmp_path / "run"), model=Modern())
    torch.testing.assert_close(again.encode(X), fitted.encode(X))
    assert torch.equal(again.model.encoder[1].running_var, fitted.model.encoder[1].running_var)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_engines_agree_on_it(engine):
    """Dropout's draws and running statistics in the compiled loop are those of eager steps."""
    torch.manual_seed(0)
    options = {"num_steps": 30, "batch_size": 20, "progress": False, "learning_rate": 0.01}
    fitted = pyrolvm.fit(Modern(), X, engine=engine, **options)
    torch.manual_seed(0)
    eager = pyrolvm.fit(Modern(), X, engine="eager", **options)
    wanted = torch.tensor(eager.history["elbo"].to_numpy())
    torch.testing.assert_close(torch.tensor(fitted.history["elbo"].to_numpy()), wanted, rtol=1e-4, atol=1e-4)
    # not the running mean: it follows the bias before it, whose gradient is rounding alone
    running = [f.model.encoder[1].running_var for f in (fitted, eager)]
    torch.testing.assert_close(*running, rtol=1e-4, atol=1e-4)
