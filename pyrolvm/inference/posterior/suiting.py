"""Data as a program takes them: looked at by the model, refused if they do not fit."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from pyrolvm.data.arrays import Batch, as_batch, check_finite_tensor
from pyrolvm.data.dataset import Dataset
from pyrolvm.inference.program.program import Program


def suited(program: Program, data: Any) -> Batch:
    """The data as the program's arguments, in its dtype and on its device; every argument is checked.

    A model of the suite's contract looks at its first argument (`check_data`) and its second (`check_condition`), and
    may return each as it wants it: counts as floating numbers, say. Integers that it leaves alone stay integers. Other
    arguments must be finite. The labels of a `Dataset` are the second argument of a model that takes them.
    """
    model: Any = program.contract
    if model is None:
        return as_batch(data, program.dtype, program.device)
    if isinstance(data, Dataset) and data.labels is not None and model.takes_labels:
        data = (data, data.labels)
    batch = _positional(as_batch(data, program.dtype, program.device), model)
    first, *others = batch.args or (None,)
    named = {f"args[{i}]": value for i, value in enumerate(others, 1)} | batch.kwargs
    for name, value in named.items():
        if value is not None:
            check_finite_tensor(name, value)
    if first is None:
        return batch
    wanted = model.check_data(first)
    first = first if wanted is None else wanted
    if others and others[0] is not None:
        condition = model.check_condition(others[0])
        others[0] = others[0] if condition is None else condition
    return dataclasses.replace(batch, args=(first, *others))


def _positional(batch: Batch, model: Any) -> Batch:
    """The same arguments by position, as far as they are the model's first ones."""
    args, named = list(batch.args), dict(batch.kwargs)
    for name in list(inspect.signature(model.model).parameters)[len(args) :]:
        if name not in named:
            break
        args.append(named.pop(name))
    return dataclasses.replace(batch, args=tuple(args), kwargs=named)
