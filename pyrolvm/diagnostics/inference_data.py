"""A fit as ArviZ sees it: InferenceData on ArviZ 0.23, an xarray DataTree on ArviZ 1.x.

Draws of a guide are independent, so they stand as one chain: r-hat and effective sample sizes carry no information
about them, and `az.summary(idata, kind="stats")` is the summary that means something. How far the guide is from
the posterior is another question: see `pyrolvm.diagnose`.

`pyrolvm.diagnostics.collect` names the dimensions, `to_arviz` is the one place that knows which ArviZ is installed.
This is the only file that imports arviz, and it does so when called: importing pyrolvm stays quick and quiet.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import logsumexp

from pyrolvm.diagnostics.collect import collect
from pyrolvm.errors import RunFolderError, SettingError, one_of
from pyrolvm.files import write_atomically
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
    prior_samples: int | None = None,
    rows: Sequence[int] | None = None,
    groups: Sequence[str] = GROUPS,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """Draws for the rows of `x` as an `arviz.InferenceData` (ArviZ 0.23) or `xarray.DataTree` (ArviZ 1.x).

    The same `seed` gives the same numbers as `fitted.draws(x, num_samples, seed=seed)`. Draws are one chain:
    [1, num_samples, ...]. All log-densities are in nats.

    The groups are

    - posterior: every latent site, local ones [chain, draw, row, event...], global ones without row. Latents that
      the model sums out are drawn from p(z | x, other latents).
    - posterior_predictive, prior_predictive: data drawn anew, [chain, draw, row, event...].
    - prior: every latent, from the model alone.
    - log_likelihood: log p(x | z) of each observed site, [chain, draw, row]; where latents are summed out, the sum.
      Masked values add 0.
    - observed_data: the observed values, [row, event...]; NaN where a mask leaves them out.
    - sample_stats: `log_p` and `log_q` [chain, draw], the joint log p(x, z) and log q(z) over the rows of `x`, as
      `approximate_loo` takes them; `log_p_row` and `log_q_row` [chain, draw, row], the part of each datum given the
      global latents. With global latents, `log_p` and `log_q` are of the training data whole, and left out for other
      rows (the attribute "weights" gives the reason).

    A plate gives its name to a dimension ("data"). The entries of a vector of data are "feature", with the table's
    column names as coordinates; those of another vector `z` are "z_dim", of a matrix `W` "W_dim_0" and "W_dim_1".
    A table's own index becomes the coordinate of the rows.

    LOO is for latents that the data share. With a latent per datum, 1 / E[1 / p(x_n | z_n)] stands for log p(x_n) and
    converges badly (k-hat is then large): compare such models by `fitted.log_evidence(x)`.

    Parameters
    ----------
    num_samples : int
        Draws.
    prior_samples : int, optional
        Draws of the two groups of the prior; `num_samples` by default.
    rows : sequence of int, optional
        The numbers of the rows that are wanted, which then name them; all by default.
    groups : list of str
        Those wanted. What is not is not kept in memory; predictions and likelihoods hold
        num_samples x rows (x features) numbers.
    dims : dict, optional
        Site -> names of its event dimensions: {"loadings": ["feature", "z_dim"]}.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree

    Raises
    ------
    SettingError
        An unknown group or row, dims that do not fit, or more numbers than the machine's memory holds.
    ProgramError
        The model sums out latents that are not inside its data plate.
    DataError
        The data do not fit.
    """
    return to_arviz(
        *collect(fitted, x, num_samples, prior_samples, rows, _known(groups), dims or {}, seed, progress)
    )


def _known(groups: Sequence[str]) -> tuple[str, ...]:
    groups = (groups,) if isinstance(groups, str) else tuple(groups)
    if not groups:
        raise SettingError(f"groups is empty: choose from {', '.join(GROUPS)}")
    for group in groups:
        one_of("groups", group, GROUPS)
    return tuple(g for g in GROUPS if g in groups)


def to_arviz(
    arrays: Mapping[str, Mapping[str, Any]],
    dims: Mapping[str, Mapping[str, Sequence[str]]],
    coords: Mapping[str, Any],
    attrs: Mapping[str, Any],
) -> Any:
    """An `arviz.InferenceData` with ArviZ 0.23, an `xarray.DataTree` with ArviZ 1.x.

    Parameters
    ----------
    arrays : dict
        Group -> variable -> [draws, ...], without draws in "observed_data".
    dims : dict
        Group -> variable -> names of the dimensions after the draws.
    coords : dict
        Dimension -> labels.
    attrs : dict
        Of the whole and of each group.
    """
    whole = None
    for group, values in arrays.items():
        chain = {k: v if group == "observed_data" else v[None] for k, v in values.items()}
        named = {k: list(v) for k, v in dims[group].items()}
        part = _one_group(group, chain, {"dims": named, "coords": dict(coords)}, dict(attrs))
        for variable in part[group].data_vars.values() if group in ("log_likelihood", "sample_stats") else ():
            variable.attrs["units"] = "nats"
        if whole is None:
            whole = part
        elif arviz_is_modern():
            whole[group] = part[group]
        else:
            whole.extend(part)
    return whole


def _one_group(group: str, values: dict[str, Any], named: dict[str, Any], attrs: dict[str, Any]) -> Any:
    if arviz_is_modern():
        from arviz_base import from_dict

        return from_dict({group: values}, attrs={"/": attrs, group: attrs}, **named)
    with _quietly():
        import arviz
    given: Any = {group: values, f"{group}_attrs": attrs}
    return arviz.from_dict(**given, attrs=attrs, **named)


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

    A guide's draws are independent and one chain, so that r-hat and effective sizes mean nothing. Labels have no
    mean: discrete latents are left out, or, where all are discrete, given as the share of the draws at each value.
    """
    with _quietly():
        import arviz
    posterior = idata["posterior"]
    chosen = list(names) or list(posterior.data_vars)
    numbers = [name for name in chosen if posterior[name].dtype.kind == "f"]
    if numbers:
        return arviz.summary(idata, kind="stats", var_names=numbers, round_to=4)
    labels = {name: pd.Series(posterior[name].values.ravel()) for name in chosen}
    shares = {name: v.value_counts(normalize=True, sort=False).sort_index() for name, v in labels.items()}
    lines = {f"{name} = {k}": round(share, 4) for name, each in shares.items() for k, share in each.items()}
    return pd.Series(lines, name="share").to_frame()


def approximate_loo(idata: Any) -> Any:
    """Leave-one-out log predictive density of the *posterior* from draws of the guide, as `az.compare` takes it.

    The draws are weighed by p(x, z) / (q(z) p(x_n | z)), smoothed by Pareto's tail (Magnusson et al. 2019, "Bayesian
    leave-one-out cross-validation for large data"), so that fits of the same model with different guides agree where
    `pareto_k` is below 0.7; `az.loo` alone takes the guide for the posterior. ArviZ 1.x has it as
    `loo_approximate_posterior`; for ArviZ 0.23 it is computed here.

    Raises
    ------
    SettingError
        `idata` lacks log_likelihood of one site, or the weights log_p and log_q: these are of the training data whole
        where latents are shared by all data.
    """
    with _quietly():
        import arviz
    groups = {g: idata[g] for g in ("log_likelihood", "sample_stats") if g in idata}
    if len(groups) < 2 or len(groups["log_likelihood"].data_vars) != 1:
        raise SettingError(
            "approximate_loo needs log_likelihood of one observed site, and sample_stats: pass "
            "to_inference_data(fitted, x), with these among its groups"
        )
    stats = groups["sample_stats"]
    if "log_p" not in stats:
        found = stats.attrs.get("weights", "none")
        raise SettingError(f"approximate_loo needs weights, and there are {found}: pass the training data")
    if arviz_is_modern():
        modern: Any = arviz
        return modern.loo_approximate_posterior(idata, stats["log_p"], stats["log_q"], pointwise=True)
    [log_likelihood] = groups["log_likelihood"].data_vars.values()
    flat = (v.stack(__sample__=("chain", "draw")) for v in (log_likelihood, stats["log_p"] - stats["log_q"]))
    return _weighed_loo(arviz, *flat)


def _weighed_loo(arviz: Any, log_likelihood: Any, ratio: Any) -> Any:
    """`az.loo` of ArviZ 0.23 with weights: log_likelihood [rows..., samples], log-ratio [samples]."""
    from arviz.stats.stats_utils import ELPDData

    corrected = (ratio - ratio.max() - log_likelihood).transpose(..., "__sample__")
    log_weights, pareto_k = arviz.psislw(corrected)  # normalised over samples
    each = (log_weights + log_likelihood).reduce(logsumexp, "__sample__").rename("loo_i")
    whole, _ = arviz.psislw(np.asarray(ratio - ratio.max()))
    fitted = logsumexp(np.asarray(log_likelihood) + whole, axis=-1).sum()
    samples = log_likelihood.sizes["__sample__"]
    good_k = min(1 - 1 / np.log10(samples), 0.7)
    total, error = float(each.sum()), float((each.size * each.var()) ** 0.5)
    found = {"elpd_loo": total, "se": error, "p_loo": float(fitted - total), "n_samples": samples}
    found |= {"n_data_points": each.size, "warning": bool((pareto_k > good_k).any()), "loo_i": each}
    found |= {"pareto_k": pareto_k, "scale": "log", "good_k": good_k}
    return ELPDData(data=list(found.values()), index=list(found))


def save_inference_data(idata: Any, path: str | Path) -> Path:
    """Write what `to_inference_data` gave as one netCDF file, in one step: the old file stays until then."""
    write_atomically(Path(path), lambda p: idata.to_netcdf(str(p), engine="h5netcdf"))
    return Path(path)


def load_inference_data(path: str | Path) -> Any:
    """Read `save_inference_data`'s file into memory. Raises `RunFolderError` if it is missing or damaged."""
    if not Path(path).is_file():
        raise RunFolderError(f"{path} does not exist: write it with save_inference_data(idata, '{path}')")
    try:
        if arviz_is_modern():
            import xarray

            with xarray.open_datatree(path, engine="h5netcdf") as tree:
                return tree.load()
        with _quietly():
            import arviz
        with arviz.rc_context({"data.load": "eager"}):
            return arviz.InferenceData.from_netcdf(str(path), engine="h5netcdf")
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read as netCDF: {error}") from None
