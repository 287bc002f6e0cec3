"""What is printed: small tables on standard output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

UNWATCHED_WIDTH = 200
"""Columns of a table that goes to a file or a pipe, where no screen says how wide it may be."""


def console() -> Console:
    """The terminal, or a file as wide as tables need."""
    found = Console(highlight=False, markup=False)
    return found if found.is_terminal else Console(highlight=False, markup=False, width=UNWATCHED_WIDTH)


def note(text: str) -> None:
    """A line that explains what stands above it."""
    console().print(text, style="dim")


def caution(text: str) -> None:
    """A line that calls for care."""
    console().print(text, style="yellow")


def print_facts(*facts: tuple[str, Any]) -> None:
    """Two columns: what, and its value; those that are None are left out."""
    table = Table.grid(padding=(0, 2))
    for name, value in (f for f in facts if f[1] is not None):
        table.add_row(Text(name, style="bold"), Text(shown(value)))
    console().print(table)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """A table with a header; numbers stand right."""
    rows = [list(row) for row in rows]
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_edge=False, pad_edge=False)
    for i, name in enumerate(columns):
        numeric = any(isinstance(row[i], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(v)) for v in row))
    console().print(table)


def shown(value: Any) -> str:
    """A number with four decimals, thousands in groups; nothing for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:z,.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
