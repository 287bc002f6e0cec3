"""The loop between chunks: what to do next is decided in one place, from one record.

Nothing here touches the host inside a chunk; everything here happens between two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pyrolvm.data.plan import BatchPlan
from pyrolvm.errors import DivergenceError, PyrolvmError, RunFolderError, warn_user
from pyrolvm.inference.engine import Engine, Problem, TrainingState, Watch
from pyrolvm.inference.engine.problem import KL_WEIGHT
from pyrolvm.inference.posterior.history import History
from pyrolvm.inference.training.checkpoint import Checkpoint
from pyrolvm.inference.training.divergence import explain, skip_bad_steps
from pyrolvm.inference.training.plateau import Plateau
from pyrolvm.inference.training.rules import Rule
from pyrolvm.processes import Processes
from pyrolvm.progress import Bar
from pyrolvm.signals import Asked, interrupts_noted, termination_as_interrupt

CHUNK_SECONDS = 1.0
"""In a shorter time a large model takes a single step, and its whole state is copied before each chunk."""
FIRST_CHUNK, LARGEST_CHUNK = 8, 2**16


@dataclass
class Report:
    """What a callback is shown after each chunk."""

    step: int
    num_steps: int
    history: History
    state: TrainingState


class Callback(Protocol):
    """Called after each chunk; returns a reason to stop, or None to go on."""

    def __call__(self, report: Report) -> str | None:
        """Look, log, or stop; the state must not be changed."""


@dataclass
class Chunk:
    """The record of one chunk, from which everything between chunks is decided.

    Attributes
    ----------
    finite : bool
        Whether the bound of every step and the parameters after it are finite.
    validation : float or None
        The held-out bound, if this chunk ends where one is due.
    done : bool
        Whether its steps were taken, and not undone.
    """

    first_step: int
    num_steps: int
    seconds: float
    finite: bool = True
    validation: float | None = None
    done: bool = True


@dataclass
class Training:
    """One run: `run()` takes it from its state to `num_steps`, or to a reason to stop.

    Attributes
    ----------
    kept_step : int or None
        The step whose parameters were put back as the best held out; None if the last ones stay.
    """

    problem: Problem
    engine: Engine
    plan: BatchPlan
    state: TrainingState
    num_steps: int
    checkpoint: Checkpoint
    validate: Callable[[], float] | None = None
    validate_every: int = 0
    plateau: Plateau | None = None
    until: Rule | None = None
    on_nan: str = "raise"
    callbacks: Sequence[Callback] = ()
    stopped_because: str = ""
    kept_step: int | None = None
    history: History = field(init=False)
    _size: int = FIRST_CHUNK
    _asked: Asked = field(default_factory=Asked)
    _spare: TrainingState | None = None

    def __post_init__(self) -> None:
        self.history = History(self.problem.terms, self._control_columns)

    def resume(self) -> None:
        """Go on from the checkpoint, if anything was written yet."""
        saved = self.checkpoint.load(self.history, self.rule, self.problem.program.device)
        if saved is not None:
            self._check_controls(saved.step)
            self.state = saved
            program = self.problem.program
            program.load(saved.parameters, later=saved.optimizer.keys() - program.parameters.keys())
            if self.until is not None and self.until.verdict is not None:
                self.stopped_because = self.until.verdict.reason

    def _check_controls(self, step: int) -> None:
        """The steps that are done must have had the schedules of this run; functions themselves cannot be compared."""
        done = self.history.frame()
        here = self._controls(0, step)[torch.from_numpy(done["step"].to_numpy() - 1)]
        for i, name in enumerate(self._control_columns):
            if self.until is not None and i == 0:
                continue  # the rates that the run chose
            apart = np.abs(done[name].to_numpy() - here[:, i].numpy()) > 1e-9
            if apart.any():
                first = int(apart.argmax())
                raise RunFolderError(
                    f"the checkpoint in {self.checkpoint.folder} is of a run with another schedule: {name} was "
                    f"{done[name].iloc[first]:.6g} at step {done['step'].iloc[first]} and is {here[first, i]:.6g} now; "
                    "use the same settings, or another folder"
                )

    def run(self, bar: Bar) -> None:
        """Train; on an interrupt, write a checkpoint and say how to go on."""
        bar.begin(self.state.step)
        good: TrainingState | None = None
        try:
            with self._interrupts() as self._asked:
                if self.until is not None and not self.state.step:
                    self.state = self.until.begin(self.state)
                while self.state.step < self.num_steps and not self.stopped_because:
                    good = self.state.clone(self._spare)
                    record = self._chunk(good)
                    good = None
                    self._decide(record, bar)
        except KeyboardInterrupt:
            if good is not None and self.processes.count > 1:  # the others do not stop here
                raise
            if good is not None:  # a step may be half done: the state before this chunk is the last whole one
                self._restore(good)
            reason = self.checkpoint.how_to_go_on(self.state.step, kept=self._keep())
            bar.note(reason)
            raise KeyboardInterrupt(reason) from None
        self.stopped_because = self.stopped_because or self._all_done
        self._keep()
        self._check_warmup()
        if self.plateau is not None and self.plateau.best_parameters:
            self.problem.program.load(self.plateau.best_parameters)
            self.kept_step = self.plateau.best_step
            self.stopped_because += (
                f"; parameters are those of step {self.plateau.best_step}, the best held out"
            )

    # ------------------------------------------------------------------ between two chunks

    def _decide(self, record: Chunk, bar: Bar) -> None:
        """Stop, chunk size, held-out bound, checkpoint, callbacks: all decisions, in this order.

        With several processes those that depend on a clock or on what a callback knows are the first one's.
        """
        step = self.state.step
        if record.validation is not None:
            self.history.record_validation(record.validation)
            if self.plateau is not None:
                self.stopped_because = self.plateau.add(step, record.validation, self.state.parameters) or ""
        if (
            self.until is not None
            and record.done
            and step % self.until.every == 0
            and not self.stopped_because
        ):
            before = self.state
            self.state, reason = self.until.look(before, self.history)
            if self.state is not before:
                self.problem.program.load(self.state.parameters)
            self.stopped_because = reason or ""
        bar.update(step, **{"ELBO": self.history.recent("elbo")})
        error: Exception | None = None
        if self.processes.is_first:
            try:
                self._call_back()
            except Exception as caught:
                error = caught
        if self._agree(self._next_size(record), error):
            self._keep()
        if self._asked.interrupted:
            raise KeyboardInterrupt

    def _call_back(self) -> None:
        report = Report(self.state.step, self.num_steps, self.history, self.state)
        for callback in self.callbacks:
            self.stopped_because = self.stopped_because or callback(report) or ""

    def _agree(self, size: int, error: Exception | None) -> bool:
        """Take the first process's decisions, in one message; whether the checkpoint is due."""
        said = self.processes.gather(
            (
                size,
                self.stopped_because,
                self.checkpoint.is_due,
                self._asked.interrupted,
                error and str(error),
            )
        )
        if error is not None:
            raise error
        self._size, self.stopped_because, due, _, failed = said[0]
        if failed is not None:
            raise PyrolvmError(f"a callback failed in process 0 of {self.processes.count}: {failed}")
        self._asked.interrupted = any(interrupted for *_, interrupted, _ in said)
        return due

    @property
    def processes(self) -> Processes:
        """Those that run together."""
        return self.problem.processes

    def _interrupts(self) -> AbstractContextManager[Asked]:
        """One process is interrupted where it stands; several stop together, after the chunk."""
        return termination_as_interrupt() if self.processes.count == 1 else interrupts_noted()

    def _next_size(self, record: Chunk) -> int:
        """Steps that take about `CHUNK_SECONDS`, growing fourfold at most."""
        size = max(1, record.num_steps)
        wanted = int(size * CHUNK_SECONDS / max(record.seconds, 1e-9))
        return max(1, min(4 * size, wanted, LARGEST_CHUNK))

    def _limited(self, wanted: int) -> int:
        """Steps of the next chunk: to the end, or to the next held-out bound, at the most."""
        left = self.num_steps - self.state.step
        if self.until is not None:
            step, every = self.state.step, self.until.every
            left = min(left, self.until.ahead(step))
            # a chunk that passes a look ends at one
            wanted = max(wanted - (step + wanted) % every, min(wanted, every - step % every))
        if self.validate_every:
            left = min(left, self.validate_every - self.state.step % self.validate_every)
        return min(wanted, left)

    def _chunk(self, good: TrainingState) -> Chunk:
        first = self.state.step
        size = self.plan.most_steps(first, self._limited(self._size))
        rows, controls = self.plan.rows(first, size), self._controls(first, size)
        self.processes.barrier()  # within steps they wait for each other for less than a minute
        start = time.perf_counter() - self.engine.setup_seconds
        seen, watch = self._watch()
        state, terms = self.engine.run(self.state, rows, watch)
        finite = _finite(state, terms, good)
        self._spare = good if finite else None
        if not finite and self._again(good, size):
            return self._chunk(good)
        if not finite:
            state, terms = self._diverged(good, rows)
            seen = [(step, self.until.seen()) for step, _ in seen if self.until is not None]  # as it is now
        seconds = time.perf_counter() - self.engine.setup_seconds - start
        if len(terms):
            self.history.append(first, terms, controls[: len(terms)], seconds)
        self.state = state
        self._note(seen if len(terms) else [])
        due = self.validate_every and state.step and state.step % self.validate_every == 0
        value = self.validate() if self.validate is not None and due and len(terms) else None
        return Chunk(first, size, seconds, finite, value, bool(len(terms)))

    def _watch(self) -> tuple[list[tuple[int, Tensor]], Watch | None]:
        """What the rule notes between the steps of a chunk: a list that fills while they run."""
        rule, seen = self.until, list[tuple[int, Tensor]]()
        if rule is None:
            return seen, None
        return seen, Watch(rule.every, lambda step: seen.append((step, rule.seen())))

    def _note(self, seen: list[tuple[int, Tensor]]) -> None:
        for step, what in seen:
            assert self.until is not None
            self.until.note(step, what)

    def _again(self, good: TrainingState, size: int) -> bool:
        """Whether a chunk that diverged is to be taken again, to its first look: where it ended depends on a clock."""
        if self.until is None:
            return False
        first = self.until.every - good.step % self.until.every
        if size <= first:
            return False
        self._size = first
        self._restore(good.clone())
        return True

    @property
    def _control_columns(self) -> tuple[str, ...]:
        constants = [name for name in self.problem.constants if name != KL_WEIGHT]
        scheduled = [name for name in self.problem.scheduled[1:] if name != KL_WEIGHT]
        return ("learning_rate", KL_WEIGHT, *scheduled, *constants)

    def _controls(self, first: int, size: int) -> Tensor:
        """The columns of the history that show the controls: [size, columns]."""
        table = self.problem.controls(first, size)
        ones = {KL_WEIGHT: torch.ones(size, dtype=torch.float64)}
        constants = {
            k: torch.full((size,), v, dtype=torch.float64) for k, v in self.problem.constants.items()
        }
        scheduled = {name: table[:, i] for i, name in enumerate(self.problem.scheduled)}
        found = ones | constants | scheduled
        return torch.stack([found[name] for name in self._control_columns], 1)

    def _diverged(self, good: TrainingState, rows: Tensor) -> tuple[TrainingState, Tensor]:
        if self.on_nan == "skip":
            return skip_bad_steps(self.problem, good, rows)
        if self.until is not None and (lower := self.until.retreat(good)) is not None:
            return lower, torch.empty(0, len(self.problem.terms))
        reason = explain(self.problem, good, rows)
        self._restore(good)
        if self.on_nan == "rollback":
            self.stopped_because = f"{reason}; went back to step {good.step}"
            return self.state, torch.empty(0, len(self.problem.terms))
        self._keep()
        raise DivergenceError(
            f"{reason}. The model holds the last good state, step {good.step}. Try a lower learning_rate, "
            "clip_norm=10.0, or on_nan='skip'"
        )

    def _restore(self, good: TrainingState) -> None:
        self.state = good
        self.problem.program.load(good.parameters)

    @property
    def rule(self) -> Plateau | Rule | None:
        """What ends the run before its steps do."""
        return self.plateau or self.until

    @property
    def _all_done(self) -> str:
        if self.until is not None:
            return f"stopped at the limit of {self.num_steps:,} steps"
        return f"all {self.num_steps} steps done"

    def _keep(self) -> bool:
        self.checkpoint.engine = self.engine.name
        return self.checkpoint.keep(self.state, self.history, self.rule)

    def _check_warmup(self) -> None:
        """Warn if the run ended while its loss was not yet that of the bound."""
        schedule = self.problem.schedules.get(KL_WEIGHT)
        weight = self.problem.values_at(self.state.step).get(KL_WEIGHT, 1.0)
        if callable(schedule) and weight < 1:
            warn_user(
                f"the run ended at step {self.state.step} of {self.num_steps}, within the KL warm-up, the KL's weight "
                f"at {weight:.3g}: what was trained is not yet the ELBO; take more steps or a smaller kl_warmup"
            )


def _finite(state: TrainingState, terms: Tensor, before: TrainingState) -> bool:
    # other terms may be nan by definition (unknown); the bound may not
    return bool(torch.isfinite(terms[:, 0]).all()) and state.not_finite(before) is None
