"""Ranks and VSBC probabilities: against Gaussian distribution functions, and guides that are wrong on purpose."""

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean, LocalNormal
from scipy.stats import norm

import pyrolvm
from pyrolvm import PPCA, ProgramError, SettingError, data_plate
from pyrolvm.diagnostics.calibration import Calibration, calibrate, calibration_of
from pyrolvm.diagnostics.simulated import simulations
from pyrolvm.diagnostics.uniformity import ecdf_band, p_values, symmetry_p

FREEZE = {"num_steps": 1, "learning_rate": 1e-12, "initialise": False, "progress": False, "engine": "eager"}


EXACT = math.sqrt(0.5)


def local(shift=0.0, scale=EXACT):
    """The exact posterior of LocalNormal is N(x/2, 1/2)."""

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2 + shift, scale))

    return pyrolvm.fit(LocalNormal().model, torch.randn(50), guide=guide, **FREEZE)


def test_the_exact_guide_passes():
    found = calibrate(local(), num_simulations=1000, num_samples=100)
    assert found.passed
    assert found.ranks.shape == (1000, 1)
    assert found.ranks.to_numpy().min() >= 0
    assert found.ranks.to_numpy().max() <= 100
    assert "is calibrated" in found.sentence
    table = found.ecdf("z")
    assert ((table["difference"] >= table["lower"]) & (table["difference"] <= table["upper"])).all()
    bins = found.histogram("z")
    assert bins["count"].sum() == 1000
    assert ((bins["count"] < bins["lower"]) | (bins["count"] > bins["upper"])).sum() <= 3


@pytest.mark.parametrize(
    ("guide", "verdict"),
    [({"shift": 0.2}, "shifted"), ({"scale": 0.5}, "too narrow"), ({"scale": 1.0}, "too wide")],
)
def test_a_wrong_guide_fails_and_says_how(guide, verdict):
    found = calibrate(local(**guide), num_simulations=1000, num_samples=100)
    assert not found.passed
    assert found.table.loc["z", "verdict"] == verdict
    assert f"z {verdict}" in found.sentence
    table = found.ecdf("z")
    assert ((table["difference"] < table["lower"]) | (table["difference"] > table["upper"])).any()


def test_a_narrow_but_centred_guide_passes_the_symmetry_test_and_a_shifted_one_fails_it():
    narrow = calibrate(local(scale=0.5), num_simulations=1000, num_samples=100)
    assert narrow.table.loc["z", "symmetry_p"] > 0.05
    assert narrow.table.loc["z", "chi_square_p"] < 1e-6
    shifted = calibrate(local(shift=0.2), num_simulations=1000, num_samples=100)
    assert shifted.table.loc["z", "symmetry_p"] < 1e-6


def test_vsbc_probabilities_are_the_gaussian_distribution_function():
    fitted = local(shift=0.3, scale=0.6)
    [simulation] = simulations(fitted.pair(fitted.example), 400, rows=True)
    draws = fitted.draws(simulation.data, 2000).values
    z, x = simulation.truth["z"], simulation.data.double().numpy()
    exact = norm.cdf((z - (x / 2 + 0.3)) / 0.6)
    found = calibration_of({"z": z}, {"z": draws["z"].double().numpy()}).probabilities["z"]
    error = np.sqrt(exact * (1 - exact) / 2000) + 1e-4
    assert (np.abs(found - exact) / error).max() < 4.5  # of 400 normal numbers
    # and (z, x) are those of the model: x - z and z standard normal, independent
    assert np.cov(z, x)[0, 1] == pytest.approx(1.0, abs=4 * math.sqrt(3 / 400))


def test_every_dimension_of_an_amortised_posterior_is_ranked():
    x = torch.randn(60, 4) @ torch.randn(4, 4)
    fitted = pyrolvm.fit(PPCA.closed_form(x, 2, guide="full"), x, **FREEZE)
    found = calibrate(fitted, num_simulations=500)
    assert list(found.ranks) == ["z[0]", "z[1]"]
    assert found.passed
    with torch.no_grad():
        fitted.model.guide_log_scale.sub_(0.7)
    assert list(calibrate(fitted, num_simulations=500).table["verdict"]) == ["too narrow"] * 2


def exact_mean(x, spread=1.0, known=[]):  # noqa: B006
    """GlobalMean with its exact posterior in place of training; fitted once, as a fit is not what is tested."""
    if not known:
        known.append(pyrolvm.fit(GlobalMean().model, x, guide=GlobalMean().guide, **FREEZE))
    [fitted] = known
    n, store = len(fitted.batch(x).args[0]), fitted.program.parameters
    with torch.no_grad():
        store["loc"].fill_(fitted.batch(x).args[0].sum() / (n + 1))
        store["scale"].fill_(math.log(spread / math.sqrt(n + 1)))
    return fitted


def test_latents_shared_by_all_data_are_refitted():
    x = torch.randn(10)
    fitted = exact_mean(x)
    options = {"num_simulations": 150, "num_samples": 50, "seed": 1}
    good = calibrate(fitted, x, refit=exact_mean, **options)
    assert good.passed
    assert list(good.ranks) == ["m"]
    bad = calibrate(fitted, x, refit=lambda x: exact_mean(x, 0.4), **options)
    assert bad.table.loc["m", "verdict"] == "too narrow"


def test_refits_can_run_elsewhere():
    x = torch.randn(10)
    seen = []

    def run(job, data, seeds):
        seen.append(len(data))
        return map(job, data, seeds)

    calibrate(exact_mean(x), x, refit=exact_mean, num_simulations=4, num_samples=5, map=run)
    assert seen == [4]


def refit_mean(x):
    """At the top of a module: other processes find it by name."""
    options = {"num_steps": 40, "learning_rate": 0.1, "progress": False, "engine": "eager"}
    return pyrolvm.fit(GlobalMean().model, x, guide=GlobalMean().guide, **options)


def test_refits_in_other_processes_give_the_same_ranks():
    x = torch.randn(10)
    options = {"refit": refit_mean, "num_simulations": 4, "num_samples": 30, "progress": False}
    alone = calibrate(refit_mean(x), x, **options)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        together = calibrate(refit_mean(x), x, map=pool.map, **options)
    assert together.ranks.equals(alone.ranks)
    assert together.uniforms.equals(alone.uniforms)
    assert alone.ranks["m"].nunique() > 1


def test_the_tests_of_uniformity_keep_their_level():
    rng = np.random.default_rng(0)
    draws = rng.random((400, 200))
    for test, rejected in (pd.DataFrame([p_values(u) for u in draws]) < 0.05).mean().items():
        assert rejected == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 400)), test
    lower, upper = ecdf_band(200)
    shares = rng.multinomial(200, np.full(100, 1 / 100), size=10_000).cumsum(1)[:, :-1] / 200
    inside = ((shares <= upper + 1e-12) & (shares >= lower - 1e-12)).all(1).mean()
    assert inside == pytest.approx(
        0.95, abs=4 * math.sqrt(0.05 * 0.95 * (1 / 10_000 + 1 / 2000))
    )  # of 2000 itself


def test_the_verdict_keeps_the_stated_level():
    """Uniform ranks fail in at most alpha of all tables: three tests share the level of each quantity."""
    rng, repeats = np.random.default_rng(2), 1500
    failed = 0
    for _ in range(repeats):
        ranks = pd.DataFrame({"z": rng.integers(0, 101, 400)})
        uniforms = (ranks + rng.random(ranks.shape)) / 101
        failed += not Calibration(ranks, uniforms, 100).passed
    assert failed / repeats < 0.05 + 2 * math.sqrt(0.05 * 0.95 / repeats)


def calibration(uniforms, num_samples=99):
    ranks = (uniforms * (num_samples + 1)).astype(int)
    return Calibration(ranks, uniforms, num_samples)


def test_all_quantities_of_a_table_share_the_level():
    rng = np.random.default_rng(3)
    failed = sum(not calibration(pd.DataFrame(rng.random((200, 25)))).passed for _ in range(12))
    assert failed <= 2


def test_one_wrong_quantity_among_right_ones_is_not_passed():
    right = (np.arange(1000) + 0.5) / 1000
    found = calibration(pd.DataFrame({"right": right, "narrow": 0.5 - 0.5 * np.cos(np.pi * right)}))
    assert list(found.table["verdict"]) == ["calibrated", "too narrow"]
    assert not found.passed
    assert "narrow too narrow" in found.sentence


def test_numbers_as_spread_as_uniform_ones_may_be_none():
    """Ten bins of twenty, symmetric around 1/2: neither too narrow nor too wide."""
    bins = np.array([0, 2, 4, 6, 8, 11, 13, 15, 17, 19])
    u = (np.repeat(bins, 40) + np.tile((np.arange(40) + 0.5) / 40, 10)) / 20
    assert calibration(pd.DataFrame({"z": u})).table.loc["z", "verdict"] == "not uniform"


def test_bins_and_distribution_function_of_numbers_that_are_known():
    found = calibration(pd.DataFrame({"z": (np.arange(1000) + 0.5) ** 2 / 1e6}))
    bins = found.histogram("z")
    # sqrt(1 / 20) of the numbers are in the first of twenty bins; 95 % of binomials of 1000 at 1 / 20: 37 to 64
    assert bins["count"].iloc[0] == 224
    assert (bins["lower"].iloc[0], bins["upper"].iloc[0]) == (37, 64)
    assert bins.index[1] == pytest.approx(5)
    ecdf = found.ecdf("z")
    z = ecdf.index.to_numpy()
    assert ecdf["difference"].to_numpy() == pytest.approx(np.sqrt(z) - z, abs=2e-3)


def test_the_symmetry_test_keeps_its_level_where_numbers_are_symmetric_but_not_uniform():
    rng = np.random.default_rng(1)
    draws = rng.beta(0.5, 0.5, (400, 200))
    rejected = np.mean([symmetry_p(u) < 0.05 for u in draws])
    assert rejected == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 400))


def test_ties_are_broken_at_random():
    zeros = {"k": np.zeros(2000)}
    found = calibration_of(zeros, {"k": np.zeros((9, 2000))})
    assert found.ranks["k"].value_counts().min() > 140
    assert found.passed


def test_what_cannot_be_calibrated_is_refused_in_one_line():
    x = torch.randn(10)
    with pytest.raises(ProgramError, match="pass refit"):
        calibrate(exact_mean(x))
    with pytest.raises(SettingError, match="training data as x"):
        calibrate(exact_mean(x), refit=exact_mean)
    auto = pyrolvm.fit(LocalNormal().model, x, guide=pyro.infer.autoguide.AutoNormal, **FREEZE)
    with pytest.raises(ProgramError, match="none for simulated"):
        calibrate(auto)
    with pytest.raises(SettingError, match=r"\[num_samples, \*\[3\]\] wanted"):
        calibration_of({"z": np.zeros(3)}, {"z": np.zeros((5, 4))})


@pytest.mark.parametrize("wrong", [{"num_simulations": 0}, {"num_samples": -1}, {"num_simulations": 2.5}])
def test_numbers_that_cannot_be_are_refused(wrong):
    with pytest.raises(SettingError, match=f"{next(iter(wrong))} must be a positive whole number"):
        calibrate(local(), **wrong)


def test_observed_values_that_are_no_argument_need_a_rebuild():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + pyro.param("b", torch.tensor(0.0)), 1.0), obs=2 * x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, math.sqrt(0.5)))

    fitted = pyrolvm.fit(model, torch.randn(20), guide=guide, **FREEZE)
    with pytest.raises(SettingError, match="pass rebuild"):
        calibrate(fitted)
    found = calibrate(fitted, rebuild=lambda arguments, simulated: simulated["x"] / 2)
    assert found.passed


def test_latents_are_ranked_by_row_first_wherever_their_plates_stand():
    """Rows inside of a plate of kinds: a latent of each, and one of each kind that all rows share."""
    x = torch.randn(6, 3)

    def plates(x):
        return pyro.plate("kinds", 3, dim=-2), data_plate(x, dim=-1)

    def model(x):
        kinds, rows = plates(x)
        with kinds, rows:
            z = pyro.sample("z", dist.Normal(torch.tensor([[-9.0], [0.0], [9.0]]), 1.0))
            pyro.sample("x", dist.Normal(z + pyro.param("b", torch.tensor(0.0)), 1.0), obs=x.T)

    def guide(x):
        kinds, rows = plates(x)
        with kinds, rows:
            pyro.sample("z", dist.Normal((x.T + torch.tensor([[-9.0], [0.0], [9.0]])) / 2, EXACT))

    fitted = pyrolvm.fit(model, x, guide=guide, **FREEZE)
    back = {"rebuild": lambda arguments, simulated: simulated["x"].T}
    found = calibrate(fitted, x, num_simulations=400, num_samples=50, **back)
    assert list(found.ranks) == ["z[0]", "z[1]", "z[2]"]
    assert found.passed

    def shared(x):
        kinds, rows = plates(x)
        with kinds:
            m = pyro.sample("m", dist.Normal(pyro.param("b", torch.tensor(0.0)), 1.0))
            with rows:
                pyro.sample("x", dist.Normal(m, 1.0), obs=x.T)

    def refit(x):
        def guide(x):
            with pyro.plate("kinds", 3, dim=-2):
                pyro.sample("m", dist.Normal(x.T.sum(1, keepdim=True) / 7, 7**-0.5))

        return pyrolvm.fit(shared, x, guide=guide, **FREEZE)

    found = calibrate(refit(x), x, refit=refit, num_simulations=5, num_samples=10, map=map, **back)
    assert list(found.ranks) == ["m[0]", "m[1]", "m[2]"]


def test_the_generators_are_left_as_found():
    fitted = local()
    before = torch.get_rng_state()
    first = calibrate(fitted, num_simulations=30, num_samples=9)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.ranks.equals(calibrate(fitted, num_simulations=30, num_samples=9).ranks)
