"""What the model found (codes, loadings, components; one function per kind of model), and new data from it."""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyrolvm import plots
from pyrolvm.errors import DataError, PyrolvmError, SettingError
from pyrolvm.models import PPCA, BayesianFactorAnalysis, BayesianGaussianMixture, GaussianMixture
from pyrolvm.report.findings import Findings
from pyrolvm.report.parts import Part, figure, table
from pyrolvm.runs import SavedRun

MOST_ROWS, MOST_FEATURES, MOST_COLUMNS = 2000, 24, 8
"""Rows of a scatter plot; features of a figure of loadings; columns of a table of means."""


DRAWS, PICTURES, PAIRS = 1000, 36, 12
PICTURE_SETS = ("digits", "mnist", "sprites")


@torch.no_grad()
def model_parts(found: Findings) -> list[Part]:
    """Figures and tables of the fitted model's own quantities, in the units of the data."""
    try:
        return _parts(found.fitted.model, found) or [Part("text", "Nothing is drawn of this kind of model.")]
    except PyrolvmError as error:
        return [Part("text", f"Not drawn: {error}.")]


@singledispatch
def _parts(model: Any, found: Findings) -> list[Part]:
    """Of any model with one continuous latent per datum: the codes."""
    return _codes(found, "Codes: means of q(z | x), a point for each datum")


@_parts.register
def _(model: PPCA, found: Findings) -> list[Part]:
    """W = U S V': the loadings U S and the scores z V in principal axes, which the likelihood alone leaves open."""
    U, S, Vh = torch.linalg.svd(model.loadings.double().cpu(), full_matrices=False)
    sign = torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True)))  # [1, latent_dim]
    noise = float(model.noise_scale.double() ** 2)
    variances = S.square().numpy()
    total = float(variances.sum()) + model.data_dim * noise
    axes = pd.RangeIndex(1, len(S) + 1)
    loadings = pd.DataFrame((U * S * sign).numpy(), found.names(model.data_dim), axes)
    loadings = loadings.mul(found.recipe.unit(model.data_dim), axis=0)
    long = pd.DataFrame({name: loadings.stack() for name in ("mean", "lower", "upper")})
    percent = ", ".join(f"{100 * v / total:.1f} %" for v in variances[:5])
    return [
        figure(
            plots.plot_scree(variances, total=total, noise=noise),
            "Scree: variance along the principal axes",
            f"Shares of the variance along the first axes: {percent}.",
        ),
        *_codes(found, "Scores: means of q(z | x) in principal axes", (Vh.mT * sign).float()),
        *_drawn_loadings(found, long.rename_axis(["feature", "factor"])),
        table(
            loadings.add_prefix("axis "),
            "Loadings in principal axes, in the units of the data",
            "column",
        ),
    ]


@_parts.register
def _(model: BayesianFactorAnalysis, found: Findings) -> list[Part]:
    scale = np.repeat(found.recipe.unit(model.data_dim), model.latent_dim)[:, None]
    loadings = model.loadings_table(columns=found.names(model.data_dim)) * scale
    return [
        *_drawn_loadings(found, loadings),
        *_codes(found, "Scores: means of q(z | x)"),
        table(loadings, "Loadings, with intervals that hold nine tenths of q(W)", "column, factor"),
    ]


@_parts.register(GaussianMixture)
@_parts.register(BayesianGaussianMixture)
def _(model: GaussianMixture | BayesianGaussianMixture, found: Findings) -> list[Part]:
    unit, names = found.recipe.unit(model.data_dim), found.names(model.data_dim)
    weights, means = model.weights.cpu().numpy(), found.recipe.undo(model.means)
    covariances = (model.scale_tril @ model.scale_tril.mT).cpu().numpy() * unit[:, None] * unit
    columns = {"weight": weights}
    for d, name in enumerate(names[:MOST_COLUMNS]):
        columns |= {f"mean of {name}": means[:, d], f"sd of {name}": covariances[:, d, d] ** 0.5}
    more = f"; the first {MOST_COLUMNS} of {len(names)} columns" if len(names) > MOST_COLUMNS else ""
    parts = [table(pd.DataFrame(columns), f"Components{more}", "component")]
    some = found.some(MOST_ROWS)
    if model.data_dim < 2 or some is None:
        return parts
    x = found.recipe.undo(some.values.astype(float))[:, :2]
    kept = weights * found.fitted.num_rows >= 1  # empty ones are as wide as their prior
    shown = weights[kept], means[kept, :2], covariances[kept, :2, :2]
    drawn = plots.plot_mixture(x, *shown, columns=(names[0], names[1]))
    alt = f"{len(x)} data in {names[0]} and {names[1]}, with ellipses of the {kept.sum()} components that hold any."
    return [figure(drawn, "Components: half and nine tenths of each lie within its ellipses", alt), *parts]


def _codes(found: Findings, title: str, rotation: torch.Tensor | None = None) -> list[Part]:
    """A scatter plot of the codes in two dimensions, with the labels if there are any."""
    structure, some = found.fitted.structure, found.some(MOST_ROWS)
    latents = structure.local_latents
    if some is None or len(latents) != 1 or latents[0].discrete or structure.per_datum:
        return []
    codes: Any = found.fitted.encode(some, seed=found.seed)
    z = codes.reshape(len(codes), -1).cpu()
    z = z if rotation is None else z @ rotation
    alt = f"{len(z):,} codes as points in two latent dimensions"
    try:
        drawn = plots.plot_latents(z, some.labels, name=latents[0].name)
    except DataError:  # more labels than can be told apart
        return [figure(plots.plot_latents(z, name=latents[0].name), title, f"{alt}.")]
    return [figure(drawn, title, f"{alt}{', by label' if some.labels is not None else ''}.")]


def _drawn_loadings(found: Findings, loadings: pd.DataFrame) -> list[Part]:
    """Loadings as pictures if the rows are, else feature by feature while they can be read."""
    features = loadings.index.get_level_values(0).unique()
    values = loadings["mean"].to_numpy().reshape(len(features), -1)
    alt = f"Loadings of {values.shape[1]} latent dimensions on {len(features)} features."
    if (shape := found.image_shape) is not None:
        return [figure(plots.plot_samples(values.T, shape), "Loadings, a picture each", alt)]
    if len(features) > MOST_FEATURES:
        return []
    return [figure(plots.plot_loadings(loadings), "Loadings", alt)]


def samples(found: Findings) -> list[Part]:
    """New data from the model, in the units of the data as they were read."""
    try:
        return _moments(found) if found.image_shape is None else _pictures(found, found.image_shape)
    except (PyrolvmError, RuntimeError, TypeError) as error:  # a pair of the user's own may not generate
        return [Part("text", f"No samples: {' '.join(str(error).split())}.")]


def image_shape(run: SavedRun, given: Any) -> tuple[int, ...] | None:
    """[height, width] or [channels, height, width] of a row that is a picture; None if it is none.

    Raises `SettingError` if the shape given is not that of a row.
    """
    shape = run.row_shape
    if given is not None:
        if not all(isinstance(n, int) and n > 0 for n in given) or math.prod(given) != math.prod(shape):
            raise SettingError(f"image_shape={tuple(given)} does not suit rows of shape {list(shape)}")
        return tuple(given)
    if len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3)):
        return shape
    named = str(run.recipe.record.get("source", "")).replace("-", "_") in PICTURE_SETS
    pixels = bool(run.columns) and all(str(c).lower().startswith("pixel") for c in run.columns)
    side = math.isqrt(shape[0]) if len(shape) == 1 else 0
    return (side, side) if (named or pixels) and shape == (side * side,) else None


def _pictures(found: Findings, shape: tuple[int, ...]) -> list[Part]:
    fitted, undo = found.fitted, found.recipe.undo
    made = undo(fitted.sample(PICTURES, mean=True, seed=found.seed))
    alt = f"{PICTURES} pictures of {' by '.join(map(str, shape))} pixels that the model made."
    title = "Means of p(x | z), z drawn from the prior"
    parts = [figure(plots.plot_samples(made, shape), title, alt)]
    if found.train is None or fitted.structure.per_datum:
        return parts
    few = found.train.take(np.arange(min(PAIRS, found.train.num_rows)))
    x, again = undo(few.values), undo(fitted.reconstruct(few, seed=found.seed))
    alt = f"Above, {len(x)} pictures of the data; below, their reconstructions by the model."
    drawn = plots.plot_reconstructions(x, again, shape, count=PAIRS)
    return [*parts, figure(drawn, "Data, and the mean of p(x | z) at their codes", alt)]


def _moments(found: Findings) -> list[Part]:
    made = found.fitted.sample(DRAWS, seed=found.seed)
    sites = made if isinstance(made, dict) else {found.fitted.structure.observed[0].name: made}
    rows = {site: found.recipe.undo(values).reshape(len(values), -1) for site, values in sites.items()}
    frames = []
    for site, x in rows.items():
        index = (
            found.names(x.shape[1], site) if len(rows) == 1 else [f"{site}[{i}]" for i in range(x.shape[1])]
        )
        frames.append(pd.DataFrame({"mean of samples": x.mean(0), "sd of samples": x.std(0)}, index))
    frame = pd.concat(frames)
    if len(rows) == 1 and found.train is not None:
        x = found.recipe.undo(found.train.values).reshape(found.train.num_rows, -1)
        if x.shape[1] == len(frame):
            frame = frame.assign(**{"mean of data": x.mean(0), "sd of data": x.std(0)})
    return [table(frame, f"{DRAWS:,} samples of the model", "column")]
