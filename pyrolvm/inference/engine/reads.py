"""What Python may read of tensors while a step is recorded.

The graph of a step is run with other parameters, noise and rows than those it was recorded with. A value that depends
on none of them (computed from data passed whole, or from settings) is the same in every step, and may be read, branched
on and looped over; it is a constant of the graph, which belongs to these data alone. Any other is refused by what it
depends on.

The cause of a value is followed by memory, through views and writes in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyrolvm.inference.engine.graphs import unrecorded

ATEN = torch.ops.aten
ROWS = "the rows of the batch"
HOST = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
"""Reads that reach no operation of torch."""
MASKS = (torch.bool, torch.uint8)


class ChangingReadError(Exception):
    """Python reads a value that is another one in the next step."""

    def __init__(self, cause: str, size: bool = False) -> None:
        what = "a result's size depends" if size else "Python reads or branches on a value that depends"
        remedy = "use torch.where or a mask, so that all steps compute the same"
        if cause == ROWS:
            remedy = "pass the data whole, or compute the value before fit and pass it as an argument"
        super().__init__(f"{what} on {cause} {{where}}: {remedy}, or engine='eager'")


class Buffer(str):
    """The name of a module's buffer, which is constant unless the step writes to it."""


class Reads(TorchDispatchMode):
    """Answers reads of what is constant, refuses those of what changes between steps.

    Parameters
    ----------
    changing : mapping
        Cause in words -> tensors that change between steps. What depends on a `Buffer` alone may be read.
    site : callable
        The sample site that was reached last.

    Attributes
    ----------
    buffers : set of str
        Those of which something was read: the record holds as long as nothing writes to them.
    """

    def __init__(
        self, changing: Mapping[str, Iterable[Tensor]], site: Callable[[], str | None] = lambda: None
    ) -> None:
        super().__init__()
        self.site, self.buffers = site, set[str]()
        self.causes: dict[int, tuple[StorageWeakRef, str | None]] = {}
        for cause, tensors in changing.items():
            for tensor in tensors:
                self._caused(tensor, cause)

    def __enter__(self) -> Any:
        self.host = _HostReads(self)
        self.host.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.host.__exit__(*error)

    def cause(self, values: Any) -> str | None:
        """What the first of these tensors that changes between steps depends on; None if none does."""
        tensors = (t for t in tree_leaves(values) if isinstance(t, Tensor) and t.numel())
        known = [cause for t in tensors if (cause := self._cause(t)) is not None]
        known.sort(key=lambda cause: isinstance(cause, Buffer))  # first what may not be read
        return known[0] if known else None

    def check(self, cause: str | None, size: bool = False) -> None:
        """Refuse a read of what depends on `cause`, unless that may be read."""
        if isinstance(cause, Buffer):
            self.buffers.add(cause)
        elif cause is not None:
            raise ChangingReadError(cause, size)

    def _cause(self, tensor: Tensor) -> str | None:
        memory, cause = self.causes.get(_memory(tensor), (None, None))
        return None if memory is None or memory.expired() else cause

    def _caused(self, tensor: Tensor, cause: str | None) -> None:
        # memory that was freed may be another tensor's by now, one that no operation made (`torch.tensor(0)`)
        if tensor.numel():
            self.causes[_memory(tensor)] = StorageWeakRef(tensor.untyped_storage()), cause

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        cause = self.cause((args, kwargs))
        reads = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if (
            reads and func is not ATEN.index.Tensor
        ):  # which has a size of its own only where its indices are masks
            return self._read(func, args, kwargs, cause)
        if func is ATEN._pack_padded_sequence.default:
            return self._packed(*args, **kwargs)
        if func is ATEN.index.Tensor:
            args = (args[0], [self._places(index) for index in args[1]])
            args = (args[0], [part for parts in args[1] for part in parts])
        if torch.Tag.nondeterministic_seeded in func.tags:
            cause = f"the draw of '{self.site()}'" if self.site() else "a random draw"
        result = func(*args, **kwargs)
        self._note(func, result, args, cause)
        return result

    def _note(self, func: Any, result: Any, args: tuple, cause: str | None) -> None:
        fresh = not any(a.alias_info for a in func._schema.arguments)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (fresh or cause is not None):
                self._caused(tensor, cause)
        if cause is None:
            return
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    if isinstance(tensor, Tensor):
                        self._caused(tensor, cause)

    def _read(self, func: Any, args: tuple, kwargs: dict, cause: str | None) -> Any:
        self.check(cause, size=torch.Tag.dynamic_output_shape in func.tags)
        with unrecorded():
            result = func(*args, **kwargs)
        self._note(func, result, args, None)
        return result

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        """The places that a mask picks, one tensor for each of its dimensions; any other index is itself."""
        if index is None or index.dtype not in MASKS:
            return [index]
        return list(self._read(ATEN.nonzero.default, (index,), {}, self.cause(index)).unbind(-1))

    def _packed(self, values: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """Pack by the places of the entries, which the lengths settle."""
        self.check(self.cause(lengths), size=True)
        with unrecorded():
            places = torch.arange(values.shape[0] * values.shape[1], device=values.device)
            picked, sizes = ATEN._pack_padded_sequence.default(
                places.reshape(values.shape[:2]), lengths, batch_first
            )
        flat = values.reshape(-1, *values.shape[2:])
        return flat.index_select(0, picked), sizes


class _HostReads(TorchFunctionMode):
    """Lists and arrays that Python makes of tensors."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in HOST:
            self.reads.check(self.reads.cause(args))
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
