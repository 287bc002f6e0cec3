"""Refinement of a guide for each row: closed forms of what it gains, and what it must leave alone."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrolvm
from pyrolvm import PPCA, ProgramError, SettingError, data_plate

X = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
NEW = torch.randn(7, 5, generator=torch.Generator().manual_seed(5))
QUIET = {"progress": False, "engine": "eager"}
FREEZE = {"num_steps": 1, "learning_rate": 1e-12, "initialise": False} | QUIET
STRETCH = 1.5


def stretched():
    """A PPCA whose guide is the best mean-field one, its scales all 1.5 times too large."""
    torch.manual_seed(1)
    model = PPCA(5, 3)
    with torch.no_grad():
        model.loadings.mul_(2)
    model.solve_guide()
    with torch.no_grad():
        model.guide_log_scale.add_(math.log(STRETCH))
    return model


def precision(model):
    W, sigma = model.loadings.detach(), model.noise_scale.item()
    return W.T @ W / sigma**2 + torch.eye(W.shape[1])


AMORTISATION = 3 * ((STRETCH**2 - 1) / 2 - math.log(STRETCH))
"""KL(N(m, (1.5 s)^2) || N(m, s^2)) of three dimensions: what the best of the family regains on every row."""


def test_the_gain_is_the_closed_form_amortisation_gap():
    model = stretched()
    refined = pyrolvm.fit(model, X, **FREEZE).refine(X, **QUIET)
    gaps, errors = refined.table["gap"], refined.table["standard_error"]
    assert refined.family == "mean_field"
    assert refined.of_guide
    assert gaps.mean() == pytest.approx(AMORTISATION, abs=4 * errors.mean() / len(X) ** 0.5 + 0.005)
    assert (abs(gaps - AMORTISATION) < 5 * errors).all()
    assert "amortisation gap" in refined.sentence
    best = precision(model).diagonal().rsqrt()
    scale = refined.program.parameters["rows.z_log_scale"].detach().exp()
    assert ((scale / best).log().mean(0).abs() < 0.02).all()


def test_what_is_left_of_the_full_family_is_nothing():
    model = stretched()
    fitted = pyrolvm.fit(model, X, **FREEZE)
    refined = fitted.refine(X, family="full", **QUIET)
    left = fitted.log_evidence(X, "exact") - refined.log_evidence(
        X, "iwae", 500, num_particles=1, progress=False
    )
    assert left.mean().item() == pytest.approx(0, abs=0.01)
    W, sigma = model.loadings.detach(), model.noise_scale.item()
    mean = torch.linalg.solve(precision(model), ((X - model.offset.detach()) @ W / sigma**2).T).T
    errors = (refined.encode(X) - mean) * precision(model).diagonal().sqrt()
    assert errors.square().mean().sqrt() < 0.06


def test_the_fit_is_left_as_it_was_and_the_seed_decides():
    fitted = pyrolvm.fit(stretched(), X, **FREEZE)
    before = {n: t.detach().clone() for n, t in fitted.program.tensors().items()}
    codes = fitted.encode(NEW)
    options = {"num_steps": 20} | QUIET
    first, again, other = (fitted.refine(NEW, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(first.encode(NEW), again.encode(NEW))
    assert not torch.equal(first.encode(NEW), other.encode(NEW))
    assert torch.equal(fitted.encode(NEW), codes)
    assert all(torch.equal(t, before[n]) for n, t in fitted.program.tensors().items())
    assert all(p.requires_grad for p in fitted.model.parameters())
    assert first.posterior(NEW, 4)["z"].shape == (4, 7, 3)
    with pytest.raises(SettingError, match=r"not saved: save the fit"):
        first.save("nowhere")
    with pytest.raises(pyrolvm.DataError, match=r"none for new ones"):
        first.encode(X)


def test_a_climb_that_fails_leaves_the_start():
    model = stretched()
    with torch.no_grad():
        model.guide_log_scale.sub_(math.log(STRETCH))  # the best of the family already
    refined = pyrolvm.fit(model, X, **FREEZE).refine(
        X, num_steps=2, learning_rate=5.0, num_samples=1, **QUIET
    )
    assert (refined.table["gap"] > -4 * refined.table["standard_error"] - 1e-9).all()


def shared_mean(x=None):
    """m ~ N(0, 100), z_n ~ N(m, 1), x_n ~ N(z_n, 1)."""
    m = pyro.sample("m", dist.Normal(0.0, 10.0))
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("guide", ["AutoNormal", "per_datum"])
def test_new_rows_of_a_guide_without_an_encoder(guide, tmp_path):
    """q(z | x) of new rows is N((x + E m) / 2, 1/2) while the fitted q(m) is held."""
    x, new = X.reshape(-1) + 3, torch.tensor([0.0, 6.0, 3.0])
    fitted = pyrolvm.fit(shared_mean, x, guide=guide, num_steps=400, learning_rate=0.05, **QUIET)
    refined = fitted.refine(new, **QUIET)
    m = fitted.posterior(x, 2000)["m"].mean()
    assert torch.allclose(refined.encode(new), (new + m) / 2, atol=0.1)
    assert refined.posterior(new, 4000)["z"].var(0).mean().item() == pytest.approx(0.5, rel=0.1)
    assert not refined.of_guide
    assert torch.allclose(refined.posterior(new, 2000)["m"].mean(), m, atol=0.05)
    own = fitted.refine(x, num_steps=5, **QUIET)
    assert own.trained
    if guide == "per_datum":
        assert own.table["gap"].abs().max() < 1


def test_what_cannot_be_refined_is_refused():
    with pytest.raises(ProgramError, match="has no continuous latents in a plate over its rows"):
        pyrolvm.fit(pyrolvm.GaussianMixture(5, 2), X, num_steps=2, **QUIET).refine(X, **QUIET)
    joint = pyrolvm.fit(shared_mean, X[:, 0], guide="AutoMultivariateNormal", num_steps=2, **QUIET)
    with pytest.raises(ProgramError, match=r"latents of all data at once"):
        joint.refine(X[:, 0], **QUIET)
    fitted = pyrolvm.fit(stretched(), X, **FREEZE)
    with pytest.raises(SettingError, match=r"family='banana'"):
        fitted.refine(X, family="banana")
    with pytest.raises(SettingError, match=r"num_steps"):
        fitted.refine(X, num_steps=0)
