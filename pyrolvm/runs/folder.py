"""The folder of a run: begun, resumed, never overwritten by mistake.

A run that has begun is known by `checkpoint/run.json`: what it was asked for, so that `resume` can tell whether it is
the same run. A finished one has the same record in `config.json` under "run".
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyrolvm.errors import RunFolderError, SettingError
from pyrolvm.files import read_json, read_tensors, write_json
from pyrolvm.inference.posterior.saving import CONFIG, HISTORY, PARAMETERS
from pyrolvm.inference.training.checkpoint import CHECKPOINT_FILE
from pyrolvm.inference.training.loop import Report

CHECKPOINT, BEGUN, EVIDENCE = "checkpoint", "run.json", "evidence.json"
DERIVED = (
    "inference_data.nc",
    "summary.csv",
    "k_hat.csv",
    "elbo.png",
    "restarts.csv",
    "report.html",
    EVIDENCE,
)
OWN = (CONFIG, PARAMETERS, HISTORY, *DERIVED)


@dataclass
class RunFolder:
    """The folder that a fit is written to, and a callback of `fit`: the record is there once training runs.

    Parameters
    ----------
    path : Path
        A new or empty folder, or a run's own with `resume` or `overwrite`.
    identity : dict
        What must agree for `resume`; JSON-able.
    command : str
        What repeats the run.
    """

    path: Path
    identity: dict[str, Any]
    command: str
    resume: bool = False
    overwrite: bool = False
    step: int = 0
    begun: bool = False
    found: dict[Path, int] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        """Where the training state is kept."""
        return self.path / CHECKPOINT

    @property
    def has_state(self) -> bool:
        """Whether there is a training state to resume from."""
        return any(states(self.path))

    @property
    def has_own_state(self) -> bool:
        """Whether a state there is of this run, and not of one that it was to replace."""
        return self.has_state and (self.resume or self.begun or self._ages() != self.found)

    @property
    def kept_step(self) -> int:
        """The step of the newest training state."""
        newest = max(states(self.path), key=lambda p: p.stat().st_mtime_ns)
        return int(read_tensors(newest)[0]["step"])

    def check(self) -> None:
        """Raise `RunFolderError` if the folder cannot be written, or holds something else than this run."""
        if self.resume and self.overwrite:
            raise SettingError("resume continues the run and overwrite replaces it: choose one")
        _check_writable(self.path)
        self.found = self._ages()
        begun = self.checkpoint / BEGUN
        there = bool(self.found) or any(file.exists() for file in (begun, *(self.path / n for n in OWN)))
        if self.resume and begun.exists():
            self._check_same(read_json(begun))
        elif self.resume:
            what = "no checkpoint" if there else "no run"
            raise RunFolderError(
                f"{self.path} holds {what} to resume: leave resume out" + " and overwrite" * there
            )
        elif there and not self.overwrite:
            raise RunFolderError(
                f"{self.path} holds a run already: --resume continues it, --overwrite replaces it; or name another "
                "folder"
            )
        elif not there and (others := sorted(n.name for n in self.path.glob("*") if n.name != CHECKPOINT)):
            raise RunFolderError(
                f"{self.path} holds other files ({', '.join(others[:3])}{', ...' * (len(others) > 3)}): name a new or "
                "an empty folder"
            )

    def _check_same(self, recorded: Any) -> None:
        there = recorded.get("identity", {}) if isinstance(recorded, dict) else {}
        for key, here in self.identity.items():
            if there.get(key) != here:
                raise RunFolderError(
                    f"{self.path} was begun with {key}={_short(there.get(key))}, this command has {_short(here)}: "
                    "repeat the same command, overwrite the run, or name another folder"
                )

    def __call__(self, report: Report) -> None:
        """Called by `fit` after each chunk, and before the first checkpoint."""
        self.step = report.step
        self.begin()

    def begin(self, keep_state: bool = False) -> None:
        """Write the record, and remove the training state of a run that is replaced.

        Its results stay until those of this run take their place (`clear_derived`).
        `keep_state`: the training state there is this run's own, because it ended before its first chunk did.
        """
        if self.begun:
            return
        old = [] if self.resume or keep_state else states(self.path)
        aside: dict[Path, Path] = {}
        try:
            for state in old:
                aside[state] = state.rename(state.with_name(f".{state.name}.replaced"))
            write_json(self.checkpoint / BEGUN, {"command": self.command, "identity": self.identity})
        except OSError:  # a full disk, say
            for state, name in aside.items():
                name.rename(state)
            raise
        self.begun = True
        for name in aside.values():
            name.unlink()

    def withdraw(self) -> None:
        """Remove the record of a run of which nothing was kept, and the folders made for it if they are empty."""
        if self.begun and not self.resume:
            (self.checkpoint / BEGUN).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.checkpoint.rmdir()
            self.path.rmdir()

    def clear_derived(self) -> None:
        """Remove what was made from the results that were there before."""
        for name in DERIVED:
            (self.path / name).unlink(missing_ok=True)

    def _ages(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in states(self.path)}


def states(path: Path) -> list[Path]:
    """The training states in the run folder `path`."""
    checkpoint = path / CHECKPOINT
    return [*checkpoint.glob(CHECKPOINT_FILE), *checkpoint.glob(f"restart-*/{CHECKPOINT_FILE}")]


def _check_writable(path: Path) -> None:
    """Try it, before hours of training are spent; folders made for it are removed again."""
    made = [p for p in (path, *path.parents) if not p.exists()]
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file: name a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written to: {error.strerror or error}") from None
    finally:
        for folder in made:
            if folder.is_dir():
                folder.rmdir()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
