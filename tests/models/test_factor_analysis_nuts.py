"""The guide over loadings, noise and offset against NUTS on the exact marginal posterior.

What a mean-field guide must get wrong is asserted too. Its factors condition on one another: q(b) has the
deviation of b given z, sqrt(psi / N), but once z is integrated out the posterior has that of the mean of
Normal(b, W W' + diag(psi)), sqrt((psi + w^2) / N) (Turner and Sahani 2011, "Two problems with variational
expectation maximisation for time series models": compactness). Their ratio is known, so that a
guide that was narrow for another reason would be noticed.
"""

import warnings

import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from pyro.ops.stats import effective_sample_size, split_gelman_rubin

import pyrolvm
from pyrolvm.models.alignment import align_loadings

GLOBALS = ("loadings", "noise_scale", "offset")
ROWS, COLUMNS = 60, 4
DRAWS, WARMUP = 400, 150


def small_set():
    """Sixty rows of one factor that explains from 80 to 16 percent of the four features."""
    loadings, noise = torch.tensor([1.0, 0.8, -0.7, 0.4]), torch.tensor([0.5, 0.6, 0.7, 0.9])
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(ROWS, 1, generator=generator)
    return (
        z * loadings + noise * torch.randn(ROWS, COLUMNS, generator=generator) + torch.tensor([2, 0, -1, 5])
    )


def marginal_program(analysis):
    """The model's own priors, and log p(x | W, psi, b) in place of z: nine latents for NUTS instead of 69."""

    def program(x):
        shared = poutine.block(analysis.model, hide=["z", "x", "data"])
        sites = poutine.trace(shared).get_trace(None).nodes
        given = {name: sites[name]["value"] for name in GLOBALS}
        pyro.factor("likelihood", analysis.log_marginal_given(x, **given).sum())

    return program


def reference_draws(analysis, x):
    """Draws of the exact posterior, site -> [draws, elements], from a start at the guide's means."""
    torch.manual_seed(0)
    start = init_to_value(values=analysis.posterior_mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing; the shapes are fixed
        kernel = NUTS(marginal_program(analysis), jit_compile=True, init_strategy=start)
        chain = MCMC(kernel, DRAWS, WARMUP, disable_progbar=True)
        chain.run(x)
    assert not chain.diagnostics()["divergences"]["chain 0"]
    return chain.get_samples()


def flat(draws, reference):
    """Sites side by side, [draws, 12], the loadings in the reference's sign."""
    loadings = align_loadings(draws["loadings"], reference).loadings
    return torch.cat([loadings.flatten(1), draws["noise_scale"], draws["offset"]], 1).detach().double()


def fitted_guide(x, factors):
    """The guide, fitted to `x`."""
    torch.manual_seed(0)
    analysis = pyrolvm.BayesianFactorAnalysis(COLUMNS, 1, factors=factors)
    options = {"num_steps": 800, "learning_rate": 0.03, "progress": False, "engine": "eager"}
    falling = {"schedule": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 800)}
    return pyrolvm.fit(analysis, x, **options, **falling)


def moments(draws):
    """Means and deviations per element of draws [S, 12]."""
    return {"mean": draws.mean(0).numpy(), "sd": draws.std(0).numpy()}


@pytest.fixture(scope="module")
def both():
    """Moments of the guide with z sampled (with the reference's beside them), and of the one with z integrated out."""
    x = small_set()
    fitted = fitted_guide(x, "sampled")
    analysis = fitted.model
    reference = analysis.posterior_mean()["loadings"]
    p = flat(reference_draws(analysis, x), reference)
    exact = {f"reference_{k}": v for k, v in moments(p).items()}
    exact["ess"] = effective_sample_size(p.unsqueeze(0), 0, 1).numpy()
    exact["r_hat"] = split_gelman_rubin(p.unsqueeze(0), 0, 1).numpy()
    index = pd.MultiIndex.from_product([GLOBALS, range(COLUMNS)])
    guides = fitted, fitted_guide(x, "integrated")
    return [pd.DataFrame(moments(flat(g.posterior(x, 4000), reference)) | exact, index) for g in guides]


@pytest.fixture
def comparison(both):
    return both[0]


@pytest.fixture
def integrated(both):
    return both[1]


def test_the_reference_converged(comparison):
    assert comparison["r_hat"].max() < 1.05
    assert comparison["ess"].min() > 100


def test_means_agree_with_the_exact_posterior(comparison):
    """In deviations of the posterior: the guide's own bias, found at 0.2, and a standard error of 0.1 at most."""
    off = (comparison["mean"] - comparison["reference_mean"]) / comparison["reference_sd"]
    assert off.abs().max() < 0.4
    assert off.abs().mean() < 0.2


def test_deviations_are_never_wider_and_at_worst_half(comparison):
    ratio = comparison["sd"] / comparison["reference_sd"]
    error = (2 * comparison["ess"]) ** -0.5  # of a deviation, relative
    assert (ratio < 1 + 3 * error).all()
    assert (ratio > 0.4).all()


def test_the_offset_is_too_narrow_by_the_factor_that_mean_field_must_be(comparison):
    loadings, noise = (comparison.loc[name, "reference_mean"] for name in ("loadings", "noise_scale"))
    wanted = noise / (noise**2 + loadings**2) ** 0.5  # 0.46 to 0.9
    offset = comparison.loc["offset"]
    ratio = offset["sd"] / offset["reference_sd"]
    assert ((ratio / wanted - 1).abs() < 4 * (2 * offset["ess"]) ** -0.5).all()
    assert wanted.min() < 0.5
    assert wanted.max() > 0.85


def test_the_posterior_is_wider_once_the_factors_are_integrated_out(comparison, integrated):
    """The offset has the exact deviations; means within a fifth of a deviation; beyond that, the noise of NUTS."""
    off = (integrated["mean"] - integrated["reference_mean"]) / integrated["reference_sd"]
    assert (off.abs() < 0.2 + 3 * integrated["ess"] ** -0.5).all()
    ratio, error = integrated["sd"] / integrated["reference_sd"], (2 * integrated["ess"]) ** -0.5
    assert ((ratio - 1).abs() < 0.1 + 3 * error)["offset"].all()
    assert (ratio < 1 + 3 * error).all()
    assert ratio.mean() > (comparison["sd"] / comparison["reference_sd"]).mean() + 0.1
