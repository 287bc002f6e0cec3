"""Data as a program takes them: looked at by the model, refused if they do not fit."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from pyrolvm.data.arrays import Batch, as_batch, check_finite_tensor
from pyrolvm.errors import DataError, SettingError
from pyrolvm.inference.program.program import Program


def suited(program: Program, batch: Batch) -> Batch:
    """The data as the model wants them; every argument is checked.

    A model of the suite's contract looks at its first argument (`check_data`), and may return it as it wants it:
    counts as floating numbers, say. Integers that it leaves alone stay integers. Other arguments must be finite.
    """
    model: Any = program.contract
    if model is None:
        return batch
    first, *others = batch.args or (None,)
    named = {f"args[{i}]": value for i, value in enumerate(others, 1)} | batch.kwargs
    for name, value in named.items():
        if value is not None:
            check_finite_tensor(name, value)
    if first is None:
        return batch
    wanted = model.check_data(first)
    if wanted is None or wanted is first:
        return batch
    return dataclasses.replace(batch, args=(wanted, *others))


def conditioned(program: Program, given: Any, num_samples: int) -> Batch:
    """The arguments of a program whose data are to be made: what is given, and None for the rest.

    Values of one row stand for all. Raises `DataError` for other numbers of rows.
    """
    names = list(inspect.signature(program.model).parameters)
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise SettingError(f"given has '{unknown[0]}', but the model's arguments are {', '.join(names)}")
        batch = as_batch(dict(given), program.dtype, program.device)
    else:
        values = as_batch(given, program.dtype, program.device).args
        batch = Batch((), dict(zip(names[len(names) - len(values) :], values, strict=True)))
    rows = torch.arange(num_samples, device=program.device)
    wide = {}
    for name, value in batch.kwargs.items():
        if value is not None and value.dim() and len(value) not in (1, num_samples):
            raise DataError(
                f"given['{name}'] has {len(value)} rows: pass 1, or {num_samples}, the rows to make"
            )
        alone = value is not None and (not value.dim() or len(value) == 1)
        wide[name] = value.reshape(1, *value.shape[1:])[rows * 0] if alone and value is not None else value
    args = tuple(wide.get(name) for name in names)
    return Batch(args, {}, rows=rows, total=num_samples)
