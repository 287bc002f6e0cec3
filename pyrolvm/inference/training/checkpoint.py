"""The checkpoint of a run: its state and history in one file, and what must agree to go on with it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrolvm.errors import RunFolderError, SettingError, warn_user
from pyrolvm.files import read_tensors, write_tensors
from pyrolvm.inference.engine import TrainingState
from pyrolvm.inference.posterior.history import History
from pyrolvm.inference.program.noise import noise_state
from pyrolvm.inference.training.plateau import Plateau
from pyrolvm.inference.training.rules import NoMoreRise, Rule
from pyrolvm.inference.training.until import Until
from pyrolvm.processes import ALONE, Processes

CHECKPOINT_FILE = "state.safetensors"
OTHERS = "others/"
"""Of the noise of all processes but the first, whose is the state's own: others/RANK/DEVICE."""


@dataclass
class Checkpoint:
    """Where a run keeps its state, and when.

    Parameters
    ----------
    folder : Path or None
        None keeps nothing.
    seconds : float
        Between two writings.
    settings : dict
        JSON-able settings that must agree for a run to be gone on with.
    engine : str
        The engine that runs, recorded so that a resumed run uses the same one.
    processes : Processes
        Those that run together; the first one writes and reads, for all.
    """

    folder: Path | None
    seconds: float = 30.0
    settings: dict[str, Any] = field(default_factory=dict)
    engine: str = ""
    processes: Processes = ALONE
    _saved: float = field(default_factory=time.monotonic)

    @property
    def is_due(self) -> bool:
        """Whether the last writing is longer ago than `seconds`."""
        return time.monotonic() - self._saved > self.seconds

    def keep(self, state: TrainingState, history: History, rule: Plateau | Rule | None) -> bool:
        """Try to write; a full disk is a warning, not an error. Whether it was written."""
        self._saved = time.monotonic()
        if self.folder is None:
            return False
        noise = self.processes.gather(state.random)
        if not self.processes.is_first:
            return self.processes.broadcast(False)
        tensors = state.flatten() | {"history": history.tensor()} | (rule.flatten() if rule else {})
        for rank, own in enumerate(noise[1:], 1):
            tensors |= {f"{OTHERS}{rank}/{kind}": value for kind, value in own.items()}
        return self.processes.broadcast(self._write(self.folder, tensors))

    def _write(self, folder: Path, tensors: dict[str, Tensor]) -> bool:
        record = {"settings": self.settings, "engine": self.engine, "num_processes": self.processes.count}
        try:
            write_tensors(folder / CHECKPOINT_FILE, tensors, record)
        except OSError as error:
            warn_user(
                f"the checkpoint could not be written to {folder} ({error.strerror or error}): the run goes "
                "on, and an earlier checkpoint there is as it was"
            )
            return False
        return True

    def load(
        self, history: History, rule: Plateau | Rule | None, device: torch.device
    ) -> TrainingState | None:
        """Read state, history and the rule that ends the run back; None if nothing was written yet.

        Raises
        ------
        SettingError
            There is no folder to resume from.
        RunFolderError
            The checkpoint is damaged, or of a run with other settings or data.
        """
        if self.folder is None:
            raise SettingError("resume=True needs checkpoint='...', the folder that the run wrote to")
        found = self.processes.first(lambda: _read(self.folder))
        if found is None:
            return None  # so that one command can be repeated until it is done
        tensors, record = found
        self._check(record["settings"])
        history.load(tensors.pop("history"))
        prefixes = (Plateau.prefix, Until.prefix, NoMoreRise.prefix)
        saved = {k: tensors.pop(k) for k in list(tensors) if k.startswith(prefixes)}
        if rule is not None:
            rule.unflatten({k: v for k, v in saved.items() if k.startswith(rule.prefix)}, device)
        others = {k: tensors.pop(k) for k in list(tensors) if k.startswith(OTHERS)}
        state = TrainingState.unflatten(tensors, device)
        return self._with_noise(state, others, record.get("num_processes", 1), device)

    def _with_noise(
        self, state: TrainingState, others: dict[str, Tensor], count: int, device: torch.device
    ) -> TrainingState:
        """The state with this process's own noise."""
        if count != self.processes.count:
            warn_user(
                f"the checkpoint in {self.folder} is of a run of {count} process{'es' if count > 1 else ''}, which "
                f"{self.processes.count} now go on with: from step {state.step} on the noise is another than that "
                "run's would have been"
            )
        if self.processes.is_first:
            return state
        own = f"{OTHERS}{self.processes.rank}/"
        saved = {k.removeprefix(own): v for k, v in others.items() if k.startswith(own)}
        if not saved or count != self.processes.count:
            saved = noise_state(self.settings.get("seed", 0), device, self.processes.rank, state.step)
        state.random = saved
        return state

    def _check(self, there: dict[str, Any]) -> None:
        for key, here in self.settings.items():
            if there.get(key) != here:
                raise RunFolderError(
                    f"the checkpoint in {self.folder} is of a run with {key}={there.get(key)!r}, this one has "
                    f"{key}={here!r}: use the same settings and data, or another folder"
                )

    def how_to_go_on(self, step: int, *, kept: bool) -> str:
        """One sentence for a run that was interrupted."""
        if not kept:
            return f"stopped at step {step}; the model holds the parameters of that step"
        return (
            f"stopped at step {step}; to go on, call fit again with the same arguments and "
            f"checkpoint='{self.folder}', resume=True"
        )


def _read(folder: Path | None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What the checkpoint in `folder` holds; None if nothing was written yet."""
    if folder is None or not (folder / CHECKPOINT_FILE).exists():
        return None
    return read_tensors(folder / CHECKPOINT_FILE)


def recorded_engine(folder: Path | None, forget: bool = False) -> str | None:
    """The engine that the run in `folder` began with; None if there is no such run, or it is to be forgotten.

    `forget`: the launcher may begin this run again, which shall then not go on with an older one.
    """
    if folder is not None and forget:
        (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
    found = _read(folder)
    return None if found is None else found[1].get("engine") or None
