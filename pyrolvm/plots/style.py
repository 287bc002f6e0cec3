"""What all figures share: one palette, plain axes, and checks of what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from pyrolvm.errors import DataError

# Okabe and Ito (2008), "Color universal design", with brown and grey for ten classes; yellow, faint on white, last
PALETTE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#56B4E9",
    "#D55E00",
    "#CC79A7",
    "#000000",
    "#8C564B",
    "#9A9A9A",
    "#F0E442",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
BLUE, ORANGE, RED = PALETTE[0], PALETTE[1], PALETTE[4]
GREY, PALE = "#6B6B6B", "#D9D9D9"


def axes_of(ax: Axes | None, width: float = 6.0, height: float = 3.6) -> tuple[Figure, Axes]:
    """The axes to draw into and their figure, in inches if it is a new one."""
    if ax is None:
        figure = Figure(figsize=(width, height), layout="constrained")
        ax = figure.add_subplot()
    return whole_figure(ax.figure), plain(ax)


def whole_figure(figure: Figure | SubFigure | None) -> Figure:
    """The figure that a subfigure stands in."""
    assert figure is not None
    return figure if isinstance(figure, Figure) else whole_figure(figure.figure)


def plain(ax: Axes) -> Axes:
    """No frame on the right and above, small ticks."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(color=GREY, labelsize="small")
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
    """Numbers as numpy's array; raises `DataError` for another number of dimensions, or for nothing."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name} holds {array.dtype}, not numbers")
    if dims is not None and array.ndim != dims:
        raise DataError(
            f"{name} has shape {list(array.shape)}: a plot needs {dims} dimension{'s'[: dims - 1]}"
        )
    if array.size == 0:
        raise DataError(f"{name} is empty: its shape is {list(array.shape)}")
    return array


def columns_of(table: Any, needed: Sequence[str], what: str) -> None:
    """Raise `DataError` unless the table has these columns and a row."""
    found = list(getattr(table, "columns", []))
    missing = [c for c in needed if c not in found]
    if missing:
        has = ", ".join(map(str, found)) or "none"
        raise DataError(f"the table of {what} lacks the column '{missing[0]}' (it has {has})")
    if not len(table):
        raise DataError(f"the table of {what} has no rows")


def finite_limits(values: np.ndarray, low: float = 0.0, high: float = 1.0) -> tuple[float, float] | None:
    """Limits that hold the quantiles `low` to `high` of the finite values, and a margin; None without any."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    bottom, top = np.quantile(values, [low, high])
    margin = 0.06 * (top - bottom) or 0.05 * max(abs(top), 1.0)
    return float(bottom - margin), float(top + margin)
