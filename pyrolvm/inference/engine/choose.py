"""Which engine runs, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pyrolvm.errors import ProgramError, SettingError, one_of
from pyrolvm.inference.engine.compiled import CompiledEngine, probe
from pyrolvm.inference.engine.eager import EagerEngine
from pyrolvm.inference.engine.garbage import seldom_collected
from pyrolvm.inference.engine.native import LEAST_SECONDS, has_compiler, is_compiled, seconds_to_compile
from pyrolvm.inference.engine.problem import Problem
from pyrolvm.inference.engine.state import TrainingState
from pyrolvm.inference.engine.tracing import trace_step
from pyrolvm.inference.engine.untraceable import UntraceableError
from pyrolvm.inference.engine.watch import Watch

ENGINES = ("auto", "compiled", "eager")
DEVICES = ("cpu", "cuda")

TRACE_SECONDS = 1.0
"""The least that tracing a step takes; shorter runs stay eager."""
FEW_STEPS = 50
"""About as many eager steps take as long as tracing one, without which nobody knows how long compiling takes."""
MARGIN = 1.5
"""How many times the estimated seconds of compiling a run must take: the estimate may be a third too low."""
KNOWN_TORCH = ((2, 11), (2, 13))
"""First and last version of torch that the compiled engine supports (see `graphs` and `inductor`)."""


class Engine(Protocol):
    """The interface that `fit` uses; it does not depend on which engine runs.

    Attributes
    ----------
    setup_seconds : float
        Seconds within `run` so far that no step took: compiling, and checking the first compiled steps.
    """

    setup_seconds: float

    @property
    def name(self) -> str:
        """The engine's name, for records."""

    def initial_state(self, random: dict[str, Tensor]) -> TrainingState:
        """The state before the first step."""

    def run(
        self, state: TrainingState, rows: Tensor, watch: Watch | None = None
    ) -> tuple[TrainingState, Tensor]:
        """Take one step for each row of `rows`.

        Parameters
        ----------
        state : TrainingState
            The state before the first of these steps; engines may update its tensors in place.
        rows : tensor [num_steps, batch], int64
            The row numbers of each step.
        watch : Watch, optional
            What is noted between them.

        Returns
        -------
        state : TrainingState
            The state after the last step.
        terms : tensor [num_steps, terms]
            In nats per datum, the bound first, on the CPU.
        """


@seldom_collected()
def choose_engine(
    name: str, problem: Problem, num_steps: int, on_compile: Callable[[str], None] | None = None
) -> tuple[Engine, str]:
    """The engine for `name`, and a sentence with the engine and the reason.

    Parameters
    ----------
    name : {"auto", "compiled", "eager"}
        "auto" compiles a step that can be compiled if the run is long enough to gain by it.
    num_steps : int
        Steps of the run.
    on_compile : callable, optional
        Called with a sentence before a compilation of several seconds.

    Raises
    ------
    SettingError
        `name` is unknown, or "compiled" on a device or machine without it.
    ProgramError
        "compiled" for a program that cannot be traced.
    """
    if one_of("engine", name, ENGINES) == "eager":
        return EagerEngine(problem), "eager engine: asked for"
    if name == "compiled":
        return _compiled(problem, on_compile), "compiled engine: asked for"
    return _best(problem, num_steps, on_compile)


def _compiled(problem: Problem, on_compile: Callable[[str], None] | None) -> CompiledEngine:
    obstacle = _agreed(problem, _obstacle(problem))
    if obstacle is not None:
        raise SettingError(f"engine='compiled' cannot run: {obstacle}; use engine='eager'")
    try:
        return CompiledEngine(problem, on_compile=on_compile)
    except UntraceableError as error:
        raise ProgramError(f"engine='compiled' cannot run this program: {error}") from error


def _best(problem: Problem, num_steps: int, on_compile: Callable[[str], None] | None) -> tuple[Engine, str]:
    eager = EagerEngine(problem)
    processes = problem.processes
    obstacle = _agreed(problem, _obstacle(problem, may_be_cached=True))
    if obstacle is not None:
        return eager, f"eager engine: {obstacle}"
    if num_steps < FEW_STEPS:
        return eager, f"eager engine: {num_steps} steps are too few to gain by compiling them"
    slots, rows, seconds = probe(problem)
    expected = num_steps * processes.broadcast(seconds)
    short = f"eager engine: {num_steps} steps take about {expected:.1f} s, compiling them takes longer"
    if expected < TRACE_SECONDS:
        return eager, short
    traced, refused = None, None
    try:
        traced = trace_step(problem, slots, rows)
    except UntraceableError as error:
        refused = str(error)
    if (refused := _agreed(problem, refused)) is not None or traced is None:
        return eager, f"eager engine: {refused}"
    known = problem.program.device.type == "cpu" and all(processes.gather(is_compiled(traced)))
    if not known:
        needed = processes.broadcast(seconds_to_compile(traced, problem.minibatch))
        if expected < MARGIN * needed:
            about = f" (about {needed:.0f} s)" if needed > LEAST_SECONDS else ""
            return eager, short + about
        obstacle = _agreed(problem, _obstacle(problem))
        if obstacle is not None:
            return eager, f"eager engine: {obstacle}"
    each = 1e3 * expected / num_steps
    note = f"compiled engine: {num_steps} steps at {each:.2g} ms each would take {expected:.0f} s eagerly"
    engine = CompiledEngine(problem, on_compile=on_compile, fall_back=True, traced=traced, note=note)
    return engine, note


def _agreed(problem: Problem, obstacle: str | None) -> str | None:
    """What stands in the way of any of the processes: all take the same engine."""
    return next((found for found in problem.processes.gather(obstacle) if found is not None), None)


def _obstacle(problem: Problem, *, may_be_cached: bool = False) -> str | None:
    """Why no program can be compiled here, or None."""
    device = problem.program.device.type
    if (unknown := _unknown_torch()) is not None:
        return unknown
    if device not in DEVICES:
        return f"there is no compiled engine for {device}"
    if device == "cpu" and not may_be_cached and not has_compiler():
        return "no C++ compiler was found (install g++ or clang++)"
    return None


def _unknown_torch() -> str | None:
    """A sentence if this version of torch is not supported, or None."""
    first, last = KNOWN_TORCH
    here = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if first <= here <= last:
        return None
    known = " to ".join(".".join(map(str, version)) for version in KNOWN_TORCH)
    return f"the compiled engine knows torch {known}, and this is torch {torch.__version__}"
