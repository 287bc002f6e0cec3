"""Named arrays through ArviZ itself, whichever is installed: 0.23's InferenceData or 1.x's DataTree.

Needs neither torch nor Pyro, so that it also runs beside an ArviZ whose Python has no torch:
`pytest --noconftest -c /dev/null tests/diagnostics/test_arviz_versions.py`.
"""

import importlib
import math
import sys
import types
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
ROOT = Path(__file__).parents[2] / "pyrolvm"


def _module(name):
    """pyrolvm's module, without running its packages where torch is missing."""
    if importlib.util.find_spec("torch") is None:
        for package in ("pyrolvm", "pyrolvm.diagnostics"):
            stub = sys.modules.setdefault(package, types.ModuleType(package))
            stub.__path__ = [str(ROOT.parent / package.replace(".", "/"))]
    return importlib.import_module(name)


idata_module = _module("pyrolvm.diagnostics.inference_data")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 announces 1.0
    import arviz as az

MODERN = idata_module.arviz_is_modern()
N, S = 50, 1000
Y = np.random.default_rng(0).normal(0.5, 1.0, N)
MEAN, VARIANCE = Y.sum() / (N + 1), 1 / (N + 1)


def _log_normal(x, mean, variance):
    return -0.5 * np.log(2 * math.pi * variance) - (x - mean) ** 2 / (2 * variance)


@pytest.fixture(scope="module")
def idata():
    """m ~ N(0, 1); y_n ~ N(m, 1): draws of the exact posterior, and of q twice as wide."""
    rng = np.random.default_rng(1)
    m = rng.normal(MEAN, math.sqrt(VARIANCE), S)
    pointwise = _log_normal(Y, m[:, None], 1.0)
    prior = rng.normal(0, 1, S)
    arrays = {
        "posterior": {"m": m, "W": rng.normal(size=(S, 3, 2))},
        "posterior_predictive": {"y": rng.normal(m[:, None], 1, (S, N))},
        "prior": {"m": prior, "W": rng.normal(size=(S, 3, 2))},
        "prior_predictive": {"y": rng.normal(prior[:, None], 1, (S, N))},
        "log_likelihood": {"y": pointwise},
        "observed_data": {"y": Y},
        "sample_stats": {
            "log_p": pointwise.sum(1) + _log_normal(m, 0, 1),
            "log_q": _log_normal(m, MEAN, VARIANCE),
        },
    }
    dims = {"m": (), "W": ("W_dim_0", "W_dim_1"), "y": ("data",), "log_p": (), "log_q": ()}
    attrs = {"model": "GlobalMean", "inference_library": "pyrolvm", "seed": 0}
    coords = {"data": [f"row {i}" for i in range(N)]}
    return idata_module.to_arviz(arrays, dict.fromkeys(arrays, dims), coords, attrs)


def test_all_groups_are_there_with_dims_and_attributes(idata):
    found = {str(g).strip("/") for g in (idata.groups if MODERN else idata.groups())} - {""}
    assert found == set(idata_module.GROUPS)
    assert idata["posterior"]["W"].dims == ("chain", "draw", "W_dim_0", "W_dim_1")
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "data")
    assert idata["observed_data"]["y"].dims == ("data",)
    assert idata["posterior_predictive"]["data"].values[1] == "row 1"
    assert idata["log_likelihood"]["y"].attrs["units"] == "nats"
    assert idata["posterior"].attrs["inference_library"] == "pyrolvm"
    assert idata.attrs["model"] == "GlobalMean"
    assert type(idata).__name__ == ("DataTree" if MODERN else "InferenceData")


def test_summary_has_the_posteriors_moments(idata):
    table = az.summary(idata, kind="stats", var_names=["m"], round_to="none")
    assert float(table.loc["m", "mean"]) == pytest.approx(MEAN, abs=5 * math.sqrt(VARIANCE / S))
    assert float(table.loc["m", "sd"]) == pytest.approx(math.sqrt(VARIANCE), rel=0.1)


def _exact_loo():
    """log p(y_n | the others) in closed form."""
    mean, variance = (Y.sum() - Y) / N, 1 / N
    return _log_normal(Y, mean, variance + 1)


def _elpd(result):
    return float(result.elpd if MODERN else result.elpd_loo)


def test_loo_is_the_exact_leave_one_out(idata):
    result = az.loo(idata, pointwise=True)
    assert _elpd(result) == pytest.approx(_exact_loo().sum(), abs=0.1)
    pointwise = result.elpd_i if MODERN else result.loo_i
    np.testing.assert_allclose(np.asarray(pointwise), _exact_loo(), atol=0.05)
    assert float(np.max(np.asarray(result.pareto_k))) < 0.5


def test_log_p_and_log_q_serve_loo_of_an_approximate_posterior(idata):
    stats = idata["sample_stats"]
    ratio = np.asarray(stats["log_p"] - stats["log_q"])
    assert ratio.shape == (1, S)
    # q is exact, so that log p(y, m) - log q(m) is log p(y) whatever the draw
    covariance = np.eye(N) + 1
    evidence = -0.5 * (
        N * math.log(2 * math.pi) + np.linalg.slogdet(covariance)[1] + Y @ np.linalg.solve(covariance, Y)
    )
    np.testing.assert_allclose(ratio, evidence, rtol=1e-9)
    result = idata_module.approximate_loo(idata)
    assert _elpd(result) == pytest.approx(_exact_loo().sum(), abs=0.1)
    pointwise = result.elpd_i if MODERN else result.loo_i
    np.testing.assert_allclose(np.asarray(pointwise), _exact_loo(), atol=0.05)


def test_netcdf_keeps_everything(idata, tmp_path):
    path = tmp_path / "run" / "inference_data.nc"
    path.parent.mkdir()
    if importlib.util.find_spec("torch") is None:
        idata.to_netcdf(str(path), engine="h5netcdf")
    else:
        assert idata_module.save_inference_data(idata, path) == path
        assert [p.name for p in path.parent.iterdir()] == ["inference_data.nc"]
    again = idata_module.load_inference_data(path)
    for group in idata_module.GROUPS:
        for name, values in idata[group].data_vars.items():
            assert again[group][name].dims == values.dims
            np.testing.assert_array_equal(again[group][name].values, values.values)
    assert list(again["observed_data"]["data"].values[:2]) == ["row 0", "row 1"]
    assert again["posterior"].attrs["model"] == "GlobalMean"
    path.unlink()  # nothing holds the file, and what was read stays
    assert float(again["posterior"]["m"].mean()) == pytest.approx(float(idata["posterior"]["m"].mean()))
    assert _elpd(az.loo(again)) == pytest.approx(_exact_loo().sum(), abs=0.1)


def test_a_file_that_is_not_there_or_not_netcdf_is_refused(tmp_path):
    error = sys.modules["pyrolvm.errors"].RunFolderError
    with pytest.raises(error, match="does not exist"):
        idata_module.load_inference_data(tmp_path / "none.nc")
    (tmp_path / "bad.nc").write_text("not netCDF")
    with pytest.raises(error, match="cannot be read"):
        idata_module.load_inference_data(tmp_path / "bad.nc")


# ArviZ 0.23 calls matplotlib in a way that 3.11 will give up
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping:DeprecationWarning")
def test_plots_of_predictions_and_pairs_draw(idata):
    import matplotlib.pyplot as plt

    if MODERN:
        az.plot_ppc_dist(idata, num_samples=20)
        az.plot_pair(idata, var_names=["W"])
        az.plot_prior_posterior(idata, var_names=["m"])
    else:
        az.plot_ppc(idata, num_pp_samples=20)
        az.plot_pair(idata, var_names=["W"])
        az.plot_dist_comparison(idata, var_names=["m"])
    assert len(plt.get_fignums()) == 3
    plt.close("all")
