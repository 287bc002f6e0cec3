"""What the latents carry: against the closed forms of linear models, and decoders that do not listen."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import LocalNormal
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyrolvm
from pyrolvm import PPCA, VAE, BayesianFactorAnalysis, ProgramError, SettingError, data_plate
from pyrolvm.data.simulators import simulate_ppca
from pyrolvm.diagnostics import collapse as module
from pyrolvm.diagnostics.collapse import collapse_report
from pyrolvm.inference.program.pair import Pair

FREEZE = {"num_steps": 1, "learning_rate": 1e-12, "initialise": False, "progress": False, "engine": "eager"}
X = torch.as_tensor(simulate_ppca(1500, 6, 2, noise_scale=1.0, seed=1).values).float()


@pytest.fixture(scope="module")
def ppca():
    return pyrolvm.fit(PPCA.closed_form(X, 2), X, **FREEZE)


@pytest.fixture(scope="module")
def report(ppca):
    return collapse_report(ppca, X)


def information(model):
    """I(x, z) = 1/2 log det (I + W' W / sigma^2) under the model."""
    W, sigma = model.loadings.detach(), model.noise_scale.item()
    return 0.5 * torch.logdet(torch.eye(W.shape[1]) + W.T @ W / sigma**2).item()


def test_kl_of_each_dimension_is_the_closed_form_at_the_maximum_of_the_likelihood(ppca, report):
    # there the aggregated covariance of q is the prior's, so that KL_i = 1/2 log M_ii / sigma^2 on the data
    W, sigma = ppca.model.loadings.detach(), ppca.model.noise_scale.item()
    expected = 0.5 * torch.log((W.T @ W).diagonal() / sigma**2 + 1)
    found = torch.tensor(report.dimensions["kl"].to_numpy())
    torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=0)
    assert found.sum().item() == pytest.approx(information(ppca.model), abs=2e-3)
    assert set(report.dimensions["kl_kind"]) == {"exact"}


def test_information_and_marginal_kl_are_those_of_the_linear_model(ppca, report):
    error = report.standard_error
    assert report.mutual_information == pytest.approx(
        information(ppca.model), abs=4 * error["mutual_information"] + 0.03
    )
    # the aggregated posterior is the prior at the optimum, up to the N components of the mixture
    assert report.marginal_kl == pytest.approx(0.0, abs=4 * error["marginal_kl"] + 0.03)
    assert report.average_kl == report.mutual_information + report.marginal_kl
    assert report.average_kl == pytest.approx(report.dimensions["kl"].sum(), abs=4 * error["average_kl"])
    assert not report.saturated
    assert report.active_units == 2
    assert report.collapsed_share == 0
    assert report.decoder_uses_latents
    assert (
        "2 of 2 latent dimensions are active (the variance of E[z | x] over the data is above 0.01)"
        in report.sentence
    )
    assert "and 0 are collapsed (average KL below 0.01 nats)" in report.sentence


def test_variance_of_the_means_is_the_closed_form(ppca, report):
    means = (X - ppca.model.offset.detach()) @ ppca.model.guide_loadings.detach().T
    variance = means.var(0, correction=0)
    found = torch.tensor(report.dimensions["mean_variance"].to_numpy())
    torch.testing.assert_close(found.float(), variance, atol=1e-4, rtol=1e-4)
    first = torch.tensor(report.dimensions["mean_variance_first"].to_numpy())
    torch.testing.assert_close(first.float(), means[:500].var(0, correction=0), atol=1e-4, rtol=1e-4)


def test_a_shifted_guide_has_its_shift_in_the_marginal_kl():
    # q(z) = N(1, 1) for x ~ N(0, 2) and q = N(x/2 + 1, 1/2): KL(q(z) || p) = 1/2, I = 1/2 log 2
    def model(x):
        LocalNormal().model(x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2 + 1, math.sqrt(0.5)))

    x = math.sqrt(2) * torch.randn(2000, generator=torch.Generator().manual_seed(3))
    report = collapse_report(pyrolvm.fit(model, x, guide=guide, **FREEZE), x)
    error = report.standard_error
    # the data are themselves a sample: their mean moves q(z) by 1/sqrt(N)
    assert report.marginal_kl == pytest.approx(0.5, abs=4 * error["marginal_kl"] + 0.05)
    assert report.mutual_information == pytest.approx(
        0.5 * math.log(2), abs=4 * error["mutual_information"] + 0.02
    )


class Deaf(nn.Module):
    """A decoder that ignores z."""

    def __init__(self, data_dim):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(data_dim))

    def forward(self, z):
        return self.bias.expand(*z.shape[:-1], -1)


def test_a_decoder_that_ignores_z_is_said_to():
    torch.manual_seed(0)
    vae = VAE(6, 3, "gaussian", encoder="linear", decoder=Deaf(6))
    fitted = pyrolvm.fit(vae, X, **FREEZE)
    report = collapse_report(fitted, X[:300])
    assert report.active_units > 0  # the encoder still moves: only the exchange finds it out
    assert report.shuffle_loss == 0
    assert not report.decoder_uses_latents
    assert "does not use the latents" in report.sentence


def test_noise_of_the_draws_is_no_variance_of_the_means():
    """The mean of z given the layer above moves with its draw by N(0, 1), but not with the datum."""

    def model(x):
        with data_plate(x):
            above = pyro.sample("above", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Normal(above, 1.0))
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            above = pyro.sample("above", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("z", dist.Normal(above, 1.0))

    x = torch.randn(600, generator=torch.Generator().manual_seed(0))
    found = collapse_report(pyrolvm.fit(model, x, guide=guide, **FREEZE), x).dimensions["mean_variance"]
    # two means of ten draws each: their covariance over 600 rows has error 0.1 / sqrt(600)
    assert found[("z", 0)] == pytest.approx(0, abs=4 * 0.1 / 600**0.5)


def test_rows_that_a_mask_leaves_out_are_no_data(monkeypatch):
    """The report is that of the other rows, whatever stands in those; in chunks of rows."""
    monkeypatch.setattr(pyrolvm.inference.program.pair, "BUDGET", 20 * 50)
    x = 2**0.5 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    seen = torch.arange(200) % 4 != 0
    x = torch.where(seen, x, torch.tensor(50.0))

    def model(x, seen):
        with data_plate(x), pyro.poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, seen):
        shift = pyro.param("shift", torch.tensor(0.0))
        with data_plate(x), pyro.poutine.mask(mask=seen):
            pyro.sample("z", dist.Normal(shift + x / 2, 0.5**0.5))

    found = collapse_report(pyrolvm.fit(model, (x, seen), guide=guide, **FREEZE), (x, seen))
    q = dist.Normal(x[seen] / 2, 0.5**0.5)
    kl = torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(150), 1.0))
    assert found.num_rows == 150
    assert found.dimensions["kl"].item() == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.average_kl == pytest.approx(kl.mean().item(), abs=4 * found.standard_error["average_kl"])
    assert found.dimensions["mean_variance"].item() == pytest.approx(
        (x[seen] / 2).var(correction=0).item(), abs=0.15
    )
    assert found.marginal_kl < 0.1


def test_dimensions_at_the_prior_are_collapsed():
    class Half(nn.Module):
        def forward(self, x):
            loc = torch.stack([x[..., 0], 0 * x[..., 0]], -1)
            return loc, torch.full_like(loc, 1.0)

    fitted = pyrolvm.fit(VAE(6, 2, "gaussian", encoder=Half(), decoder="linear"), X, **FREEZE)
    report = collapse_report(fitted, X[:400])
    assert list(report.dimensions["active"]) == [True, False]
    assert list(report.dimensions["active_first"]) == [True, False]
    assert list(report.dimensions["collapsed"]) == [False, True]
    assert report.dimensions["mean_variance"].iloc[1] == 0
    assert "z[1]" in report.sentence


def test_information_cannot_exceed_the_logarithm_of_the_data_and_says_so():
    class Sharp(nn.Module):
        def forward(self, x):
            return x[..., :2], torch.full_like(x[..., :2], 1e-3)

    fitted = pyrolvm.fit(VAE(6, 2, "gaussian", encoder=Sharp(), decoder="linear"), X, **FREEZE)
    report = collapse_report(fitted, X[:100])
    assert report.mutual_information == pytest.approx(math.log(100), abs=1e-6)
    assert report.saturated
    assert "log N = 4.61" in report.sentence


def test_chunks_and_loops_change_nothing_but_the_draws(ppca, report, monkeypatch):
    whole = Pair.chunks
    monkeypatch.setattr(Pair, "chunks", lambda self, per_row=1: whole(self, per_row, 6 * 20 * 64))
    monkeypatch.setattr("pyrolvm.diagnostics.mixture.BUDGET", 5000)
    chunked = collapse_report(ppca, X[:500])
    monkeypatch.undo()
    ppca.program.vectorized = False
    looped = collapse_report(ppca, X[:500])
    ppca.program.vectorized = True
    whole = collapse_report(ppca, X[:500])
    for other in (chunked, looped):
        for name in ("average_kl", "mutual_information", "marginal_kl"):
            error = math.hypot(other.standard_error[name], whole.standard_error[name])
            assert getattr(other, name) == pytest.approx(getattr(whole, name), abs=4 * error)
        assert (other.dimensions["kl"] - whole.dimensions["kl"]).abs().max() < 1e-5


def test_sites_that_depend_on_each_other_run_the_guide_at_the_given_draws():
    # z2 ~ N(0, 1), z1 | z2 ~ N(z2, 1), x | z1 ~ N(z1, 1) with its exact posterior: KL = I(x; z1, z2) at x ~ N(0, 3)
    def model(x):
        with data_plate(x):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            slope = pyro.param("slope", torch.tensor(2 / 3))
            z1 = pyro.sample("z1", dist.Normal(slope * x, math.sqrt(2 / 3)))
            pyro.sample("z2", dist.Normal(z1 / 2, math.sqrt(0.5)))

    x = math.sqrt(3) * torch.randn(600, generator=torch.Generator().manual_seed(4))
    fitted = pyrolvm.fit(model, x, guide=guide, **FREEZE)
    found = collapse_report(fitted, x)
    error = found.standard_error
    assert found.mutual_information == pytest.approx(
        0.5 * math.log(3), abs=4 * error["mutual_information"] + 0.03
    )
    assert found.average_kl == pytest.approx(0.5 * math.log(3), abs=4 * error["average_kl"] + 0.05)
    # z2 is active through z1: E[z2 | x] = x / 3, variance 1/3 over x
    assert found.dimensions["mean_variance"].loc[("z2", 0)] == pytest.approx(x.var().item() / 9, rel=0.15)


def test_guides_of_other_kinds():
    fitted = pyrolvm.fit(LocalNormal().model, X[:50, 0], guide=AutoNormal, **FREEZE)
    report = collapse_report(fitted, X[:50, 0])
    assert set(report.dimensions["kl_kind"]) == {"exact"}
    factors = BayesianFactorAnalysis(6, 2)
    report = collapse_report(pyrolvm.fit(factors, X, **FREEZE), X[:50])
    assert set(report.dimensions["kl_kind"]) == {"marginal"}
    assert list(report.dimensions.index.names) == ["site", "dimension"]


def test_what_cannot_be_reported_is_refused_in_one_line(ppca):
    with pytest.raises(SettingError, match="at least 2"):
        collapse_report(ppca, X[:1])
    with pytest.raises(SettingError, match="num_samples=1"):
        collapse_report(ppca, X[:9], num_samples=1)
    model = PPCA(6, 2)
    marginal = pyrolvm.fit(model.marginal_model, X, guide=lambda x: None, **FREEZE)
    with pytest.raises(ProgramError, match="none in its data plate"):
        collapse_report(marginal, X)
    with pytest.raises(ProgramError, match="enumerated"):
        collapse_report(pyrolvm.fit(pyrolvm.GaussianMixture(6, 2), X, **FREEZE), X)
    assert module.FIRST_ROWS == 500


def test_the_last_row_of_a_chunk_is_exchanged_with_another_one(monkeypatch):
    """z exact and x = z: given the z of another row, log p(x | z) falls by (x - x')^2 / 2 on average, for every row."""
    x = torch.tensor([3.0, -3.0, 3.0])

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, 1e-3))

    fitted = pyrolvm.fit(LocalNormal().model, x, guide=guide, **FREEZE)
    split = Pair.split
    monkeypatch.setattr(Pair, "split", lambda self, size: split(self, 1))
    lost = [collapse_report(fitted, x, seed=s).shuffle_loss for s in range(10)]
    # three rows exchanged in a circle: two of them get one of the other sign, with 6^2 / 2 = 18 nats each
    assert lost == pytest.approx([12.0] * 10, abs=0.05)


def test_kl_of_a_positive_latent_with_an_autoguide_counts_the_jacobian():
    # z ~ LogNormal(0, 1), x | z ~ N(0, 1): q is the LogNormal(m, s) that AutoNormal holds
    def model(x):
        with data_plate(x):
            pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(pyro.param("b", torch.tensor(0.0)), 1.0), obs=x)

    x = torch.zeros(400)
    fitted = pyrolvm.fit(model, x, guide=AutoNormal, **FREEZE)
    [loc] = [value for name, value in fitted.program.parameters.items() if "loc" in name]
    with torch.no_grad():
        loc.fill_(0.5)
    report = collapse_report(fitted, x, 200)
    scale = 0.1  # AutoNormal's own start
    expected = 0.5 * (scale**2 + 0.25 - 1) - math.log(scale)
    assert report.dimensions["kl"].iloc[0] == pytest.approx(expected, abs=0.02)


def test_the_generators_are_left_as_found(ppca):
    before = torch.get_rng_state()
    first = collapse_report(ppca, X[:40])
    assert torch.equal(torch.get_rng_state(), before)
    assert first.mutual_information == collapse_report(ppca, X[:40]).mutual_information


@pytest.mark.parametrize("slope", [1.0, 0.0])
def test_rows_that_stay_together_exchange_their_latents(slope):
    """A plate of a fixed size: nothing can be drawn for other rows, so z of the same rows is given to others."""
    x = X[:60, 0]

    def model(x):
        with pyro.plate("data", 60):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(slope * z, 1.0), obs=x)

    def guide(x):  # the posterior
        variance = pyro.param("variance", torch.tensor(1 / (1 + slope**2)))
        with pyro.plate("data", 60):
            pyro.sample("z", dist.Normal(variance * slope * x, variance.sqrt()))

    found = collapse_report(pyrolvm.fit(model, x, guide=guide, **FREEZE), x, num_samples=400)
    # of rows n and m: E[(x_n - z_m)^2 - (x_n - z_n)^2] / 2 = ((x_n - x_m / 2)^2 - (x_n / 2)^2) / 2, over all m
    pairs = (x[:, None] - x / 2).square() - (x[:, None] / 2).square()
    each = pairs[~torch.eye(60, dtype=torch.bool)].mean().item() / 2 if slope else 0.0
    assert found.shuffle_loss == pytest.approx(each, abs=4 * found.standard_error["shuffle_loss"] + 1e-6)
    assert found.decoder_uses_latents == bool(slope)
