"""From what a user holds (arrays, tables, tensors) to the tensors that a program is called with.

Memory: numpy arrays and pandas tables are copied, so that writing to them later does not change a
training run. Two things are used in place, because copying them would defeat their purpose: a torch tensor
that already has the wanted dtype and device, and a numpy array memory-mapped copy-on-write (`mode="c"`, as
`pyrolvm.data.read(..., mmap=True)` returns it).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyrolvm.data.arguments import arguments_of, is_list_of_numbers, is_setting
from pyrolvm.data.batch import Batch
from pyrolvm.data.columns import check_names
from pyrolvm.data.dataset import Dataset
from pyrolvm.data.far.streamed import StreamedDataset
from pyrolvm.data.numeric import as_array
from pyrolvm.errors import DataError


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
        return data.map(convert)
    call = arguments_of(data)
    columns = _first_columns((*call.args, *call.kwargs.values()))
    batch = Batch(call.args, call.kwargs, columns).map(convert)
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
