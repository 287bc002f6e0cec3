"""From what a user holds (arrays, tables, tensors) to the tensors that a program is called with.

Memory: numpy arrays and pandas tables are copied, so that writing to them later does not change a
training run. Two things are used in place, because copying them would defeat their purpose: a torch tensor
that already has the wanted dtype and device, and a numpy array memory-mapped copy-on-write (`mode="c"`, as
`pyrolvm.data.read(..., mmap=True)` returns it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrolvm.data.dataset import Dataset
from pyrolvm.data.numeric import as_array
from pyrolvm.errors import DataError


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of one call of a model and its guide: tensors of one leading length.

    Args:
        args: positional arguments; `None` where the program is to be called with None.
        kwargs: keyword arguments, likewise.
        columns: the column names of the first table among them, if there is one.
    """

    args: tuple[Tensor | None, ...] = ()
    kwargs: dict[str, Tensor | None] = field(default_factory=dict)
    columns: list[str] | None = None

    @property
    def num_rows(self) -> int:
        """Leading length of the first tensor that has one; 0 if none has."""
        return next((t.shape[0] for _, t in self.tensors() if t.dim()), 0)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with the name that messages call it by: `args[0]`, ..., then the keywords."""
        for i, value in enumerate(self.args):
            if value is not None:
                yield f"args[{i}]", value
        for name, value in self.kwargs.items():
            if value is not None:
                yield name, value

    def check_rows(self) -> None:
        """Raise `DataError` unless all tensors have `num_rows` rows; it names those that differ."""
        lengths = {name: _length(name, tensor) for name, tensor in self.tensors()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise DataError(
                f"the parts of the data have different numbers of rows: {found}; "
                "pass arrays of one leading length, or put the others into the model"
            )

    def take(self, rows: Tensor) -> Batch:
        """The given rows of every tensor; `rows`: int64 [batch]."""
        self.check_rows()
        return self._map(lambda t: t.index_select(0, rows.to(t.device)))

    def to(self, device: torch.device | str) -> Batch:
        """The same data on another device."""
        return self._map(lambda t: t.to(device))

    def _map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        args = tuple(None if v is None else f(v) for v in self.args)
        kwargs = {k: None if v is None else f(v) for k, v in self.kwargs.items()}
        return Batch(args, kwargs, self.columns)


def as_batch(data: Any, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Batch:
    """Turn `data` into the arguments of a program.

    Args:
        data: a tensor, numpy array, DataFrame, Series, `Dataset` or nested list of numbers (the only
            argument); a tuple, or a list that holds any of these, for positional arguments; a dict for
            keyword arguments. Each is [rows, ...]; numbers and `None` may stand among them.
        dtype: what floating values are cast to. Integers and booleans stay integers and booleans.
        device: where the tensors go.

    Raises:
        DataError: text, dates, objects, complex or masked values, ragged lists, no rows, or values beyond the
            range of `dtype`. Missing values (NaN) pass: what they mean is the model's to say.
    """
    if isinstance(data, Batch):
        return data._map(lambda t: _cast(t, "data", dtype, device))
    if isinstance(data, Mapping):
        _check_keywords(data)
        kwargs = {k: _tensor(v, k, dtype, device) for k, v in data.items()}
        return Batch((), kwargs, _first_columns(data.values()))
    parts = tuple(data) if _is_positional(data) else (data,)
    args = tuple(_tensor(v, f"args[{i}]", dtype, device) for i, v in enumerate(parts))
    return Batch(args, {}, _first_columns(parts))


def _is_positional(data: Any) -> bool:
    if isinstance(data, tuple):
        return True
    held = (Tensor, np.ndarray, pd.DataFrame, pd.Series, Dataset, type(None))
    # [[1, 2], [3, 4]] is one matrix, [x, y] are two arguments; numpy's scalars are not ndarrays
    return isinstance(data, list) and any(isinstance(v, held) for v in data)


def _check_keywords(data: Mapping[Any, Any]) -> None:
    for key in data:
        if not isinstance(key, str):
            raise DataError(f"the data's key {key!r} is not a name: use the model's argument names as keys")


def _first_columns(parts: Any) -> list[str] | None:
    for part in parts:
        if isinstance(part, pd.DataFrame):
            return [str(c) for c in part.columns]
        if isinstance(part, Dataset):
            return part.columns
    return None


def _length(name: str, tensor: Tensor) -> int:
    if tensor.dim() == 0:
        raise DataError(
            f"{name} is a single number and has no rows to take a minibatch of: "
            "type batch_size=None, or put the number into the model"
        )
    return tensor.shape[0]


def _tensor(value: Any, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor | None:
    """One argument as a tensor of its own memory (see the module's note)."""
    if value is None:
        return None
    if isinstance(value, Dataset):
        value = value.values
    if not isinstance(value, Tensor):
        value = _from_numpy(as_array(value, name), name)
    return _cast(value, name, dtype, device)


def _cast(value: Tensor, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if value.layout != torch.strided:
        raise DataError(f"{name} is a sparse tensor: pass {name}.to_dense()")
    if value.is_complex():
        raise DataError(f"{name} holds complex numbers: pass its real and imaginary parts as columns")
    if value.dim() and value.numel() == 0:
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
            "type dtype=torch.float64 or rescale the data"
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
