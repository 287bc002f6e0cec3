"""All that the engines use of torch's private and prototype parts (torch 2.11 to 2.13).

    record      run a function and record its tensor operations              (make_fx)
    unrecorded  operations within a record that it leaves out                (make_fx; `reads` watches it)
    functional  the same graph with side effects on its inputs only, at its end (functionalize)
    cpp_source  a graph as C++ source                                        (inductor, cpp_wrapper)
    compiler_command, header                                                 (inductor's C++ builder)
    fused       a graph as fused kernels of its device                       (inductor)
    borrowed    tensors as the pointers that such C++ takes                  (torch._C._aoti)

A part that is missing in another version of torch raises an exception here; the engines then run
eagerly, with the reason in `fitted.engine`.
"""

from __future__ import annotations

import ctypes
import logging
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, fx

from pyrolvm.inference.engine import rewrites

# Some give the numbers of eager torch, the others only make compiling quicker.
INDUCTOR_SETTINGS: dict[str, Any] = {
    "fallback_random": True,  # draws are ATen's own, from the default generators
    "size_asserts": False,  # shapes cannot change between steps
    "cpp.vec_isa_ok": True,  # skips a trial compilation; a compiler that cannot fails at once
    "cpp.min_chunk_size": 8192,  # a parallel region costs microseconds, and far more on a busy machine
    "pattern_matcher": False,  # it would join products and sums again, for BLAS, and takes time
    "cpp_wrapper": True,
}
# -O3 takes longer for no gain: inductor vectorises the kernels itself
FLAGS = {"-O3": "-O2", "-g1": "", "-Wall": "-w", "-pedantic": ""}
REMOVED_OPS = ("_record_function", "_linalg_check_errors")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and log lines of torch's compiler: they are for its developers."""
    loggers = [logging.getLogger(n) for n in (*logging.root.manager.loggerDict,) if n.startswith("torch._")]
    levels = [logger.level for logger in loggers]
    _set_levels(loggers, [logging.ERROR] * len(loggers))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _set_levels(loggers, levels)


def _set_levels(loggers: Sequence[logging.Logger], levels: Sequence[int]) -> None:
    """As `setLevel` of each, which takes a second for the hundreds that torch has."""
    if [logger.level for logger in loggers] == list(levels):
        return
    for logger, level in zip(loggers, levels, strict=True):
        logger.level = level
    loggers[0].setLevel(levels[0])  # clears what all loggers remember


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """The layout of `tensor`."""
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def example(self) -> Tensor:
        """A tensor of this layout."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


LAYOUT = "layout"
"""Where a node of a recorded graph keeps the `Layout` of its value."""


def _set_layout(proxy: Any, value: Any) -> Any:
    if isinstance(value, Tensor) and value.layout == torch.strided:
        proxy.node.meta[LAYOUT] = Layout.of(value)
    return proxy


def record(
    function: Callable[..., Any], inputs: Sequence[Tensor], mode: Literal["real", "fake"] = "real"
) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The operations of `function(*inputs)`, run once on these tensors, and the constants that it reads.

    An input that the function reaches by another name is that input of the graph. In the `mode` "fake" nothing is
    computed and no input changes.

    Returns
    -------
    graph : GraphModule
        Its arguments are the inputs, then the constants.
    constants : tuple of tensor
        The other tensors that the function reads.
    """
    from torch.fx.experimental import proxy_tensor

    # a fake tensor for each operation, with the stack that made it, is most of the time of a trace
    with mock.patch.object(proxy_tensor, "set_meta", _set_layout):
        graph = proxy_tensor.make_fx(function, tracing_mode=mode)(*inputs)
    for node in reversed(graph.graph.nodes):
        # profiler marks with their objects, and a check that reads its result on the host
        removed = node.op == "get_attr" or any(name in str(node.target) for name in REMOVED_OPS)
        if removed and not node.users:
            graph.graph.erase_node(node)
    return graph, _lift_constants(graph, inputs)


def unrecorded() -> AbstractContextManager[Any]:
    """Operations inside are run and not recorded: their results are constants of the graph."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


def _lift_constants(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Make the tensors that the graph holds inputs; one that is an input by another name becomes that input."""
    nodes = graph.graph
    placeholders = [n for n in nodes.nodes if n.op == "placeholder"]
    known = {_memory(t): p for t, p in zip(inputs, placeholders, strict=True)}
    constants: list[Tensor] = []
    for node in list(nodes.nodes):
        if node.op != "get_attr":
            continue
        value: Any = getattr(graph, str(node.target))
        if _memory(value) not in known:
            with nodes.inserting_after(placeholders[-1]):
                placeholders.append(nodes.placeholder(f"constant_{len(constants)}"))
            placeholders[-1].meta[LAYOUT] = Layout.of(value)
            constants.append(value)
            known[_memory(value)] = placeholders[-1]
        node.replace_all_uses_with(known[_memory(value)])
        nodes.erase_node(node)
    graph.recompile()
    return tuple(constants)


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.numel() == 0:
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.device


def inlined(graph: fx.Graph, part: fx.GraphModule, inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """Append the operations of `part` on `inputs` to `graph`; its outputs there."""
    placeholders = [n for n in part.graph.nodes if n.op == "placeholder"]
    copied = graph.graph_copy(part.graph, dict(zip(placeholders, inputs, strict=True)))
    return list(copied) if isinstance(copied, list | tuple) else [copied]  # type: ignore[list-item]


def written_inputs(graph: fx.GraphModule) -> list[int]:
    """Positions of the inputs that the graph writes to in place, directly or through a view."""
    positions = {n: i for i, n in enumerate(n for n in graph.graph.nodes if n.op == "placeholder")}
    base: dict[fx.Node, fx.Node] = {}
    written = set()
    for node in graph.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if isinstance(value, fx.Node) and argument.alias_info is not None:
                base[node] = base.get(value, value)
                if argument.alias_info.is_write and base[node] in positions:
                    written.add(positions[base[node]])
    return sorted(written)


@quiet()
def functional(function: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The operations of `function(*inputs)` in inductor's terms, none in place except the final `copy_`."""
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    rewrites.exponential_by_inversion()  # called before the trace, which draws no numbers
    with config.patch(INDUCTOR_SETTINGS), torch.no_grad():
        table = rewrites.decompositions(select_decomp_table())
        pure = torch.func.functionalize(function, remove="mutations")
        flat = make_fx(pure, decomposition_table=table, tracing_mode="fake")(*inputs)
    rewrites.delay_expansions(flat)
    rewrites.hoist_scalars(flat)
    return flat


def keep_strides(graph: fx.GraphModule, strides: Sequence[tuple[int, ...]]) -> None:
    """Make inductor give the results of the graph these strides."""
    output = next(iter(reversed(graph.graph.nodes)))
    output.meta["user_visible_output_idxs"] = list(range(len(strides)))
    output.meta["original_output_strides"] = list(strides)


class _Source(BaseException):
    """Carries the source out of inductor before it is compiled; not an Exception, so nothing wraps it."""


@quiet()
def cpp_source(graph: fx.GraphModule, *, vectorised: bool = True) -> str:
    """C++ that defines `void inductor_entry_impl(AtenTensorHandle* inputs, AtenTensorHandle* outputs)`.

    Kernels that are not `vectorised` are written and compiled in half the time.

    Raises
    ------
    RuntimeError
        inductor wrote no C++, or C++ with other inputs.
    """
    from torch._inductor.codecache import CppWrapperCodeCache

    def capture(*args: Any, main_code: str, kernel_code: str | None = None, **kwargs: Any) -> None:
        raise _Source(main_code + (kernel_code or ""))

    with mock.patch.object(CppWrapperCodeCache, "load_pybinding", capture):
        try:
            _compile(graph, INDUCTOR_SETTINGS | ({} if vectorised else {"cpp.simdlen": 1}))
        except _Source as source:
            code = str(source.args[0])
        else:
            raise RuntimeError("inductor wrote no C++ for this graph")
    taken = re.findall(r"steal_from_raw_handles_to_raii_handles\(input_handles, (\d+)\)", code)
    count = sum(n.op == "placeholder" for n in graph.graph.nodes)
    if taken != [str(count)]:
        raise RuntimeError(f"inductor's C++ takes {taken} inputs where the graph has {count}")
    return code


@quiet()
def fused(graph: fx.GraphModule) -> Callable[[Sequence[Tensor]], Any]:
    """The graph as kernels that inductor wrote for its device, called from Python."""
    compiled = _compile(graph, INDUCTOR_SETTINGS | {"cpp_wrapper": False})
    return lambda inputs: compiled(list(inputs))


def _compile(graph: fx.GraphModule, settings: dict[str, Any]) -> Any:
    """Compile by inductor alone: the graph is traced, flat and functional, so Dynamo and AOTAutograd are not needed."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.utils import BoxedBool
    from torch._inductor.virtualized import V

    inputs = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
    mode = next(t.fake_mode for t in inputs)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(config.patch(settings))
        stack.enter_context(V.set_fake_mode(mode))
        stack.enter_context(tracing(TracingContext(mode)))
        stack.enter_context(_reads_or_none())
        return compile_fx_inner(
            graph, inputs, cudagraphs=BoxedBool(False), cpp_wrapper=settings["cpp_wrapper"]
        )


@contextmanager
def _reads_or_none() -> Iterator[None]:
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


HEADERS = "#include <torch/csrc/inductor/cpp_wrapper/cpu.h>\n#include <torch/csrc/inductor/cpp_prefix.h>\n"


@quiet()
def compiler_command(source: Path, target: Path, header: Path | None = None) -> list[str]:
    """The command that compiles C++ `source` for this processor into the library `target`.

    Parameters
    ----------
    source : Path
        A C++ file, or a header (.h), which is precompiled.
    target : Path
        The library, or the precompiled header.
    header : Path, optional
        A header to include first, precompiled beside itself.
    """
    from torch._inductor import config
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    precompiling = source.suffix == ".h"
    with config.patch(INDUCTOR_SETTINGS):
        options = CppTorchDeviceOptions(
            vec_isa=pick_vec_isa(), include_pytorch=True, device_type="cpu", precompiling=precompiling
        )
        if header is not None:
            options.precompiled_header = str(header)
        name = str(target.with_suffix(""))
        line = CppBuilder(name=name, sources=str(source), BuildOption=options).get_command_line()
    words = shlex.split(line)
    words[words.index("-o") + 1] = str(target)
    return [w for w in (FLAGS.get(w, w) for w in words) if w]


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


@contextmanager
def borrowed(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """The tensors as an array of `AtenTensorHandle`, valid within the block."""
    capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
    try:
        yield (ctypes.c_void_p * len(capsules))(*(_capsule_pointer(c, None) for c in capsules))
    finally:
        torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)
