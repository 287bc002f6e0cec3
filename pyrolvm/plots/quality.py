"""How far a guide is from the posterior: k-hat, ranks, gaps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binom

from pyrolvm.errors import DataError
from pyrolvm.plots.style import BLUE, GREY, PALE, RED, as_array, axes_of, columns_of, panels_of

LARGEST = 24  # panels of one figure


def plot_khat(k_hat: Any, threshold: float = 0.7, *, ax: Axes | None = None) -> Figure:
    """k-hat of every datum against its row; above the threshold, importance weights are not to be trusted.

    Parameters
    ----------
    k_hat : array_like [rows]
    threshold : float
        The largest k-hat to be trusted.
    ax : Axes, optional
        Axes to draw into.

    Raises
    ------
    DataError
        Unless `k_hat` is one-dimensional.

    Notes
    -----
    The title counts the data above the threshold, and those without a k-hat (not finite), which are marked along
    the upper edge.
    """
    k = as_array(k_hat, "k_hat", dims=1).astype(float)
    figure, ax = axes_of(ax)
    rows, known = np.arange(len(k)), np.isfinite(k)
    high = known & (k > threshold)
    size = float(np.clip(4000 / len(k), 5, 30))
    good = known & ~high
    ax.scatter(rows[good], k[good], s=size, color=BLUE, linewidths=0, label="at most the threshold")
    ax.scatter(rows[high], k[high], s=1.6 * size, color=RED, marker="^", linewidths=0, label="above it")
    ax.axhline(threshold, color=GREY, linewidth=1, linestyle="--")
    ends: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "fontsize": "small", "va": "center"}
    ax.annotate(f"{threshold:.2f}", (1, threshold), **ends)
    text = f"{high.sum()} of {len(k)} above {threshold:.2f}"
    if not known.all():
        edge: dict[str, Any] = {
            "transform": ax.get_xaxis_transform(),
            "clip_on": False,
            "label": "not finite",
        }
        ax.scatter(rows[~known], np.ones((~known).sum()), marker="x", color="black", **edge)
        text += f", {(~known).sum()} not finite"
    ax.set(xlabel="datum", ylabel=r"Pareto $\hat{k}$", xlim=(-0.02 * len(k), 1.02 * len(k)))
    ax.set_title(text, fontsize="medium", loc="left")
    return figure


def plot_ranks(
    ranks: Any,
    num_samples: int | None = None,
    *,
    bins: int | None = None,
    level: float = 0.95,
    ax: Axes | None = None,
) -> Figure:
    """Histogram of the ranks of true values among draws, with the band that uniform ranks stay in.

    Parameters
    ----------
    ranks : array_like [simulations] or [simulations, quantities], or DataFrame
        Whole numbers 0 to `num_samples`; a panel for each quantity, named by the columns of a table.
    num_samples : int, optional
        Draws among which the true values were ranked; the largest rank by default.
    bins : int, optional
        By default one for ten simulations, 20 at most.
    level : float
        Share of uniform ranks' counts that the band holds, bin by bin.
    ax : Axes, optional
        Axes to draw one quantity into.

    Raises
    ------
    DataError
        For ranks that cannot be, `ax` with several panels, or more than 24 of them.

    Notes
    -----
    A valley means a guide that is too narrow, a hill one that is too wide, a slope one that is shifted.
    """
    table = ranks if isinstance(ranks, pd.DataFrame) else _named(as_array(ranks, "ranks"))
    values = as_array(table.to_numpy(), "ranks", dims=2)
    highest = int(values.max()) if num_samples is None else num_samples
    if values.min() < 0 or values.max() > highest or not np.isfinite(values).all():
        found = f"{values.min()} and {values.max()}"
        raise DataError(f"ranks lie between {found}: with {highest} draws, 0 to {highest}")
    most = LARGEST if ax is None else 1
    if values.shape[1] > most:
        raise DataError(f"ranks of {values.shape[1]} quantities: choose {most} at most")
    edges = _edges(highest, bins or min(20, max(2, len(values) // 10)))
    figure, panels = panels_of(values.shape[1]) if ax is None else (axes_of(ax)[0], [ax])
    for panel, name, column in zip(panels, table.columns, values.T, strict=False):
        _histogram(panel, str(name), column, edges, level)
    if ax is None:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def _named(ranks: np.ndarray) -> pd.DataFrame:
    if ranks.ndim not in (1, 2):
        wanted = "[simulations] or [simulations, quantities]"
        raise DataError(f"ranks have shape {list(ranks.shape)}: pass {wanted}")
    columns = [""] if ranks.ndim == 1 else [f"quantity {i}" for i in range(ranks.shape[1])]
    return pd.DataFrame(ranks.reshape(len(ranks), -1), columns=columns)


def _edges(highest: int, bins: int) -> np.ndarray:
    """Edges between whole numbers, so that no rank is on one; bins hold equally many, give or take one."""
    return np.unique(np.round(np.linspace(0, highest + 1, min(bins, highest + 1) + 1))) - 0.5


def _histogram(ax: Axes, name: str, ranks: np.ndarray, edges: np.ndarray, level: float) -> None:
    counts = np.histogram(ranks, edges)[0]
    share = np.diff(edges) / (edges[-1] - edges[0])
    lower, upper = (binom.ppf(p, len(ranks), share) for p in ((1 - level) / 2, (1 + level) / 2))
    ax.stairs(upper, edges, baseline=lower, fill=True, color=PALE, label=f"{level:.0%} band of uniform ranks")
    ax.stairs(len(ranks) * share, edges, baseline=None, color=GREY, linewidth=1, linestyle="--")
    ax.stairs(counts, edges, baseline=None, color=BLUE, linewidth=1.6, label="ranks")
    ax.set(xlabel="rank among the draws", ylabel="simulations", xlim=(edges[0], edges[-1]), ylim=(0, None))
    if name:
        ax.set_title(name, fontsize="medium", loc="left")


def plot_gaps(table: pd.DataFrame | pd.Series, *, ax: Axes | None = None) -> Figure:
    """Gaps as bars, each with its standard error if there is one.

    Parameters
    ----------
    table : DataFrame or Series
        One row per datum with columns that end in `_gap`, whose means over the data are drawn; or one row per gap,
        with columns `gap` and, if there, `standard_error`; or a series of gaps. All in nats per datum.
    ax : Axes, optional
        Axes to draw into.

    Raises
    ------
    DataError
        If there is no such column.

    Notes
    -----
    Gaps are at least 0: a bar left of it is an estimate's error.
    """
    table = _mean_gaps(table.to_frame("gap") if isinstance(table, pd.Series) else table)
    columns_of(table, ("gap",), "gaps")
    gaps = table["gap"].to_numpy(float)
    error = table["standard_error"].to_numpy(float) if "standard_error" in table else None
    figure, ax = axes_of(ax, 6.0, 0.9 + 0.42 * len(table))
    place = np.arange(len(table))
    ax.barh(place, np.nan_to_num(gaps), height=0.6, color=BLUE)
    if error is not None:
        ax.errorbar(gaps, place, xerr=2 * error, fmt="none", ecolor="black", elinewidth=1, capsize=3)
    ax.axvline(0, color=GREY, linewidth=0.8)
    whiskers = np.zeros(len(gaps)) if error is None else np.where(np.isfinite(error), 2 * error, 0.0)
    for i, gap in enumerate(gaps):
        note = f"{gap:.3g}" if np.isfinite(gap) else "not finite"
        beyond = whiskers[i] + max(0.0, np.nan_to_num(gap))
        ax.annotate(note, (beyond, i), (4, 0), textcoords="offset points", va="center", fontsize="small")
    ax.set_yticks(place, [str(name) for name in table.index])
    unit = "nats per datum" + ("; whiskers: two standard errors" if error is not None else "")
    ax.set(xlabel=f"gap ({unit})", ylim=(len(table) - 0.5, -0.5))
    ax.margins(x=0.12)
    if (np.nan_to_num(gaps - (0 if error is None else 2 * error)) >= 0).all():
        ax.set_xlim(left=0)
    return figure


def _mean_gaps(table: pd.DataFrame) -> pd.DataFrame:
    """Means over data, with their standard errors, of the columns called `..._gap`; other tables as they are."""
    names = [str(c) for c in table.columns if str(c).endswith("_gap")]
    if "gap" in table or not names:
        return table
    finite = table[names].where(np.isfinite(table[names]))
    count = finite.notna().sum().to_numpy(float)
    means = pd.DataFrame({"gap": finite.mean(), "standard_error": finite.std() / count**0.5})
    return means.rename(index=lambda name: name.replace("_", " "))
