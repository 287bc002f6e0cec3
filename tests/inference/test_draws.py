"""Draws row by row and as a whole: shared latents, their densities, and where the rows stand."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrolvm
import pyrolvm.inference.program.pair as fitted_module
from pyrolvm import data_plate

X = torch.randn(20, generator=torch.Generator().manual_seed(0))
STILL = {"progress": False, "engine": "eager", "num_steps": 1, "learning_rate": 1e-12}


def two_levels(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 3):
        pyro.sample("w", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(m, 1e-4))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    m = pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 0.5))
    with pyro.plate("group", 3):
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with data_plate(x):
        pyro.sample("z", dist.Normal(m, 1e-4))


@pytest.fixture
def fitted():
    return pyrolvm.fit(two_levels, X, guide=guide, **STILL)


@pytest.mark.parametrize("vectorized", [True, False])
def test_densities_outside_the_plate_are_told_apart(fitted, vectorized, monkeypatch):
    monkeypatch.setattr(fitted_module, "BUDGET", 7 * 8)
    fitted._vectorized = vectorized
    draws = fitted.draws(X, 8)
    m, w = draws.values["m"], draws.values["w"]
    assert w.shape == (8, 3, 2)
    log_p = dist.Normal(0.0, 1.0).log_prob(m) + dist.Normal(0.0, 2.0).log_prob(w).sum((1, 2))
    log_q = dist.Normal(0.2, 0.5).log_prob(m) + dist.Normal(0.0, 1.0).log_prob(w).sum((1, 2))
    torch.testing.assert_close(draws.global_log_prior, log_p)
    torch.testing.assert_close(draws.global_log_guide, log_q)
    torch.testing.assert_close(draws.log_likelihood, dist.Normal(draws.values["z"], 1.0).log_prob(X))


def test_a_program_without_shared_latents_has_nothing_outside():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def local(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, pyro.param("scale", torch.tensor(1.0))))

    draws = pyrolvm.fit(model, X, guide=local, **STILL).draws(X, 4)
    assert torch.equal(draws.global_log_prior, torch.zeros(4))
    assert torch.equal(draws.global_log_guide, torch.zeros(4))
    z = draws.values["z"]
    weight = (
        dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(X) - dist.Normal(X, 1.0).log_prob(z)
    )
    torch.testing.assert_close(draws.log_weight, weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vectorized", [True, False])
def test_chunks_of_one_prior_draw_share_the_global_latent(fitted, vectorized, monkeypatch):
    monkeypatch.setattr(fitted_module, "BUDGET", 3 * 8)
    fitted._vectorized = vectorized
    draws = fitted.draws(X, 8, prior=True)
    assert draws.values["z"].shape == draws.predictive["x"].shape == (8, 20)
    assert (draws.values["z"] - draws.values["m"][:, None]).abs().max() < 1e-3
    assert draws.values["m"].std() > 0.1


def test_rows_come_first_and_are_joined_when_a_plate_stands_left_of_theirs(monkeypatch):
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("item", 2):  # its dimension is left of the rows'
                u = pyro.sample("u", dist.Normal(z, 1e-4))
            pyro.sample("x", dist.Normal(z + u.sum(0), 1.0), obs=x)

    def local(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(10 * x, pyro.param("scale", torch.tensor(1e-4))))
            with pyro.plate("item", 2):
                pyro.sample("u", dist.Normal(z, 1e-4))

    monkeypatch.setattr(fitted_module, "BUDGET", 3 * 4)
    fitted = pyrolvm.fit(model, X, guide=local, **STILL)
    fitted._vectorized = False  # summing over dim 0 would meet the draws
    u = fitted.draws(X, 4).values["u"]
    assert u.shape == (4, 20, 2)
    assert (u - 10 * X[:, None]).abs().max() < 1e-2


def test_chunks_are_the_parts_of_the_whole(fitted, monkeypatch):
    monkeypatch.setattr(fitted_module, "BUDGET", 6 * 8)
    parts = list(fitted.draw_chunks(X, 8, seed=2))
    assert len(parts) > 1
    whole = fitted.draws(X, 8, seed=2)
    assert torch.equal(torch.cat([p.values["z"] for p in parts], 1), whole.values["z"])
    assert all(torch.equal(p.values["m"], whole.values["m"]) for p in parts)


def test_programs_with_shared_latents_are_drawn_at_once_also_from_a_few_rows_of_many():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    fitted = pyrolvm.fit(pyrolvm.BayesianFactorAnalysis(5, 2), x, num_steps=2, progress=False, engine="eager")
    assert fitted.vectorized


def test_prior_and_posterior_share_no_noise():
    """With q(z | x) = p(z) the draws of both would be the same numbers."""

    def model(x):
        with pyrolvm.data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyrolvm.data_plate(x):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    x = torch.zeros(50)
    fitted = pyrolvm.fit(
        model, x, guide=guide, num_steps=1, learning_rate=1e-12, progress=False, engine="eager"
    )
    prior, posterior = (fitted.draws(x, 40, prior=p).values["z"].flatten() for p in (True, False))
    assert torch.corrcoef(torch.stack([prior, posterior]))[0, 1].abs() < 4 / 2000**0.5


def test_corrected_draws_of_shared_latents_weigh_all_rows():
    """The guide of z is exact given m, that of m too wide by three tenths: its precision is 1 + 30 / 2."""
    x = torch.randn(30, generator=torch.Generator().manual_seed(1))
    sd = 16**-0.5

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", x.sum() / 32)
        m = pyro.sample("m", dist.Normal(loc, 1.3 * sd))
        with data_plate(x):
            pyro.sample("z", dist.Normal((x + m) / 2, 0.5**0.5))

    still = {"num_steps": 1, "learning_rate": 1e-12, "progress": False, "engine": "eager"}
    found = pyrolvm.fit(model, x, guide=guide, **still).posterior(x, 2000, corrected=True)
    error = (2 * 2000 * found.effective_share) ** -0.5
    assert found["m"].std().item() / sd == pytest.approx(1, abs=4 * error)
