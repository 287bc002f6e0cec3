"""The data plate: the one place where a program and its trainer agree on the number of data.

A program declares its data with `data_plate(x)`. Whoever runs the program may say how many rows the
whole data set has and which of them `x` holds; then a minibatch of B out of N rows is scaled by N/B
(Hoffman et al. 2013, "Stochastic variational inference", section 2.3), so that global latents and
the prior on them keep their right weight. Run alone, the plate is an ordinary `pyro.plate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor

DATA_PLATE = "data"


@dataclass(frozen=True)
class Rows:
    """Which rows of how many: `indices` [batch] out of `total`; `made` are the names of the plates made."""

    total: int
    indices: Tensor
    made: set[str] = field(default_factory=set)


_current: ContextVar[Rows | None] = ContextVar("pyrolvm_rows", default=None)


@contextmanager
def data_rows(total: int, indices: Tensor) -> Iterator[Rows]:
    """Say, for the programs run inside, that their data are rows `indices` [batch] out of `total`."""
    rows = Rows(total, indices)
    token = _current.set(rows)
    try:
        yield rows
    finally:
        _current.reset(token)


def current_rows() -> Rows | None:
    """What `data_rows` says here; None outside it. Who says it also holds the program's parameters."""
    return _current.get()


def data_plate(x: Any = None, name: str = DATA_PLATE, dim: int | None = None) -> pyro.plate:
    """The plate over the rows of `x`, scaled by N/B when the trainer passes a minibatch.

    Parameters
    ----------
    x: tensor [batch, ...], or None to generate: then as many rows as the caller asked for, or one.
    name: the plate's name; one program has one data plate.
    dim: the batch dimension, counted from the right as in `pyro.plate`.
    """
    rows = _current.get()
    size = len(x) if x is not None else (len(rows.indices) if rows else 1)
    if rows is None or len(rows.indices) != size:
        return pyro.plate(name, size, dim=dim)
    rows.made.add(name)
    return pyro.plate(name, rows.total, subsample=rows.indices, dim=dim)


def arange_rows(size: int, device: torch.device | None = None) -> Tensor:
    """Indices [size] of rows taken in their order."""
    return torch.arange(size, device=device)
