"""What inductor does otherwise while it compiles a step: less of what only its developers or other devices need.

And two things right that it does wrong (`writes_before_reads`, `draws_in_order`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

from torch import fx

from pyrolvm.inference.engine import rewrites


@contextmanager
def without_trials() -> Iterator[None]:
    """Keep inductor from trial compilations, six here, of instructions for products in less than float32.

    Its kernels have none of these products; `-march=native` permits the rest.
    """
    from torch._inductor import cpu_vec_isa

    kinds = [
        k for k in vars(cpu_vec_isa).values() if isinstance(k, type) and issubclass(k, cpu_vec_isa.VecISA)
    ]
    functions = [cpu_vec_isa.valid_vec_isa_list, *(vars(kind).get("__bool__") for kind in kinds)]
    forget = [clear for function in functions if (clear := getattr(function, "cache_clear", None))]
    for clear in forget:
        clear()
    try:
        with mock.patch.object(cpu_vec_isa.VecISA, "check_build", lambda self, code: False):
            yield
    finally:
        for clear in forget:
            clear()


@contextmanager
def reads_or_none() -> Iterator[None]:
    """Let inductor ask at which index a kernel loads a buffer that it reads in another way, by a search, say.

    It asks while it looks whether loops can share a local buffer, and would stop with a KeyError; None means that they
    cannot.
    """
    from torch._inductor.loop_body import LoopBody

    strict = LoopBody.get_read_expr

    def read(self: Any, name: str) -> Any:
        with suppress(KeyError):
            return strict(self, name)
        return None

    with mock.patch.object(LoopBody, "get_read_expr", read):
        yield


@contextmanager
def writes_before_reads() -> Iterator[None]:
    """Keep what reads a buffer after it was written in place, a dropout's mask, say, behind the writing.

    Where inductor fits loops to each other it finds anew what they read, by names from before the writing: a product of
    the mask would join a kernel that runs before the mask is drawn.
    """
    from torch._inductor.scheduler import SchedulerNode

    original = SchedulerNode.recompute_size_and_body

    def recompute(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.set_read_writes(self.read_writes.rename(self.mutation_renames))

    with mock.patch.object(SchedulerNode, "recompute_size_and_body", recompute):
        yield


@contextmanager
def draws_in_order() -> Iterator[None]:
    """Keep a draw behind one before it that nothing uses, as that of a latent whose KL has a closed form.

    inductor ties the second to what reads the first, which it removes; the numbers would be each other's.
    """
    from torch._inductor import ir
    from torch._inductor.scheduler import Scheduler
    from torch._inductor.virtualized import V

    original = Scheduler.compute_dependencies

    def drawn(name: str) -> str:
        found = V.graph.name_to_buffer.get(name)
        if not isinstance(found, ir.MultiOutput):
            return name
        parent: Any = found.inputs[0]
        return drawn(parent.get_name())

    def compute(self: Any) -> None:
        for names in V.graph.additional_buffer_deps.values():
            names.update([drawn(name) for name in names])
        original(self)

    with mock.patch.object(Scheduler, "compute_dependencies", compute):
        yield


@contextmanager
def without_reports(mode: Any) -> Iterator[None]:
    """Keep inductor from printing the graph for its developers, and from making the fake values anew that it has."""
    from torch._dynamo.repro import after_aot
    from torch._inductor import compile_fx

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(after_aot, "save_graph_repro", lambda *args, **kwargs: None))
        stack.enter_context(mock.patch.object(fx.GraphModule, "print_readable", lambda *args, **kwargs: ""))
        stack.enter_context(mock.patch.object(compile_fx, "fake_tensor_prop", lambda *args, **kwargs: mode))
        yield


@contextmanager
def one_table_of_types() -> Iterator[None]:
    """Keep inductor from filling its table of types anew for each operation of each kernel."""
    from torch._inductor.dtype_propagation import DtypePropagationOpsHandler

    DtypePropagationOpsHandler()  # of which there is one
    with mock.patch.object(DtypePropagationOpsHandler, "__init__", lambda self: None):
        yield


@contextmanager
def vectors_from(least: int) -> Iterator[None]:
    """Vectors in the kernels of at least `least` elements alone: others are written once, not thrice."""
    from torch._inductor import config
    from torch._inductor.codegen.cpp import TilingSelect, _get_loop_body

    select, indices = TilingSelect.select_tiling, TilingSelect._select_tiling_indices

    def selected(self: Any, functions: Any, sizes: Any) -> Any:
        nodes = (node for body in _get_loop_body(functions) for node in body.get_nodes())
        # inductor shuns vectors of numbers that lie apart; an exponential is dearer than fetching them
        costly = any(node.target in rewrites.COSTLY for node in nodes)
        with config.patch({"cpp.enable_tiling_heuristics": not costly}):
            return select(self, functions, sizes)

    def places(self: Any, functions: Any, sizes: Any, factor: int) -> Any:
        count = max(math.prod(int(n) for part in own for n in part) for own in sizes)
        return [] if count < least else indices(self, functions, sizes, factor)

    with (
        mock.patch.object(TilingSelect, "select_tiling", selected),
        mock.patch.object(TilingSelect, "_select_tiling_indices", places),
    ):
        yield
