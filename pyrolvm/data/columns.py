"""Columns by their names: each once, and similar names for one that is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from pyrolvm.errors import DataError, did_you_mean


def check_names(names: Sequence[str], source: str) -> None:
    """Raise `DataError` if two columns have one name."""
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise DataError(f"{source} has two columns called {twice[0]!r}: rename one of them")


def find_columns(columns: Sequence[str | int], names: Sequence[str], source: str) -> list[int]:
    """Positions of `columns` among `names`.

    Raises
    ------
    DataError
        None are named, or one is missing or named twice.
    """
    if isinstance(columns, str):
        raise DataError(f"columns={columns!r} is one string: type a list, columns=[{columns!r}]")
    if not columns:
        raise DataError(f"{source}: no columns were chosen: name at least one of {listed(names, 20)}")
    positions = [find_column(c, names, source) for c in columns]
    twice = [names[i] for i, times in Counter(positions).items() if times > 1]
    if twice:
        raise DataError(f"{source}: column {twice[0]!r} is chosen twice: name each column once")
    return positions


def find_column(column: str | int, names: Sequence[str], source: str) -> int:
    """Position of `column` among `names`.

    Raises
    ------
    DataError
        It is missing; the message lists similar names.
    """
    if str(column) in names:
        return list(names).index(str(column))
    hint = did_you_mean(str(column), names).rstrip() or f"it has {listed(names, 20)}"
    raise DataError(f"{source} has no column {str(column)!r}: {hint}")


def listed(values: Iterable[Any], most: int = 6) -> str:
    """The first values, and how many more there are."""
    each = list(values)
    more = f" and {len(each) - most} more" if len(each) > most else ""
    return ", ".join(map(repr, each[:most])) + more
