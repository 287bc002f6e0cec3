"""One row, side by side: built, checked against one another, warmed up, then timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.check import compare
from benchmarks.contenders import CONTENDERS, Runner, UnavailableError, synchronise
from benchmarks.rows import Case, Row

SLOW_SECONDS, SLOW_REPEATS = 5.0, 3
"""One timing longer than this is repeated this often only."""

REFERENCE = ("eager", "pyro", "compiled")
"""Whose bounds the others are held against: the first of these that takes part."""

MOST_ROWS = 2**23  # of a plan, in memory at once


@dataclass(frozen=True)
class Settings:
    """How long and how often. seconds: of one timing; chunk: steps of a compiled loop."""

    chunk: int = 256
    seconds: float = 0.5
    repeats: int = 9


FULL, QUICK = Settings(), Settings(chunk=32, seconds=0.03, repeats=3)


@dataclass
class Result:
    """One cell. microseconds: per step, one entry per repetition; reason: why there are none."""

    contender: str
    microseconds: list[float] = field(default_factory=list)
    start_up: float = float("nan")
    mean_bound: float = float("nan")
    reason: str = ""

    @property
    def median(self) -> float:
        """Microseconds per step; nan if it was not timed."""
        return statistics.median(self.microseconds) if self.microseconds else float("nan")


@dataclass
class Entrant:
    """A contender in the race: what it has done, and how many steps one timing takes."""

    result: Result
    runner: Runner | None = None
    bounds: Tensor | None = None
    step: int = 0
    num_steps: int = 0

    @property
    def is_done(self) -> bool:
        """Whether a contender as slow as this has been timed often enough."""
        times = self.result.microseconds
        return len(times) >= SLOW_REPEATS and 1e-6 * times[-1] * self.num_steps > SLOW_SECONDS

    def seconds(self, num_steps: int) -> float:
        """Take `num_steps` more steps."""
        assert self.runner is not None
        taken = self.runner.seconds(self.step, num_steps)
        self.step += num_steps
        return taken


def measure(
    row: Row, names: list[str], device: torch.device, settings: Settings, say: Callable[[str], None] = print
) -> list[Result]:
    """Times of the contenders `names` on `row`."""
    case = Case(row, device, settings.chunk)
    entrants = []
    for name in names:
        say(f"{row.name}: {name}")
        entrants.append(_enter(name, case, settings))
    _check(entrants)
    say(f"{row.name}: timing")
    _race([e for e in entrants if e.runner is not None and not e.result.reason], settings.repeats)
    return [e.result for e in entrants]


def _enter(name: str, case: Case, settings: Settings) -> Entrant:
    """Build, take the first chunk (which is checked), and settle how many steps one timing takes."""
    entrant = Entrant(Result(name))
    try:
        start = time.perf_counter()
        entrant.runner = runner = CONTENDERS[name](case)
        entrant.bounds = runner.run(0, case.chunk)
        synchronise(case.device)
        ready = time.perf_counter() - start
        entrant.step = case.chunk
        entrant.num_steps = _num_steps(entrant, case, settings)
        entrant.result.start_up = max(0.0, ready - entrant.seconds(case.chunk)) if runner.paired else ready
    except UnavailableError as reason:
        entrant.result.reason = str(reason)
    except Exception as error:  # another library's failure is a cell of the table, not the end of it
        first = (str(error).strip().splitlines() or [""])[0]
        entrant.result.reason = f"fails: {type(error).__name__}: {first[:160]}"
    return entrant


def _num_steps(entrant: Entrant, case: Case, settings: Settings) -> int:
    """Steps that take about `settings.seconds`; a multiple of the chunk where the loop is of one length."""
    assert entrant.runner is not None
    target = settings.seconds * entrant.runner.patience
    most = max(case.chunk, MOST_ROWS // case.batch_rows // case.chunk * case.chunk)
    steps = case.chunk
    entrant.seconds(steps)  # warm-up
    while (taken := entrant.seconds(steps)) < target / 2 and steps < most:
        steps = min(4 * steps, most)
    steps = max(4, min(most, round(steps * target / taken)))
    if entrant.runner.fixed_chunk:
        steps = max(1, round(steps / case.chunk)) * case.chunk
    return steps


def _check(entrants: list[Entrant]) -> None:
    """Leave out, with a reason, whoever computes something else than the reference does."""
    present = {e.result.contender: e for e in entrants if e.bounds is not None and not e.result.reason}
    reference = next((present[name] for name in REFERENCE if name in present), None)
    for name, entrant in present.items():
        assert entrant.bounds is not None
        assert entrant.runner is not None
        entrant.result.mean_bound = float(entrant.bounds.mean())
        if reference is None or reference.bounds is None or entrant is reference:
            continue
        exact = {name, reference.result.contender} == {"compiled", "eager"}
        entrant.result.reason = compare(entrant.bounds, reference.bounds, entrant.runner.paired, exact)


def _race(entrants: list[Entrant], repeats: int) -> None:
    """Time in turns, each round in another order, so that what else the machine does meets all alike."""
    for round_ in range(repeats):
        shift = round_ % max(1, len(entrants))
        for entrant in entrants[shift:] + entrants[:shift]:
            if entrant.result.reason or entrant.is_done:
                continue
            try:
                taken = entrant.seconds(entrant.num_steps)
                entrant.result.microseconds.append(1e6 * taken / entrant.num_steps)
            except Exception as error:
                entrant.result.reason = f"fails while timed: {type(error).__name__}: {error}"[:200]
                entrant.result.microseconds.clear()
