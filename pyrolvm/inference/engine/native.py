"""The traced step as native code on the CPU: C++ by inductor, compiled once, looped without Python.

The library is kept in the user's cache (`cache.py`). A process that finds it there neither imports
inductor nor needs a compiler.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pyrolvm.inference.engine import (
    adjustments,
    cache,
    driver,
    folding,
    graphs,
    in_place,
    inductor,
    loops,
    operations,
    pieces,
    repeats,
    rewrites,
    source,
    tracing,
)
from pyrolvm.inference.engine.garbage import seldom_collected
from pyrolvm.inference.engine.loops import StaticLoop, lengths_of
from pyrolvm.inference.engine.tracing import TracedStep

CPP = Path(__file__).with_name("cpp")
SECONDS, SECONDS_PER_OPERATION, SECONDS_PER_TRACED = 1.2, 0.004, 0.0003
IMPORT_SECONDS, HEADER_SECONDS = 1.5, 2.0
"""Of a compilation: at least, for each operation that is compiled, and for each that was traced; for importing torch's
compiler, once in a process; for torch's headers, once on a machine. On a busy machine all take longer, as steps do."""
LEAST_SECONDS = 5.0
"""Of a compilation whose estimate is shown."""
COMPILERS = ("g++", "clang++")
GENERATORS = (
    adjustments,
    driver,
    folding,
    graphs,
    in_place,
    inductor,
    loops,
    operations,
    pieces,
    repeats,
    rewrites,
    source,
    tracing,
    sys.modules[__name__],
)
"""On whose code that of a step depends."""


class CompilerError(RuntimeError):
    """The C++ compiler is missing or failed."""


def key(traced: TracedStep) -> str:
    """The name of the compiled step in the cache, a hash of the step and of the sources that generate its code."""
    sources = [Path(module.__file__ or "").read_text("utf-8") for module in GENERATORS]
    own = [header_text(path.name) for path in sorted(CPP.glob("*.h"))]
    return cache.digest(traced.text(), *sources, *own)


def is_compiled(traced: TracedStep) -> bool:
    """Whether the step is in the cache."""
    return cache.is_stored(cache.entry(key(traced), ".so"))


def seconds_to_compile(traced: TracedStep, minibatch: bool) -> float:
    """About how long compiling the step takes here and now."""
    seconds = SECONDS + SECONDS_PER_OPERATION * folding.operations_to_compile(traced, minibatch)
    seconds += SECONDS_PER_TRACED * len(traced.graph.graph.nodes)
    if "torch._inductor.compile_fx" not in sys.modules:
        seconds += IMPORT_SECONDS
    if not any(cache.folder().glob("*.gch")):
        seconds += HEADER_SECONDS
    return seconds


def has_compiler() -> bool:
    """Whether a C++ compiler is found."""
    return any(shutil.which(name) for name in COMPILERS)


class NativeLoop(StaticLoop):
    """The step as a library: a chunk is one call."""

    def __init__(self, traced: TracedStep, minibatch: bool) -> None:
        """Load the step from the cache, or compile it. Raises `CompilerError` if the compiler fails."""
        super().__init__(traced, minibatch)
        path = cache.entry(key(traced), ".so")
        if not cache.is_stored(path):
            _compile(traced, minibatch, self._advance, self._inputs, path)
        self._library = _load(path)

    def run(self, num_steps: int | Iterable[int]) -> None:
        """As `Loop.run`."""
        with inductor.borrowed(self._inputs) as handles:
            for size in lengths_of(num_steps):
                error = self._library(size, handles)
                if error is not None:
                    raise RuntimeError(error.decode(errors="replace"))


def _load(path: Path) -> Callable[..., bytes | None]:
    # PyDLL: the loop starts with the interpreter's lock and releases it while a step computes
    function = ctypes.PyDLL(str(path)).pyrolvm_run
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_int64, ctypes.c_void_p]
    return function


def _compile(
    traced: TracedStep, minibatch: bool, advance: Callable[..., Any], inputs: Sequence[Tensor], path: Path
) -> None:
    if not has_compiler():
        raise CompilerError("no C++ compiler was found (install g++ or clang++)")
    header = _header()
    with seldom_collected():
        folded = folding.fold(traced, inputs, minibatch)
        if folded is not None:
            program, others = driver.source(folded)
            steps = "\n".join([header_text("driver.h"), program, header_text("interpreter.h")])
        else:
            code = inductor.cpp_source(inductor.functional(advance, inputs))
            steps, others = source.kernels_apart(source.looped(code))
    with cache.storing(path) as target:
        _build(_parts(steps, others, len(inputs)), target, header)
    _precompile(header)


def _build(parts: Sequence[str], target: Path, header: Path) -> None:
    """Compile the parts side by side, and make a library of them."""
    included = header if cache.is_stored(_precompiled(header)) else None
    written = [target.with_name(f"part_{i}.cpp") for i in range(len(parts))]
    for path, part in zip(written, parts, strict=True):
        path.write_text(part, encoding="utf-8")
    if len(parts) > 1:
        objects = [path.with_suffix(".o") for path in written]
        pairs = zip(written, objects, strict=True)
        _call(*(inductor.compiler_command([one], made, included) for one, made in pairs))
        written, included = objects, None
    _call(inductor.compiler_command(written, target, included))


def _cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parts(steps: str, others: Sequence[str], num_inputs: int) -> list[str]:
    """C++ to compile side by side: the steps, with what calls them, and what they call."""
    # an operator written in Python leaves its error in the interpreter, which is checked after each step
    at_once = 1 if "PyGILState" in steps or "PyObject" in steps else 2**62
    lines = [f"#define NUM_INPUTS {num_inputs}", f"#define STEPS_PER_CALL {at_once}"]
    called = [_SHARED in code for code in (steps, *others)]
    sums = ("shared_sum.h", "shared_sum_step.h") if any(called) else ()
    first = "\n".join([inductor.WRAPPER_HEADER, *lines, *map(header_text, ("runtime.h", *sums)), steps])
    return source.balanced(first, others, 1 if any(called[1:]) else _cores())


_SHARED = "aoti_torch_cpu_shared_"


def library(code: str, options: Sequence[str]) -> Path:
    """C++ that needs nothing of torch, compiled once on a machine. Raises `CompilerError` if the compiler fails."""
    path = cache.entry(cache.digest(code, *options), ".so")
    if not cache.is_stored(path):
        compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
        if compiler is None:
            raise CompilerError("no C++ compiler was found (install g++ or clang++)")
        with cache.storing(path) as target:
            written = target.with_suffix(".cpp")
            written.write_text(code, encoding="utf-8")
            _call([compiler, *options, str(written), "-o", str(target)])
    return path


def header_text(name: str) -> str:
    """The text of a file of `cpp`."""
    return (CPP / name).read_text("utf-8")


def _header() -> Path:
    """Torch's headers, as one to precompile."""
    text = inductor.WRAPPER_HEADER + inductor.KERNEL_HEADER
    path = cache.entry(
        cache.digest(text, *inductor.compiler_command([Path("torch.h")], Path("torch.h.gch"))), ".h"
    )
    if not cache.is_stored(path):
        with cache.storing(path) as target:
            target.write_text(text, encoding="utf-8")
    return path


def _precompiled(header: Path) -> Path:
    return header.with_suffix(".h.gch")


def _precompile(header: Path) -> None:
    """Precompile torch's headers, once per machine, on another core while the first step runs there.

    That takes longer than to read them as text, as that step does.
    """
    path = _precompiled(header)
    if path not in _PRECOMPILED and not cache.is_stored(path):
        Precompilation(header, path)
        _PRECOMPILED.add(path)


_PRECOMPILED: set[Path] = set()
"""What this process precompiles, has precompiled or could not."""


class Precompilation(threading.Thread):
    """A compiler that nobody waits for; it ends with this process at the latest."""

    def __init__(self, header: Path, path: Path) -> None:
        super().__init__(daemon=True)
        self.path, self.folder = path, Path(tempfile.mkdtemp(prefix=".new-", dir=path.parent))
        self.made = self.folder / path.name
        self.process = _started(inductor.compiler_command([header], self.made))
        atexit.register(self.stop)
        self.start()

    def run(self) -> None:
        """Keep what the compiler makes."""
        self.process.communicate()
        with contextlib.suppress(OSError):
            if self.process.returncode == 0:
                with cache.storing(self.path) as target:
                    self.made.replace(target)
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.stop)

    def stop(self) -> None:
        """End the compiler and remove what it has written."""
        _end(self.process)
        self.join()


def _call(*commands: list[str]) -> None:
    """Run the commands at the same time. Raises `CompilerError` if one fails."""
    with contextlib.ExitStack() as stack:
        running = [(command[0], stack.enter_context(_compiler(command))) for command in commands]
        for name, process in running:
            lines = process.communicate()[1].splitlines()
            if process.returncode:
                named = [line for line in lines if "error" in line] or lines or ["no message"]
                raise CompilerError(f"the C++ compiler {name} failed: {named[0]}")


@contextlib.contextmanager
def _compiler(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The command as a process that ends with the block, and the processes that it starts with it."""
    with _started(command) as process:
        try:
            yield process
        finally:
            _end(process)


def _started(command: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
        )
    except OSError as error:
        raise CompilerError(f"the C++ compiler {command[0]} did not start: {error}") from error


def _end(process: subprocess.Popen[str]) -> None:
    """End the process, and those that it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
