"""Data as a program takes them: looked at by the model, refused if they do not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

from pyrolvm.data.arrays import Batch, check_finite_tensor
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
