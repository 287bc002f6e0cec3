"""What a program must not do if its step is to be traced, and the sentence that names the line that does it."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import fx

from pyrolvm.errors import ProgramError
from pyrolvm.inference.engine import graphs
from pyrolvm.inference.engine.reads import ChangingReadError
from pyrolvm.inference.program.program import Program

_PACKAGES = [Path(module.__file__ or "").parent for module in (torch, pyro)]
_LIBRARIES = (*map(str, _PACKAGES), str(Path(__file__).parents[1]))
_STANDARD = str(Path(traceback.__file__).parent)


class UntraceableError(ProgramError):
    """The program cannot be traced as one graph; the message names the operation and its line."""


@contextmanager
def kept(program: Program) -> Iterator[None]:
    """Restore parameters and buffers, inside `program.scope()`. Raises `UntraceableError` if one was replaced."""
    tensors = program.tensors()
    values = {k: v.detach().clone() for k, v in tensors.items()}
    store = pyro.get_param_store()
    entries = store.get_state()
    owners = [m._buffers for module in program.modules.values() for m in module.modules()]
    buffers = [dict(owner) for owner in owners]
    try:
        yield
        before: list[dict[str, Any]] = [entries["params"], *buffers]
        after: list[dict[str, Any]] = [store.get_state()["params"], *owners]
        for old, new in zip(before, after, strict=True):
            for name in old.keys() | new.keys():
                if old.get(name) is not new.get(name):
                    raise UntraceableError(f"'{name}' becomes another tensor in every step")
    finally:
        store.clear()
        store.set_state(entries)
        for owner, buffer in zip(owners, buffers, strict=True):
            owner.update(buffer)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(values[name])


def check_writes(graph: fx.GraphModule, names: list[str], num_inputs: int, read: Collection[str]) -> None:
    """Raise `UntraceableError` if the graph writes to something else than its first inputs, which have `names`.

    Nor may it write to those that were `read` while it was recorded.
    """
    for position in graphs.written_inputs(graph):
        if position >= len(names):
            raise UntraceableError(
                "the program writes to a tensor in place that is neither a parameter nor a buffer of a module"
                if position >= num_inputs
                else "the program writes to its data in place"
            )
        if (name := f"'{names[position].partition('/')[2]}'") in read:
            raise UntraceableError(f"Python reads or branches on {name}, to which each step writes")


class LastSite(Messenger):
    """Remembers the sample site that was reached last."""

    name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.name = msg["name"]


@contextmanager
def explained() -> Iterator[LastSite]:
    """Raise `UntraceableError`, with the line or site, for what fails within the block."""
    site = LastSite()
    try:
        with site:
            yield site
    except UntraceableError:
        raise
    except Exception as error:
        where = _user_line(error) or (f"at the site '{site.name}'" if site.name else "in the optimiser")
        if isinstance(error, ChangingReadError):
            raise UntraceableError(str(error).format(where=where)) from error
        if _depends_on_data(error):
            raise UntraceableError(
                f"Python reads or branches on the value of a tensor {where}: "
                "use torch.where, a mask, or engine='eager'"
            ) from error
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise UntraceableError(f"it could not be traced {where}: {first[0]}") from error


def _depends_on_data(error: Exception) -> bool:
    kinds = ("data-dependent", "DataDependent", "GuardOnDataDependent")
    return any(kind in f"{type(error).__name__} {error}" for kind in kinds)


def _user_line(error: Exception) -> str | None:
    """The last line of the traceback that is the program's own."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        own = Path(frame.filename)
        if frame.filename.startswith(_LIBRARIES) or str(own.parent) == _STANDARD:
            continue
        if frame.filename.startswith("<eval_with_key") or not frame.line:  # a notebook's cells have lines
            continue
        return f"in {own.name}, line {frame.lineno}: `{frame.line}`"
    return None
