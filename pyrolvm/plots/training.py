"""The course of a fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyrolvm.errors import DataError
from pyrolvm.plots.style import (
    BLUE,
    GREY,
    ORANGE,
    PALE,
    axes_of,
    columns_of,
    finite_limits,
    legend_above,
    panels_of,
)

POINTS = 2000  # of a line: more than a screen can tell apart
NO_TERMS = ("step", "elbo", "validation_elbo", "seconds")
LEAST_SPAN = (0.02, 1e-3)  # of the axis, in nats and as a share of the bound: below it, a run is flat


def plot_elbo(
    history: pd.DataFrame,
    *,
    window: int | None = None,
    unit: str = "nats per datum",
    name: str = "ELBO",
    ax: Axes | None = None,
) -> Figure:
    """The bound at every step, its running mean, and the held-out bound where it was computed.

    Parameters
    ----------
    history : DataFrame
        A fit's record: `step`, `elbo` (nats per datum), and, if there, `validation_elbo` and `kl_weight`; other
        columns are of no matter. Steps at which `kl_weight` is below 1 are shaded: their bound is not the one of
        later steps.
    window : int, optional
        Steps of the running mean, by default a fiftieth of the run.
    unit : str
        "nats in total" for a program without a data plate.
    name : str
        What the column `elbo` is: of a point estimate, no ELBO.
    ax : Axes, optional
        Axes to draw into.

    Raises
    ------
    DataError
        For a table that lacks a column or rows.

    Notes
    -----
    The height is that of the later steps: the lowest tenth, mostly the first ones, and lone extremes may lie
    outside the frame. It spans at least 0.02 nats and a thousandth of the bound, so that a flat run looks flat.
    Steps that are not finite leave a gap.
    """
    columns_of(history, ("step", "elbo"), "steps")
    figure, ax = axes_of(ax)
    step, elbo = (history[c].to_numpy(float) for c in ("step", "elbo"))
    _curve(ax, history, "elbo", window)
    held_out = _held_out(history, ax)
    _warm_up(history, ax)
    shown = np.concatenate([_settled(elbo), held_out])
    level = np.abs(shown[np.isfinite(shown)]).max(initial=0.0)
    limits = finite_limits(shown, max(LEAST_SPAN[0], LEAST_SPAN[1] * level))
    margin = 0.01 * max(step[-1] - step[0], 1)
    ax.set(xlabel="step", ylabel=f"{name} ({unit})", xlim=(step[0] - margin, step[-1] + margin), ylim=limits)
    legend_above(ax)
    return figure


def plot_terms(history: pd.DataFrame, columns: Sequence[str] | None = None) -> Figure:
    """The terms and the controls of a fit, a panel for each.

    Parameters
    ----------
    history : DataFrame
        A fit's record: `step` and any named columns of numbers.
    columns : sequence of str, optional
        By default all but the bounds and the seconds that are not constant.

    Raises
    ------
    DataError
        For a table that lacks a column or rows, or has nothing to draw.
    """
    others = [str(c) for c in history if c not in NO_TERMS and history[c].nunique() > 1]
    names = others if columns is None else list(columns)
    columns_of(history, ("step", *names), "steps")
    if not names:
        raise DataError("the table of steps has no terms or controls that change: name the columns to draw")
    figure, panels = panels_of(len(names))
    for ax, name in zip(panels, names, strict=True):
        _curve(ax, history, name, None)
        values = history[name].to_numpy(float)
        values = values[np.isfinite(values)]
        if len(values):
            values = np.quantile(values, [0.02, 0.98])  # the margin holds the rest of a ramp, not of a fall
        ax.set(xlabel="step", ylim=finite_limits(values, LEAST_SPAN[1] * np.abs(values).max(initial=0.0)))
        ax.set_title(name.replace("_", " "), fontsize="medium", loc="left")
    return figure


def _curve(ax: Axes, history: pd.DataFrame, column: str, window: int | None) -> None:
    """Each step's value and their running mean, a fiftieth of the run wide by default."""
    mean = history[column].rolling(window or max(1, len(history) // 50), min_periods=1, center=True).mean()
    thin = slice(None, None, max(1, len(history) // POINTS))
    step = history["step"].to_numpy()[thin]
    ax.plot(step, history[column].to_numpy(float)[thin], color=PALE, linewidth=0.8, label="each step")
    ax.plot(step, mean.to_numpy()[thin], color=BLUE, linewidth=1.6, label="running mean")


def _settled(elbo: np.ndarray) -> np.ndarray:
    """The bounds without the lowest tenth and lone extremes, so that a fall at the start does not flatten the rest."""
    finite = elbo[np.isfinite(elbo)]
    if len(finite) < 20:
        return finite
    low, high = np.quantile(finite, [0.1, 0.995])
    return finite[(finite >= low) & (finite <= high)]


def _held_out(history: pd.DataFrame, ax: Axes) -> np.ndarray:
    if "validation_elbo" not in history:
        return np.empty(0)
    points = history[["step", "validation_elbo"]].dropna()
    style: dict[str, Any] = {"color": ORANGE, "linewidth": 1.2, "linestyle": "--", "label": "held out"}
    style |= {"marker": "o", "markersize": 4, "markeredgecolor": "black", "markeredgewidth": 0.4}
    ax.plot(points["step"], points["validation_elbo"], **style)
    return _settled(points["validation_elbo"].to_numpy(float))


def _warm_up(history: pd.DataFrame, ax: Axes) -> None:
    if "kl_weight" not in history or not (history["kl_weight"] < 1).any():
        return
    steps = history["step"][history["kl_weight"] < 1]
    ax.axvspan(steps.min(), steps.max(), color=GREY, alpha=0.12, linewidth=0, label="KL weight below 1")
