"""Many fits: the same results however many workers, a worker that dies, and the table of a sweep."""

import os
import signal
from functools import partial

import joblib
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrolvm
from pyrolvm import PPCA, SettingError, data_plate, sweep
from pyrolvm.diagnostics import calibrate, compare_with_nuts
from pyrolvm.inference import fit_restarts
from pyrolvm.inference.training.many import run_all

GENERATOR = torch.Generator().manual_seed(0)
W = torch.tensor([[2.0, 0, 0, 1, 0, 1], [0, 2.0, 1, 0, 1, 0]])
X = torch.randn(300, 2, generator=GENERATOR) @ W + 0.3 * torch.randn(300, 6, generator=GENERATOR)
QUIET = {"engine": "eager", "progress": False}
FEW = {**QUIET, "num_steps": 20}


def build(seed):
    torch.manual_seed(seed)
    return PPCA(6, 2)


def location(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with data_plate(x):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def refitted(x):
    return pyrolvm.fit(location, x, guide="AutoNormal", **FEW)


def test_two_processes_give_the_results_of_one():
    """Restarts, calibration with refits, and the chains of the reference; functions and closures travel."""
    y = X[:20, 0]
    fitted = refitted(y)

    def everything():
        best, table = fit_restarts(lambda seed: build(seed + 1), X, num_restarts=3, initialise=False, **FEW)
        ranks = calibrate(fitted, y, refit=refitted, num_simulations=4, num_samples=20, progress=False).ranks
        nuts = compare_with_nuts(
            fitted, y, num_samples=20, warmup_steps=20, num_chains=2, progress=False
        ).draws
        return best.program.tensors(), table.drop(columns="seconds"), ranks, nuts

    alone = everything()
    with joblib.parallel_config("loky", n_jobs=2, inner_max_num_threads=torch.get_num_threads()):
        spread = everything()
    for one, two in zip(alone, spread, strict=True):
        if isinstance(one, pd.DataFrame):
            pd.testing.assert_frame_equal(one, two)
        else:
            for name, value in one.items():
                assert torch.equal(value, two[name]), name


def dies_once(path, value):
    if value == 1 and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * value


def test_what_a_dead_worker_lost_is_done_again(tmp_path):
    with joblib.parallel_config(n_jobs=2):
        found = list(run_all(dies_once, [(tmp_path / "once", i) for i in range(4)]))
    assert found == [0, 10, 20, 30]


def test_a_sweep_finds_the_dimension_by_exact_held_out_evidence():
    best, table = sweep(
        partial(PPCA, 6, guide="exact"),
        X,
        {"latent_dim": [1, 2], "learning_rate": [0.001, 0.02]},
        num_steps=1500,
        **QUIET,
    )
    assert list(table["below_best"]) == sorted(table["below_best"])
    assert table["latent_dim"][0] == 2
    first = table[table["learning_rate"] == 0.02].set_index("latent_dim")
    assert first.loc[1, "below_best"] > 5 * first.loc[1, "difference_error"]
    assert best.settings["learning_rate"] == table["learning_rate"][0]
    row = table.iloc[0]
    assert row["lower"] < row["log_evidence"] < row["upper"]
    assert np.isclose(row["upper"] - row["lower"], 2 * 1.96 * row["standard_error"])


def test_a_sweep_of_a_program_is_judged_by_its_held_out_bound():
    y, before = X[:, 0], torch.random.get_rng_state()
    best, table = sweep(
        location, y, {"learning_rate": [1e-6, 0.1]}, by="bound", guide="AutoNormal", num_steps=200, **QUIET
    )
    assert list(table["learning_rate"]) == [0.1, 1e-6]
    assert best.settings["learning_rate"] == 0.1
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_sweep_says_what_is_wrong_with_its_grid():
    with pytest.raises(SettingError, match="latent_din"):
        sweep(partial(PPCA, 6), X, {"latent_din": [1, 2]}, **FEW)
    with pytest.raises(SettingError, match="no values"):
        sweep(partial(PPCA, 6), X, {"latent_dim": []}, **FEW)
    with pytest.raises(SettingError, match="by="):
        sweep(partial(PPCA, 6), X, {"latent_dim": [1]}, by="loss", **FEW)
