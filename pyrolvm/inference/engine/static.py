"""Pyro and torch's optimisers without the values that they read on the host, so that a step is one graph.

TensorScalars   numbers that an optimiser reads from tensors stay tensors
static_pyro     Pyro's objectives without reads and branches that serve only messages or speed
plain_lstms     LSTMs as products and sums
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pyro
import pyro.infer.util
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TORCH, ENGINE = str(Path(torch.__file__ or "").parent), str(Path(__file__).parent)
PYRO = str(Path(pyro.__file__ or "").parent)


class TensorScalars(TorchFunctionMode):
    """Keep numbers that an optimiser reads from tensors (`step.item()`) as tensors, in double precision."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.item:
            return args[0].to(torch.float64) if args[0].is_floating_point() else args[0]
        for key in ("value", "alpha"):
            if isinstance(kwargs.get(key), Tensor):
                return _scaled(func.__name__, *args, kwargs.pop(key), **kwargs)
        return func(*args, **kwargs)


def _scaled(name: str, target: Tensor, *terms: Any) -> Tensor:
    """`target.addcdiv_(a, b, value=scale)` and its kin, for a scale that is a tensor."""
    *factors, scale = terms
    term = scale * factors[0]
    if name.startswith("addcdiv"):
        term = term / factors[1]
    elif name.startswith("addcmul"):
        term = term * factors[1]
    if name.startswith("sub"):
        term = -term
    return target.add_(term) if name.endswith("_") else target + term


@contextmanager
def static_pyro() -> Iterator[None]:
    """Pyro without host reads and branches that serve only messages or speed."""
    replaced = {"torch_item": _as_tensor, "warn_if_nan": lambda *args, **kwargs: None}
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("pyro.infer"):
                for function, static in replaced.items():
                    if hasattr(module, function):
                        stack.enter_context(mock.patch.object(module, function, static))
        stack.enter_context(mock.patch.object(pyro.infer.util, "_fulldot", _masked_dot))
        # a distribution made before the trace (a PyroSample's prior) checks its values whatever the default now is
        unchecked = mock.patch.object(
            torch.distributions.Distribution, "_validate_sample", lambda *args: None
        )
        stack.enter_context(unchecked)
        stack.enter_context(_NoShortcuts())
        yield


@contextmanager
def plain_lstms() -> Iterator[None]:
    """LSTMs without oneDNN's layer, which keeps nothing for its gradient where autograd is off, as in a traced step."""
    usual = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(usual)


def _as_tensor(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _masked_dot(weight: Tensor, cost: Tensor) -> Tensor:
    """sum weight * cost where the weight is not 0, the static form of a masked select."""
    return (weight * torch.where(weight > 0, cost, torch.zeros_like(cost))).sum()


class _NoShortcuts(TorchFunctionMode):
    """`Dice.compute_expectation` branches on whether some weight is 0; `_masked_dot` needs no branch.

    What Pyro asserts of its own values holds.

    `one_hot` looks whether its values fit; a comparison with every class does not. `pad_packed_sequence` writes the
    lengths past what records operations; the same are counted from the sizes of the steps.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is Tensor.__bool__ and _is_check(_caller()):
            return True
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "_pad_packed_sequence":
            padded, lengths = func(*args, **(kwargs or {}))
            return padded, (args[1].unsqueeze(-1) > torch.arange(len(lengths))).sum(0)
        return func(*args, **(kwargs or {}))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """As torch's; without a number of classes torch's own, which reads the largest value."""
    if num_classes < 0:
        return torch.ops.aten.one_hot(tensor, num_classes)
    every = torch.arange(num_classes, device=tensor.device)
    return (tensor.unsqueeze(-1) == every).to(torch.int64)


def _caller() -> FrameType:
    """Where the nearest caller outside of torch and the engine is."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((TORCH, ENGINE)):
        frame = frame.f_back
    return frame


def _is_check(frame: FrameType) -> bool:
    """Whether this is Dice's branch, or an assertion of Pyro's own (of the splines and stable distributions)."""
    if frame.f_code is pyro.infer.util.Dice.compute_expectation.__code__:
        return True
    file = frame.f_code.co_filename
    return file.startswith(PYRO) and linecache.getline(file, frame.f_lineno).lstrip().startswith("assert ")
