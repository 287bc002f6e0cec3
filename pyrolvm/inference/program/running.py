"""What surrounds a run of a pair: no handlers and no floating type of the caller's, and errors with their reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from pyrolvm.data.batch import Batch
from pyrolvm.errors import ProgramError, PyrolvmError
from pyrolvm.inference.program.hints import LAST, hint_of, reason_of

HALF = (torch.bfloat16, torch.float16)


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
def products_alone_cast(device: torch.device) -> Iterator[None]:
    """Under the caller's `torch.autocast`, take products in its type and all else, densities above all, in float32.

    Parameters are cast anew at each use: autocast's cache would keep them as they were at the first step.
    """
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        with _Widened():
            yield
    finally:
        torch.set_autocast_cache_enabled(before)


class _Widened(TorchFunctionMode):
    """What autocast computes in half precision from float32 is float32 again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return tree_map_only(Tensor, lambda t: t.float() if t.dtype in HALF else t, result)


_EVERY_ROW: ContextVar[bool] = ContextVar("pyrolvm_every_row", default=False)


@contextmanager
def every_row(batch: Batch) -> Iterator[None]:
    """Let plates of a subsample hold all of their rows within the block.

    They draw it, or take its numbers from an argument that is none of those that carry the rows.
    """
    plates: Any = SubsampleMessenger
    drawn = plates._subsample
    places = {t.data_ptr() for name, t in batch.tensors() if name in batch.shared}

    def subsample(
        name: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *rest: Any
    ) -> Any:
        if _EVERY_ROW.get() and size is not None:
            if subsample is None:
                subsample_size = None
            elif size == batch.num_rows and isinstance(subsample, Tensor) and subsample.data_ptr() in places:
                subsample = subsample_size = None
        return drawn(name, size, subsample_size, subsample, *rest)

    token = _EVERY_ROW.set(True)  # other threads that run Pyro meanwhile draw as they would
    plates._subsample = staticmethod(subsample)
    try:
        yield
    finally:
        plates._subsample = staticmethod(drawn)
        _EVERY_ROW.reset(token)


@contextmanager
def explained(batch: Batch, role: str, instead: Callable[[], str] | None = None) -> Iterator[None]:
    """Say which half of the pair failed, on what, and what to type; the original error stays as the cause.

    `instead` looks for another reason, which is told rather than what the error says.
    """
    try:
        yield
    except PyrolvmError:
        raise
    except Exception as error:
        hint = (
            hint_of(error, batch) or (instead() if instead is not None else "") or hint_of(error, batch, LAST)
        )
        raise ProgramError(
            f"the {role} failed on data of {_describe(batch)}: {reason_of(error)}{hint}"
        ) from error


def _describe(batch: Batch) -> str:
    shapes = [f"{name}: {list(tensor.shape)} {tensor.dtype}" for name, tensor in batch.tensors()]
    return "shapes " + ", ".join(shapes) if shapes else "no tensors"
