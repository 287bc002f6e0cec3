"""Data as a program takes them: looked at by the model, refused if they do not fit."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from pyrolvm.data.arguments import leaves
from pyrolvm.data.arrays import as_batch, as_tensor, check_finite_tensor
from pyrolvm.data.batch import Batch
from pyrolvm.data.dataset import Dataset
from pyrolvm.inference.program.carriers import positional_names
from pyrolvm.inference.program.program import Program


def suited(program: Program, data: Any, like: Batch | None = None) -> Batch:
    """The data as the program's arguments, in its dtype and on its device; every argument is checked.

    A model of the suite's contract looks at its first argument (`check_data`) and its second (`check_condition`), and
    may return each as it wants it: counts as floating numbers, say. Integers that it leaves alone stay integers. Other
    arguments must be finite. The labels of a `Dataset` are the second argument of a model that takes them.

    Parameters
    ----------
    like : Batch, optional
        A call of the program: what is left out of `data` and holds no rows is taken from it.
    """
    model: Any = program.contract
    if model is None:
        data = (data,) if _is_one_argument(program.model, data) else data
        batch = as_batch(data, program.dtype, program.device)
        return batch if like is None else completed(program, batch, like)
    if isinstance(data, Dataset) and data.labels is not None and model.takes_labels:
        data = (data, data.labels)
    batch = _positional(as_batch(data, program.dtype, program.device), model)
    batch = batch if like is None else completed(program, batch, like)
    first, *others = batch.args or (None,)
    named = {f"args[{i}]": value for i, value in enumerate(others, 1)} | batch.kwargs
    for name, value in named.items():
        for part, tensor in leaves(value, name):
            check_finite_tensor(part, tensor)
    if first is None:
        return batch
    first = as_tensor(first, "args[0]", batch)
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


def _is_one_argument(model: Any, data: Any) -> bool:
    """Whether a dict is the model's only argument, and its keys are not the names of arguments."""
    if not isinstance(data, dict):
        return False
    try:
        signature = inspect.signature(model)
        signature.bind(data)
    except (TypeError, ValueError):
        return False
    try:
        signature.bind(**data)
    except TypeError:
        return True
    return False


def completed(program: Program, batch: Batch, like: Batch) -> Batch:
    """The arguments in the places of another call, with its settings where none are given.

    By position are given either all arguments of that call, or its first ones, or those of them that carry rows.
    """
    names = positional_names(program.model)
    named, args = dict(batch.kwargs), list(batch.args)
    for name in names[len(like.args) : len(args)]:  # that call had them by name
        if name in like.kwargs:
            named[name] = args.pop(len(like.args))
    places = dict[int, Any]()
    for place, name in enumerate(names[: len(like.args)]):
        if len(args) < len(like.args) and name in named:
            places[place] = named.pop(name)
    free = [i for i in range(len(like.args)) if i not in places]
    carrying = [i for i in free if carries(like, i)]
    free = carrying if len(args) == len(carrying) else free
    places |= dict(zip(free, args, strict=False))
    left = [i for i in range(len(like.args)) if i not in places] + [k for k in like.kwargs if k not in named]
    if any(carries(like, key) for key in left):
        return batch  # data are missing: refused where the number of arguments is checked
    whole = (*(places.get(i, like.args[i]) for i in range(len(like.args))), *args[len(like.args) :])
    return dataclasses.replace(batch, args=whole, kwargs=like.kwargs | named, shared=like.shared)


def carries(like: Batch, place: int | str) -> bool:
    """Whether an argument of a call holds rows."""
    name = f"args[{place}]" if isinstance(place, int) else place
    value = like.args[place] if isinstance(place, int) else like.kwargs[place]
    carrying = {part for part, _ in like.lengths()}
    return any(part in carrying for part, _ in leaves(value, name))
