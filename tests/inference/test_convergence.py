"""`fitted.convergence`: what it says of runs that are known to be done, or not, and where it is written."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from programs import GlobalMean, LocalNormal
from sklearn.datasets import load_iris

import pyrolvm
from pyrolvm import PPCA
from pyrolvm.errors import ConvergenceWarning
from pyrolvm.inference import fit_restarts
from pyrolvm.inference.posterior.convergence import judge, trend_of
from pyrolvm.inference.program.structure import Plate, Site, Structure

IRIS = torch.tensor(load_iris().data, dtype=torch.float32)
QUIET = {"progress": False, "engine": "eager"}
PLATE = Plate("data", -1, 100, 100)
LOCAL = Structure(
    (
        Site("z", "latent", True, "Normal", (100,), (2,), ("data",)),
        Site("x", "data", True, "Normal", (100,), (4,), ("data",)),
    ),
    PLATE,
    1,
)
SHARED = Structure((Site("m", "latent", False, "Normal", (), (), ()), LOCAL.sites[1]), PLATE, 1)


def correlated(size, rho, rng):
    """Noise of variance 1 with correlation `rho` from step to step."""
    noise = rng.normal(size=size) * (1 - rho**2) ** 0.5
    for i in range(1, size):
        noise[i] += rho * noise[i - 1]
    return noise


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_the_error_of_a_trend_is_that_of_the_noise_with_its_correlation(rho):
    """Of 300 flat series, z beyond 3 in at most 3 %: a t of 18 degrees has it in 0.8 %."""
    rng = np.random.default_rng(0)
    z = [trend_of(correlated(1000, rho, rng)).z for _ in range(300)]
    assert np.mean(np.abs(z) > 3) < 0.03
    assert 0.6 < np.std(z) < 1.5


def test_the_rise_over_a_window_is_found_within_its_error():
    rng = np.random.default_rng(1)
    found = [trend_of(np.linspace(0, 0.5, 900) + rng.normal(size=900)) for _ in range(100)]
    assert np.mean([t.rise for t in found]) == pytest.approx(0.5, abs=4 * found[0].error / 10)


def history(elbo, **columns):
    return pd.DataFrame({"step": np.arange(1, len(elbo) + 1), "elbo": elbo, **columns})


def test_a_rise_that_matters_is_not_yet_and_one_that_does_not_is_converged():
    rng = np.random.default_rng(2)
    noise = 0.001 * rng.normal(size=3000) - 10
    assert judge(history(noise), LOCAL).converged is True
    assert judge(history(noise + 0.1 * np.linspace(0, 1, 3000)), LOCAL).converged is False
    assert judge(history(noise + 0.01 * np.linspace(0, 1, 3000)), LOCAL).converged is True
    assert "fell" in judge(history(noise - 0.1 * np.linspace(0, 1, 3000)), LOCAL).sentence


def test_latents_of_all_data_are_judged_in_total():
    """0.003 nats per datum over the window do not matter to a code; of 100 data's shared latent they are 0.3 nats."""
    noise = 0.0005 * np.random.default_rng(3).normal(size=3000) - 10
    rising = history(noise + 0.009 * np.linspace(0, 1, 3000))
    assert judge(rising, LOCAL).converged is True
    assert judge(rising, SHARED).converged is False


def test_a_bound_too_noisy_or_too_short_says_nothing():
    rng = np.random.default_rng(4)
    assert judge(history(5 * rng.normal(size=600)), LOCAL).converged is None
    assert judge(history(np.zeros(100)), LOCAL).converged is None
    warming = np.linspace(0.001, 1, 600)
    assert "schedules" in judge(history(np.zeros(600), kl_weight=warming), LOCAL).sentence


def test_held_out_values_are_judged_before_training_ones():
    """Training goes on rising while the held-out bound is flat: that run is done."""
    elbo = np.linspace(-20, -10, 3000)
    held_out = np.full(3000, np.nan)
    held_out[99::100] = -21 + 0.001 * np.random.default_rng(5).normal(size=30)
    assert judge(history(elbo), LOCAL).converged is False
    assert judge(history(elbo, validation_elbo=held_out), LOCAL).converged is True


def test_a_fit_that_stopped_early_warns_once_and_says_what_to_do():
    ppca = PPCA(4, 2)
    with pytest.warns(ConvergenceWarning, match=r"before it had converged.*num_steps") as seen:
        fitted = pyrolvm.fit(ppca, IRIS, num_steps=200, initialise=False, **QUIET)
    assert len(seen) == 1
    assert seen[0].filename == __file__  # the user's line
    assert fitted.convergence.converged is False
    assert fitted.convergence.numbers["rise"] > 0.1
    assert fitted.convergence.sentence in repr(fitted)


def test_restarts_warn_once_for_all():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ConvergenceWarning)
        fit_restarts(lambda seed: PPCA(4, 2), IRIS, num_restarts=3, num_steps=200, initialise=False, **QUIET)
    assert sum(issubclass(w.category, ConvergenceWarning) for w in seen) == 1


def test_a_fit_at_its_optimum_is_converged_and_quiet():
    program = LocalNormal()
    x = torch.randn(40, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = pyrolvm.fit(
            program.model, x, guide=program.guide, objective="meanfield", num_steps=2000, learning_rate=0.05,
            **QUIET,
        )  # fmt: skip
    assert fitted.convergence.converged is not False


def test_the_verdict_is_saved_and_an_older_run_cannot_tell(tmp_path):
    fitted = pyrolvm.fit(PPCA(4, 2), IRIS, num_steps=200, initialise=False, **QUIET)
    fitted.save(tmp_path)
    assert pyrolvm.load(tmp_path).convergence == fitted.convergence
    config = json.loads((tmp_path / "config.json").read_text())
    del config["convergence"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = pyrolvm.load(tmp_path).convergence
    assert (old.converged, old.word) == (None, "cannot tell")


def test_arviz_is_told():
    program = GlobalMean()
    x = torch.randn(20, generator=torch.Generator().manual_seed(0))
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, num_steps=20, **QUIET)
    idata = pyrolvm.to_inference_data(fitted, x, num_samples=10, groups=["posterior"], progress=False)
    assert idata.attrs["converged"] == "cannot tell"
    assert idata.attrs["convergence"] == fitted.convergence.sentence
