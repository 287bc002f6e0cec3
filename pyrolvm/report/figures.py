"""Figures of a page, in the page's own colours, light or dark; and those that only a page has."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from pyrolvm.plots.style import BLUE, GREY, ORANGE, PALE, RED, axes_of, legend_above, plain
from pyrolvm.report.parts import Part

COLOURS = {
    "#000000": "ink",
    "#ffffff": "page",
    GREY: "soft",
    PALE: "pale",
    BLUE: "blue",
    RED: "red",
    ORANGE: "orange",
}
"""Colours of a figure on white -> the variable of the page's style that stands for each."""

# what only a file needs, and what would act on the whole page or say twice what `alt` says
_OF_A_FILE = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", re.S
)
_NAMESPACES = re.compile(r' (?:xmlns(?::\w+)?|version)="[^"]*"')
_NAMED = re.compile(r'(\bid="|href="#|url\(#)')


def figure(draw: Callable[[], Figure], title: str, alt: str) -> Part:
    """A figure as a drawing inside the page; `alt` says what it shows."""
    return Part("figure", {"svg": Markup(_inline(_svg(draw()))), "alt": alt}, title)


def _inline(svg: str) -> str:
    """The drawing without what only a file needs, its names its own, its colours the page's."""
    svg = _NAMESPACES.sub("", _OF_A_FILE.sub("", svg))
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = _NAMED.sub(rf"\g<1>{own}-", svg)
    for colour, name in COLOURS.items():
        svg = svg.replace(f": {colour.lower()}", f": var(--{name})")
    return svg.strip()


def _svg(drawn: Figure) -> str:
    drawn.patch.set_alpha(0.0)
    for ax in drawn.axes:
        ax.patch.set_alpha(0.0)
        _whole_ticks(ax)
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "pyrolvm"}):  # the same figure gives the same bytes
        drawn.savefig(stream, format="svg", dpi=200, metadata=nothing)
    return stream.getvalue()


def _whole_ticks(ax: Axes) -> None:
    """Tick labels that are the numbers themselves, not what is left of them above an offset."""
    for axis in (ax.xaxis, ax.yaxis):
        formatter = axis.get_major_formatter()
        if isinstance(formatter, ScalarFormatter):
            formatter.set_useOffset(False)


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
        _draw_statistic(plain(ax), str(name), check.replicates[name], check.table.loc[name])
    for ax in panels[len(names) :]:
        ax.remove()
    return drawn


def _draw_statistic(ax: Any, name: str, replicates: pd.Series, row: pd.Series) -> None:
    ax.hist(replicates, bins=20, color=GREY, alpha=0.55)
    ax.axvline(row["observed"], color=RED if row["extreme"] else BLUE, linewidth=2)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.locator_params(axis="x", nbins=3)
    ax.set_title(name.replace("$", r"\$"), fontsize="small", loc="left")
