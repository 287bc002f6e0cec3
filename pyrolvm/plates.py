"""The data plate: the one place where a program and its trainer agree on the number of data.

A program declares its data with `data_plate(x)`. The caller may set, by `data_rows`, how many rows the
whole data set has and which of them `x` holds; then a minibatch of B out of N rows is scaled by N/B
(Hoffman et al. 2013, "Stochastic variational inference", section 2.3), so that the prior on global
latents keeps the right weight. Otherwise the plate is an ordinary `pyro.plate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import pyro
from torch import Tensor

DATA_PLATE = "data"


@dataclass(frozen=True)
class Rows:
    """The rows that a batch holds.

    Attributes
    ----------
    total : int
        N, the rows of the whole data set.
    indices : tensor [batch], int64
        Row numbers, below `total`.
    made : set of str
        Names of the data plates created under these rows.
    tables : set of int
        Identities of the tables that `row_entries` was asked for.
    entries : dict of int to Tensor
        Identity of a table -> its entries of the batch, where the trainer has gathered them to train them alone.
    """

    total: int
    indices: Tensor
    made: set[str] = field(default_factory=set)
    tables: set[int] = field(default_factory=set)
    entries: Mapping[int, Tensor] = field(default_factory=dict)


_current: ContextVar[Rows | None] = ContextVar("pyrolvm_rows", default=None)


@contextmanager
def data_rows(total: int, indices: Tensor, entries: Mapping[int, Tensor] | None = None) -> Iterator[Rows]:
    """Within the block, the batch holds rows `indices` of `total`; `entries` as in `Rows`."""
    rows = Rows(total, indices, entries=entries or {})
    token = _current.set(rows)
    try:
        yield rows
    finally:
        _current.reset(token)


def current_rows() -> Rows | None:
    """The enclosing `data_rows`, or None.

    Inside it the trainer owns the parameters, so models must not register them.
    """
    return _current.get()


def data_plate(x: Any = None, name: str = DATA_PLATE, dim: int | None = None) -> pyro.plate:
    """The plate over the rows of `x`, scaled by N/B when the trainer passes a minibatch.

    Parameters
    ----------
    x : tensor [batch, ...], optional
        The data. None generates: as many rows as the enclosing `data_rows` has, or one.
    name : str
        The plate's name. A program has one data plate.
    dim : int, optional
        The batch dimension, negative, counted from the right as in `pyro.plate`.
    """
    rows = _current.get()
    size = len(x) if x is not None else (len(rows.indices) if rows else 1)
    if rows is None or len(rows.indices) != size:
        return pyro.plate(name, size, dim=dim)
    rows.made.add(name)
    return pyro.plate(name, rows.total, subsample=rows.indices, dim=dim)


def row_entries(table: Tensor) -> Tensor:
    """The entries of the batch's rows in a parameter that has one entry for each row of the whole data.

    Under `fit` on minibatches such a parameter is trained by its entries: a step reads and writes those of its batch,
    and their part of the optimiser's state, whatever the number of rows.

    Parameters
    ----------
    table : Tensor [N, ...]

    Returns
    -------
    Tensor [batch, ...]
        All N entries outside of `fit`.
    """
    rows = _current.get()
    if rows is None:
        return table
    rows.tables.add(id(table))
    found = rows.entries.get(id(table))
    return table.index_select(0, rows.indices) if found is None else found
