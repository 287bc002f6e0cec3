"""The arguments of one call of a program: which of them are data, whose rows they hold, and parts of them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyrolvm.data.arguments import described, is_setting, leaves, length_of, mapped, taken
from pyrolvm.data.plan import split_rows
from pyrolvm.errors import DataError


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of one call of a model and its guide.

    Parameters
    ----------
    args : tuple
        Positional arguments: tensors, packed sequences, lists or dicts of them, and settings as they were passed.
    kwargs : dict
        Keyword arguments, likewise.
    columns : list of str, optional
        The column names of the first table among them, if there is one.
    rows : tensor [batch], optional
        Which rows of the whole data these are; by default the first ones, in their order.
    total : int, optional
        N, the rows of the whole data; by default those held here.
    shared : frozenset of str
        The tensors, by name, that belong to all rows: their leading dimension is another one. Single numbers always do.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    columns: list[str] | None = None
    rows: Tensor | None = None
    total: int | None = None
    shared: frozenset[str] = frozenset()

    @property
    def num_rows(self) -> int:
        """Leading length of the first tensor that carries rows; 0 if none does."""
        return next((length for _, length in self.lengths()), 0)

    @property
    def indices(self) -> Tensor:
        """Which rows of the whole data these are, int64 [batch]; [0] if there are no rows at all."""
        if self.rows is not None:
            return self.rows
        device = next((t.device for _, t in self.tensors()), None)
        return torch.arange(self.num_rows or 1, device=device)

    @property
    def total_rows(self) -> int:
        """N, the rows of the whole data that this batch was taken from; 1 if there are no rows at all."""
        return self.total or self.num_rows or 1

    def of(self, total: int) -> Batch:
        """The same rows as part of data of `total` rows."""
        return dataclasses.replace(self, rows=self.indices, total=total)

    def numbered(self, rows: Tensor) -> Batch:
        """The same data under other row numbers, int64 [batch]."""
        return dataclasses.replace(self, rows=rows, total=self.total_rows)

    def parts(self) -> Iterator[tuple[str, Tensor | PackedSequence]]:
        """Everything that is data, with the name that messages call it by: `args[0]`, ..., then the keywords."""
        for i, value in enumerate(self.args):
            yield from leaves(value, f"args[{i}]")
        for name, value in self.kwargs.items():
            yield from leaves(value, name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name; of a packed sequence, its entries."""
        for name, part in self.parts():
            yield name, part.data if isinstance(part, PackedSequence) else part

    def settings(self) -> Iterator[tuple[str, Any]]:
        """Every argument that holds no data, with its name."""
        for i, value in enumerate(self.args):
            if is_setting(value):
                yield f"args[{i}]", value
        yield from ((name, value) for name, value in self.kwargs.items() if is_setting(value))

    def lengths(self) -> Iterator[tuple[str, int]]:
        """The name and leading length of all that carries rows."""
        for name, part in self.parts():
            length = length_of(part)
            if length is not None and name not in self.shared:
                yield name, length

    def carrying(self) -> list[Tensor]:
        """The tensors [rows, ...] that carry rows."""
        names = {name for name, _ in self.lengths()}
        return [part for name, part in self.parts() if name in names and isinstance(part, Tensor)]

    def check_rows(self) -> None:
        """Raise `DataError` unless all that carries rows has `num_rows` of them; it names those that differ."""
        lengths = dict(self.lengths())
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise DataError(
                f"the parts of the data have different numbers of rows: {found}; "
                "pass arrays of one leading length, or say which carry the rows: fit(..., rows=...)"
            )

    def take(self, rows: Tensor) -> Batch:
        """The given rows of every tensor, which keep their numbers; `rows`: int64 [batch]."""
        total, carrying = self._carried
        numbers = rows if self.rows is None else self.rows.index_select(0, rows.to(self.rows.device))
        return self.map(lambda name, t: taken(t, rows) if name in carrying else t, rows=numbers, total=total)

    @functools.cached_property
    def _carried(self) -> tuple[int, frozenset[str]]:
        """N, and the names of all that carries rows, checked once for all batches that are taken."""
        self.check_rows()
        return self.total_rows, frozenset(name for name, _ in self.lengths())

    def split(self, share: float, seed: int) -> tuple[Batch, Batch]:
        """(rows to train on, rows held out), each numbered anew; see `split_rows`."""
        self.check_rows()
        parts = [self.take(rows) for rows in split_rows(self.num_rows, share, seed)]
        train, held_out = (dataclasses.replace(part, rows=None, total=None) for part in parts)
        return train, held_out

    def to(self, device: torch.device | str) -> Batch:
        """The same data on another device."""
        moved = self.map(lambda _, t: t.to(device))
        return moved if self.rows is None else dataclasses.replace(moved, rows=self.rows.to(device))

    def fingerprint(self) -> str:
        """A digest of settings, and of types, shapes and up to 2^16 evenly spaced entries of each tensor."""
        digest = hashlib.sha256()
        for _, tensor in self.tensors():
            flat = tensor.detach().reshape(-1)
            step = max(1, flat.numel() // 2**16)
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
        for _, value in self.settings():
            if value is not None:
                digest.update(json.dumps(described(value), sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def map(self, f: Callable[[str, Any], Any], **changes: Any) -> Batch:
        """The same call with `f(name, part)` in place of everything that is data, and other fields changed."""
        args = tuple(mapped(v, f"args[{i}]", f) for i, v in enumerate(self.args))
        kwargs = {k: mapped(v, k, f) for k, v in self.kwargs.items()}
        return dataclasses.replace(self, args=args, kwargs=kwargs, **changes)
