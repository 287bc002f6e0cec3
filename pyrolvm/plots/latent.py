"""Where data lie among the latents, and what the latents do: scatter, loadings, mixtures, active units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from pyrolvm.errors import DataError
from pyrolvm.plots.style import (
    BLUE,
    GREY,
    MARKERS,
    PALE,
    PALETTE,
    as_array,
    axes_of,
    columns_of,
    legend_outside,
)

FEW = 10  # classes that colours and markers can tell apart
MASSES = (0.5, 0.9)  # of the ellipses of a component


def plot_latents(
    z: Any, labels: Any = None, *, dims: tuple[int, int] = (0, 1), name: str = "z", ax: Axes | None = None
) -> Figure:
    """Two dimensions of the codes, one point per datum.

    z: [rows, latent_dim]; with one latent dimension, against the row. labels: one per row; up to ten different
    ones are classes with a colour and a marker each, more numbers than that a scale of colours. Rows that are
    not finite are left out. Raises `DataError` for shapes that do not agree.
    """
    z = as_array(z, "z", dims=2)
    points, names = _two_columns(z, dims, name)
    given = None if labels is None else np.asarray(labels.cpu() if hasattr(labels, "cpu") else labels)
    if given is not None and given.shape != (len(z),):
        raise DataError(
            f"labels have shape {list(given.shape)}, but z has {len(z)} rows: pass one label for each"
        )
    figure, ax = axes_of(ax, 5.4, 4.4)
    size = float(np.clip(3000 / len(z), 6, 30))
    classes = [] if given is None else list(pd.unique(pd.Series(given).dropna()))
    if given is not None and len(classes) > FEW and given.dtype.kind in "biuf":
        drawn = ax.scatter(points[:, 0], points[:, 1], c=given, s=size, cmap="viridis", linewidths=0)
        figure.colorbar(drawn, ax=ax, label="label")
    elif len(classes) > FEW:
        raise DataError(
            f"{len(classes)} different labels that are no numbers: {FEW} at most can be told apart"
        )
    else:
        _by_class(ax, points, given, classes, size)
    ax.set(xlabel=names[0], ylabel=names[1])
    return figure


def _two_columns(z: np.ndarray, dims: tuple[int, int], name: str) -> tuple[np.ndarray, tuple[str, str]]:
    if z.shape[1] == 1:
        return np.column_stack([np.arange(len(z)), z[:, 0]]), ("row", f"{name}[0]")
    if len(dims) != 2 or not all(-z.shape[1] <= d < z.shape[1] for d in dims):
        raise DataError(f"dims={dims} of codes with {z.shape[1]} dimensions: pass two numbers below it")
    return z[:, list(dims)], (f"{name}[{dims[0]}]", f"{name}[{dims[1]}]")


def _by_class(
    ax: Axes, points: np.ndarray, labels: np.ndarray | None, classes: list[Any], size: float
) -> None:
    if labels is None or not classes:
        ax.scatter(points[:, 0], points[:, 1], s=size, color=BLUE, alpha=0.7, linewidths=0)
        return
    for i, label in enumerate(sorted(classes, key=lambda c: (str(type(c)), c))):
        chosen = points[labels == label]
        ax.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=size,
            color=PALETTE[i],
            marker=MARKERS[i],
            alpha=0.8,
            linewidths=0,
            label=str(label),
        )
    legend_outside(ax, markerscale=1.8)


def plot_loadings(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Loadings with their intervals, feature by feature, a colour and a marker for each factor.

    table: indexed by (feature, factor), with columns `mean`, `lower` and `upper`, in the data's units: what
    `BayesianFactorAnalysis.loadings_table` returns. Raises `DataError` if a column is missing.
    """
    columns_of(table, ("mean", "lower", "upper"), "loadings")
    if table.index.nlevels != 2:
        raise DataError(
            f"the table of loadings has {table.index.nlevels} index level(s), not (feature, factor)"
        )
    features, factors = (list(pd.unique(table.index.get_level_values(i))) for i in (0, 1))
    figure, ax = axes_of(ax, 6.0, 1.0 + (0.18 + 0.13 * len(factors)) * len(features))
    for i, factor in enumerate(factors):
        part = table.xs(factor, level=1)
        place = np.array([features.index(f) for f in part.index]) + (i - (len(factors) - 1) / 2) * 0.7 / len(
            factors
        )
        interval = np.abs(part[["lower", "upper"]].to_numpy().T - part["mean"].to_numpy())
        style: dict[str, Any] = {"color": PALETTE[i % FEW], "markersize": 4.5, "elinewidth": 1.3}
        ax.errorbar(
            part["mean"], place, xerr=interval, fmt=MARKERS[i % FEW], label=f"factor {factor}", **style
        )
    for i in range(
        1, len(features), 2
    ):  # a band under every other feature, so that its intervals stand together
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

    x: [rows, 2]; weights [K]; means [K, 2]; covariances [K, 2, 2], variances [K, 2] or [K, 1] or [K]. The legend
    gives the weights. Raises `DataError` for shapes that do not agree.
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
    shapes: dict[tuple[int, ...], Any] = {
        (K, 2, 2): lambda: covariances,
        (K, 2): lambda: covariances[:, :, None] * np.eye(2),
        (K, 1): lambda: covariances[:, :, None] * np.eye(2),
        (K,): lambda: covariances[:, None, None] * np.eye(2),
    }
    if covariances.shape not in shapes:
        raise DataError(
            f"covariances have shape {list(covariances.shape)}: pass [{K}, 2, 2] or variances [{K}, 2]"
        )
    return shapes[covariances.shape]()


def _component(ax: Axes, k: int, weight: float, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Ellipses of a Gaussian: a share p of it lies within squared distance -2 log(1 - p)."""
    colour, line = PALETTE[k % FEW], ("-", "--", "-.", ":")[k % 4]
    label = f"{weight:.2f}"
    ax.plot(
        *mean, MARKERS[k % FEW], color=colour, markeredgecolor="white", linestyle=line, label=label, zorder=3
    )
    if not np.isfinite(covariance).all():
        return
    values, vectors = np.linalg.eigh(covariance)
    angle = np.degrees(np.arctan2(vectors[1, -1], vectors[0, -1]))
    for mass in MASSES:
        width, height = 2 * np.sqrt(-2 * np.log(1 - mass) * np.maximum(values[::-1], 0))
        shape = Ellipse(tuple(mean), width, height, angle=angle, fill=False, edgecolor=colour, linestyle=line)
        ax.add_patch(shape)


def plot_active_units(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """The KL of every latent dimension, largest first; those that do not move with the datum are hatched.

    table: one row per dimension, with columns `kl` (nats per datum) and, if there, `active`: what a collapse report
    calls `dimensions`. Raises `DataError` if `kl` is missing.
    """
    columns_of(table, ("kl",), "latent dimensions")
    table = table.sort_values("kl", ascending=False)
    active = table["active"].to_numpy(bool) if "active" in table else np.ones(len(table), bool)
    figure, ax = axes_of(ax, float(np.clip(1.5 + 0.28 * len(table), 4, 12)), 3.2)
    place = np.arange(len(table))
    for chosen, colour, hatch, name in ((active, BLUE, "", "active"), (~active, PALE, "////", "inactive")):
        if chosen.any():
            bars: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": GREY if hatch else colour}
            ax.bar(
                place[chosen],
                table["kl"].to_numpy()[chosen],
                width=0.8,
                label=f"{name} ({chosen.sum()})",
                **bars,
            )
    _name_bars(ax, [_short(i) for i in table.index])
    ax.set(
        ylabel="KL (nats per datum)", xlim=(-0.6, len(table) - 0.4), ylim=(min(0, table["kl"].min()), None)
    )
    ax.set_xlabel("latent dimension, by KL")
    legend_outside(ax)
    return figure


def _short(index: Any) -> str:
    """("z", 3) as z[3]."""
    return f"{index[0]}[{', '.join(map(str, index[1:]))}]" if isinstance(index, tuple) else str(index)


def _name_bars(ax: Axes, names: list[str]) -> None:
    """Every bar's name, or as many as can be read."""
    every = max(1, -(-len(names) // 40))
    ax.set_xticks(range(0, len(names), every), names[::every], rotation=90 if len(names) > 8 else 0)
