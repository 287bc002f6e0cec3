"""Where data lie among the latents, and which latents carry anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    legend_outside,
    plain,
    row_name,
    to_numpy,
)


def plot_latents(
    z: Any, labels: Any = None, *, dims: tuple[int, int] = (0, 1), name: str = "z", ax: Axes | None = None
) -> Figure:
    """Two dimensions of the codes, one point per datum.

    Parameters
    ----------
    z : array_like [rows, latent_dim]
        Codes or scores; with one latent dimension, drawn against the row. Rows that are not finite are left out.
    labels : array_like [rows], optional
        Up to ten different ones are classes with a colour and a marker each, more numbers than that a scale of
        colours.
    dims : tuple of int
        The two dimensions.
    name : str
        The latents' name, for the axes.
    ax : Axes, optional
        Axes to draw into.

    Raises
    ------
    DataError
        For shapes that do not agree, or more than ten classes.
    """
    z = as_array(z, "z", dims=2)
    points, names = _two_columns(z, dims, name)
    given = None if labels is None else to_numpy(labels)
    if given is not None and given.shape != (len(z),):
        raise DataError(
            f"labels have shape {list(given.shape)}, but z has {len(z)} rows: pass one label for each"
        )
    figure, ax = axes_of(ax, 5.4, 4.4)
    size = float(np.clip(3000 / len(z), 6, 30))
    classes = [] if given is None else list(pd.unique(pd.Series(given).dropna()))
    if given is not None and len(classes) > FEW and given.dtype.kind in "biuf":
        drawn = ax.scatter(points[:, 0], points[:, 1], c=given, s=size, cmap="viridis", linewidths=0)
        plain(figure.colorbar(drawn, ax=ax, label="label").ax)
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
        style: dict[str, Any] = {"color": PALETTE[i], "marker": MARKERS[i], "alpha": 0.8, "linewidths": 0}
        across, up = points[labels == label].T
        ax.scatter(across, up, s=size, label=str(label), **style)
    legend_outside(ax, markerscale=1.8)


def plot_active_units(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """The KL of every latent dimension, largest first; those that do not move with the datum are hatched.

    Parameters
    ----------
    table : DataFrame
        One row per dimension, with columns `kl` (nats per datum) and, if there, `active`: what a collapse report
        calls `dimensions`.
    ax : Axes, optional
        Axes to draw into.

    Raises
    ------
    DataError
        If `kl` is missing.
    """
    columns_of(table, ("kl",), "latent dimensions")
    table = table.sort_values("kl", ascending=False)
    active = table["active"].to_numpy(bool) if "active" in table else np.ones(len(table), bool)
    figure, ax = bar_axes(ax, [row_name(i) for i in table.index], 0.28)
    place, kl = np.arange(len(table)), table["kl"].to_numpy()
    for chosen, colour, hatch, name in ((active, BLUE, "", "active"), (~active, PALE, "////", "inactive")):
        if chosen.any():
            bars: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": GREY if hatch else colour}
            ax.bar(place[chosen], kl[chosen], width=0.8, label=f"{name} ({chosen.sum()})", **bars)
    ax.set(xlabel="latent dimension, by KL", ylabel="KL (nats per datum)", ylim=(min(0, np.nanmin(kl)), None))
    legend_outside(ax)
    return figure
