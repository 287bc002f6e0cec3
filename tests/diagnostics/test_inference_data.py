"""A fit as ArviZ sees it: the same numbers as FittedModel.draws, named; and against closed forms."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import SCHOOLS_Y, GlobalMean, eight_schools
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyrolvm
from pyrolvm import PPCA, VAE, BayesianFactorAnalysis, SettingError
from pyrolvm.diagnostics import approximate_loo, collect, to_inference_data
from pyrolvm.diagnostics import dims as dims_module
from pyrolvm.diagnostics.inference_data import GROUPS, arviz_is_modern, summarise
from pyrolvm.inference.program.pair import Pair

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

QUIET = {"progress": False, "engine": "eager"}
STILL = QUIET | {"num_steps": 1, "learning_rate": 1e-12, "initialise": False}
X = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
TABLE = pd.DataFrame(X.numpy(), columns=list("abcde"), index=[f"row {i}" for i in range(30)])


def dims(idata, group, name):
    return idata[group][name].dims


@pytest.fixture(scope="module")
def ppca():
    return pyrolvm.fit(PPCA.closed_form(X, 2, guide="full"), TABLE, **STILL)


def test_every_group_has_its_dimensions_and_coordinates(ppca):
    idata = to_inference_data(ppca, TABLE, num_samples=7)
    draws = ("chain", "draw", "data")
    assert idata["posterior"]["z"].shape == (1, 7, 30, 2)
    assert dims(idata, "posterior", "z") == dims(idata, "prior", "z") == (*draws, "z_dim")
    assert dims(idata, "posterior_predictive", "x") == (*draws, "feature")
    assert dims(idata, "prior_predictive", "x") == (*draws, "feature")
    assert dims(idata, "log_likelihood", "x") == draws
    assert dims(idata, "observed_data", "x") == ("data", "feature")
    assert dims(idata, "sample_stats", "log_p") == draws[:2]
    assert dims(idata, "sample_stats", "log_q_row") == draws
    assert list(idata["observed_data"]["feature"].values) == list("abcde")
    assert list(idata["posterior"]["data"].values) == list(TABLE.index)
    chosen = idata["observed_data"]["x"].sel(data="row 3", feature="c")
    assert float(chosen) == pytest.approx(TABLE.loc["row 3", "c"])


def test_attributes_say_where_the_numbers_are_from(ppca):
    attrs = to_inference_data(ppca, TABLE, num_samples=2, groups=["posterior"], seed=4)["posterior"].attrs
    assert attrs["model"] == "PPCA"
    assert attrs["seed"] == 4
    assert attrs["inference_library"] == "pyrolvm"
    assert attrs["torch_version"] == torch.__version__
    assert pd.Timestamp(attrs["created_at"]).tz is not None


def test_values_are_those_of_draws_with_the_same_seed_in_any_chunks(ppca, monkeypatch):
    chunks = Pair.chunks
    for budget in (2**22, 9 * 7 * 5):
        monkeypatch.setattr(Pair, "chunks", lambda self, per_row=1, b=budget: chunks(self, per_row, b))
        idata = to_inference_data(ppca, X, num_samples=7, seed=3)
        draws, prior = (ppca.draws(X, 7, seed=3, prior=p) for p in (False, True))
        pairs = [
            (idata["posterior"]["z"], draws.values["z"]),
            (idata["posterior_predictive"]["x"], draws.predictive["x"]),
            (idata["log_likelihood"]["x"], draws.pointwise["x"]),
            (idata["prior"]["z"], prior.values["z"]),
            (idata["prior_predictive"]["x"], prior.predictive["x"]),
            (idata["sample_stats"]["log_q_row"], draws.log_guide),
            (idata["sample_stats"]["log_p_row"], draws.log_prior + draws.log_likelihood),
        ]
        for found, expected in pairs:
            np.testing.assert_array_equal(found.values[0], expected.numpy())
        np.testing.assert_array_equal(idata["observed_data"]["x"].values, X.numpy())


def test_likelihoods_and_log_densities_are_the_analytic_ones(ppca):
    idata = to_inference_data(ppca, X, num_samples=5)
    model = ppca.model
    z = torch.from_numpy(idata["posterior"]["z"].values[0])
    mean = z @ model.loadings.T + model.offset
    expected = dist.Normal(mean, model.noise_scale).log_prob(X).sum(-1).detach().numpy()
    np.testing.assert_allclose(idata["log_likelihood"]["x"].values[0], expected, rtol=1e-4, atol=1e-4)
    stats = idata["sample_stats"]
    # the guide is the exact posterior: log p(x, z) - log q(z | x) is log p(x) at every draw
    evidence = model.log_marginal(X).detach().numpy()
    difference = (stats["log_p_row"] - stats["log_q_row"]).values[0]
    np.testing.assert_allclose(difference, np.broadcast_to(evidence, (5, 30)), atol=2e-3)
    np.testing.assert_allclose((stats["log_p"] - stats["log_q"]).values, evidence.sum(), atol=0.05)
    assert stats["log_p"].attrs["units"] == "nats"


def test_loo_of_a_shared_latent_is_the_exact_one():
    program, x = GlobalMean(), X[:, 0]
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, **STILL)
    N = len(x)
    with torch.no_grad():
        fitted.program.load(
            {"loc": (x.sum() / (N + 1)).reshape(()), "scale": torch.tensor(-0.5 * math.log(N + 1))}
        )
    idata = to_inference_data(
        fitted, x, num_samples=2000, groups=["posterior", "log_likelihood", "sample_stats"]
    )
    assert dims(idata, "posterior", "m") == ("chain", "draw")
    exact = dist.Normal((x.sum() - x) / N, math.sqrt(1 + 1 / N)).log_prob(x).sum().item()
    result = az.loo(idata, pointwise=True)
    assert (result.elpd if arviz_is_modern() else result.elpd_loo) == pytest.approx(exact, abs=0.1)
    stats = idata["sample_stats"]
    covariance = torch.eye(N) + 1
    evidence = dist.MultivariateNormal(torch.zeros(N), covariance).log_prob(x).item()
    np.testing.assert_allclose((stats["log_p"] - stats["log_q"]).values, evidence, atol=2e-3)


def test_eight_schools_in_plain_pyro():
    fitted = pyrolvm.fit(eight_schools, SCHOOLS_Y, guide=AutoNormal, num_steps=5, **QUIET)
    idata = to_inference_data(fitted, SCHOOLS_Y, num_samples=6)
    assert set(idata["posterior"].data_vars) == {"mu", "tau", "theta"}
    assert dims(idata, "posterior", "theta") == dims(idata, "log_likelihood", "y")
    assert dims(idata, "posterior", "theta") == ("chain", "draw", "school")
    assert dims(idata, "posterior", "mu") == ("chain", "draw")
    mu, tau, theta = (idata["posterior"][n].values[0] for n in ("mu", "tau", "theta"))
    t = torch.from_numpy
    log_p = dist.Normal(0.0, 5.0).log_prob(t(mu)) + dist.HalfCauchy(5.0).log_prob(t(tau))
    log_p = log_p + dist.Normal(0.0, 1.0).log_prob(t(theta)).sum(-1)
    log_p = log_p.numpy() + idata["log_likelihood"]["y"].values[0].sum(-1)
    np.testing.assert_allclose(idata["sample_stats"]["log_p"].values[0], log_p, rtol=1e-5)
    assert len(az.summary(idata, kind="stats")) == 10


def test_a_table_of_the_shared_weights_is_by_feature_and_factor_if_so_named():
    fitted = pyrolvm.fit(BayesianFactorAnalysis(5, 2, "ard"), TABLE, num_steps=1, **QUIET)
    names = {"loadings": ["feature", "z_dim"], "relevance": ["z_dim"], "offset": ["feature"]}
    idata = to_inference_data(fitted, TABLE, num_samples=3, groups=("posterior", "prior"), dims=names)
    for group in ("posterior", "prior"):
        for site, own in names.items():
            assert dims(idata, group, site) == ("chain", "draw", *own)
    assert idata["posterior"]["loadings"].sel(feature="d").shape == (1, 3, 2)
    plain = to_inference_data(fitted, TABLE, num_samples=3, groups=("posterior",))
    assert dims(plain, "posterior", "loadings") == ("chain", "draw", "loadings_dim_0", "loadings_dim_1")


def test_a_vae_and_a_summary_of_some_of_its_latents():
    fitted = pyrolvm.fit(VAE(5, 2, "gaussian", hidden=(4,)), X, num_steps=1, **QUIET)
    idata = to_inference_data(fitted, X[:3], num_samples=20)
    assert idata["posterior"]["z"].shape == (1, 20, 3, 2)
    assert len(az.summary(idata, kind="stats", var_names=["z"])) == 6


def test_a_guide_joint_over_the_data_has_totals_but_no_rows():
    def model(x):
        with pyro.plate("rows", 12):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    fitted = pyrolvm.fit(model, torch.zeros(12), guide=AutoMultivariateNormal, num_steps=2, **QUIET)
    idata = to_inference_data(fitted, torch.zeros(12), num_samples=4)
    assert set(idata["sample_stats"].data_vars) == {"log_p", "log_q"}
    z = torch.from_numpy(idata["posterior"]["z"].values[0])
    guide = fitted.program.auto_guide
    with fitted.program.scope():
        expected = guide.get_posterior().log_prob(z).detach().numpy()
    np.testing.assert_allclose(idata["sample_stats"]["log_q"].values[0], expected, rtol=1e-4)


def test_only_what_is_wanted_is_drawn_and_kept(ppca, monkeypatch):
    idata = to_inference_data(ppca, X, num_samples=3, groups=["posterior", "observed_data"])
    found = {str(g).strip("/") for g in (idata.groups if arviz_is_modern() else idata.groups())} - {""}
    assert found == {"posterior", "observed_data"}
    monkeypatch.setattr(type(ppca), "draw_chunks", None)
    to_inference_data(ppca, X, groups="observed_data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": ["posterior", "warmup"]}, "groups='warmup' is not known: choose from posterior, "),
        ({"groups": []}, "groups is empty: choose from"),
        ({"num_samples": 0}, "positive whole number"),
        ({"dims": {"w": ["factor"]}}, "'w', which is not one of z, x"),
        ({"dims": {"z": ["factor", "other"]}}, r"event dimensions are \[2\]: type a list of 1 different"),
    ],
)
def test_settings_that_cannot_be_are_refused(ppca, options, message):
    with pytest.raises(SettingError, match=message):
        to_inference_data(ppca, X, **{"num_samples": 2, **options})


def test_given_dimensions_are_used_everywhere(ppca):
    idata = to_inference_data(ppca, X, num_samples=2, dims={"z": ["factor"]})
    assert dims(idata, "posterior", "z")[-1] == "factor"


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (pd.RangeIndex(30), list(range(30))),
        (pd.RangeIndex(10, 40), list(range(10, 40))),
        (pd.Index(["same"] * 30), list(range(30))),
        (pd.Index([None, *"abcdefghijklmnopqrstuvwxyz", 1, 2, 3]), None),
        (pd.MultiIndex.from_product([["a", "b", "c"], range(10)]), None),
        (pd.date_range("2020", periods=30), None),
    ],
)
def test_the_tables_index_names_the_rows_if_it_can(ppca, index, expected):
    idata = to_inference_data(ppca, TABLE.set_axis(index), num_samples=2, groups=["posterior"])
    found = idata["posterior"]["data"].values
    assert list(found) == (expected if expected is not None else list(found))
    if isinstance(index, pd.MultiIndex):
        assert found[0] == "('a', 0)"
    if isinstance(index, pd.DatetimeIndex):
        assert np.issubdtype(found.dtype, np.datetime64)


def test_a_run_is_written_and_read_back(ppca, tmp_path):
    from pyrolvm.diagnostics.inference_data import load_inference_data, save_inference_data

    idata = to_inference_data(ppca, TABLE, num_samples=4)
    again = load_inference_data(save_inference_data(idata, tmp_path / "inference_data.nc"))
    for group in GROUPS:
        for name, values in idata[group].data_vars.items():
            np.testing.assert_array_equal(again[group][name].values, values.values)
    assert again["posterior"].attrs == idata["posterior"].attrs


def test_importing_the_package_does_not_import_arviz():
    code = "import sys, pyrolvm, pyrolvm.diagnostics; sys.exit('arviz' in sys.modules or 'xarray' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


def test_more_than_the_memory_holds_is_refused_in_a_line(monkeypatch):
    x = torch.randn(30, 5)
    fitted = pyrolvm.fit(pyrolvm.PPCA(5, 2), x, num_steps=1, progress=False, engine="eager")
    arrays = to_inference_data(fitted, x, num_samples=40)
    held = sum(
        v.nbytes
        for group in ("posterior", "prior", "posterior_predictive", "prior_predictive", "log_likelihood")
        for v in arrays[group].data_vars.values()
    )
    stats = ("posterior", "prior", "posterior_predictive", "prior_predictive", "log_likelihood")
    assert held == 4 * 40 * collect.numbers_per_draw(fitted.structure, 30, stats)
    monkeypatch.setattr(collect, "physical_memory", lambda: 2.0 * held)
    with pytest.raises(
        SettingError, match=r"150 draws for 30 rows take .* GiB and this machine has .*: pass fewer rows"
    ):
        to_inference_data(fitted, x, num_samples=150)
    to_inference_data(fitted, x, num_samples=150, groups=["posterior", "log_likelihood"])


def test_loo_of_the_posterior_from_a_guide_that_is_wrong():
    """m ~ N(0, 1), x_n ~ N(m, 1): log N(x_n; sum of the others / N, 1 + 1 / N), whatever the guide."""
    x = torch.randn(12, generator=torch.Generator().manual_seed(2)) + 1
    exact = dist.Normal((x.sum() - x) / 12, math.sqrt(1 + 1 / 12)).log_prob(x)
    found = {}
    for name, shift, scale in (("right", 0.0, 1.0), ("wrong", 0.8, 1.5)):  # in posterior sds
        fitted = pyrolvm.fit(GlobalMean().model, x, guide=GlobalMean().guide, **STILL)
        with torch.no_grad():
            fitted.program.parameters["loc"].fill_((x.sum() / 13 + shift / 13**0.5).item())
            fitted.program.parameters["scale"].fill_(math.log(scale / 13**0.5))
        idata = to_inference_data(fitted, x, num_samples=20_000)
        found[name] = approximate_loo(idata)
        pointwise = np.asarray(found[name].elpd_i if arviz_is_modern() else found[name].loo_i)
        np.testing.assert_allclose(pointwise, exact, atol=0.03)
        plain = az.loo(idata)
        gap = float(plain.elpd if arviz_is_modern() else plain.elpd_loo) - exact.sum().item()
        assert (abs(gap) > 0.3) == (name == "wrong")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23's own, of pandas
        table = az.compare(found)
    assert set(table.index) == {"right", "wrong"}
    assert table["elpd_diff"].abs().max() < 0.1
    with pytest.raises(SettingError, match="approximate_loo needs log_likelihood of one observed site"):
        approximate_loo(to_inference_data(fitted, x, num_samples=5, groups=["posterior"]))


def test_other_rows_than_the_training_data_have_no_weights_for_loo():
    x = torch.randn(40, generator=torch.Generator().manual_seed(2)) + 1
    fitted = pyrolvm.fit(GlobalMean().model, x, guide=GlobalMean().guide, **STILL)
    part = to_inference_data(fitted, x[:10], num_samples=50)
    assert set(part["sample_stats"].data_vars) == {"log_p_row", "log_q_row"}
    with pytest.raises(SettingError, match="'m' is shared by all data, its guide is fitted to 40 rows"):
        approximate_loo(part)
    assert {"log_p", "log_q"} <= set(to_inference_data(fitted, x, num_samples=50)["sample_stats"].data_vars)
    ppca = pyrolvm.fit(
        PPCA.closed_form(X, 2), X, **STILL
    )  # latents of each datum only: any rows have weights
    assert "log_p" in to_inference_data(ppca, X[:10], num_samples=5)["sample_stats"]


def test_dimensions_are_never_called_like_a_variable_and_mean_one_length():
    layouts = {
        "data": dims_module.Layout(("data",), (), True),
        "draw": dims_module.Layout(("chain",), (), False),
        "b": dims_module.Layout((), (3,), False),
    }
    arrays = {"posterior": {"draw": np.zeros((4, 2))}, "posterior_predictive": {"data": np.zeros((4, 3))}}
    dims, coords = dims_module.name_dims(arrays, layouts, {}, "data", ["a", "b", "c"], None)
    assert dims["posterior_predictive"]["data"] == ("data_dim",)
    assert dims["posterior"]["draw"] == ("chain_dim",)
    assert coords == {"data_dim": ["a", "b", "c"]}
    arrays = {"posterior": {"draw": np.zeros((4, 2)), "b": np.zeros((4, 3))}}
    with pytest.raises(SettingError, match="'chain_dim' has 2 entries in one site and 3 in another"):
        dims_module.name_dims(arrays, layouts, {"b": ["chain"]}, "data", None, None)


def test_labels_are_counted_and_not_averaged():
    x = torch.cat([torch.zeros(30, 1), torch.full((10, 1), 8.0)]) + 0.3 * torch.arange(40.0).sin()[:, None]
    mixture = pyrolvm.GaussianMixture(1, 2)
    fitted = pyrolvm.fit(mixture, x, num_steps=100, learning_rate=0.02, engine="eager", progress=False)
    idata = to_inference_data(fitted, x, num_samples=20, groups=["posterior"])
    shares = summarise(idata)
    expected = mixture.responsibilities(x)  # [rows, K]
    error = (expected * (1 - expected) / 20).sum(0).sqrt() / len(x)  # of the mean over 20 draws of each row
    assert ((torch.tensor(shares["share"].values) - expected.mean(0)).abs() < 4 * error + 1e-4).all()
    assert list(shares.index) == ["z = 0", "z = 1"]
    mixture = pyrolvm.GaussianMixture(1, 2, prior="conjugate")
    fitted = pyrolvm.fit(mixture, x, num_steps=20, learning_rate=0.02, engine="eager", progress=False)
    idata = to_inference_data(fitted, x, num_samples=5, groups=["posterior"])
    assert not any(str(name).startswith("z") for name in summarise(idata).index)


def test_chosen_rows_keep_their_numbers_and_names(ppca):
    some = to_inference_data(ppca, TABLE, num_samples=5, prior_samples=3, rows=[4, 2])
    assert list(some["posterior"]["data"].values) == [TABLE.index[4], TABLE.index[2]]
    assert some["observed_data"]["x"].values == pytest.approx(TABLE.iloc[[4, 2]].to_numpy(), rel=1e-6)
    assert (some["posterior"].sizes["draw"], some["prior"].sizes["draw"]) == (5, 3)
    without = to_inference_data(ppca, TABLE.to_numpy(), num_samples=5, rows=[4, 2], groups=["posterior"])
    assert list(without["posterior"]["data"].values) == [4, 2]
    for rows in ([], [30], [-1], [0.5]):
        with pytest.raises(SettingError, match="rows must be numbers from 0 to 29"):
            to_inference_data(ppca, TABLE, rows=rows)
