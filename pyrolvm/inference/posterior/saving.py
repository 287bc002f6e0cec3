"""The run folder: plain files, no pickles, nothing in it is executed.

config.json              format, versions, model, settings, structure
parameters.safetensors   parameters and buffers by name; no rows of the data
history.csv              one row per step
checkpoint/              the training state, if `fit` was asked to keep it there
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pyro
import torch

from pyrolvm._version import __version__
from pyrolvm.data.arguments import described, is_plain, is_setting
from pyrolvm.data.arrays import Batch
from pyrolvm.errors import RunFolderError
from pyrolvm.files import FORMAT, Writer, json_writer, tensor_writer, write_together
from pyrolvm.inference.posterior.convergence import Convergence
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import Structure
from pyrolvm.processes import here

CONFIG, PARAMETERS, HISTORY = "config.json", "parameters.safetensors", "history.csv"


class Savable(Protocol):
    """What a run folder keeps of a `FittedModel`."""

    program: Program
    structure: Structure
    history: pd.DataFrame
    settings: dict[str, Any]
    example: Batch | None
    num_rows: int
    engine: str
    stopped_because: str
    convergence: Convergence
    columns: list[str] | None
    arguments: dict[str, Any] | None


def save_run(fitted: Savable, path: Path, extra: dict[str, Any] | None = None) -> Path:
    """Write the run folder; its files are replaced when all are whole, other files in it are left alone.

    `extra` is kept in config.json under "run"; `load_run` does not look at it. Of several processes that made the fit
    together the first one writes.
    """
    if fitted.settings.get("num_processes", 1) > 1 and not here().is_first:
        return path
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file: name a folder to save the run in")
    with fitted.program.scope():  # its values, though its modules may have been trained again
        tensors = {f"program/{k}": v.detach().clone() for k, v in fitted.program.tensors().items()}
    files: dict[Path, Writer] = {
        path / PARAMETERS: tensor_writer(tensors),
        path / HISTORY: lambda p: fitted.history.to_csv(p, index=False),
        path / CONFIG: json_writer(_config(fitted) | ({"run": extra} if extra is not None else {})),
    }
    try:
        write_together(files)
    except OSError as error:
        raise RunFolderError(
            f"the run could not be written to {path} ({error.strerror or error}); what was there is as it was"
        ) from None
    return path


def _config(fitted: Savable) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": model_record(fitted.program.source),
        "guide": fitted.program.guide_record,
        "settings": fitted.settings,
        "columns": fitted.columns,
        "num_rows": fitted.num_rows,
        "dtype": str(fitted.program.dtype).removeprefix("torch."),
        "arguments": fitted.arguments if fitted.example is None else describe(fitted.example),
        "structure": dataclasses.asdict(fitted.structure),
        "controls": fitted.program.controls,
        "engine": fitted.engine,
        "stopped_because": fitted.stopped_because,
        "convergence": fitted.convergence.record(),
        "versions": versions(),
    }


def describe(example: Batch) -> dict[str, Any]:
    """The shapes and types of a program's data, and its settings: what has to be known to run it again."""

    def of(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            kept = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            return kept | ({"shared": True} if name in example.shared else {})
        if value is None:
            return None
        if is_setting(value):
            return {"value": value} if is_plain(value) else {"setting": described(value)}
        if type(value) in (list, tuple, dict):
            keys = value if isinstance(value, dict) else range(len(value))
            inside = {str(key): of(value[key], f"{name}[{key!r}]") for key in keys}
            return {type(value).__name__: inside if isinstance(value, dict) else list(inside.values())}
        return {"setting": described(value)}  # a packed sequence: its lengths are data

    return {
        "positional": [of(v, f"args[{i}]") for i, v in enumerate(example.args)],
        "keyword": {k: of(v, k) for k, v in example.kwargs.items()},
        "total": example.total_rows,
    }


def versions() -> dict[str, str]:
    """What the numbers of a run depend on."""
    return {
        "pyrolvm": __version__,
        "pyro": pyro.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def model_record(model: Any) -> dict[str, Any]:
    """How to build the model again: its class and arguments if they are plain, else its name alone."""
    arguments = getattr(model, "constructor", None)
    name = (
        type(model).__name__
        if isinstance(model, torch.nn.Module)
        else getattr(model, "__name__", repr(model))
    )
    record: dict[str, Any] = {"name": name, "arguments": None}
    with contextlib.suppress(TypeError, ValueError):  # networks passed as objects: the caller builds them
        record["arguments"] = json.loads(json.dumps(arguments))
    return record
