"""All that the engines use of inductor, torch's compiler, and of its C++ (torch 2.11 to 2.13).

    functional  a graph in inductor's terms, with side effects on its inputs only, at its end    (functionalize)
    cpp_source  a graph as C++ source                                                            (cpp_wrapper)
    compiler_command, header                                                                     (its C++ builder)
    fused       a graph as fused kernels of its device
    borrowed    tensors as the pointers that such C++ takes                                      (torch._C._aoti)

A part that is missing in another version of torch raises an exception here; the engines then run eagerly, with the
reason in `fitted.engine`.
"""

from __future__ import annotations

import ctypes
import logging
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from pyrolvm.inference.engine import adjustments, rewrites

# Some give the numbers of eager torch, the others only make compiling quicker.
INDUCTOR_SETTINGS: dict[str, Any] = {
    "fallback_random": True,  # draws are ATen's own, from the default generators
    "size_asserts": False,  # shapes cannot change between steps
    "cpp.vec_isa_ok": True,  # skips a trial compilation; a compiler that cannot fails at once
    "cpp_cache_precompile_headers": False,  # would include more than is used here
    "cpp.min_chunk_size": 8192,  # a parallel region costs microseconds, and far more on a busy machine
    "pattern_matcher": False,  # it would join products and sums again, for BLAS, and takes time
    "cpp_wrapper": True,
    "fx_graph_cache": False,  # the library has a cache of its own
}
LEAST_VECTORISED, LEAST_OF_LONG, LONG = 64, 4096, 1000
"""Elements from which on a kernel is vectorised; the same of a step of many operations; how many are many."""
# -O3 takes longer for no gain: inductor vectorises the kernels itself
FLAGS = {"-O3": "-O2", "-g1": "", "-Wall": "-w", "-pedantic": ""}


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
    rewrites.share_equals(flat)
    rewrites.delay_expansions(flat)
    rewrites.hoist_scalars(flat)
    rewrites.gather_in_place(flat)
    rewrites.transpose_factors(flat)
    return flat


def keep_strides(graph: fx.GraphModule, strides: Sequence[tuple[int, ...]]) -> None:
    """Make inductor give the results of the graph these strides."""
    output = next(iter(reversed(graph.graph.nodes)))
    output.meta["user_visible_output_idxs"] = list(range(len(strides)))
    output.meta["original_output_strides"] = list(strides)


_NO_DECLARATIONS = re.compile(r'extern "C" \{\s*\}')


class _Source(BaseException):
    """Carries the source out of inductor before it is compiled; not an Exception, so nothing wraps it."""


@quiet()
def cpp_source(graph: fx.GraphModule, *, long: bool | None = None) -> str:
    """C++ that defines `void inductor_entry_impl(AtenTensorHandle* inputs, AtenTensorHandle* outputs)`.

    Of a `long` step (by default one of many operations) small kernels have no vectors: they are written and compiled in
    less than half the time.

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
            _compile(graph, INDUCTOR_SETTINGS | _own_operators(), _least_vectorised(graph, long))
        except _Source as source:
            code = str(source.args[0])
        else:
            raise RuntimeError("inductor wrote no C++ for this graph")
    taken = re.findall(r"steal_from_raw_handles_to_raii_handles\(input_handles, (\d+)\)", code)
    count = sum(n.op == "placeholder" for n in graph.graph.nodes)
    if taken != [str(count)]:
        raise RuntimeError(f"inductor's C++ takes {taken} inputs where the graph has {count}")
    return _NO_DECLARATIONS.sub("", code)


def _own_operators() -> dict[str, Any]:
    """Operators of this package's that the step calls as C++, which stands before inductor's."""
    names = ("shared_sum", "shared_scatter", "shared_gather_")
    operators = [getattr(torch.ops.pyrolvm, n).default for n in names if hasattr(torch.ops.pyrolvm, n)]
    return {"aot_inductor.custom_ops_to_c_shims": {operator: [] for operator in operators}}


@quiet()
def fused(graph: fx.GraphModule) -> Callable[[Sequence[Tensor]], Any]:
    """The graph as kernels that inductor wrote for its device, called from Python."""
    compiled = _compile(graph, INDUCTOR_SETTINGS | {"cpp_wrapper": False})
    return lambda inputs: compiled(list(inputs))


def _least_vectorised(graph: fx.GraphModule, long: bool | None) -> int:
    if long is None:
        long = len(graph.graph.nodes) >= LONG
    return LEAST_OF_LONG if long else LEAST_VECTORISED


def _compile(graph: fx.GraphModule, settings: dict[str, Any], least_vectorised: int = 0) -> Any:
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
        stack.enter_context(adjustments.without_trials())
        stack.enter_context(adjustments.reads_or_none())
        stack.enter_context(adjustments.without_reports(mode))
        stack.enter_context(adjustments.one_table_of_types())
        stack.enter_context(adjustments.vectors_from(least_vectorised))
        stack.enter_context(adjustments.writes_before_reads())
        stack.enter_context(adjustments.draws_in_order())
        return compile_fx_inner(
            graph, inputs, cudagraphs=BoxedBool(False), cpp_wrapper=settings["cpp_wrapper"]
        )


WRAPPER_HEADER = "#include <torch/csrc/inductor/cpp_wrapper/cpu.h>\n"
KERNEL_HEADER = "#include <torch/csrc/inductor/cpp_prefix.h>\n"


@quiet()
def compiler_command(sources: Sequence[Path], target: Path, header: Path | None = None) -> list[str]:
    """The command that makes `target` of `sources` for this processor.

    Parameters
    ----------
    sources : sequence of Path
        A C++ file or a header (.h), or the objects of a library.
    target : Path
        A library (.so), an object (.o) or a precompiled header (.gch).
    header : Path, optional
        A header to include first, precompiled beside itself.
    """
    from torch._inductor import config
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    with config.patch(INDUCTOR_SETTINGS), adjustments.without_trials():
        options = CppTorchDeviceOptions(
            vec_isa=pick_vec_isa(),
            include_pytorch=True,
            device_type="cpu",
            precompiling=target.suffix == ".gch",
            compile_only=target.suffix == ".o",
        )
        if header is not None:
            options.precompiled_header = shlex.quote(str(header))
        names = [shlex.quote(str(source)) for source in sources]
        builder = CppBuilder(name="made", sources=names, BuildOption=options)
        line = builder.get_command_line()
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
