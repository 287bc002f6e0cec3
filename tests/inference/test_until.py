"""Runs without num_steps: they end by themselves, at the right place, and go on to the same bits."""

import math
import types

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean, LocalNormal, ppca_functions
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from sklearn.datasets import load_iris

import pyrolvm
from pyrolvm import PPCA, data_plate
from pyrolvm.data.plan import BatchPlan
from pyrolvm.errors import ConvergenceWarning
from pyrolvm.inference.training import loop, rules, until
from pyrolvm.inference.training.iterates import Iterates
from pyrolvm.inference.training.stationarity import effective_size, split_r_hat
from pyrolvm.inference.training.until import Until

IRIS = torch.tensor(load_iris().data, dtype=torch.float32)
QUIET = {"progress": False, "engine": "eager"}
COMPILED = {"progress": False, "engine": "compiled"}
"""Of thousands of steps: the compiled step is kept between tests."""
X = 0.5 + torch.randn(200, generator=torch.Generator().manual_seed(1))


def autoregressive(size, rho, dim, rng):
    x = rng.normal(size=(size, dim))
    for i in range(1, size):
        x[i] = rho * x[i - 1] + math.sqrt(1 - rho**2) * x[i]
    return x


def test_r_hat_and_the_effective_size_of_known_series():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(400, 5))
    assert split_r_hat(noise) == pytest.approx(1.0, abs=0.02)
    assert effective_size(noise) == pytest.approx(400, rel=0.1)
    assert effective_size(np.concatenate([noise, np.ones((400, 1))], 1)) == effective_size(noise)
    assert effective_size(autoregressive(4000, 0.8, 20, rng)) == pytest.approx(4000 * 0.2 / 1.8, rel=0.2)
    drifting = rng.normal(size=(400, 5)) + np.linspace(0, 4, 400)[:, None]
    assert split_r_hat(drifting) > 1.3


def test_a_subsampled_mean_has_its_closed_form():
    """m | x ~ N(sum x / (N + 1), 1 / (N + 1)); nothing is given but model, data, guide and batch size."""
    program = GlobalMean()
    fitted = pyrolvm.fit(program.model, X, guide=program.guide, batch_size=50, **COMPILED)
    sd = 1 / math.sqrt(201)
    loc, scale = (fitted.program.parameters[n].item() for n in ("loc", "scale"))
    assert loc == pytest.approx(X.sum().item() / 201, abs=0.1 * sd)
    assert math.exp(scale) == pytest.approx(sd, rel=0.1)
    assert fitted.convergence.converged is True
    assert fitted.stopped_because.startswith("converged")
    assert fitted.settings["num_steps"] is None
    rates = fitted.history["learning_rate"]
    assert (rates.diff().dropna() <= 0).all()
    assert rates.nunique() > 1


def test_looks_within_a_chunk_leave_a_run_as_it_is(monkeypatch):
    """Iterates that are noted between the steps of one chunk, or of many chunks that each end at a look."""
    program = GlobalMean()
    fits, chunks = [], []
    for ahead in (Until.ahead, lambda self, step: self.every - step % self.every):
        monkeypatch.setattr(Until, "ahead", ahead)
        chunks.append(0)

        def count(report):
            chunks[-1] += 1

        fits.append(
            pyrolvm.fit(program.model, X, guide=program.guide, batch_size=50, callbacks=[count], **COMPILED)
        )
    whole, split = fits
    assert len(whole.history) == len(split.history)
    for name, value in whole.program.parameters.items():
        assert torch.equal(value, split.program.parameters[name])
    assert whole.convergence == split.convergence
    assert 3 * chunks[0] < chunks[1]


def test_iterates_are_averaged_together_as_one_by_one(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    series = torch.randn(50, 6, generator=rng)
    together, apart = Iterates(True), Iterates(True)
    for i, flat in enumerate(series):
        for iterates in (together, apart):
            iterates.add(flat.clone())
        apart.take_in()
        if i == 19:
            together.take_in()
            together.average_anew()
            apart.average_anew()
    together.take_in()
    torch.testing.assert_close(together.mean, series[20:].mean(0))
    torch.testing.assert_close(apart.mean, together.mean)
    assert together.averaged == apart.averaged == 30
    assert np.array_equal(np.stack(together.rows), series.double().numpy())
    assert together.r_hat(10) == apart.r_hat(10)
    monkeypatch.setattr("pyrolvm.inference.training.iterates.MOST_PENDING", 12)
    few = Iterates(False)
    for flat in series:
        few.add(flat.clone())
        assert len(few.pending) < 2
    torch.testing.assert_close(few.mean, series.mean(0))


def test_where_a_rate_is_given_up_does_not_depend_on_the_length_of_chunks(monkeypatch):
    """The mean is log(loc), and loc falls from 1 to 0.007 by steps of 0.003: it leaves the support at step 333."""

    def diverging(x):
        loc = pyro.param("loc", torch.tensor(1.0))
        with data_plate(x):
            pyro.sample("x", dist.Normal(loc.log(), 1.0), obs=x)

    monkeypatch.setattr(until, "RATES", (0.003,))
    monkeypatch.setattr(rules, "MOST_STEPS", 600)
    x, fits = torch.full((10,), -5.0), []
    for largest in (100, 2**16):
        monkeypatch.setattr(loop, "LARGEST_CHUNK", largest)
        pyro.clear_param_store()
        with pytest.warns(ConvergenceWarning, match="after 600 steps"):
            fits.append(pyrolvm.fit(diverging, x, guide=lambda x: None, optimizer="adam", **QUIET))
    short, long = (f.history.drop(columns="seconds") for f in fits)
    assert list(short["learning_rate"].unique()) == pytest.approx([0.003, 0.0003])
    pd.testing.assert_frame_equal(short, long)
    assert torch.equal(*(f.program.parameters["loc"] for f in fits))


def regression(x, y):
    """Columns of scales 1 and 20, conjugate: y ~ N(x w, 1), w ~ N(0, 1)."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with data_plate(x):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


@pytest.mark.slow
def test_a_subsampled_regression_has_its_closed_form():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 2, generator=generator) * torch.tensor([1.0, 20.0])
    y = x @ torch.tensor([1.0, -0.5]) + torch.randn(300, generator=generator)
    covariance = torch.linalg.inv(torch.eye(2) + x.T @ x)
    mean, sd = covariance @ (x.T @ y), covariance.diagonal().sqrt()
    fitted = pyrolvm.fit(regression, (x, y), guide=AutoMultivariateNormal, batch_size=100, **COMPILED)
    draws = fitted.posterior((x, y), 4000)["w"]
    assert ((draws.mean(0) - mean).abs() / sd).max() < 0.2
    assert (draws.std(0) / sd).log().abs().max() < 0.2
    assert fitted.convergence.converged is not False


def test_a_plain_maximum_is_reached_with_networks_away():
    """PPCA of iris from random loadings: the closed form's -2.6998, to a hundredth."""
    torch.manual_seed(0)
    ppca = PPCA(4, 2)
    fitted = pyrolvm.fit(ppca, IRIS, init="own", **COMPILED)
    assert ppca.log_marginal(IRIS).mean().item() == pytest.approx(-2.699752, abs=0.02)
    assert fitted.convergence.converged is True


def test_an_explicit_rate_is_obeyed():
    program, x = LocalNormal(), torch.randn(50, generator=torch.Generator().manual_seed(3))
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, learning_rate=0.05, **QUIET)
    assert (fitted.history["learning_rate"] == 0.05).all()
    assert fitted.convergence.converged is not False


def test_an_explicit_number_of_steps_is_obeyed():
    program, x = LocalNormal(), torch.zeros(8)
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, num_steps=7, **QUIET)
    assert len(fitted.history) == 7
    assert (fitted.history["learning_rate"] == 1e-3).all()


def test_a_run_ends_at_its_limit_and_says_so(monkeypatch):
    monkeypatch.setattr(rules, "MOST_STEPS", 300)
    model, guide = ppca_functions(4, 2)
    with pytest.warns(ConvergenceWarning, match="after 300 steps.*init=fitted"):
        fitted = pyrolvm.fit(model, IRIS, guide=guide, **QUIET)
    assert len(fitted.history) == 300
    assert fitted.stopped_because == "stopped at the limit of 300 steps"
    assert fitted.convergence.converged is False


def until_with(record):
    """The rule after these estimates: (step, bound)."""
    program, x = LocalNormal(), torch.zeros(8)
    setup = types.SimpleNamespace(
        structure=pyrolvm.fit(program.model, x, guide=program.guide, num_steps=1, **QUIET).structure
    )
    return Until(setup, None, record=record)


@pytest.mark.parametrize("rho", [1.0, 0.9, 0.8])
def test_what_ten_times_the_steps_gain_is_a_geometric_series_of_doublings(rho):
    """Gains per doubling 1, rho, rho^2, ...: the next three of them, and the part of the fourth up to log2(10)."""
    gains = np.concatenate([[0.0], np.cumsum(rho ** np.arange(8))])
    record = [(1000 * 2**k, -20 + g) for k, g in enumerate(gains)]
    rule = until_with(record[:5])
    part = math.log2(10) - 3
    assert rule.tenfold == pytest.approx(gains[7] - gains[4] + part * (gains[8] - gains[7]))


def test_gains_are_not_predicted_to_end_at_once():
    """After gains of 1 and 0.1 per doubling: no ratio below three quarters is believed; nor one above 1."""
    q = 0.75
    fast = until_with([(1000, -3.0), (2000, -2.0), (4000, -1.9)]).tenfold
    assert fast == pytest.approx(0.1 * (q + q**2 + q**3 + (math.log2(10) - 3) * q**4))
    slow = until_with([(1000, -3.0), (2000, -2.9), (4000, -1.9)]).tenfold
    assert slow == pytest.approx(math.log2(10))
    assert until_with([(1000, -3.0), (2000, -2.9), (3900, -1.9)]).tenfold == math.inf


def test_small_networks_on_minibatches_may_take_more_steps():
    x = torch.randn(1000, 4)
    small, large = (
        pyrolvm.fit(pyrolvm.VAE(4, 2, "gaussian", hidden=h), x, num_steps=1, **QUIET)
        for h in ((8,), (1500, 1500))
    )
    for fitted, size, wanted in (
        (small, 100, 500_000),
        (small, 10, 1_000_000),
        (small, None, 100_000),
        (large, 100, 100_000),
    ):
        found = rules.most_steps(fitted.program, fitted.structure, BatchPlan(1000, size), size)
        assert found == wanted


@pytest.mark.parametrize("at", [300, 1700])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, at):
    program, x = GlobalMean(), X
    options = {"guide": program.guide, "batch_size": 50, **COMPILED}

    def interrupt(report):
        if report.step >= at:
            raise KeyboardInterrupt

    whole = pyrolvm.fit(program.model, x, **options)
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        pyrolvm.fit(program.model, x, checkpoint=tmp_path, callbacks=[interrupt], **options)
    resumed = pyrolvm.fit(program.model, x, checkpoint=tmp_path, resume=True, **options)
    assert len(resumed.history) == len(whole.history) > at
    for name, value in whole.program.parameters.items():
        assert torch.equal(value, resumed.program.parameters[name])
    assert resumed.convergence == whole.convergence


def test_warm_up_and_schedules_go_their_way_before_anything_is_judged():
    program, x = LocalNormal(), torch.randn(50, generator=torch.Generator().manual_seed(5))
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, kl_warmup=0.5, **QUIET)
    weights = fitted.history.set_index("step")["kl_weight"]
    assert weights[500] == pytest.approx(0.5)
    assert weights[1000] == weights.iloc[-1] == 1.0
    assert len(fitted.history) > rules.SCHEDULED_STEPS


def test_held_out_rows_end_a_run_that_learns_by_heart(monkeypatch):
    """40 rows of noise in 20 columns: a decoder of rank 8 fits them ever better, and rows held out ever worse."""
    monkeypatch.setattr(until, "OF_NETWORKS", (0.003, 0.001))  # rates at which it soon does
    x = torch.randn(60, 20, generator=torch.Generator().manual_seed(6))
    torch.manual_seed(0)
    vae = pyrolvm.VAE(20, 8, "gaussian", hidden=(32,))
    fitted = pyrolvm.fit(vae, x, validation=0.33, **QUIET)
    assert fitted.convergence.converged is True
    seen = fitted.history["validation_elbo"].dropna()
    assert seen.max() < fitted.held_out_elbo + 0.5
    assert seen.iloc[-1] < fitted.held_out_elbo  # the parameters kept are not the last ones


def test_a_rate_at_which_the_bound_is_lost_is_given_up():
    """The mean is log(loc): a step of 0.1 from a loc of 0.01 leaves the support."""

    def diverging(x):
        loc = pyro.param("loc", torch.tensor(0.01))
        with data_plate(x):
            pyro.sample("x", dist.Normal(loc.log(), 1.0), obs=x)

    x = torch.full((10,), -5.0) + 0.1 * torch.randn(10, generator=torch.Generator().manual_seed(7))
    fitted = pyrolvm.fit(diverging, x, guide=lambda x: None, **QUIET)
    assert fitted.program.parameters["loc"].log().item() == pytest.approx(x.mean().item(), abs=0.05)


def test_coordinate_ascent_ends_when_it_rises_no_more():
    fitted = pyrolvm.fit(PPCA(4, 1, guide="full"), IRIS, alternate=16, progress=False)
    assert fitted.convergence.converged is True
    assert fitted.convergence.sentence in repr(fitted)


@pytest.mark.slow
def test_a_guide_per_row_ends():
    x = torch.linspace(-2, 2, 30)

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    fitted = pyrolvm.fit(model, x, guide=AutoNormal, batch_size=10, **COMPILED)
    torch.testing.assert_close(fitted.encode(x), x * 0.8, rtol=0, atol=0.1)


@pytest.mark.slow
def test_ppca_of_digits_with_defaults_alone_ends_within_a_hundredth_of_a_run_of_ten_times_the_length():
    digits = pyrolvm.data.load_dataset("digits")

    def build():
        torch.manual_seed(0)
        return PPCA(64, 8)

    fitted = pyrolvm.fit(build(), digits, progress=False)
    longer = pyrolvm.fit(build(), digits, num_steps=10 * len(fitted.history), progress=False)
    here, there = (f.log_evidence(digits, "exact").mean().item() for f in (fitted, longer))
    assert fitted.convergence.converged is True
    assert here > there - 0.01 * abs(there)


@pytest.mark.slow
def test_a_vae_of_digits_with_defaults_alone_ends_by_itself_near_a_long_run():
    """It takes 80,000 steps, to -18.579; 800,000 at 0.001 reached -18.515."""
    digits, _ = pyrolvm.data.load_dataset("digits").binarise()
    torch.manual_seed(0)
    fitted = pyrolvm.fit(pyrolvm.VAE(64, 2, hidden=(16,)), digits, progress=False)
    assert fitted.convergence.converged is True
    assert fitted.log_evidence(digits, "iwae", 64, num_particles=1).mean().item() > -18.515 * 1.01
