"""Which engine runs, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pyrolvm.errors import ProgramError, SettingError
from pyrolvm.inference.engine.compiled import CompiledEngine, probe
from pyrolvm.inference.engine.eager import EagerEngine
from pyrolvm.inference.engine.native import has_compiler, is_compiled
from pyrolvm.inference.engine.problem import Problem
from pyrolvm.inference.engine.state import TrainingState
from pyrolvm.inference.engine.tracing import UntraceableError, trace_step

ENGINES = ("auto", "compiled", "eager")
DEVICES = ("cpu", "cuda")

COMPILE_SECONDS = 5.0
TRACE_SECONDS = 1.0
"""What compiling, and finding a step compiled before, take at least; a run that is shorter stays eager."""
FEW_STEPS = 20
KNOWN_TORCH = ((2, 11), (2, 13))
"""The versions of torch whose private parts the compiled engine knows (see `graphs`): first and last."""


class Engine(Protocol):
    """What `fit` asks of an engine; nothing in it knows which one runs."""

    @property
    def name(self) -> str:
        """The engine's name, for records."""

    def initial_state(self, random: dict[str, Tensor]) -> TrainingState:
        """The state before the first step."""

    def run(self, state: TrainingState, rows: Tensor) -> tuple[TrainingState, Tensor]:
        """Steps over `rows` [num_steps, batch] -> the new state, terms [num_steps, terms] in nats per datum."""


def choose_engine(
    name: str, problem: Problem, num_steps: int, on_compile: Callable[[str], None] | None = None
) -> tuple[Engine, str]:
    """The engine for `name`, and one sentence that says which runs and why.

    name: "eager"; "compiled", which raises `ProgramError` where it cannot; "auto", which compiles what
    can be compiled and runs long enough to gain by it.
    on_compile: called with a sentence before a compilation of several seconds.
    """
    if name not in ENGINES:
        raise SettingError(f"engine='{name}' is not known: choose from {', '.join(ENGINES)}")
    if name == "eager":
        return EagerEngine(problem), "eager engine: asked for"
    if name == "compiled":
        return _compiled(problem, on_compile), "compiled engine: asked for"
    return _best(problem, num_steps, on_compile)


def _compiled(problem: Problem, on_compile: Callable[[str], None] | None) -> CompiledEngine:
    obstacle = _obstacle(problem)
    if obstacle is not None:
        raise SettingError(f"engine='compiled' cannot run: {obstacle}; use engine='eager'")
    try:
        return CompiledEngine(problem, on_compile=on_compile)
    except UntraceableError as error:
        raise ProgramError(f"engine='compiled' cannot run this program: {error}") from error


def _best(problem: Problem, num_steps: int, on_compile: Callable[[str], None] | None) -> tuple[Engine, str]:
    eager = EagerEngine(problem)
    obstacle = _obstacle(problem, may_be_cached=True)
    if obstacle is not None:
        return eager, f"eager engine: {obstacle}"
    if num_steps < FEW_STEPS:
        return eager, f"eager engine: {num_steps} steps are too few to gain by compiling them"
    slots, rows, seconds = probe(problem)
    expected = num_steps * seconds
    short = f"eager engine: {num_steps} steps take about {expected:.1f} s, compiling them takes longer"
    if expected < TRACE_SECONDS:
        return eager, short
    try:
        traced = trace_step(problem, slots, rows)
    except UntraceableError as error:
        return eager, f"eager engine: {error}"
    if problem.program.device.type != "cpu" or not is_compiled(traced):
        if expected < 2 * COMPILE_SECONDS:
            return eager, short
        obstacle = _obstacle(problem)
        if obstacle is not None:
            return eager, f"eager engine: {obstacle}"
    note = f"compiled engine: {num_steps} steps at {1e3 * seconds:.2g} ms each would take {expected:.0f} s eagerly"
    engine = CompiledEngine(problem, on_compile=on_compile, fall_back=True, traced=traced, note=note)
    return engine, note


def _obstacle(problem: Problem, *, may_be_cached: bool = False) -> str | None:
    """Why nothing can be compiled here, whatever the program."""
    device = problem.program.device.type
    if (unknown := _unknown_torch()) is not None:
        return unknown
    if device not in DEVICES:
        return f"there is no compiled engine for {device}"
    if device == "cpu" and not may_be_cached and not has_compiler():
        return "no C++ compiler was found (install g++ or clang++)"
    return None


def _unknown_torch() -> str | None:
    """A sentence if this torch is outside the range that the compiled engine knows."""
    first, last = KNOWN_TORCH
    here = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if first <= here <= last:
        return None
    known = " to ".join(".".join(map(str, version)) for version in KNOWN_TORCH)
    return f"the compiled engine knows torch {known}, and this is torch {torch.__version__}"
