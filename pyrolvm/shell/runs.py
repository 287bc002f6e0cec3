"""RUN on the command line: begun, gone on with, never overwritten by mistake, and read back.

A run that has begun is known by `checkpoint/run.json`: what was asked for, so that --resume can tell
whether it is the same run. A finished one has the same record in `config.json` under "run".
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyrolvm.errors import RunFolderError, warn_user
from pyrolvm.files import read_json, write_json
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.posterior.saving import CONFIG, HISTORY, PARAMETERS, load_run
from pyrolvm.inference.training.loop import CHECKPOINT_FILE, Report
from pyrolvm.models import REGISTRY
from pyrolvm.shell.pairs import Pair, as_pair, find_pair

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
    """The folder that `fit` writes to; a callback of `fit`, which puts the record there once training runs.

    identity: what must agree for --resume. record: what is kept of the run, a part of which identity is.
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
        """Whether there is a training state to go on from."""
        return any(self._states())

    @property
    def has_own_state(self) -> bool:
        """Whether a state there is of this run, and not of one that it was to replace."""
        return self.has_state and (self.resume or self.begun or self._ages() != self.found)

    def check(self) -> None:
        """Raise `RunFolderError` if the folder cannot be written, or holds another run."""
        _check_writable(self.path)
        self.found = self._ages()
        begun = self.checkpoint / BEGUN
        if self.resume and begun.exists():
            self._check_same(read_json(begun))
        elif self._own_files() and self.resume:
            raise RunFolderError(
                f"{self.path} holds no checkpoint to go on from: say --overwrite to start anew"
            )
        elif self._own_files() and not self.overwrite:
            raise RunFolderError(
                f"{self.path} holds a run already: say --resume to go on with it, --overwrite to replace it, or "
                "another --out"
            )

    def _check_same(self, recorded: dict[str, Any]) -> None:
        there = recorded.get("identity", {})
        for key, here in self.identity.items():
            if there.get(key) != here:
                raise RunFolderError(
                    f"{self.path} was begun with {key}={_short(there.get(key))}, this command says {_short(here)}: "
                    "repeat the same command, or say --overwrite or another --out"
                )

    def __call__(self, report: Report) -> None:
        """Called by `fit` after each chunk, and before the first checkpoint."""
        self.step = report.step
        self.begin()

    def begin(self, keep_state: bool = False) -> None:
        """Write the record, and take away the training state of a run that is replaced.

        Its results stay until those of this run take their place (`clear_derived`).
        `keep_state`: the training state there is this run's own, because it ended before its first chunk did.
        """
        if self.begun:
            return
        old = [] if self.resume or keep_state else self._states()
        aside = {state: state.with_name(f".{state.name}.replaced") for state in old}
        for state, name in aside.items():
            state.rename(name)
        try:
            write_json(self.checkpoint / BEGUN, {"command": self.command, "identity": self.identity})
        except OSError:  # a full disk, say
            for state, name in aside.items():
                name.rename(state)
            raise
        self.begun = True
        for name in aside.values():
            name.unlink()

    def clear_derived(self) -> None:
        """Take away what was made from the results that were there before."""
        for name in DERIVED:
            (self.path / name).unlink(missing_ok=True)

    def _states(self) -> list[Path]:
        return [*self.checkpoint.glob(CHECKPOINT_FILE), *self.checkpoint.glob(f"restart-*/{CHECKPOINT_FILE}")]

    def _ages(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in self._states()}

    def _own_files(self) -> list[Path]:
        names = [self.path / name for name in OWN if (self.path / name).exists()]
        return names + self._states() + [p for p in (self.checkpoint / BEGUN,) if p.exists()]


def _check_writable(path: Path) -> None:
    """Try it, before hours of training are spent; folders made for it are taken away again."""
    made = [p for p in (path, *path.parents) if not p.exists()]
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file: name a folder for --out")
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


def open_run(path: Path, model: str | None = None, device: str = "cpu") -> tuple[FittedModel, dict[str, Any]]:
    """A run and the record of its data (empty if it was saved from Python).

    model: `file.py:Name` for a pair of the user's own; a run folder never names a file to execute.
    """
    if model is None:
        refuse_unknown(path)
        return load_run(path, REGISTRY, device=device), data_record(path)
    pair = find_pair(model, guide=_recorded(path).get("guide"))
    built = _rebuild(pair, path)
    program, guide = built if isinstance(built, tuple) else (built, None)
    return load_run(path, REGISTRY, program, guide, device), data_record(path)


def _rebuild(pair: Pair, path: Path) -> Any:
    arguments = _recorded(path).get("arguments")
    if arguments is None:
        arguments = read_json(path / CONFIG)["model"]["arguments"] or {}
    return as_pair(pair.build(arguments)) if pair.cls is not None else pair.build({})


def refuse_unknown(path: Path) -> None:
    """Raise `RunFolderError` if the run is not finished, or of a pair that has to be named by --model."""
    if not path.is_dir() or not (path / CONFIG).exists():
        if (path / CHECKPOINT / BEGUN).exists():
            command = read_json(path / CHECKPOINT / BEGUN).get("command", "pyrolvm fit ...")
            raise RunFolderError(f"the run in {path} is not finished: go on with {command} --resume")
        return
    _warn_of_unfinished(path)
    config = read_json(path / CONFIG)
    name = config.get("model", {}).get("name") if isinstance(config, dict) else None
    if name is not None and name not in REGISTRY:
        text = _recorded(path).get("model", f"file.py:{name}")
        raise RunFolderError(
            f"the run in {path} is of '{name}', a pair of your own, and a run folder executes nothing: say where it "
            f"is, --model {text}"
        )


def _warn_of_unfinished(path: Path) -> None:
    """Say so where a run was begun in place of the one whose results are still there."""
    begun = path / CHECKPOINT / BEGUN
    command = read_json(begun).get("command") if begun.exists() else None
    if command not in (None, _recorded(path).get("command", command)):
        warn_user(
            f"these are results of the earlier run in {path}: the one begun since is not finished ({command})"
        )


def _recorded(path: Path) -> dict[str, Any]:
    """What the shell recorded of the run; empty if it was saved from Python."""
    config = read_json(path / CONFIG) if path.is_dir() else {}
    run = config.get("run") if isinstance(config, dict) else None
    return run if isinstance(run, dict) else {}


def data_record(path: Path) -> dict[str, Any]:
    """What was recorded of the run's data."""
    record = _recorded(path).get("data")
    return record if isinstance(record, dict) else {}


def add_evidence(path: Path, entry: dict[str, Any]) -> None:
    """Note an estimate in the run folder, in place of an earlier one of the same data and method."""
    file = path / EVIDENCE
    kept = read_json(file) if file.exists() else []
    keys = ("data", "method", "num_samples")
    kept = [e for e in kept if any(e.get(k) != entry[k] for k in keys)]
    write_json(file, [*kept, entry])
