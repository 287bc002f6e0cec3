"""What the parameters of a model are: loadings, the variance they explain, components and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from pyrolvm.errors import DataError
from pyrolvm.plots.style import (
    BLUE,
    FEW,
    GREY,
    MARKERS,
    PALE,
    PALETTE,
    as_array,
    axes_of,
    bar_axes,
    columns_of,
    legend_above,
    legend_outside,
)

MASSES = (0.5, 0.9)  # of the ellipses of a component


def plot_loadings(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Loadings feature by feature, a colour and a marker for each factor, with their intervals if there are any.

    Parameters
    ----------
    table : DataFrame
        Indexed by (feature, factor), with a column `mean` and, for a posterior, `lower` and `upper`, in the units
        of the data.
    ax : Axes, optional
        Axes to draw into.

    Raises
    ------
    DataError
        If `mean` or one end of the intervals is missing, or the index has not two levels.
    """
    intervals = [c for c in ("lower", "upper") if c in table] and ["lower", "upper"]
    columns_of(table, ("mean", *intervals), "loadings")
    if table.index.nlevels != 2:
        raise DataError(
            f"the table of loadings has {table.index.nlevels} index level(s), not (feature, factor)"
        )
    features, factors = (list(pd.unique(table.index.get_level_values(i))) for i in (0, 1))
    figure, ax = axes_of(ax, 6.0, 1.0 + (0.18 + 0.13 * len(factors)) * len(features))
    for i, factor in enumerate(factors):
        part = table.xs(factor, level=1)
        beside = (i - (len(factors) - 1) / 2) * 0.7 / len(factors)
        place = np.array([features.index(f) for f in part.index]) + beside
        interval = np.abs(part[intervals].to_numpy().T - part["mean"].to_numpy()) if intervals else None
        style: dict[str, Any] = {"color": PALETTE[i % FEW], "markersize": 4.5, "elinewidth": 1.3}
        style |= {"fmt": MARKERS[i % FEW], "label": f"factor {factor}"}
        ax.errorbar(part["mean"], place, xerr=interval, **style)
    # a band under every other feature, so that its intervals stand together
    for i in range(1, len(features), 2):
        ax.axhspan(i - 0.5, i + 0.5, color=PALE, alpha=0.35, linewidth=0, zorder=0)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_yticks(range(len(features)), [str(f) for f in features])
    ax.set(xlabel="loading (units of the data)", ylim=(len(features) - 0.5, -0.5))
    legend_outside(ax)
    return figure


def plot_mixture(
    x: Any,
    weights: Any,
    means: Any,
    covariances: Any,
    *,
    columns: tuple[str, str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Data in two dimensions, with the ellipses that hold half and nine tenths of each component.

    Parameters
    ----------
    x : array_like [rows, 2]
    weights : array_like [K]
        Given in the legend.
    means : array_like [K, 2]
    covariances : array_like [K, 2, 2]
        Or variances [K, 2], [K, 1] or [K].
    columns : tuple of str, optional
        Names of the two columns of `x`.
    ax : Axes, optional
        Axes to draw into.

    Raises
    ------
    DataError
        For shapes that do not agree.
    """
    x, w, m = as_array(x, "x", 2), as_array(weights, "weights", 1), as_array(means, "means", 2)
    full = _matrices(as_array(covariances, "covariances"), len(w))
    if x.shape[1] != 2 or m.shape != (len(w), 2):
        raise DataError(
            f"x has shape {list(x.shape)} and means {list(m.shape)}: a plot needs [rows, 2] and [{len(w)}, 2]; "
            "choose two columns"
        )
    figure, ax = axes_of(ax, 5.6, 4.2)
    ax.scatter(x[:, 0], x[:, 1], s=float(np.clip(3000 / len(x), 4, 16)), color=GREY, alpha=0.45, linewidths=0)
    for k in range(len(w)):
        _component(ax, k, w[k], m[k], full[k])
    names = columns or ("x[0]", "x[1]")
    ax.set(xlabel=names[0], ylabel=names[1])
    legend_outside(ax, title="weight", title_fontsize="small")
    return figure


def _matrices(covariances: np.ndarray, K: int) -> np.ndarray:
    if covariances.shape == (K, 2, 2):
        return covariances
    if covariances.shape not in ((K, 2), (K, 1), (K,)):
        shape = list(covariances.shape)
        raise DataError(f"covariances have shape {shape}: pass [{K}, 2, 2] or variances [{K}, 2]")
    return covariances.reshape(K, -1, 1) * np.eye(2)


def _component(ax: Axes, k: int, weight: float, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Ellipses of a Gaussian: a share p of it lies within squared distance -2 log(1 - p)."""
    colour, line = PALETTE[k % FEW], ("-", "--", "-.", ":")[k % 4]
    style: dict[str, Any] = {"color": colour, "markeredgecolor": "white", "linestyle": line, "zorder": 3}
    ax.plot(*mean, MARKERS[k % FEW], label=f"{weight:.2f}", **style)
    if not np.isfinite(covariance).all():
        return
    values, vectors = np.linalg.eigh(covariance)
    angle = np.degrees(np.arctan2(vectors[1, -1], vectors[0, -1]))
    for mass in MASSES:
        width, height = 2 * np.sqrt(-2 * np.log(1 - mass) * np.maximum(values[::-1], 0))
        shape = Ellipse(tuple(mean), width, height, angle=angle, fill=False, edgecolor=colour, linestyle=line)
        ax.add_patch(shape)


def plot_scree(
    variances: Any, *, total: float | None = None, noise: float | None = None, ax: Axes | None = None
) -> Figure:
    """The variance of the data along each latent direction, largest first.

    Parameters
    ----------
    variances : array_like [latent_dim]
        In squared units of the data: for loadings W, the squares of their singular values.
    total : float, optional
        The variance of the data; bars then carry the share explained by them and those before.
    noise : float, optional
        The noise variance of one feature, drawn as a line.
    ax : Axes, optional
        Axes to draw into.

    Raises
    ------
    DataError
        Unless `variances` is one-dimensional.
    """
    heights = np.sort(as_array(variances, "variances", dims=1))[::-1]
    figure, ax = bar_axes(ax, [str(i + 1) for i in range(len(heights))])
    bars = ax.bar(range(len(heights)), heights, width=0.8, color=BLUE)
    if total is not None:
        shares = [f"{share:.0%}" for share in heights.cumsum() / total]
        ax.bar_label(bars, shares, padding=2, fontsize="x-small")
    if noise is not None:
        ax.axhline(noise, color=GREY, linewidth=1, linestyle="--", label="noise variance")
    ax.set(xlabel="latent direction, by variance", ylabel="variance (units of the data, squared)")
    ax.margins(y=0.1)
    legend_above(ax)
    return figure


def plot_weights(weights: Any, *, names: Sequence[str] | None = None, ax: Axes | None = None) -> Figure:
    """The weights of a mixture's components as bars, in the colours of `plot_mixture`.

    Parameters
    ----------
    weights : array_like [K]
    names : sequence of str, optional
        Of the components; their numbers by default.
    ax : Axes, optional
        Axes to draw into.

    Raises
    ------
    DataError
        Unless `weights` is one-dimensional, with a name for each if there are names.
    """
    w = as_array(weights, "weights", dims=1)
    labels = [str(k) for k in range(len(w))] if names is None else [str(name) for name in names]
    if len(labels) != len(w):
        raise DataError(f"{len(labels)} names of {len(w)} components: pass one for each")
    figure, ax = bar_axes(ax, labels)
    bars = ax.bar(range(len(w)), w, width=0.8, color=[PALETTE[k % FEW] for k in range(len(w))])
    ax.bar_label(bars, [f"{weight:.2f}" for weight in w], padding=2, fontsize="x-small")
    ax.set(xlabel="component", ylabel="weight")
    ax.margins(y=0.1)
    return figure
