"""Which engine runs, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from pyrolvm.errors import ProgramError, SettingError
from pyrolvm.inference.engine.compiled import CompiledEngine, probe
from pyrolvm.inference.engine.eager import EagerEngine
from pyrolvm.inference.engine.native import has_compiler, is_compiled
from pyrolvm.inference.engine.state import TrainingState
from pyrolvm.inference.engine.step import Step
from pyrolvm.inference.engine.tracing import UntraceableError, trace_step

ENGINES = ("auto", "compiled", "eager")
DEVICES = ("cpu", "cuda")

COMPILE_SECONDS = 5.0
TRACE_SECONDS = 1.0
"""What compiling, and finding a step compiled before, take at least; a run that is shorter stays eager."""
FEW_STEPS = 20


class Engine(Protocol):
    """What `fit` asks of an engine; nothing in it knows which one runs."""

    @property
    def name(self) -> str:
        """The engine's name, for records."""

    def initial_state(self, random: dict[str, Tensor]) -> TrainingState:
        """The state before the first step."""

    def run(self, state: TrainingState, rows: Tensor) -> tuple[TrainingState, Tensor]:
        """Steps over `rows` [num_steps, batch] -> the new state, terms [num_steps, 3] in nats per datum."""


def choose_engine(
    name: str, step: Step, num_steps: int, on_compile: Callable[[str], None] | None = None
) -> tuple[Engine, str]:
    """The engine for `name`, and one sentence that says which runs and why.

    name: "eager"; "compiled", which raises `ProgramError` where it cannot; "auto", which compiles what
    can be compiled and runs long enough to gain by it.
    on_compile: called with a sentence before a compilation of several seconds.
    """
    if name not in ENGINES:
        raise SettingError(f"engine='{name}' is not known: choose from {', '.join(ENGINES)}")
    if name == "eager":
        return EagerEngine(step), "eager engine: asked for"
    if name == "compiled":
        return _compiled(step, on_compile), "compiled engine: asked for"
    return _best(step, num_steps, on_compile)


def _compiled(step: Step, on_compile: Callable[[str], None] | None) -> CompiledEngine:
    obstacle = _obstacle(step)
    if obstacle is not None:
        raise SettingError(f"engine='compiled' cannot run: {obstacle}; use engine='eager'")
    try:
        return CompiledEngine(step, on_compile=on_compile)
    except UntraceableError as error:
        raise ProgramError(f"engine='compiled' cannot run this program: {error}") from error


def _best(step: Step, num_steps: int, on_compile: Callable[[str], None] | None) -> tuple[Engine, str]:
    eager = EagerEngine(step)
    obstacle = _obstacle(step, may_be_cached=True)
    if obstacle is not None:
        return eager, f"eager engine: {obstacle}"
    if num_steps < FEW_STEPS:
        return eager, f"eager engine: {num_steps} steps are too few to gain by compiling them"
    slots, rows, seconds = probe(step)
    expected = num_steps * seconds
    short = f"eager engine: {num_steps} steps take about {expected:.1f} s, compiling them takes longer"
    if expected < TRACE_SECONDS:
        return eager, short
    try:
        traced = trace_step(step, slots, rows)
    except UntraceableError as error:
        return eager, f"eager engine: {error}"
    if step.program.device.type != "cpu" or not is_compiled(traced):
        if expected < 2 * COMPILE_SECONDS:
            return eager, short
        obstacle = _obstacle(step)
        if obstacle is not None:
            return eager, f"eager engine: {obstacle}"
    note = f"compiled engine: {num_steps} steps at {1e3 * seconds:.2g} ms each would take {expected:.0f} s eagerly"
    engine = CompiledEngine(step, on_compile=on_compile, fall_back=True, traced=traced, note=note)
    return engine, note


def _obstacle(step: Step, *, may_be_cached: bool = False) -> str | None:
    """Why nothing can be compiled here, whatever the program."""
    device = step.program.device.type
    if device not in DEVICES:
        return f"there is no compiled engine for {device}"
    if device == "cpu" and not may_be_cached and not has_compiler():
        return "no C++ compiler was found (install g++ or clang++)"
    return None
