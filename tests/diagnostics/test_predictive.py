"""Posterior predictive checks: p-values against closed forms, models that do and do not make such data."""

import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean
from scipy.stats import norm

import pyrolvm
from pyrolvm import PPCA, SettingError, data_plate
from pyrolvm.diagnostics.predictive import OF_ROWS, STATISTICS, PredictiveCheck, _table, predictive_check

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


def test_both_ends_are_extreme_and_told_apart():
    replicates = pd.DataFrame({name: np.arange(100.0) for name in ("low", "middle", "high")})
    table = _table({"low": -1.0, "middle": 50.5, "high": 200.0}, replicates)
    assert list(table["extreme"]) == [True, False, True]
    assert list(table["p_value"]) == [1.0, 0.49, 0.0]
    sd = math.sqrt(100 * 101 / 12)
    assert table["z"].to_numpy() == pytest.approx([-50.5 / sd, 1 / sd, 150.5 / sd])
    sentence = PredictiveCheck(table, replicates).sentence
    assert "low smaller than the model's" in sentence
    assert "high larger than the model's" in sentence


def test_the_deviation_of_rows_is_that_of_their_means():
    x = torch.tensor([[0.0, 2.0, 4.0], [4.0, 6.0, 8.0]])
    assert STATISTICS[OF_ROWS](x).item() == pytest.approx(8**0.5)


def test_replicates_keep_the_latents_of_their_data_or_have_new_ones():
    """Far latents that the guide knows: only replicates of the same latents have the data's mean."""
    x = 3 * torch.ones(50)

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, 0.1))

    fitted = pyrolvm.fit(model, x, guide=guide, **FREEZE)
    means = [
        predictive_check(fitted, x, {"mean": torch.mean}, 50, latents=latents).table.loc["mean", "mean"]
        for latents in ("same", "new")
    ]
    assert means == pytest.approx([3.0, 0.0], abs=0.1)  # errors 0.003 and 0.02


def test_masked_rows_are_left_out_and_masked_entries_have_the_median():
    x = torch.tensor([[1.0, 2.0], [1e3, 1e3], [3.0, 1e3], [4.0, 5.0]])
    seen = x < 1e3

    def model(x, seen):
        loc = pyro.param("loc", torch.tensor(0.0))
        with data_plate(x, dim=-2), pyro.plate("columns", 2, dim=-1), pyro.poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    fitted = pyrolvm.fit(model, x, seen, guide=lambda x, seen: None, **FREEZE)
    statistics = {"rows": len, "third": lambda x: x[1, 1], "mean": torch.mean}
    found = predictive_check(fitted, (x, seen), statistics, 10)
    assert found.table["observed"].to_dict() == pytest.approx({"rows": 3, "third": 3.0, "mean": 3.0})
    assert list(found.replicates["third"].unique()) == [3.0]


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
