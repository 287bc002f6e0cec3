"""What a page is made of: numbers as text, tables, and the template that holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
import pandas as pd

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


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: list[Part]

    @property
    def anchor(self) -> str:
        """What links to the section call it."""
        return self.title.lower().replace(" ", "-")


def render(title: str, sections: list[Section]) -> str:
    """The page as HTML; all that is not the template's own is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = files("pyrolvm.report").joinpath("template.html").read_text(encoding="utf-8")
    return environment.from_string(text).render(title=title, sections=sections)


def number(value: Any, decimals: int | None = None) -> str:
    """A number as text: thousands in groups, three or four digits that count; a dash for what is not known."""
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
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if not text.strip("-0.") else text  # no -0.00


def decimals_of(values: Iterable[Any]) -> int:
    """How many decimals suit all of a column's numbers; more than 4 stands for powers of ten."""
    sizes = [abs(float(v)) for v in values if not isinstance(v, str | None) and math.isfinite(v) and v]
    largest = max(sizes, default=1.0)
    return 5 if largest < 1e-3 else int(np.clip(3 - math.floor(math.log10(largest)), 2, 4))


def facts(pairs: Iterable[tuple[str, Any]]) -> Part:
    """What, and its value; those that are None are left out."""
    return Part("facts", [(name, number(value)) for name, value in pairs if value is not None])


def table(frame: pd.DataFrame, title: str, head: str = "", decimals: int | None = None) -> Part:
    """A table of the frame's first 40 rows, its index as row heads."""
    shown = frame.head(MOST_ROWS)
    columns = [_column(shown.iloc[:, i], decimals) for i in range(shown.shape[1])]
    content = {
        "head": head or " ".join(str(n) for n in frame.index.names if n),
        "columns": [LABELS.get(str(c), str(c).replace("_", " ")) for c in frame.columns],
        "numeric": [c.dtype.kind in "iuf" for _, c in shown.items()],
        "rows": [(row_name(name), [c[i] for c in columns]) for i, name in enumerate(shown.index)],
        "more": f"and {len(frame) - len(shown):,} more" if len(frame) > len(shown) else "",
    }
    return Part("table", content, title)


def _column(column: pd.Series, decimals: int | None) -> list[str]:
    values = column.tolist()
    digits = decimals_of(values) if decimals is None and column.dtype.kind == "f" else decimals
    return [number(v, digits) for v in values]


def row_name(name: Any) -> str:
    """("z", 3) as z[3]."""
    return f"{name[0]}[{', '.join(map(str, name[1:]))}]" if isinstance(name, tuple) else str(name)
