"""A fit as ArviZ sees it: InferenceData on ArviZ 0.23, an xarray DataTree on ArviZ 1.x.

Draws of a guide are independent, so they stand as one chain: r-hat and effective sample sizes say nothing
about them, and `az.summary(idata, kind="stats")` is the summary that means something. How far the guide is from
the posterior is another question: see `pyrolvm.diagnose`.

`pyrolvm.diagnostics.tables` names the dimensions, `to_arviz` is the one place that knows which ArviZ is installed.
This is the only file that imports arviz, and it does so when called: importing pyrolvm stays quick and quiet.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyrolvm.diagnostics.tables import Tables
    from pyrolvm.inference.posterior.fitted import FittedModel

GROUPS = (
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "log_likelihood",
    "observed_data",
    "sample_stats",
)


def to_inference_data(
    fitted: FittedModel,
    x: Any,
    *,
    num_samples: int = 500,
    groups: Sequence[str] = GROUPS,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """Draws for the rows of `x` as an `arviz.InferenceData` (ArviZ 0.23) or `xarray.DataTree` (ArviZ 1.x).

    The same `seed` gives the same numbers as `fitted.draws(x, num_samples, seed=seed)`. Draws are one chain:
    [1, num_samples, ...]. All log-densities are in nats.

    Groups
    ------
    posterior: every latent site, local ones [chain, draw, row, event...], global ones without row. Latents that
        the model sums out are drawn from p(z | x, other latents).
    posterior_predictive, prior_predictive: data drawn anew, [chain, draw, row, event...].
    prior: every latent, from the model alone.
    log_likelihood: log p(x | z) of each observed site, [chain, draw, row]; where latents are summed out, the sum.
    observed_data: the observed values, [row, event...].
    sample_stats: `log_p` and `log_q` [chain, draw], the joint log p(x, z) and log q(z) over the rows of `x`, as
        `approximate_loo` takes them; `log_p_row` and `log_q_row` [chain, draw, row], the part of
        each datum given the global latents.

    Dimensions: a plate gives its name ("data"); the entries of a row are "feature", with the table's column names
    as coordinates; a latent vector `z` has "z_dim", and the categories of a discrete `z` are "z_category". Other
    sites take these names for axes of the same length, if only one name has it ("loadings": feature, z_dim).
    A table's own index becomes the coordinate of the rows.

    LOO is for latents that the data share. With a latent per datum, 1 / E[1 / p(x_n | z_n)] stands for log p(x_n) and
    converges badly (k-hat says so): compare such models by `fitted.log_evidence(x)`.

    Parameters
    ----------
    groups: those wanted. What is not is not kept in memory; predictions and likelihoods hold
        num_samples x rows (x features) numbers.
    dims: site -> names of its event dimensions, where the names above do not suit.

    Raises `SettingError` for an unknown group, dims that do not fit, or more numbers than the machine's memory
    holds, `ProgramError` if the model sums out latents that are not inside its data plate, and `DataError` for
    data that do not fit.
    """
    from pyrolvm.diagnostics.collect import collect
    from pyrolvm.diagnostics.tables import build_tables

    wanted = _known(groups)
    found = collect(fitted, x, num_samples, wanted, seed, progress=progress)
    tables = build_tables(
        found.arrays,
        found.layouts,
        row_dim=found.row_dim,
        row_names=found.row_names,
        columns=fitted.columns or found.columns,
        dims=dims,
        attrs=found.attrs,
    )
    return to_arviz(tables)


def _known(groups: Sequence[str]) -> tuple[str, ...]:
    from pyrolvm.errors import SettingError

    groups = (groups,) if isinstance(groups, str) else tuple(groups)
    unknown = [g for g in groups if g not in GROUPS]
    if unknown or not groups:
        what = f"groups has '{unknown[0]}', which is not known" if unknown else "groups is empty"
        raise SettingError(f"{what}: choose from {', '.join(GROUPS)}")
    return tuple(g for g in GROUPS if g in groups)


def to_arviz(tables: Tables) -> Any:
    """An `arviz.InferenceData` with ArviZ 0.23, an `xarray.DataTree` with ArviZ 1.x."""
    import xarray

    datasets = {}
    for group, variables in tables.groups.items():
        nats = group in ("log_likelihood", "sample_stats")
        data = {k: (dims, value, {"units": "nats"} if nats else {}) for k, (dims, value) in variables.items()}
        used = {d for dims, _ in variables.values() for d in dims}
        coords = {k: v for k, v in tables.coords.items() if k in used}
        datasets[group] = xarray.Dataset(data, coords, tables.attrs)
    if arviz_is_modern():
        return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=tables.attrs), **datasets})
    with _quietly():
        import arviz
    groups: dict[str, Any] = datasets
    return arviz.InferenceData(attrs=dict(tables.attrs), **groups)


def arviz_is_modern() -> bool:
    """Whether the installed ArviZ is 1.x, whose home is xarray's DataTree."""
    return int(version("arviz").split(".")[0]) >= 1


@contextmanager
def _quietly() -> Iterator[None]:
    """ArviZ 0.23 announces 1.0 whenever it is imported."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
        yield


def summarise(idata: Any, names: Sequence[str] = ()) -> Any:
    """ArviZ's table of the posterior (of `names`, or all), a DataFrame of means, sds and intervals.

    A guide's draws are independent and one chain, so that r-hat and effective sizes would say nothing. Labels have no
    mean: discrete latents are left out, or, where all are discrete, given as the share of the draws at each value.
    """
    with _quietly():
        import arviz
    posterior = idata["posterior"]
    chosen = list(names) or list(posterior.data_vars)
    numbers = [name for name in chosen if posterior[name].dtype.kind == "f"]
    if not numbers:
        return _shares({name: posterior[name].values for name in chosen})
    return arviz.summary(idata, kind="stats", var_names=numbers, round_to=4)


def _shares(labels: dict[str, Any]) -> Any:
    """How many of the draws of discrete latents [chain, draw, ...] take each value."""
    import numpy as np
    import pandas as pd

    lines = {}
    for name, values in labels.items():
        for label, count in zip(*np.unique(values, return_counts=True), strict=True):
            lines[f"{name} = {label}"] = {"share": round(count / values.size, 4)}
    return pd.DataFrame.from_dict(lines, orient="index")


def approximate_loo(idata: Any) -> Any:
    """Leave-one-out log predictive density of the *posterior* from draws of the guide, as `az.compare` takes it.

    The draws are weighed by p(x, z) / (q(z) p(x_n | z)), smoothed by Pareto's tail (Magnusson et al. 2019, "Bayesian
    leave-one-out cross-validation for large data"), so that fits of the same model with different guides agree where
    `pareto_k` is below 0.7; `az.loo` alone takes the guide for the posterior. ArviZ 1.x has it as
    `loo_approximate_posterior`; for ArviZ 0.23 it is computed here.

    Raises `SettingError` unless `idata` has the groups log_likelihood, of one site, and sample_stats.
    """
    with _quietly():
        import arviz
    groups = {g: idata[g] for g in ("log_likelihood", "sample_stats") if g in idata}
    if len(groups) < 2 or len(groups["log_likelihood"].data_vars) != 1:
        from pyrolvm.errors import SettingError

        raise SettingError(
            "approximate_loo needs log_likelihood of one observed site, and sample_stats: pass "
            "to_inference_data(fitted, x), with these among its groups"
        )
    stats = groups["sample_stats"]
    if arviz_is_modern():
        modern: Any = arviz
        return modern.loo_approximate_posterior(idata, stats["log_p"], stats["log_q"], pointwise=True)
    [log_likelihood] = groups["log_likelihood"].data_vars.values()
    return _weighed_loo(
        arviz, log_likelihood.stack(__sample__=("chain", "draw")), stats["log_p"] - stats["log_q"]
    )


def _weighed_loo(arviz: Any, log_likelihood: Any, log_ratio: Any) -> Any:
    """`az.loo` of ArviZ 0.23 with weights: log_likelihood [rows..., samples], log_ratio [chain, draw]."""
    import numpy as np
    from scipy.special import logsumexp

    ratio = log_ratio.stack(__sample__=("chain", "draw"))
    corrected = (ratio - ratio.max() - log_likelihood).transpose(..., "__sample__")
    log_weights, pareto_k = arviz.psislw(corrected)  # normalised over samples
    each = (log_weights + log_likelihood).reduce(logsumexp, "__sample__").rename("loo_i")
    whole, _ = arviz.psislw(np.asarray(ratio - ratio.max()))
    fitted = logsumexp(np.asarray(log_likelihood) + whole, axis=-1).sum()
    samples = log_likelihood.sizes["__sample__"]
    good_k = min(1 - 1 / np.log10(samples), 0.7)
    total, error = float(each.sum()), float((each.size * each.var()) ** 0.5)
    found = {
        "elpd_loo": total,
        "se": error,
        "p_loo": float(fitted - total),
        "n_samples": samples,
        "n_data_points": each.size,
        "warning": bool((pareto_k > good_k).any()),
        "loo_i": each,
        "pareto_k": pareto_k,
        "scale": "log",
        "good_k": good_k,
    }
    from arviz.stats.stats_utils import ELPDData

    return ELPDData(data=list(found.values()), index=list(found))


def save_inference_data(idata: Any, path: str | Path) -> Path:
    """Write what `to_inference_data` gave as one netCDF file, in one step: the old file stays until then."""
    from pyrolvm.files import write_atomically

    write_atomically(Path(path), lambda p: idata.to_netcdf(str(p), engine="h5netcdf"))
    return Path(path)


def load_inference_data(path: str | Path) -> Any:
    """Read `save_inference_data`'s file into memory. Raises `RunFolderError` if it is missing or damaged."""
    from pyrolvm.errors import RunFolderError

    if not Path(path).is_file():
        raise RunFolderError(f"{path} does not exist: write it with save_inference_data(idata, '{path}')")
    try:
        return _read(Path(path))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read as netCDF: {error}") from None


def _read(path: Path) -> Any:
    if arviz_is_modern():
        import xarray

        with xarray.open_datatree(path, engine="h5netcdf") as tree:
            return tree.load()
    with _quietly():
        import arviz
    with arviz.rc_context({"data.load": "eager"}):
        return arviz.InferenceData.from_netcdf(str(path), engine="h5netcdf")
