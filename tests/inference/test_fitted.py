"""What a fitted pair says: against closed forms, for any number of rows, in chunks."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean, LocalNormal
from pyro.infer.autoguide import AutoMultivariateNormal

import pyrolvm
from pyrolvm import PPCA, VAE, SettingError, data_plate
from pyrolvm.inference.posterior.evidence import StreamingLogMeanExp

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)) @ torch.randn(
    5, 5, generator=torch.Generator().manual_seed(2)
)
QUIET = {"progress": False, "engine": "eager"}


@pytest.fixture(scope="module")
def ppca():
    model = PPCA.closed_form(X, 2, guide="full")
    return pyrolvm.fit(model, X, num_steps=1, learning_rate=1e-12, **QUIET)


def test_encode_reconstruct_and_posterior_are_the_exact_ones(ppca):
    mean, scale_tril = ppca.model.exact_posterior(X)
    torch.testing.assert_close(ppca.encode(X), mean.detach(), atol=1e-4, rtol=1e-4)
    expected = mean @ ppca.model.loadings.T + ppca.model.offset
    torch.testing.assert_close(ppca.reconstruct(X), expected.detach(), atol=1e-4, rtol=1e-4)
    z = ppca.posterior(X, 4000)["z"]
    assert z.shape == (4000, 40, 2)
    error = scale_tril.diagonal().max().item() / math.sqrt(4000)
    assert (z.mean(0) - mean).abs().max() < 5 * error
    covariance = (scale_tril @ scale_tril.T).detach()
    torch.testing.assert_close(torch.cov((z - mean).reshape(-1, 2).T), covariance, atol=0.01, rtol=0.02)


def test_samples_have_the_marginal_moments(ppca):
    x = ppca.sample(20_000)
    assert x.shape == (20_000, 5)
    W, sigma = ppca.model.loadings.detach(), ppca.model.noise_scale.item()
    covariance = W @ W.T + sigma**2 * torch.eye(5)
    torch.testing.assert_close(torch.cov(x.T), covariance, atol=0.05 * covariance.max().item(), rtol=0.05)
    means = ppca.sample(20_000, mean=True)
    torch.testing.assert_close(torch.cov(means.T), W @ W.T, atol=0.05 * covariance.max().item(), rtol=0.05)


@pytest.mark.parametrize("method", ["importance", "iwae", "prior"])
def test_estimates_of_the_evidence_agree_with_the_exact_value(ppca, method):
    exact = ppca.log_evidence(X, "exact")
    found = ppca.log_evidence(X, method, num_samples=20_000 if method == "prior" else 50)
    assert found.shape == (40,)
    # with the exact posterior as guide every weight is log p(x): no Monte Carlo error at all
    torch.testing.assert_close(found.float(), exact, atol=0.3 if method == "prior" else 1e-3, rtol=0)


def test_estimates_of_the_evidence_with_a_wrong_guide_rise_with_the_draws():
    program = LocalNormal(shift=0.7)
    x = torch.linspace(-2, 2, 300)
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, num_steps=1, learning_rate=1e-12, **QUIET)
    exact = LocalNormal.log_evidence(x).mean().item()
    levels = [
        fitted.log_evidence(x, "iwae", num_samples=500, num_particles=k).mean().item()
        for k in (1, 5, 50, 500)
    ]
    assert levels == sorted(levels)
    assert levels[-1] == pytest.approx(exact, abs=0.02)
    assert levels[0] == pytest.approx(exact - 0.5 * (0.7**2 * 2 + 1 - math.log(2)), abs=0.1)


def test_the_streaming_mean_is_the_whole_mean_with_its_error():
    log_weight = torch.randn(1000, 7, dtype=torch.float64)
    stream = StreamingLogMeanExp.empty(log_weight)
    for part in log_weight.split([1, 99, 400, 500]):
        stream.add(part)
    torch.testing.assert_close(stream.value, log_weight.logsumexp(0) - math.log(1000))
    weight = log_weight.exp()
    torch.testing.assert_close(stream.effective_sample_size, weight.sum(0) ** 2 / (weight**2).sum(0))
    relative = weight.std(0) / weight.mean(0) / math.sqrt(1000)
    torch.testing.assert_close(stream.standard_error, relative)


def test_chunks_change_nothing_that_is_not_random(ppca, monkeypatch):
    import pyrolvm.inference.program.pair as module

    whole = ppca.encode(X), ppca.reconstruct(X), ppca.log_evidence(X, "exact")
    shapes = {k: v.shape for k, v in ppca.posterior(X, 6).items()}
    monkeypatch.setattr(module, "BUDGET", 7 * 5)
    torch.testing.assert_close(ppca.encode(X), whole[0])
    torch.testing.assert_close(ppca.reconstruct(X), whole[1])
    torch.testing.assert_close(ppca.log_evidence(X, "exact"), whole[2])
    assert {k: v.shape for k, v in ppca.posterior(X, 6).items()} == shapes
    draws = ppca.posterior(X, 3)["z"]
    assert not torch.equal(draws[:, 0], draws[:, 7])


def test_chunks_of_one_draw_share_the_global_latent(monkeypatch):
    import pyrolvm.inference.program.pair as module

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(m, 1e-4))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        m = pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
        with data_plate(x):
            pyro.sample("z", dist.Normal(m, 1e-4))

    x = torch.zeros(20)
    fitted = pyrolvm.fit(model, x, guide=guide, num_steps=1, **QUIET)
    for vectorized in (True, False):
        monkeypatch.setattr(module, "BUDGET", 3 * 8)
        fitted._vectorized = vectorized
        draws = fitted.posterior(x, 8)
        assert draws["m"].shape == (8,)
        assert draws["z"].shape == (8, 20)
        assert (draws["z"] - draws["m"][:, None]).abs().max() < 1e-3
        assert draws["m"].std() > 0.1


def test_one_row_and_many_rows_and_no_stray_dimensions():
    vae = VAE(5, 2, "gaussian", hidden=(8,))
    fitted = pyrolvm.fit(vae, X, num_steps=2, batch_size=8, **QUIET)
    for rows in (1, 3, 97):
        x = X.repeat(3, 1)[:rows]
        assert fitted.encode(x).shape == (rows, 2)
        assert fitted.reconstruct(x).shape == (rows, 5)
        assert fitted.posterior(x, 4)["z"].shape == (4, rows, 2)
        assert fitted.predict(x, 4)["x"].shape == (4, rows, 5)
        assert fitted.log_evidence(x, num_samples=3).shape == (rows,)
    assert fitted.sample(1).shape == (1, 5)


def test_loops_take_over_where_a_network_knows_no_further_dimension():
    from torch import nn

    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, z):
            return self.conv(z.reshape(len(z), 1, 2, 2)).reshape(len(z), 4)

    net = Images()

    def model(x):
        pyro.module("net", net)
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, pyro.param("scale", torch.ones(4))).to_event(1))

    fitted = pyrolvm.fit(model, X[:, :4], guide=guide, num_steps=2, **QUIET)
    assert not fitted.vectorized
    assert fitted.posterior(X[:, :4], 3)["z"].shape == (3, 40, 4)
    vae = VAE(16, 2, "gaussian", encoder="conv", decoder="conv", image_shape=(1, 4, 4))
    shipped = pyrolvm.fit(vae, torch.randn(20, 16), num_steps=1, **QUIET)
    assert shipped.vectorized


def test_looped_and_vectorised_draws_have_the_same_law(ppca):
    values = []
    for vectorized in (True, False):
        ppca._vectorized = vectorized
        values.append(ppca.draws(X[:10], 300, seed=1))
    ppca._vectorized = None
    for name in ("log_guide", "log_prior", "log_likelihood"):
        a, b = (getattr(v, name) for v in values)
        assert a.shape == b.shape == (300, 10)
        error = ((a.var(0) + b.var(0)) / 300).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 4.5 * error).all(), name


def test_draws_with_a_global_latent_are_posterior_predictive():
    """log E_q(m)[N(x; m, 1)] = log N(x; loc, 1 + scale^2)."""
    program, x = GlobalMean(), torch.linspace(-1, 1, 20)
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, num_steps=1, learning_rate=1e-12, **QUIET)
    found = fitted.log_evidence(x, num_samples=20_000)
    torch.testing.assert_close(found.float(), dist.Normal(0.0, math.sqrt(2)).log_prob(x), atol=0.03, rtol=0)


def test_a_guide_that_is_joint_over_the_data_has_no_evidence_per_datum():
    def model(x):
        with pyro.plate("rows", 12):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.zeros(12)
    fitted = pyrolvm.fit(model, x, guide=AutoMultivariateNormal, num_steps=2, **QUIET)
    with pytest.raises(SettingError, match="draws the latents of all data at once"):
        fitted.log_evidence(x)
    assert fitted.log_evidence(x, "prior", 10).shape == (12,)


def test_discrete_latents_are_encoded_as_probabilities():
    def model(x):
        with data_plate(x):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("x", dist.Normal(k.float(), 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            logits = pyro.param("logits", torch.zeros(3)) + x.unsqueeze(-1)
            pyro.sample("k", dist.Categorical(logits=logits))

    fitted = pyrolvm.fit(model, torch.randn(12), guide=guide, num_steps=2, **QUIET)
    code = fitted.encode(torch.randn(5))
    assert code.shape == (5, 3)
    torch.testing.assert_close(code.sum(1), torch.ones(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.log_evidence(X, "magic"), "choose from exact, importance, iwae, prior"),
        (lambda f: f.log_evidence(X, num_samples=0), "positive whole number"),
        (lambda f: f.log_evidence(X, "iwae", 10, num_particles=3), "multiple of num_particles"),
        (lambda f: f.posterior(X, 0), "positive whole number"),
        (lambda f: f.sample(2.5), "positive whole number"),
    ],
)
def test_settings_that_cannot_be_are_refused(ppca, call, message):
    with pytest.raises(SettingError, match=message):
        call(ppca)


def test_exact_evidence_needs_a_closed_form():
    fitted = pyrolvm.fit(VAE(5, 2, "gaussian", hidden=(4,)), X, num_steps=1, **QUIET)
    with pytest.raises(SettingError, match="VAE has no exact log p"):
        fitted.log_evidence(X, "exact")


def test_wrong_columns_are_refused(ppca):
    with pytest.raises(pyrolvm.DataError, match=r"\[rows, 5\] but got \[40, 3\]"):
        ppca.encode(X[:, :3])
