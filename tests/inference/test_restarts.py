"""Of several starts the best is kept, judged alike."""

import numpy as np
import pyro
import pytest
import torch
from programs import LocalNormal

import pyrolvm
from pyrolvm import DivergenceError, GaussianMixture, SettingError
from pyrolvm.inference.training.restarts import fit_restarts

QUIET = {"progress": False, "engine": "eager"}


def clusters():
    """Eight tight clusters far apart on a line: random starts mostly leave two of them in one component."""
    rng = np.random.default_rng(0)
    centres = np.repeat(np.arange(8) * 8.0 - 28, 20)
    return torch.tensor(centres + rng.normal(size=len(centres)), dtype=torch.float32).unsqueeze(-1)


def mixture(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GaussianMixture(1, 8)
        model.unit.fill_(18.0)
    return model


def test_best_of_ten_beats_the_median_of_a_mixture():
    options = {"num_steps": 200, "learning_rate": 0.05, **QUIET}
    # without the start from the data, which makes all ten the same
    best, table = fit_restarts(mixture, clusters(), num_restarts=10, initialise=False, **options)
    assert len(table) == 10
    assert table["bound"].is_monotonic_decreasing
    assert table["bound"][0] > table["bound"].median() + 0.1
    assert best.history["elbo"].tail(20).mean() == pytest.approx(table["bound"][0])


def test_a_row_of_the_table_is_an_ordinary_fit():
    options = {"num_steps": 20, "learning_rate": 0.05, **QUIET}
    best, table = fit_restarts(mixture, clusters(), num_restarts=3, seed=4, **options)
    seed = int(table["seed"][0])
    again = pyrolvm.fit(mixture(seed), clusters(), seed=seed, **options)
    for name, tensor in best.program.tensors().items():
        assert torch.equal(tensor, again.program.tensors()[name]), name
    assert sorted(table["seed"]) == [4, 5, 6]


def test_all_are_judged_by_the_same_rows_and_noise():
    """The same model three times has the same held-out bound, though the fits' seeds differ."""
    program = LocalNormal()

    def build(seed):
        return program.model, program.guide

    options = {"num_steps": 1, "learning_rate": 1e-12, "validation": 0.25, **QUIET}
    _, table = fit_restarts(build, torch.randn(40), num_restarts=3, **options)
    assert np.allclose(table["bound"], table["bound"][0], atol=1e-6)


@pytest.mark.parametrize("share", [0.2, np.float32(0.2)])
def test_a_share_of_any_type_is_held_out_once_for_all(share):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    options = {"validation": share, "dtype": "float64", "num_steps": 3, "progress": False}
    best, table = pyrolvm.fit_restarts(lambda seed: pyrolvm.PPCA(4, 1), x, num_restarts=2, **options)
    assert best.num_rows == 48
    assert table["bound"].notna().all()


def test_diverged_restarts_are_noted_and_skipped():
    options = {"num_steps": 5, "optimizer": "sgd", "learning_rate": 1e-3, **QUIET}
    best, table = fit_restarts(
        lambda seed: exploding() if seed == 1 else calm(), torch.randn(20), num_restarts=3, **options
    )
    assert table["outcome"].iloc[-1].startswith("diverged: ")
    assert table["seed"].iloc[-1] == 1
    assert np.isnan(table["bound"].iloc[-1])
    assert np.isfinite(best.elbo)


def calm():
    program = LocalNormal()
    return program.model, program.guide


def exploding():
    """Its bound is finite at first and overflows as soon as the step is taken."""
    program = LocalNormal()

    def model(x):
        offset = pyro.param("offset", torch.tensor(0.0))
        program.model(x)
        pyro.factor("steep", 1e30 * offset - 1e30 * offset**3)

    return model, program.guide


def test_if_all_diverge_it_is_an_error():
    options = {"num_steps": 5, "optimizer": "sgd", "learning_rate": 1.0, **QUIET}
    with pytest.raises(DivergenceError, match="all 2 restarts diverged"):
        fit_restarts(lambda seed: exploding(), torch.randn(20), num_restarts=2, **options)


def test_a_stopped_contest_goes_on(tmp_path):
    options = {"num_steps": 10, "checkpoint": tmp_path, **QUIET}
    _, table = fit_restarts(mixture, clusters(), num_restarts=2, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["restart-0", "restart-1"]
    _, again = fit_restarts(mixture, clusters(), num_restarts=3, resume=True, **options)
    assert again.set_index("seed")["bound"][0] == table.set_index("seed")["bound"][0]
    assert len(again) == 3


@pytest.mark.parametrize(("value", "match"), [(0, "positive"), (2.5, "positive")])
def test_bad_counts(value, match):
    with pytest.raises(SettingError, match=match):
        fit_restarts(mixture, clusters(), num_restarts=value, **QUIET)


def test_a_share_that_leaves_no_rows():
    with pytest.raises(SettingError, match="leaves 0 to hold out"):
        fit_restarts(mixture, clusters(), validation=0.001, **QUIET)


def outlier_or_cloud(seed):
    """Two components of a cloud and a point far away: an even seed gives the point one of its own."""
    model = GaussianMixture(1, 2)
    means = torch.tensor([[0.0], [30.0]]) if seed % 2 == 0 else torch.tensor([[-1.0], [1.0]])
    spread = torch.tensor([1.0, 0.02]) if seed % 2 == 0 else torch.tensor([3.0, 3.0])
    model.set_components(torch.tensor([0.5, 0.5]), means, spread.view(2, 1, 1))
    return model


def test_a_collapsed_restart_is_not_kept_though_its_bound_is_higher():
    x = torch.cat([torch.randn(60, generator=torch.Generator().manual_seed(0)), torch.tensor([30.0])])
    options = {"num_steps": 300, "learning_rate": 0.05, **QUIET}
    with pytest.raises(DivergenceError, match="the fit is degenerate: component 1 holds 1 of 61 data"):
        pyrolvm.fit(outlier_or_cloud(0), x, **options)
    best, table = fit_restarts(outlier_or_cloud, x, num_restarts=2, **options)
    assert best.model.scale.min() > 0.5
    assert list(table["seed"]) == [1, 0]
    assert table["outcome"][1].startswith("diverged: the fit is degenerate")
    with pytest.raises(DivergenceError, match=r"all 1 restarts diverged; the last one: .*degenerate"):
        fit_restarts(outlier_or_cloud, x, num_restarts=1, **options)


def test_fits_are_judged_by_the_objective_that_the_model_names():
    """The held-out bound of a table is that of the fit's own record: of several draws here (VIMCO)."""
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    options = {"num_steps": 5, "validate_every": 5, "validation": x[30:], **QUIET}

    def build(hidden=(8,)):
        torch.manual_seed(0)
        return pyrolvm.ProbabilisticVQVAE(4, 4, 8, 2, hidden=hidden)

    assert build().objective() == "vimco"
    best, restarts = fit_restarts(lambda seed: build(), x[:30], num_restarts=1, **options)
    _, swept = pyrolvm.sweep(build, x[:30], {"hidden": [(8,)]}, by="bound", **options)
    recorded = best.history["validation_elbo"].iloc[-1]
    assert restarts["bound"][0] == pytest.approx(recorded, abs=1e-5)
    assert swept["bound"][0] == pytest.approx(recorded, abs=1e-5)
