"""Which arguments carry the rows of the data, and which belong to all rows."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch.utils.data import DataLoader

from pyrolvm.data.arguments import leaves, length_of
from pyrolvm.data.batch import Batch
from pyrolvm.errors import ProgramError, SettingError
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import sample_sites

Rows = str | int | Sequence[str | int] | None


def carried(program: Program, batch: Batch, rows: Rows, seed: int) -> Batch:
    """The batch with what all rows share marked as such.

    Parameters
    ----------
    rows : names or positions of arguments, optional
        Those that carry rows. If None, all that have the same leading length do; where lengths differ, those as long as
        the outermost plate that stands around observed sites in a run of the model.

    Raises
    ------
    SettingError
        `rows` names no argument, or one that holds no data.
    """
    if rows is not None:
        return dataclasses.replace(batch, shared=_others(program, batch, rows))
    lengths = dict(batch.lengths())
    if len(set(lengths.values())) < 2:
        return batch
    whole = _whole(batch)
    size = _plate_size(program, batch, whole, seed) if whole else 0
    if size is None:
        return batch
    return dataclasses.replace(batch, shared=frozenset(n for n, length in lengths.items() if length != size))


def _whole(batch: Batch) -> list[int]:
    """The lengths of the arguments of one length each, in their order: a ragged list of sequences has none."""
    arguments = [(f"args[{i}]", v) for i, v in enumerate(batch.args)] + list(batch.kwargs.items())
    parts = [{length_of(part) for _, part in leaves(value, name)} - {None} for name, value in arguments]
    return [length for each in parts if len(each) == 1 for length in each if length is not None]


def not_taken(program: Program, batch: Batch) -> dict[str, Any]:
    """The arguments by name that the model does not take: those of a loss that takes them out of a step's."""
    try:
        parameters = inspect.signature(program.model).parameters
    except (TypeError, ValueError):  # it does not say what it takes
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return {}
    return {name: value for name, value in batch.kwargs.items() if name not in parameters}


def check_call(program: Program, batch: Batch) -> None:
    """Raise `ProgramError` if the model has no place for an argument, or lacks one."""
    try:
        signature = inspect.signature(program.model)
    except (TypeError, ValueError):  # it does not say what it takes
        return
    try:
        signature.bind(*batch.args, **batch.kwargs)
    except TypeError as error:
        if any(isinstance(value, DataLoader) for value in batch.args):
            raise ProgramError(
                f"the model takes {signature} and is called with a DataLoader: fit takes minibatches itself, so pass "
                "its tensors, as in fit(model, x, y, guide=guide, batch_size=64)"
            ) from None
        raise ProgramError(
            f"the model takes {signature} and is called with {len(batch.args)} arguments by position"
            + (f" and {', '.join(batch.kwargs)} by name" if batch.kwargs else "")
            + f" ({error}): pass its arguments after it and all else by name, as in fit(model, x, y, guide=guide)"
        ) from None


def _others(program: Program, batch: Batch, rows: Rows) -> frozenset[str]:
    """The parts of all arguments but those that are said to carry rows."""
    known = argument_names(program, batch)
    chosen = [rows] if isinstance(rows, str | int) else list(rows or ())
    for argument in chosen:
        if argument not in known and not (isinstance(argument, int) and 0 <= argument < len(batch.args)):
            raise SettingError(
                f"rows={argument!r} is no argument of the call: name some of {', '.join(known) or 'none'}"
            )
    kept = set()
    for argument in chosen:
        name = known[argument] if isinstance(argument, str) else f"args[{argument}]"
        value = batch.args[int(name[5:-1])] if name.startswith("args[") else batch.kwargs[name]
        found = [part for part, _ in leaves(value, name)]
        if not found:
            raise SettingError(
                f"rows={argument!r} is a setting and holds no rows: name arguments that are data"
            )
        kept |= set(found)
    return frozenset(name for name, _ in batch.parts()) - kept


def argument_names(program: Program, batch: Batch) -> dict[str, str]:
    """The model's name of every argument of the call -> the batch's own: `x` -> `args[0]`."""
    names = positional_names(program.model)
    places = {name: f"args[{i}]" for i, name in enumerate(names[: len(batch.args)])}
    return places | {name: name for name in batch.kwargs}


def positional_names(model: Any) -> list[str]:
    """The names of the arguments that a model takes by position; none where it does not say."""
    try:
        found = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _plate_size(program: Program, batch: Batch, lengths: list[int], seed: int) -> int | None:
    """The rows of the outermost plate around observed sites that is as long as an argument; None if none is.

    Of several, the length of the first argument.
    """
    model = _trial(program, batch, seed)
    if model is None:
        return None
    frames = [f for s in sample_sites(model) if s["is_observed"] for f in s["cond_indep_stack"]]
    found = [(f.dim or 0, lengths.index(n)) for f in frames for n in (f.full_size, f.size) if n in lengths]
    return lengths[min(found)[1]] if found else None


def _trial(program: Program, batch: Batch, seed: int) -> Trace | None:
    """One run of the model that leaves the program as it was; None if it fails, which is said later."""
    store = program.stored()
    try:
        scope = program.untouched(), program.scope(), seeded(seed, program.device)
        with scope[0], scope[1], scope[2], torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pyro.poutine.trace(program.model).get_trace(*batch.args, **batch.kwargs)
    except Exception:
        return None
    finally:
        program.restore(store)
