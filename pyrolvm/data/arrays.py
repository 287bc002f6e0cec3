"""From what a user holds (arrays, tables, tensors) to the tensors that a program is called with.

Memory: numpy arrays and pandas tables are copied, so that writing to them later does not change a
training run. Two things are used in place, because copying them would defeat their purpose: a torch tensor
that already has the wanted dtype and device, and a numpy array memory-mapped copy-on-write (`mode="c"`, as
`pyrolvm.data.read(..., mmap=True)` returns it).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyrolvm.data.arguments import (
    arguments_of,
    described,
    is_list_of_numbers,
    is_setting,
    leaves,
    length_of,
    mapped,
    taken,
)
from pyrolvm.data.columns import check_names
from pyrolvm.data.dataset import Dataset
from pyrolvm.data.far.streamed import StreamedDataset
from pyrolvm.data.numeric import as_array
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
        return self._map(lambda name, t: taken(t, rows) if name in carrying else t, rows=numbers, total=total)

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
        moved = self._map(lambda _, t: t.to(device))
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

    def _map(self, f: Callable[[str, Any], Any], **changes: Any) -> Batch:
        args = tuple(mapped(v, f"args[{i}]", f) for i, v in enumerate(self.args))
        kwargs = {k: mapped(v, k, f) for k, v in self.kwargs.items()}
        return dataclasses.replace(self, args=args, kwargs=kwargs, **changes)


def as_batch(data: Any, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Batch:
    """Turn `data` into the arguments of a program.

    Parameters
    ----------
    data
        A tensor, numpy array, DataFrame, Series, `Dataset` or nested list of numbers (the only argument); a tuple for
        positional arguments; a dict for keyword arguments; `Arguments` for both. Lists and dicts of tensors stay one
        argument, and a list of numbers is data if it has an entry for every row. All else is passed on as it is.
    dtype : torch.dtype
        What floating values are cast to. Integers and booleans stay integers and booleans.
    device : torch.device or str
        Where the tensors go.

    Raises
    ------
    DataError
        Arrays and tables of text, dates, objects, complex or masked values, ragged lists, no rows, or values beyond the
        range of `dtype`. Missing values (NaN) pass: what they mean is for the model to decide.
    """

    def convert(name: str, value: Any) -> Any:
        return _tensor(value, name, dtype, device)

    if isinstance(data, Batch):
        return data._map(convert)
    call = arguments_of(data)
    columns = _first_columns((*call.args, *call.kwargs.values()))
    batch = Batch(call.args, call.kwargs, columns)._map(convert)
    rows = batch.num_rows

    def listed(name: str, value: Any) -> Any:
        nonlocal rows
        if not is_list_of_numbers(value) or rows not in (0, len(value)):
            return value
        rows = len(value)
        return convert(name, value)

    args = tuple(listed(f"args[{i}]", v) for i, v in enumerate(batch.args))
    return dataclasses.replace(batch, args=args, kwargs={k: listed(k, v) for k, v in batch.kwargs.items()})


def check_finite_tensor(name: str, value: Tensor) -> None:
    """Raise `DataError` naming the first entry of `value` that is not finite; some rows are looked at at a time."""
    if not value.is_floating_point():
        return
    rows = max(1, 2**22 // max(1, value[:1].numel())) if value.dim() else 1
    for first in range(0, len(value) if value.dim() else 1, rows):
        part = value[first : first + rows] if value.dim() else value
        wrong = ~torch.isfinite(part)
        if bool(wrong.any()):
            where = wrong.nonzero()[0].tolist()
            where[:1] = [first + where[0]] if where else []
            raise DataError(
                f"{name} holds {value[tuple(where)].item()} at index {where}: drop or fill such rows first"
            )


def _first_columns(parts: Any) -> list[str] | None:
    for part in parts:
        if isinstance(part, pd.DataFrame):
            names = [str(c) for c in part.columns]
            check_names(names, "the data")
            return names
        if isinstance(part, Dataset):
            return part.columns
    return None


def _tensor(value: Any, name: str, dtype: torch.dtype, device: torch.device | str) -> Any:
    """One part of the data as a tensor of its own memory (see the module's note); a packed sequence stays one."""
    if isinstance(value, PackedSequence):
        data = _cast(value.data, name, dtype, device)
        return value.to(data)  # type: ignore[arg-type]
    if isinstance(value, StreamedDataset):
        raise DataError(
            f"{value.name} is read as it is needed: pass it alone to fit(..., batch_size=...) or to "
            "pyrolvm.write_answers, or read it whole (`.load()`)"
        )
    if isinstance(value, Dataset):
        value = value.values
    if not isinstance(value, Tensor):
        value = _from_numpy(as_array(value, name), name)
        if value.dim() and value.numel() == 0:  # a tensor without columns may be meant: no covariates
            raise DataError(f"{name} is empty: its shape is {list(value.shape)}")
    return _cast(value, name, dtype, device)


def as_tensor(value: Any, name: str, like: Batch) -> Any:
    """An argument that must be data, whatever it is: text and objects are refused by name."""
    first = next((t for _, t in like.tensors()), torch.zeros(()))
    return _tensor(value, name, torch.get_default_dtype(), first.device) if is_setting(value) else value


def _cast(value: Tensor, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if value.layout != torch.strided:
        raise DataError(f"{name} is a sparse tensor: pass {name}.to_dense()")
    if value.is_complex():
        raise DataError(f"{name} holds complex numbers: pass its real and imaginary parts as columns")
    if value.dim() and len(value) == 0:
        raise DataError(f"{name} is empty: its shape is {list(value.shape)}")
    value = value.detach()
    if not value.is_floating_point():
        return value.to(device)
    cast = value.to(dtype)
    if cast.dtype != value.dtype:
        _check_range(value, cast, name)
    return cast.to(device)


def _check_range(value: Tensor, cast: Tensor, name: str) -> None:
    """A value too large for the dtype would become infinite without a word."""
    lost = torch.isinf(cast) & ~torch.isinf(value)
    if bool(lost.any()):
        where = lost.nonzero()[0].tolist()
        raise DataError(
            f"{name} holds {value[tuple(where)].item():g} at index {where}, beyond {cast.dtype}: "
            "use dtype=float64 or rescale the data"
        )


def _from_numpy(array: np.ndarray, name: str) -> Tensor:
    """A tensor of the array's values, copied unless it is memory-mapped copy-on-write."""
    native = _torch_dtype(array.dtype)
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise DataError(f"{name} holds {array.max()}, beyond 64-bit integers: pass x.astype(float)")
    if isinstance(array, np.memmap) and array.mode == "c" and array.dtype == native:
        return torch.from_numpy(np.asarray(array))
    return torch.from_numpy(np.array(array, dtype=native, order="C"))


def _torch_dtype(dtype: np.dtype) -> np.dtype:
    """The nearest type that torch computes with: native byte order, no wide unsigned or long double."""
    if dtype.kind == "u" and dtype.itemsize > 1:
        return np.dtype({2: np.int32, 4: np.int64, 8: np.int64}[dtype.itemsize])
    if dtype.kind == "f" and dtype.itemsize > 8:
        return np.dtype(np.float64)
    return dtype.newbyteorder("=")
