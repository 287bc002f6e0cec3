"""Gradient noise: moments against closed forms, coverage of their intervals, and whose parameters are whose."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import LocalNormal

import pyrolvm
from pyrolvm import PPCA, VAE, SettingError
from pyrolvm.diagnostics import gradient_draws, gradient_variance
from pyrolvm.diagnostics.gradients import _moments

X = torch.linspace(-2.0, 2.5, 40)
QUIET = {"progress": False}


def test_the_moments_of_a_closed_form():
    """ELBO of LocalNormal in `shift` per datum: mean gradient 2 * 0.3, variance 4 / N, from the noise of z alone."""
    program = LocalNormal()
    table = gradient_variance(
        program.model, "trace", X, guide=program.guide, num_samples=800, dtype=torch.float64, **QUIET
    ).set_index("group")
    # -ELBO has d/dshift = 2 z - x with z = x / 2 + 0.3 + noise, d/doffset = z - x
    guide, model = table.loc["guide"], table.loc["model"]
    assert guide["norm"] == pytest.approx(0.6, abs=4 * math.sqrt(4 / 40 / 800))
    assert guide["variance_low"] < 4 / 40 < guide["variance_high"]
    assert guide["snr_low"] < 0.6 / math.sqrt(4 / 40) < guide["snr_high"]
    assert model["variance_low"] < 1 / 40 < model["variance_high"]
    assert table.loc["all", "num_parameters"] == 2
    assert (table["objective"] == "trace").all()
    exact = LocalNormal.log_evidence(X).mean() - (0.3**2 + 0.5 - 0.5 * math.log(2))
    assert table["bound"].iloc[0] == pytest.approx(exact.item(), abs=0.02)


def test_the_intervals_cover_nineteen_of_twenty_times():
    """Draws with mean m and covariance s^2 I of 5 parameters: variance 5 s^2, snr |m| / (s sqrt 5)."""
    m = torch.tensor([0.5, -0.2, 0.0, 0.1, 0.3], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    variance, snr, repeats = 5 * 0.7**2, m.norm().item() / (0.7 * math.sqrt(5)), 400
    hits = [0, 0]
    for _ in range(repeats):
        draws = m + 0.7 * torch.randn(60, 5, generator=generator, dtype=torch.float64)
        found = _moments(draws)
        hits[0] += found["variance_low"] < variance < found["variance_high"]
        hits[1] += found["snr_low"] < snr < found["snr_high"]
    error = math.sqrt(0.05 * 0.95 / repeats)
    for hit in hits:
        assert abs(hit / repeats - 0.95) < 4 * error


def test_no_noise_is_an_infinite_ratio():
    found = _moments(torch.ones(5, 3, dtype=torch.float64))
    assert (found["variance"], found["snr"]) == (0.0, math.inf)


def test_parameters_are_grouped_by_whose_densities_depend_on_them():
    vae = VAE(4, 2, "gaussian", hidden=(8,))
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    table = gradient_variance(vae, "iwae", x, num_samples=3, **QUIET).set_index("group")
    encoder = sum(p.numel() for p in vae.encoder.parameters())
    total = sum(p.numel() for p in vae.parameters())
    assert table.loc["guide", "num_parameters"] == encoder
    assert table.loc["model", "num_parameters"] == total - encoder
    assert table.loc["all", "num_parameters"] == total
    names = [n for n, _ in vae.named_parameters()]
    mine = {"first": names[:1]}
    assert list(gradient_variance(vae, "trace", x, groups=mine, num_samples=3, **QUIET)["group"]) == ["first"]
    with pytest.raises(SettingError, match="'W', which is no parameter"):
        gradient_variance(vae, "trace", x, groups={"a": ["W"]}, num_samples=3, **QUIET)


class WithBaseline(pyrolvm.Objective):
    """An objective with a module of its own."""

    def __init__(self):
        self.baseline = torch.nn.LazyLinear(1)

    def estimate(self, pair, controls):
        model, guide = pair.draw()
        density = pair.densities(model, guide)
        cost = density.log_weight.detach()
        expected = self.baseline(pair.batch.args[0][:, None])[:, 0]
        score = (cost - expected.detach()) * density.log_guide
        bound = (density.scale * density.log_weight).sum()
        surrogate = -(density.scale * (density.log_weight + score)).sum()
        return pyrolvm.inference.objectives.Estimate(
            bound.detach(), surrogate, {}, own_loss=(cost - expected).square().sum()
        )


def coin(x):
    with pyrolvm.data_plate(x):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=x)


def coin_guide(x):
    slope = pyro.param("slope", torch.tensor(0.0))
    with pyrolvm.data_plate(x):
        pyro.sample("z", dist.Bernoulli(logits=slope * x))


def test_estimators_of_a_discrete_program_are_compared_without_their_own_modules():
    fitted = pyrolvm.fit(coin, X, guide=coin_guide, num_steps=5, engine="eager", **QUIET)
    before = {k: v.clone() for k, v in fitted.program.tensors().items()}
    several = {"downstream": "tracegraph", "baseline": WithBaseline(), "none": "trace"}
    table = gradient_variance(fitted, several, X, num_samples=30, **QUIET)
    assert list(table["objective"].unique()) == list(several)
    assert (table["num_parameters"] == 1).all()
    assert (table["variance"] > 0).all()
    assert fitted.program.tensors().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in fitted.program.tensors().items())


def test_a_fit_is_taken_at_its_parameters_and_generators_are_left():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    model = PPCA(3, 1)
    fitted = pyrolvm.fit(model, x, num_steps=400, learning_rate=0.05, engine="eager", **QUIET)
    state = torch.get_rng_state()
    table = gradient_variance(fitted, "trace", x, num_samples=40, **QUIET)
    again = gradient_variance(model, "trace", x, num_samples=40, **QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    assert table["variance"].tolist() == pytest.approx(again["variance"].tolist())
    fresh = gradient_variance(PPCA(3, 1), "trace", x, num_samples=40, **QUIET)
    assert table["norm"].max() < fresh["norm"].max() / 2
    draws = gradient_draws(fitted, "trace", x, num_samples=3, **QUIET)
    assert {k: v.shape[1:] for k, v in draws.items()} == {n: p.shape for n, p in model.named_parameters()}


def test_too_few_draws_are_refused():
    with pytest.raises(SettingError, match="num_samples must be a whole number of at least 3"):
        gradient_variance(LocalNormal().model, "trace", X, guide=LocalNormal().guide, num_samples=2, **QUIET)


def test_gradients_of_a_fit_are_per_datum_of_the_data_that_are_passed():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    fitted = pyrolvm.fit(PPCA(3, 1), x, num_steps=5, engine="eager", **QUIET)
    tables = [
        gradient_variance(fitted, "meanfield", rows, num_samples=3, **QUIET) for rows in (x, x.repeat(20, 1))
    ]
    assert tables[0]["bound"][0] == pytest.approx(tables[1]["bound"][0], rel=0.1)
