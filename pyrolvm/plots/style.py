"""What all figures share: one palette, plain axes, and checks of what is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import ScalarFormatter
from torch import Tensor

from pyrolvm.errors import DataError

# Okabe and Ito (2008), "Color universal design", with brown and grey for ten classes; yellow, faint on white, last
PALETTE = (
    *("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00"),
    *("#CC79A7", "#000000", "#8C564B", "#9A9A9A", "#F0E442"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
FEW = len(PALETTE)  # classes that colours and markers can tell apart
BLUE, ORANGE, RED = PALETTE[0], PALETTE[1], PALETTE[4]
GREY, PALE = "#6B6B6B", "#D9D9D9"


def axes_of(ax: Axes | None, width: float = 6.0, height: float = 3.6) -> tuple[Figure, Axes]:
    """The axes to draw into and their figure.

    Parameters
    ----------
    ax : Axes or None
        None makes a new figure.
    width, height : float
        Of a new figure, in inches.
    """
    if ax is None:
        figure = Figure(figsize=(width, height), layout="constrained")
        ax = figure.add_subplot()
    return whole_figure(ax.figure), plain(ax)


def panels_of(count: int) -> tuple[Figure, list[Axes]]:
    """A new figure of `count` axes, as square a grid as their number allows."""
    columns = min(count, max(1, math.ceil(math.sqrt(count))))
    rows = math.ceil(count / columns)
    size = (6.0, 3.4) if count == 1 else (3.0 * columns, 2.3 * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in grid[count:]:
        panel.remove()
    return figure, [plain(panel) for panel in grid[:count]]


def whole_figure(figure: Figure | SubFigure | None) -> Figure:
    """The figure that a subfigure stands in."""
    assert figure is not None
    return figure if isinstance(figure, Figure) else whole_figure(figure.figure)


def plain(ax: Axes) -> Axes:
    """No frame on the right and above, small ticks, each labelled with its whole number."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(color=GREY, labelsize="small")
    for formatter in (ax.xaxis.get_major_formatter(), ax.yaxis.get_major_formatter()):
        if isinstance(
            formatter, ScalarFormatter
        ):  # an offset or a power of ten would stand apart from the ticks
            formatter.set_useOffset(False)
            formatter.set_scientific(False)
    return ax


def legend(ax: Axes, **options: Any) -> None:
    """A legend without a frame, if anything has a label."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize="small", **options)


def legend_outside(ax: Axes, **options: Any) -> None:
    """A legend right of the axes, where it hides nothing."""
    legend(ax, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, **options)


def legend_above(ax: Axes) -> None:
    """A legend in one line above the axes."""
    count = len(ax.get_legend_handles_labels()[0])
    legend(ax, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=count, borderaxespad=0.2, columnspacing=1.2)


def as_array(value: Any, name: str, dims: int | None = None) -> np.ndarray:
    """Numbers as numpy's array.

    Parameters
    ----------
    value : Tensor or array_like
    name : str
        What errors call it.
    dims : int, optional
        The number of dimensions wanted.

    Raises
    ------
    DataError
        For what is no number, has another number of dimensions, or is empty.
    """
    array = to_numpy(value)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name} holds {array.dtype}, not numbers")
    if dims is not None and array.ndim != dims:
        raise DataError(
            f"{name} has shape {list(array.shape)}: a plot needs {dims} dimension{'s'[: dims - 1]}"
        )
    if array.size == 0:
        raise DataError(f"{name} is empty: its shape is {list(array.shape)}")
    return array


def bar_axes(ax: Axes | None, names: list[str], inches: float = 0.4) -> tuple[Figure, Axes]:
    """Axes for bars at 0, 1, ..., `inches` each if new, and their figure; as many are named as can be read."""
    figure, ax = axes_of(ax, float(np.clip(1.5 + inches * len(names), 4, 12)), 3.2)
    every = max(1, -(-len(names) // 40))
    ax.set_xticks(range(0, len(names), every), names[::every], rotation=90 if len(names) > 8 else 0)
    ax.set_xlim(-0.6, len(names) - 0.4)
    return figure, ax


def to_numpy(value: Any) -> np.ndarray:
    """A tensor on any device, or anything that numpy takes, as numpy's array."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def row_name(index: Any) -> str:
    """The name of a table's row: ("z", 3) as z[3]."""
    return f"{index[0]}[{', '.join(map(str, index[1:]))}]" if isinstance(index, tuple) else str(index)


def columns_of(table: Any, needed: Sequence[str], what: str) -> None:
    """Raise `DataError` unless the table of `what` has the columns `needed` and a row."""
    found = list(table.columns) if isinstance(table, pd.DataFrame) else []
    missing = [c for c in needed if c not in found]
    if missing:
        has = ", ".join(map(str, found)) or "none"
        raise DataError(f"the table of {what} lacks the column '{missing[0]}' (it has {has})")
    if not len(table):
        raise DataError(f"the table of {what} has no rows")


def finite_limits(values: np.ndarray, least: float = 0.0) -> tuple[float, float] | None:
    """Limits that hold the finite values and a margin.

    Parameters
    ----------
    values : ndarray
    least : float
        The smallest span, so that rounding is not magnified to fill the frame.

    Returns
    -------
    tuple of float or None
        None if no value is finite.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    bottom, top = float(values.min()), float(values.max())
    margin = 0.06 * (top - bottom) + max(0.0, least - (top - bottom)) / 2
    return bottom - margin, top + margin
