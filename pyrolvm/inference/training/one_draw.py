"""A run of a program with one draw's noise as a function of its trained parameters, repeated over draws by `vmap`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from pyrolvm.errors import ProgramError
from pyrolvm.inference.engine import graphs
from pyrolvm.inference.engine.recorded import record, settled
from pyrolvm.inference.log_joint.function import widened
from pyrolvm.inference.program.noise import kept_generators, seeded
from pyrolvm.inference.program.program import Program


class OneDraw:
    """A function of the trained parameters and one draw's noise, as recorded operations that `vmap` repeats.

    A program thus takes many draws at once whether or not it is written for them. Make it inside `doubled`.

    Parameters
    ----------
    run : callable
        () -> tensors, what the program gives with its parameters as they are.

    Raises
    ------
    ProgramError
        The run cannot be recorded, or its record gives something else.
    """

    def __init__(self, program: Program, run: Callable[[], tuple[Tensor, ...]]) -> None:
        self.leaves = list(program.parameters.values())
        self.sizes = [p.numel() for p in self.leaves]

        def whole(*flat: Tensor) -> tuple[Tensor, ...]:
            with widened(program), program.scope():
                return run()

        failed: Exception | None = None
        # as it is, or without what it writes in place, whichever can be repeated
        for pure in (False, True):
            try:
                self._record(whole, program, pure)
                return
            except Exception as error:  # of the program, of recording, of vmap
                failed = failed or error
        assert failed is not None
        raise failed

    def _record(self, function: Callable[..., tuple[Tensor, ...]], program: Program, pure: bool) -> None:
        with torch.no_grad(), warnings.catch_warnings(), kept_generators(program.device):
            warnings.simplefilter("ignore")
            graph, constants = record(function, self.leaves, pure=pure)
            _draw_apart(graph)
            constants = settled(graph, len(self.leaves), tuple(t.detach() for t in constants))
            if graphs.written_inputs(graph):
                raise ProgramError("a run of the program changes what it reads")
            self.graph, self.constants = graph, constants
            self(torch.cat([p.detach().reshape(-1) for p in self.leaves]), 2, 0)

    def __call__(self, vector: Tensor, num_draws: int, seed: int) -> tuple[Tensor, ...]:
        """The outputs [num_draws, ...] at `vector` [size]; differentiable, the same noise for the same seed."""
        shapes = [p.shape for p in self.leaves]
        parts = [v.reshape(s) for v, s in zip(vector.split(self.sizes), shapes, strict=True)]
        repeated = [p.expand(num_draws, *p.shape) for p in parts]
        with seeded(seed, vector.device):
            return torch.func.vmap(self._at, randomness="different")(*repeated)

    def _at(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.graph(*parameters, *self.constants))


def _draw_apart(graph: fx.GraphModule) -> None:
    """Draw normals and uniforms anew rather than into memory, which `vmap` would fill alike for every draw."""
    aten, cpu = torch.ops.aten, torch.device("cpu")
    normals, uniforms = (
        (aten.normal_functional.default, aten.normal_.default),
        (aten.uniform.default, aten.uniform_.default),
    )
    node: Any
    for node in list(graph.graph.nodes):
        if node.target not in (*normals, *uniforms):
            continue
        layout = node.meta[graphs.LAYOUT]
        first, second = [*node.args[1:], 0.0, 1.0][:2] if len(node.args) != 2 else [node.args[1], 1.0]
        draw, scale = (aten.randn, second) if node.target in normals else (aten.rand, second - first)
        with graph.graph.inserting_before(node):
            call, kind = graph.graph.call_function, {"dtype": layout.dtype, "device": cpu}
            drawn = call(draw.default, (list(layout.shape),), kind)
            moved = call(aten.add.Scalar, (call(aten.mul.Scalar, (drawn, scale)), first))
        node.replace_all_uses_with(moved)
        graph.graph.erase_node(node)
    graph.recompile()


@contextmanager
def doubled(program: Program) -> Iterator[None]:
    """Hold the trained parameters in float64 inside."""
    leaves = list(program.parameters.values())
    types = [p.dtype for p in leaves]
    try:
        for p in leaves:
            p.data = p.data.double()
        yield
    finally:
        for p, dtype in zip(leaves, types, strict=True):
            p.data = p.data.to(dtype)
