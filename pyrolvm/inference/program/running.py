"""What surrounds a run of a pair: no handlers and no floating type of the caller's, and errors with their reasons."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK

from pyrolvm.data.arrays import Batch
from pyrolvm.errors import ProgramError

_MISMATCH = re.compile(r"Shape mismatch inside plate\('(\w+)'\) at site (\S+) dim (-\d+), (\d+) vs (\d+)")


@contextmanager
def without_handlers() -> Iterator[None]:
    """Run inside apart from the handlers that are active outside: a user's `poutine.scale` around `fit`, say."""
    # handlers, and the dimensions that plates outside have taken
    stacks: list[list[Any]] = [_PYRO_STACK, _DIM_ALLOCATOR._stack]
    active = [stack[:] for stack in stacks]
    for stack in stacks:
        stack.clear()
    try:
        yield
    finally:
        for stack, before in zip(stacks, active, strict=True):
            stack[:] = before


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of this floating type within the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def explained(batch: Batch, role: str) -> Iterator[None]:
    """Say which half of the pair failed, on what; the original error stays as the cause."""
    try:
        yield
    except (ProgramError, KeyboardInterrupt):
        raise
    except Exception as error:
        hint = ""
        if "Multiple sample sites named" in str(error):
            hint = "\nIf that is a plate: make it once, plate = pyrolvm.data_plate(x), and write `with plate:` twice."
        if found := _MISMATCH.search(str(error)):
            plate, site, dim, size, other = found.groups()
            hint = (
                f"\nThe batch of '{site}' has {other} entries where the plate '{plate}' has {size} rows (dimension "
                f"{dim}): if the {other} belong to one datum, write .to_event(1) at '{site}'"
            )
        raise ProgramError(f"the {role} failed on data of {_describe(batch)}: {error}{hint}") from error


def _describe(batch: Batch) -> str:
    shapes = [f"{name}: {list(tensor.shape)} {tensor.dtype}" for name, tensor in batch.tensors()]
    return "shapes " + ", ".join(shapes) if shapes else "no tensors"
