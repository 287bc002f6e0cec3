"""A run folder read back: the fit, the recipe of its data, and the notes added since."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pyrolvm.errors import PyrolvmError, RunFolderError, warn_user
from pyrolvm.files import read_json, write_json
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.posterior.loading import load_run
from pyrolvm.inference.posterior.saving import CONFIG, PARAMETERS
from pyrolvm.models import REGISTRY
from pyrolvm.runs.folder import BEGUN, CHECKPOINT, EVIDENCE, states
from pyrolvm.runs.named import find_model, first_line
from pyrolvm.runs.recipe import Recipe

RECORD: dict[str, Any] = {"model": dict, "settings": dict, "columns": (list, type(None)), "num_rows": int}
"""Entries of config.json and their types."""


@dataclass(frozen=True)
class SavedRun:
    """A run folder: its path, its config.json and its fit."""

    path: Path
    config: dict[str, Any]
    fitted: FittedModel

    @property
    def recipe(self) -> Recipe:
        """The recipe of its data; of a fit saved from Python without one, what the fit itself knows."""
        record = self.config["run"].get("data")
        if isinstance(record, dict):
            return Recipe(record)
        arguments = self.config["model"].get("arguments") or {}
        return Recipe({"columns": self.fitted.columns, "vectors": "data_dim" in arguments})

    @property
    def columns(self) -> list[str]:
        """Names of the entries of a row; empty if they have none."""
        return self.recipe.columns or self.fitted.columns or []

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row: of the data as they were read, else of the fit's first argument."""
        positional = (self.fitted.arguments or {}).get("positional") or [None]
        known = positional[0]["shape"][1:] if positional[0] else []
        return tuple(self.recipe.shape or known)

    @property
    def command(self) -> str | None:
        """The command that repeats the run, if the shell recorded one."""
        return self.config["run"].get("command")

    @property
    def evidence(self) -> list[dict[str, Any]]:
        """The estimates of log p(x) noted in the folder."""
        return read_evidence(self.path)


def open_run(path: Path, model: Any = None, guide: Any = None, device: str = "cpu") -> SavedRun:
    """Read a run folder. Nothing in it is executed, and it never names a file to execute.

    Parameters
    ----------
    path : Path
        The run folder.
    model : str or object, optional
        For a pair of one's own: `file.py:Name`, or the model (and `guide`) as `pyrolvm.load` takes them.

    Raises
    ------
    RunFolderError
        The folder is missing, damaged, unfinished, or of a pair that `model` has to name.
    """
    path = Path(path)
    config = read_config(path, named=model is not None)
    if isinstance(model, str):
        model, guide = _rebuild(model, config)
    try:
        fitted = load_run(path, REGISTRY, model, guide, device)
    except PyrolvmError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, MemoryError) as error:
        raise RunFolderError(
            f"{path / CONFIG} is damaged: the model cannot be built from it ({first_line(error)})"
        ) from None
    return SavedRun(path, config, fitted)


def _rebuild(text: str, config: dict[str, Any]) -> tuple[Any, Any]:
    """The pair that `text` names, built with the arguments of the run."""
    named = find_model(text, guide=config["run"].get("guide"))
    arguments = config["run"].get("arguments") or config["model"].get("arguments") or {}
    built = named.build(arguments)
    return built if isinstance(built, tuple) else (built, None)


def read_config(path: Path, named: bool = True) -> dict[str, Any]:
    """config.json of a finished run, its types checked before anything is built from it.

    `named`: the caller brings the model. Raises `RunFolderError`.
    """
    if not path.is_dir():
        raise RunFolderError(f"{path} is not a folder: name the folder that a run was saved in")
    begun = _command_begun(path)
    _check_finished(path, begun)
    config = _checked(path, read_json(path / CONFIG))
    if begun not in (None, config["run"].get("command", begun)):
        warn_user(
            f"these are results of the earlier run in {path}: the one begun since is not finished ({begun})"
        )
    name = config["model"].get("name")
    if not named and name not in REGISTRY:
        text = config["run"].get("model", f"file.py:{name}")
        raise RunFolderError(
            f"the run in {path} is of '{name}', a pair of your own, and a run folder executes nothing: name the pair, "
            f"--model {text} at the shell, model=... in Python"
        )
    return config


def _check_finished(path: Path, begun: str | None) -> None:
    """Raise `RunFolderError` if the folder holds the checkpoint of a run and no result yet."""
    if (path / CONFIG).exists() or not (path / CHECKPOINT / BEGUN).exists():
        return
    command = begun or "pyrolvm fit ..."
    if states(path):
        raise RunFolderError(f"the run in {path} is not finished: resume it with {command} --resume")
    raise RunFolderError(
        f"the run in {path} ended before its first checkpoint: start it again with {command} --overwrite"
    )


def _checked(path: Path, config: Any) -> dict[str, Any]:
    """The record, of the types that it must have; "run" is what was recorded beside the fit, if anything."""
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise RunFolderError(f"{path / CONFIG} is not the record of a run")
    config["run"] = config["run"] if isinstance(config.get("run"), dict) else {}
    for key, kind in RECORD.items():
        if key in config and not isinstance(config[key], kind):
            raise RunFolderError(f"{path / CONFIG} is damaged: {key}={config[key]!r} is of the wrong type")
    return config


def _command_begun(path: Path) -> str | None:
    """The command of the run that was begun in the folder, if any."""
    begun = path / CHECKPOINT / BEGUN
    found = read_json(begun) if begun.exists() else None
    return found.get("command") if isinstance(found, dict) else None


def count_parameters(path: Path) -> int:
    """The numbers that the program of the run in `path` holds, from the head of the file alone."""
    file = path / PARAMETERS
    try:
        with safe_open(file, framework="np") as tensors:
            shapes = [tensors.get_slice(k).get_shape() for k in tensors.keys() if k.startswith("program/")]  # noqa: SIM118
    except Exception as error:  # safetensors raises its own and the system's
        raise RunFolderError(f"{file} is damaged: {first_line(error)}") from None
    return sum(math.prod(shape) for shape in shapes)


def read_evidence(path: Path) -> list[dict[str, Any]]:
    """The estimates of log p(x) noted in the run folder."""
    entries = read_json(path / EVIDENCE) if (path / EVIDENCE).is_file() else []
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise RunFolderError(f"{path / EVIDENCE} is damaged: delete it")
    return entries


def add_evidence(path: Path, entry: dict[str, Any]) -> None:
    """Note an estimate in the run folder, in place of an earlier one of the same data and method."""
    keys = ("data", "method", "num_samples")
    kept = [e for e in read_evidence(path) if any(e.get(k) != entry[k] for k in keys)]
    write_json(path / EVIDENCE, [*kept, entry])
