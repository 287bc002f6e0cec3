"""Posterior predictive checks: p-values against closed forms, models that do and do not make such data."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean
from scipy.stats import norm

import pyrolvm
from pyrolvm import PPCA, SettingError, data_plate
from pyrolvm.diagnostics.predictive import predictive_check

FREEZE = {"num_steps": 1, "learning_rate": 1e-12, "initialise": False, "progress": False, "engine": "eager"}
X = torch.randn(80, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(
    4, 4, generator=torch.Generator().manual_seed(1)
)


@pytest.fixture(scope="module")
def ppca():
    return pyrolvm.fit(PPCA.closed_form(X, 2), X, **FREEZE)


@pytest.mark.parametrize("latents", ["same", "new"])
def test_data_of_the_model_pass(ppca, latents):
    x = ppca.sample(80, seed=5)
    found = predictive_check(ppca, x, num_samples=100, latents=latents)
    assert found.passed
    assert "makes data like these" in found.sentence
    assert found.replicates.shape == (100, len(found.table))


def test_what_the_model_cannot_make_is_named(ppca):
    x = X.clone()
    x[0, 0] = 60.0
    statistics = {"largest": lambda x: x.max(), "mean": lambda x: x.mean()}
    found = predictive_check(ppca, x, statistics, num_samples=100, latents="new")
    assert list(found.table["extreme"]) == [True, False]
    assert not found.passed
    assert "largest larger than the model's (60" in found.sentence


def test_what_every_replicate_has_and_the_data_have_not_is_infinitely_far(ppca):
    x = X.clone()
    x[:8] = 0.0
    zeros = {"share of zeros": lambda x: (x == 0).float().mean(), "rows": lambda x: torch.tensor(len(x))}
    table = predictive_check(ppca, x, zeros, num_samples=20, latents="new").table
    assert list(table["z"]) == [math.inf, 0.0]


def test_the_p_value_is_the_closed_form():
    # m | x ~ N(a, 1 / (n + 1)): the mean of n new data is N(a, 1 / (n + 1) + 1 / n)
    x = torch.randn(20, generator=torch.Generator().manual_seed(2)) + 1.0
    program = GlobalMean()
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, **FREEZE)
    with torch.no_grad():
        fitted.program.parameters["loc"].fill_(x.sum() / 21)
        fitted.program.parameters["scale"].fill_(-0.5 * math.log(21))
    expected = norm.sf(x.mean().item(), x.sum().item() / 21, math.sqrt(1 / 21 + 1 / 20))
    for latents, count in (("same", 4000), ("new", 1000)):
        found = predictive_check(fitted, x, {"mean": torch.mean}, count, latents=latents)
        error = math.sqrt(expected * (1 - expected) / count)
        assert found.table.loc["mean", "p_value"] == pytest.approx(expected, abs=4 * error)


def test_ties_count_half():
    def model(x):
        with data_plate(x):
            pyro.sample("x", dist.Bernoulli(logits=pyro.param("c", torch.tensor(-50.0))), obs=x)

    fitted = pyrolvm.fit(model, torch.zeros(5), guide=lambda x: None, **FREEZE)
    found = predictive_check(fitted, torch.zeros(5), {"mean": torch.mean}, 20)
    assert found.table.loc["mean", "p_value"] == 0.5


def test_statistics_may_be_numpy_and_must_be_numbers(ppca):
    found = predictive_check(ppca, X, {"median": lambda x: np.median(x)}, 20)
    assert found.table.loc["median", "observed"] == pytest.approx(np.median(X.numpy()))
    with pytest.raises(SettingError, match="one finite number"):
        predictive_check(ppca, X, {"means": lambda x: x.mean(0)}, 5)
    with pytest.raises(SettingError, match="latents='prior' is not known: choose from same, new"):
        predictive_check(ppca, X, latents="prior")
    with pytest.raises(SettingError, match="site='z' is not known: choose from x"):
        predictive_check(ppca, X, site="z")
    with pytest.raises(SettingError, match="empty"):
        predictive_check(ppca, X, {})


def test_the_generators_are_left_as_found(ppca):
    before = torch.get_rng_state()
    first = predictive_check(ppca, X, num_samples=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.table.equals(predictive_check(ppca, X, num_samples=5).table)


def test_of_one_row_the_statistics_that_it_has():
    one = predictive_check(pyrolvm.fit(PPCA.closed_form(X, 2), X[:1], **FREEZE), X[:1], num_samples=5)
    assert list(one.table.index) == ["mean", "sd", "smallest", "largest", "share of zeros"]
    assert np.isfinite(one.replicates.to_numpy()).all()
