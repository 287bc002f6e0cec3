"""The compiled engine: steps traced once, then run without Python; on the CPU and on CUDA.

The first step of a run is eager, so that torch itself creates the optimiser's state. From then on the state's
tensors are the buffers that the compiled step writes to; either engine can continue from the other's state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.engine.division import SHARE
from pyrolvm.inference.engine.eager import EagerEngine
from pyrolvm.inference.engine.loops import CudaLoop, Loop
from pyrolvm.inference.engine.native import LEAST_SECONDS, NativeLoop, is_compiled, seconds_to_compile
from pyrolvm.inference.engine.problem import Problem
from pyrolvm.inference.engine.split import SplitLoop, tells
from pyrolvm.inference.engine.state import TrainingState
from pyrolvm.inference.engine.tracing import Slots, TracedStep, trace_step
from pyrolvm.inference.engine.watch import Watch
from pyrolvm.inference.program.noise import generator_state, kept_generators, noise_state, set_generator_state

CHECKED_STEPS = 2
PROBED_STEPS = 2


class CompiledEngine:
    """Runs whole chunks of steps outside Python.

    Parameters
    ----------
    problem : Problem
        The pair, data and optimiser.
    on_compile : callable, optional
        Called with a sentence before a compilation of several seconds.
    fall_back : bool
        Run eagerly where compiling fails, with the reason in `note`; otherwise raise `ProgramError`.
    traced : TracedStep, optional
        The step, if it has been traced before.
    note : str
        A sentence with the engine and the reason.
    loop : callable, optional
        (traced step, minibatch) -> `Loop`. By default native code on the CPU, a captured graph on CUDA.

    Attributes
    ----------
    num_compilations : int
        How often a step was compiled or captured: once, whatever the lengths of the chunks.
    setup_seconds : float
        As `Engine.setup_seconds`.

    Raises
    ------
    UntraceableError
        The program cannot be traced.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        on_compile: Callable[[str], None] | None = None,
        fall_back: bool = False,
        traced: TracedStep | None = None,
        note: str = "compiled engine",
        loop: Callable[[TracedStep, bool], Loop] | None = None,
    ) -> None:
        self.problem = problem
        self.eager = EagerEngine(problem)
        self.on_compile = on_compile
        self.fall_back = fall_back
        self.note = note
        self.num_compilations = 0
        self.setup_seconds = 0.0
        self._traced = traced or trace_step(problem, *probe(problem)[:2])
        self._slots = _slots(self._traced)
        self._given: dict[str, dict[str, Tensor]] = {}
        self._loop: Loop | None = None
        self._make_loop = loop or (CudaLoop if problem.program.device.type == "cuda" else NativeLoop)
        self._given_up = False
        self._live: TrainingState | None = None

    @property
    def name(self) -> str:
        """The engine that runs: "compiled", or "eager" after a fallback."""
        return "eager" if self._given_up else "compiled"

    def initial_state(self, random: dict[str, Tensor]) -> TrainingState:
        """The state before the first step: the program's parameters as they are now."""
        return self.eager.initial_state(random)

    def run(
        self, state: TrainingState, rows: Tensor, watch: Watch | None = None
    ) -> tuple[TrainingState, Tensor]:
        """As `Engine.run`."""
        usual = len(rows) and rows.shape[1] == len(self._traced.rows)
        if self._given_up or not usual or not (state is self._live or _have_one_count(state)):
            return self.eager.run(state, rows, watch)
        done: list[Tensor] = []
        if not self._is_complete(state):
            state, terms = self.eager.run(state, rows[:1], watch)
            rows, done = rows[1:], [terms]
        if len(rows):
            run = self._run if self._loop else self._first_run
            state, terms = run(state, rows, watch)
            done.append(terms)
        return state, torch.cat(done)

    def _is_complete(self, state: TrainingState) -> bool:
        return all(
            own.keys() <= state.optimizer.get(name, {}).keys()
            for owner, own in self._slots.items()
            for name in self._owners(owner)
        )

    def _owners(self, name: str) -> Iterable[str]:
        """The parameters of the program whose slots are those of `name`."""
        division = self._traced.division
        return division.shapes if division is not None and name == SHARE else (name,)

    def _first_run(
        self, state: TrainingState, rows: Tensor, watch: Watch | None
    ) -> tuple[TrainingState, Tensor]:
        """Compile, and check the first steps against eager ones."""
        before, start = state.clone(), time.perf_counter()
        _, expected = self.eager.run(state.clone(), rows[:CHECKED_STEPS])
        self.problem.program.load(before.parameters)  # so that `state` is intact if compiling is interrupted
        try:
            return self._begun(before, rows, watch, expected, start)
        except Exception as error:
            if not self.fall_back:
                raise ProgramError(f"the compiled engine cannot run this program: {error}") from error
            self._given_up = True
            self.setup_seconds = time.perf_counter() - start
            self.note = f"eager engine: compiling failed ({error})"
            return self.eager.run(before, rows, watch)

    def _begun(
        self, before: TrainingState, rows: Tensor, watch: Watch | None, expected: Tensor, start: float
    ) -> tuple[TrainingState, Tensor]:
        """The first steps of the loop, or of the step in parts where the loop cannot hold sums over processes."""
        try:
            self._loop = self._compiled_together()
            self.num_compilations += 1
            self.setup_seconds = time.perf_counter() - start
            return self.problem.processes.each(lambda: self._checked(before.clone(), rows, watch, expected))
        except Exception as error:
            if self._make_loop is SplitLoop or not tells(self._traced.graph):
                raise
            self._make_loop = SplitLoop
            self.note += f", in parts between sums over the processes (whole: {error})"
            return self._begun(before, rows, watch, expected, start)

    def _checked(
        self, state: TrainingState, rows: Tensor, watch: Watch | None, expected: Tensor
    ) -> tuple[TrainingState, Tensor]:
        after, terms = self._run(state, rows, watch)
        _check_equal(terms[:CHECKED_STEPS], expected)
        return after, terms

    def _compiled_together(self) -> Loop:
        """The first process of a machine compiles, the others find it done; where one cannot, all raise."""
        processes, loop = self.problem.processes, None
        if processes.is_first_here:
            loop = processes.each(self._compile)
        else:
            processes.agree(None)
        return processes.each(lambda: loop or self._compile())

    def _compile(self) -> Loop:
        known = self._make_loop is NativeLoop and is_compiled(self._traced)
        if self.on_compile is not None and not known:
            seconds = self._seconds_to_compile()
            about = f" (about {seconds:.0f} s)" if seconds > LEAST_SECONDS else ""
            self.on_compile(f"compiling the training step{about}, once for this program and machine")
        return self._make_loop(self._traced, self.problem.minibatch)

    def _seconds_to_compile(self) -> float:
        if self._make_loop is not NativeLoop:
            return LEAST_SECONDS
        return seconds_to_compile(self._traced, self.problem.minibatch)

    def _run(self, state: TrainingState, rows: Tensor, watch: Watch | None) -> tuple[TrainingState, Tensor]:
        assert self._loop is not None
        self._adopt(state)
        self._live = None  # until the chunk is done
        device = self.problem.program.device
        controls = self.problem.controls(state.step, len(rows))
        with kept_generators(device):
            set_generator_state(state.random, device)
            size = self._loop.capacity
            terms = [
                self._part(self._loop, rows[i : i + size], controls[i : i + size], state.step + i, watch)
                for i in range(0, len(rows), size)
            ]
            random = generator_state(device)
        self._live = TrainingState(
            self.problem.program.tensors(),
            self._whole_slots(),
            state.step + len(rows),
            random,
        )
        return self._live, torch.cat(terms)

    def _part(self, loop: Loop, rows: Tensor, controls: Tensor, step: int, watch: Watch | None) -> Tensor:
        if self.problem.minibatch:
            loop.rows[: len(rows)].copy_(rows)
        loop.controls[: len(rows)].copy_(controls)
        loop.index.zero_()
        loop.run(len(rows) if watch is None else watch.parts(step, len(rows)))
        return loop.terms[: len(rows)].to("cpu", copy=True)

    def _whole_slots(self) -> dict[str, dict[str, Tensor]]:
        """The optimiser's state, of all that is divided."""
        found = {name: {k: t.to(where) for k, (t, where) in own.items()} for name, own in self._slots.items()}
        if (division := self._traced.division) is not None:
            own = found.pop(SHARE, {})
            self._given = self._given or division.blank(own)
            division.give(own, self._given)
            found |= self._given
        return found

    def _adopt(self, state: TrainingState) -> None:
        if state is self._live:
            return
        self.problem.program.load(state.parameters)
        if (division := self._traced.division) is not None:
            share = division.take(self.problem.program.parameters, state.optimizer)
            for key, tensor in zip(self._traced.names, self._traced.state, strict=True):
                if key in share:
                    tensor.copy_(share[key])
        for name, own in self._slots.items():
            for slot, (tensor, _) in own.items() if name != SHARE else ():
                tensor.copy_(state.optimizer[name][slot])


def probe(problem: Problem) -> tuple[Slots, Tensor, float]:
    """Time some eager steps; the program, its parameters and the generators are unchanged.

    Returns
    -------
    slots : dict
        The optimiser's state after a step.
    rows : tensor [batch]
        The rows used.
    seconds : float
        Per step; on the CPU those of this thread alone, since a busy machine would slow compiling as much.
    """
    program = problem.program
    before = {k: v.detach().clone() for k, v in program.tensors().items()}
    plate = problem.structure.data_plate
    rows = torch.arange(
        plate.size if problem.minibatch and plate else problem.num_rows, device=program.device
    )
    engine = EagerEngine(problem)
    clock = time.thread_time if program.device.type == "cpu" else time.perf_counter
    try:
        state, _ = engine.run(engine.initial_state(noise_state(0, program.device)), rows.expand(1, -1))
        start = clock()
        state, _ = engine.run(state, rows.expand(PROBED_STEPS, -1))
        seconds = (clock() - start) / PROBED_STEPS
    finally:
        program.load(before)
    return state.optimizer, rows, seconds


def _slots(traced: TracedStep) -> dict[str, dict[str, tuple[Tensor, torch.device]]]:
    """Parameter -> slot -> (the tensor that the step writes to, the device that torch keeps it on)."""
    found: dict[str, dict[str, tuple[Tensor, torch.device]]] = {}
    for key, tensor in zip(traced.names, traced.state, strict=True):
        kind, _, name = key.partition("/")
        if kind == "optimizer":
            slot, _, owner = name.partition("/")
            where = torch.device("cpu") if slot == "step" else tensor.device
            found.setdefault(owner, {})[slot] = (tensor, where)
    return found


def _have_one_count(state: TrainingState) -> bool:
    """Whether all parameters have taken as many steps."""
    return len({float(own["step"]) for own in state.optimizer.values() if "step" in own}) <= 1


def _check_equal(terms: Tensor, expected: Tensor) -> None:
    if not torch.allclose(terms, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
        worst = (terms - expected).abs().max().item()
        raise ProgramError(
            f"its bound differs from the eager one by {worst:.3g} nats: the program depends on something "
            "that changes between steps and is no tensor of it, such as a Python counter or NumPy noise"
        )
