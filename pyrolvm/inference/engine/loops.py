"""The traced step over static buffers: run from Python, or replayed on CUDA.

A loop owns the buffers of a chunk (`index`, `terms`, `controls`, `rows`) and writes to the state's tensors in place.
`native.NativeLoop` runs it on the CPU without Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from pyrolvm.inference.engine import inductor
from pyrolvm.inference.engine.tracing import TracedStep
from pyrolvm.inference.program.noise import kept_generators

CAPACITY = 1024
ROWS_CAPACITY = 2**20
WARM_UPS = 3


class Loop(Protocol):
    """Advances the traced state in place.

    Attributes
    ----------
    capacity : int
        The most steps of one `run`.
    index : tensor [], int64
        The next step of the chunk.
    terms : tensor [capacity, terms]
        Written by each step, in nats per datum.
    controls : tensor [capacity, controls], float64
        The controls of each step, the learning rate first.
    rows : tensor [capacity, batch], int64
        The rows of each step; [N] if the data are taken whole.
    """

    capacity: int
    index: Tensor
    terms: Tensor
    controls: Tensor
    rows: Tensor

    def run(self, num_steps: int | Iterable[int]) -> None:
        """Take `num_steps` steps from `index` on, with the controls and rows in the buffers; or several such pieces."""


def chunk_capacity(traced: TracedStep, minibatch: bool) -> int:
    """Steps whose buffers take a few megabytes."""
    return max(1, min(CAPACITY, ROWS_CAPACITY // len(traced.rows))) if minibatch else CAPACITY


def lengths_of(num_steps: int | Iterable[int]) -> Iterable[int]:
    """The pieces that `Loop.run` is asked for."""
    return (num_steps,) if isinstance(num_steps, int) else num_steps


class StaticLoop:
    """Runs the traced step from Python, for tests; `CudaLoop` captures it."""

    def __init__(self, traced: TracedStep, minibatch: bool) -> None:
        self.capacity = chunk_capacity(traced, minibatch)
        self._advance, self._inputs = traced.in_place(self.capacity, minibatch)
        self.index, self.terms, self.controls, self.rows = self._inputs[:4]
        self._written = [self.index, self.terms, *traced.state]

    @torch.no_grad()
    def run(self, num_steps: int | Iterable[int]) -> None:
        """As `Loop.run`."""
        for size in lengths_of(num_steps):
            for _ in range(size):
                self._advance(*self._inputs)


class CudaLoop(StaticLoop):
    """Replays one captured step, without host synchronisation between the steps of a chunk.

    Noise comes from the device's default generator, whose state each replay reads and advances.
    """

    def __init__(self, traced: TracedStep, minibatch: bool) -> None:
        """Capture a step; the state and the generators are unchanged."""
        super().__init__(traced, minibatch)
        self._device = self.index.device
        before = [t.clone() for t in self._written]
        with torch.no_grad(), torch.cuda.device(self._device), kept_generators(self._device):
            advance = _fused(self._advance, self._inputs) or self._plain
            self._graph = self._capture(advance)
            for tensor, value in zip(self._written, before, strict=True):
                tensor.copy_(value)

    def run(self, num_steps: int | Iterable[int]) -> None:
        """As `Loop.run`."""
        with torch.cuda.device(self._device):
            for size in lengths_of(num_steps):
                for _ in range(size):
                    self._graph.replay()

    def _plain(self) -> None:
        self._advance(*self._inputs)

    def _capture(self, advance: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        # libraries initialise in the first calls, which must not be captured
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.index.zero_()
                advance()
            self.index.zero_()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(torch.cuda.default_generators[self._device.index or 0])
        # other threads of the process may use the device meanwhile
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            advance()
        return graph


def _fused(advance: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[[], Any] | None:
    """The step as kernels fused by inductor; None where that fails."""
    if find_spec("triton") is None:
        return None
    try:
        compiled = inductor.fused(inductor.functional(advance, inputs))
        compiled(inputs)
    except Exception:
        return None
    return lambda: compiled(inputs)
