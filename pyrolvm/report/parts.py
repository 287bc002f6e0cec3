"""What a page is made of: numbers as text, tables, figures, and the template that holds them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pyrolvm.plots.style import row_name

MOST_ROWS = 40
LABELS = {
    "k_hat": "k-hat",
    "kl": "KL",
    "elbo": "ELBO",
    "kl_kind": "kind of KL",
    "mean_variance": "variance of means",
    "p_value": "p-value",
}
"""Columns of tables that read better under another name."""


@dataclass(frozen=True)
class Part:
    """A piece of a section: `kind` is text, words (a list), note, facts, table, figure or code."""

    kind: str
    content: Any
    title: str = ""


def render(title: str, sections: dict[str, list[Part]]) -> str:
    """The page as HTML, its sections by their headings; all that is not the template's own is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = files("pyrolvm.report").joinpath("template.html").read_text(encoding="utf-8")
    return environment.from_string(text).render(title=title, sections=sections)


def figure(drawn: Figure, title: str, alt: str) -> Part:
    """A drawing inside the page; `alt` describes it in words."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "pyrolvm"}):  # the same figure gives the same bytes
        drawn.savefig(stream, format="svg", dpi=200, metadata={"Date": None})
    source = "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
    return Part("figure", {"source": source, "alt": alt}, title)


def number(value: Any, decimals: int | None = None) -> str:
    """A number as text: thousands in groups, three or four significant digits; a dash for what is not known."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if not isinstance(value, int | float | np.number):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    digits = decimals_of([value]) if decimals is None else decimals
    if digits > 4:
        return f"{value:.2e}" if value else "0"
    return f"{value:z,.{digits}f}"


def decimals_of(values: Iterable[Any]) -> int:
    """How many decimals suit all of a column's numbers; more than 4 stands for powers of ten."""
    sizes = [abs(float(v)) for v in values if not isinstance(v, str | None) and math.isfinite(v) and v]
    largest = max(sizes, default=1.0)
    return 5 if largest < 1e-3 else int(np.clip(3 - math.floor(math.log10(largest)), 2, 4))


def facts(*pairs: tuple[str, Any]) -> Part:
    """What, and its value; those that are None are left out."""
    return Part("facts", [(name, number(value)) for name, value in pairs if value is not None])


def table(frame: pd.DataFrame, title: str, head: str = "") -> Part:
    """A table of the frame's first 40 rows, its index as row heads."""
    shown = frame.head(MOST_ROWS)
    texts = []
    for _, column in shown.items():
        digits = decimals_of(column) if column.dtype.kind == "f" else None
        texts.append([number(v, digits) for v in column.tolist()])
    content = {
        "head": head,
        "columns": [LABELS.get(str(c), str(c).replace("_", " ")) for c in frame.columns],
        "numeric": [c.dtype.kind in "iuf" for _, c in shown.items()],
        "rows": [(row_name(name), [t[i] for t in texts]) for i, name in enumerate(shown.index)],
        "more": f"and {len(frame) - len(shown):,} more" if len(frame) > len(shown) else "",
    }
    return Part("table", content, title)
