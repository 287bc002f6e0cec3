"""Figures that only a page has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pyrolvm.plots.style import BLUE, GREY, ORANGE, RED, axes_of, legend_above, plain


def draw_evidence(tables: dict[str, pd.DataFrame]) -> Figure:
    """Histograms of log p of each datum, as shares of each set of rows, with their means."""
    values = {name: _finite(t["log_evidence"]) for name, t in tables.items()}
    together = np.concatenate(list(values.values()))
    edges = np.histogram_bin_edges(together, bins=int(np.clip(len(together) ** 0.5, 8, 30)))
    drawn, ax = axes_of(None, 6.0, 3.0)
    for (name, v), colour, dash in zip(values.items(), (BLUE, ORANGE), ("-", "--"), strict=False):
        if len(v):
            share = np.histogram(v, edges)[0] / len(v)
            ax.stairs(share, edges, color=colour, linewidth=1.4, linestyle=dash, label=name, fill=False)
            ax.axvline(v.mean(), color=colour, linewidth=1, linestyle=":")
    ax.set(xlabel="log p of each datum (nats); dotted: mean", ylabel="share of the rows", ylim=(0, None))
    legend_above(ax)
    return drawn


def _finite(column: pd.Series) -> np.ndarray:
    values = column.to_numpy(float)
    return values[np.isfinite(values)]


def draw_replicates(check: Any) -> Figure:
    """A panel for each statistic: its values in data made by the model, and its value in the data."""
    names = list(check.table.index)
    across = min(3, len(names))
    rows = math.ceil(len(names) / across)
    drawn = Figure(figsize=(0.4 + 2.5 * across, 1.9 * rows), layout="constrained")
    panels = drawn.subplots(rows, across, squeeze=False).ravel()
    for ax, name in zip(panels, names, strict=False):
        row = check.table.loc[name]
        plain(ax).hist(check.replicates[name], bins=20, color=GREY, alpha=0.55)
        ax.axvline(row["observed"], color=RED if row["extreme"] else BLUE, linewidth=2)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.locator_params(axis="x", nbins=3)
        ax.set_title(str(name).replace("$", r"\$"), fontsize="small", loc="left")
    for ax in panels[len(names) :]:
        ax.remove()
    return drawn
