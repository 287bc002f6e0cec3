"""The arguments of a program as a user passes them: data among settings.

Tensors, arrays and tables are data. A list, tuple or dict that holds some, and a packed sequence, is data too and stays
one argument. All else (numbers, text, functions, objects of settings) reaches the program as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pyrolvm.data.dataset import Dataset
from pyrolvm.data.far.streamed import StreamedDataset
from pyrolvm.errors import DataError

_DATA = (Tensor, PackedSequence, np.ndarray, pd.DataFrame, pd.Series, Dataset, StreamedDataset)
_PLAIN = (bool, int, float, str, type(None))
_FIELDS = (argparse.Namespace, types.SimpleNamespace)


@dataclass(frozen=True, eq=False)
class Arguments:
    """Positional and keyword arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def as_call(data: Any, more: tuple[Any, ...] = (), keywords: Mapping[str, Any] | None = None) -> Any:
    """What `fit(model, data, *more, model_kwargs=keywords)` calls the model with; `data` itself if that is all.

    Alone, a tuple holds positional arguments and a dict keyword arguments. Beside others each is one argument.
    """
    if not more and not keywords:
        return data
    if not more and isinstance(data, Mapping):
        if twice := sorted(set(data) & set(keywords or {})):
            raise DataError(f"'{twice[0]}' is given twice, in the data and in model_kwargs: leave one out")
        return Arguments((), {**data, **(keywords or {})})
    first = data if isinstance(data, tuple) and not more else (data,)
    return Arguments((*first, *more), dict(keywords or {}))


def arguments_of(data: Any) -> Arguments:
    """The arguments that `data` stands for: a tuple positional, a dict keyword ones, anything else the only one."""
    if isinstance(data, Arguments):
        return data
    if isinstance(data, Mapping):
        for key in data:
            if not isinstance(key, str):
                raise DataError(
                    f"the data's key {key!r} is not a name: use the model's argument names as keys"
                )
        return Arguments((), dict(data))
    plain = isinstance(data, tuple) and not isinstance(data, PackedSequence)
    return Arguments(tuple(data) if plain else (data,))


def is_data(value: Any) -> bool:
    """Whether a value is data by its type, not by what it holds."""
    array = hasattr(value, "__array__") or hasattr(value, "toarray")
    return isinstance(value, _DATA) or (array and not isinstance(value, np.generic | type))


def mapped(value: Any, name: str, f: Callable[[str, Any], Any]) -> Any:
    """`value` with `f(name, part)` in place of every part that is data; the same object if it holds none."""
    if is_data(value):
        return f(name, value)
    found = {key: mapped(part, f"{name}[{key!r}]", f) for key, part in _parts(value)}
    if all(found[key] is part for key, part in _parts(value)):
        return value
    if isinstance(value, dict):
        return type(value)(found) if type(value) is not dict else found
    return type(value)(*found.values()) if hasattr(value, "_fields") else type(value)(found.values())


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every part that is data, with the name that messages call it by: `x`, `x[0]`, `x['mask']`."""
    if is_data(value):
        yield name, value
    else:
        for key, part in _parts(value):
            yield from leaves(part, f"{name}[{key!r}]")


def _parts(value: Any) -> Any:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


def is_setting(value: Any) -> bool:
    """Whether no part of a value is data."""
    return not any(True for _ in leaves(value, ""))


def is_list_of_numbers(value: Any) -> bool:
    """Whether a value is a list, or a list of lists, of numbers."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(v, int | float) or is_list_of_numbers(v) for v in value)


def length_of(part: Tensor | PackedSequence) -> int | None:
    """The leading length of a tensor, the sequences of a packed one; None of a single number."""
    if isinstance(part, PackedSequence):
        return int(part.batch_sizes[0])
    return part.shape[0] if part.dim() else None


def taken(part: Tensor | PackedSequence, rows: Tensor) -> Tensor | PackedSequence:
    """The given rows of a tensor, or sequences of a packed one."""
    if isinstance(part, Tensor):
        return part.index_select(0, rows.to(part.device))
    padded, lengths = pad_packed_sequence(part, batch_first=True)
    chosen = padded.index_select(0, rows.to(padded.device)), lengths.index_select(0, rows.cpu())
    return pack_padded_sequence(*chosen, batch_first=True, enforce_sorted=False)


def described(value: Any) -> Any:
    """A setting in plain words that JSON has; an object that has none by its type alone."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        return value if not isinstance(value, float) or math.isfinite(value) else {"object": repr(value)}
    if isinstance(value, list | tuple):
        return [described(v) for v in value]
    if isinstance(value, dict):
        return {str(k): described(v) for k, v in value.items()}
    if isinstance(value, _FIELDS):
        return {"object": type(value).__name__, "fields": described(vars(value))}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"object": type(value).__name__, "fields": described(fields)}
    return {"object": getattr(value, "__qualname__", type(value).__name__)}


def is_plain(value: Any) -> bool:
    """Whether a file can give a setting back as it was."""
    if isinstance(value, list | dict):
        return all(is_plain(v) for v in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, _PLAIN) and not (isinstance(value, float) and not math.isfinite(value))
