"""The course of a fit."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyrolvm.plots.style import BLUE, GREY, ORANGE, PALE, axes_of, columns_of, finite_limits, legend_above

POINTS = 2000  # of a line: more than a screen can tell apart


def plot_elbo(
    history: pd.DataFrame, *, window: int | None = None, unit: str = "nats per datum", ax: Axes | None = None
) -> Figure:
    """The bound at every step, its running mean, and the held-out bound where it was computed.

    history: a fit's record: `step`, `elbo` (nats per datum), and, if there, `validation_elbo` and `kl_weight`.
        Steps at which `kl_weight` is below 1 are shaded: their bound is not the one of later steps.
    window: steps of the running mean, by default a fiftieth of the run.
    unit: "nats in total" for a program without a data plate.

    The height is that of the later steps: the lowest tenth, mostly the first ones, and lone extremes may lie
    outside the frame. Steps that are not finite leave a gap. Raises `DataError` for a table that lacks a column
    or rows.
    """
    columns_of(history, ("step", "elbo"), "steps")
    figure, ax = axes_of(ax)
    step, elbo = (history[c].to_numpy(float) for c in ("step", "elbo"))
    mean = history["elbo"].rolling(window or max(1, len(history) // 50), min_periods=1, center=True).mean()
    thin = slice(None, None, max(1, len(step) // POINTS))
    ax.plot(step[thin], elbo[thin], color=PALE, linewidth=0.8, label="each step")
    ax.plot(step[thin], mean.to_numpy()[thin], color=BLUE, linewidth=1.6, label="running mean")
    held_out = _held_out(history, ax)
    _warm_up(history, ax)
    limits = finite_limits(np.concatenate([_settled(elbo), held_out]))
    margin = 0.01 * max(step[-1] - step[0], 1)
    ax.set(xlabel="step", ylabel=f"ELBO ({unit})", xlim=(step[0] - margin, step[-1] + margin), ylim=limits)
    legend_above(ax)
    return figure


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
    ax.plot(
        points["step"],
        points["validation_elbo"],
        color=ORANGE,
        linewidth=1.2,
        linestyle="--",
        marker="o",
        markersize=4,
        markeredgecolor="black",
        markeredgewidth=0.4,
        label="held out",
    )
    return _settled(points["validation_elbo"].to_numpy(float))


def _warm_up(history: pd.DataFrame, ax: Axes) -> None:
    if "kl_weight" not in history or not (history["kl_weight"] < 1).any():
        return
    steps = history["step"][history["kl_weight"] < 1]
    ax.axvspan(steps.min(), steps.max(), color=GREY, alpha=0.12, linewidth=0, label="KL weight below 1")
