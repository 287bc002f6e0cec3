"""The loop between chunks: history, held-out bound, checkpoints, and what to do when things go wrong.

Nothing here touches the host inside a chunk; everything here happens between two.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pyrolvm.data.plan import BatchPlan
from pyrolvm.errors import DivergenceError, RunFolderError, warn_user
from pyrolvm.files import read_tensors, write_tensors
from pyrolvm.inference.engine import Engine, Step, TrainingState
from pyrolvm.inference.posterior.history import History
from pyrolvm.inference.training.divergence import explain, skip_bad_steps
from pyrolvm.inference.training.plateau import Plateau
from pyrolvm.progress import Bar

CHUNK_SECONDS = 0.25
CHECKPOINT_FILE = "state.safetensors"


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
class Training:
    """One run: `run()` takes it from its state to `num_steps`, or to a reason to stop."""

    step: Step
    engine: Engine
    plan: BatchPlan
    state: TrainingState
    num_steps: int
    settings: dict[str, Any]
    history: History = field(default_factory=History)
    validate: Callable[[], float] | None = None
    validate_every: int = 0
    plateau: Plateau | None = None
    checkpoint: Path | None = None
    checkpoint_seconds: float = 30.0
    on_nan: str = "raise"
    callbacks: Sequence[Callback] = ()
    stopped_because: str = ""
    kept_step: int | None = None
    """The step whose parameters were put back as the best held out; None if the last ones stay."""

    def run(self, bar: Bar) -> None:
        """Train; on an interrupt, write a checkpoint and say how to go on."""
        size, saved = 8, time.monotonic()
        bar.begin(self.state.step)
        good: TrainingState | None = None
        try:
            with _termination_as_interrupt():
                while self.state.step < self.num_steps and not self.stopped_because:
                    good = self.state.clone()
                    seconds = self._chunk(self._size(size), good)
                    good = None
                    size = max(1, min(4 * size, int(size * CHUNK_SECONDS / max(seconds, 1e-9)), 2**16))
                    self._after_chunk(bar)
                    if time.monotonic() - saved > self.checkpoint_seconds:
                        self._keep()
                        saved = time.monotonic()
        except KeyboardInterrupt:
            if good is not None:  # a step may be half done: the state before this chunk is the last whole one
                self._restore(good)
            said = self._how_to_go_on(kept=self._keep())
            bar.note(said)
            raise KeyboardInterrupt(said) from None
        self.stopped_because = self.stopped_because or f"all {self.num_steps} steps done"
        self._keep()
        self._check_warmup()
        if self.plateau is not None and self.plateau.best_parameters:
            self.step.program.load(self.plateau.best_parameters)
            self.kept_step = self.plateau.best_step
            self.stopped_because += (
                f"; parameters are those of step {self.plateau.best_step}, the best held out"
            )

    def _check_warmup(self) -> None:
        """Warn if the run ended while its loss was not yet that of the bound."""
        weight = self.step.kl_weight(self.state.step - 1)
        if weight < 1:
            warn_user(
                f"the run ended at step {self.state.step} of a KL warm-up of {self.step.warmup_steps}, the KL's weight "
                f"at {weight:.3g}: what was trained is not yet the ELBO; take more steps or a smaller kl_warmup"
            )

    def _size(self, wanted: int) -> int:
        """Steps of the next chunk: to the end, or to the next held-out bound, at the most."""
        left = self.num_steps - self.state.step
        if self.validate_every:
            left = min(left, self.validate_every - self.state.step % self.validate_every)
        return min(wanted, left)

    def _chunk(self, size: int, good: TrainingState) -> float:
        first = self.state.step
        rows = self.plan.rows(first, size)
        controls = self.step.controls(first, size)
        start = time.perf_counter()
        state, terms = self.engine.run(self.state, rows)
        if not _finite(state, terms):
            state, terms, controls = self._diverged(good, rows, controls)
        seconds = time.perf_counter() - start
        if len(terms):
            self.history.append(first, terms, controls, seconds)
        self.state = state
        return seconds

    def _diverged(
        self, good: TrainingState, rows: Tensor, controls: Tensor
    ) -> tuple[TrainingState, Tensor, Tensor]:
        if self.on_nan == "skip":
            state, terms = skip_bad_steps(self.step, good, rows)
            return state, terms, controls
        reason = explain(self.step, good, rows)
        self._restore(good)
        if self.on_nan == "rollback":
            self.stopped_because = f"{reason}; went back to step {good.step}"
            return self.state, torch.empty(0, 3), controls[:0]
        self._keep()
        raise DivergenceError(
            f"{reason}. The model holds the last good state, step {good.step}. Try a lower learning_rate, "
            "clip_norm=10.0, or on_nan='skip'"
        )

    def _restore(self, good: TrainingState) -> None:
        self.state = good
        self.step.program.load(good.parameters)

    def _after_chunk(self, bar: Bar) -> None:
        step = self.state.step
        if self.validate is not None and self.validate_every and step and step % self.validate_every == 0:
            value = self.validate()
            self.history.record_validation(value)
            if self.plateau is not None:
                self.stopped_because = self.plateau.add(step, value, self.state.parameters) or ""
        bar.update(step, **{"ELBO": self.history.recent("elbo")})
        report = Report(step, self.num_steps, self.history, self.state)
        for callback in self.callbacks:
            self.stopped_because = self.stopped_because or callback(report) or ""

    def _keep(self) -> bool:
        """Write a checkpoint if the disk lets us: hours of training are not given up for one that is full."""
        try:
            self.save_checkpoint()
        except OSError as error:
            warn_user(
                f"the checkpoint could not be written to {self.checkpoint} ({error.strerror or error}): the run goes "
                "on, and an earlier checkpoint there is as it was"
            )
            return False
        return True

    def save_checkpoint(self) -> None:
        """Write state and history in one file, in one step; without a folder, nothing."""
        if self.checkpoint is None:
            return
        tensors = self.state.flatten() | {"history": self.history.tensor()}
        if self.plateau is not None:
            tensors |= self.plateau.flatten()
        write_tensors(self.checkpoint / CHECKPOINT_FILE, tensors, {"settings": self.settings})

    def load_checkpoint(self) -> None:
        """Go on from the checkpoint; its settings must be this run's."""
        assert self.checkpoint is not None
        tensors, record = read_tensors(self.checkpoint / CHECKPOINT_FILE)
        for key, here in self.settings.items():
            there = record["settings"].get(key)
            if there != here:
                raise RunFolderError(
                    f"the checkpoint in {self.checkpoint} is of a run with {key}={there!r}, this one has "
                    f"{key}={here!r}: use the same settings, or another folder"
                )
        self.history = History.from_tensor(tensors.pop("history"))
        saved = {k: tensors.pop(k) for k in list(tensors) if k.startswith("plateau/")}
        if self.plateau is not None:
            self.plateau.unflatten(saved, self.step.program.device)
        self.state = TrainingState.unflatten(tensors, self.step.program.device)
        self.step.program.load(self.state.parameters)

    def _how_to_go_on(self, kept: bool) -> str:
        if self.checkpoint is None or not kept:
            return f"stopped at step {self.state.step}; the model holds the parameters of that step"
        return (
            f"stopped at step {self.state.step}; to go on, call fit again with the same arguments and "
            f"checkpoint='{self.checkpoint}', resume=True"
        )


def _finite(state: TrainingState, terms: Tensor) -> bool:
    # kl and log-likelihood may be nan by definition (unknown); the bound may not
    if not bool(torch.isfinite(terms[:, 0]).all()):
        return False
    floating = [t for t in state.parameters.values() if t.is_floating_point()]
    return all(bool(torch.isfinite(t).all()) for t in floating)


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """A polite kill (SIGTERM) ends the run as Ctrl-C does, with a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
