"""The run folder: plain files, no pickles, nothing in it is executed.

config.json              format, versions, model, settings, structure
parameters.safetensors   parameters and buffers by name; no rows of the data
history.csv              one row per step
checkpoint/              the training state, if `fit` was asked to keep it there
"""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any

import pyro
import torch

from pyrolvm._version import __version__
from pyrolvm.data.arguments import described, is_plain, is_setting
from pyrolvm.data.batch import Batch
from pyrolvm.errors import RunFolderError
from pyrolvm.files import FORMAT, Writer, json_writer, tensor_writer, write_together
from pyrolvm.inference.posterior.record import Record, model_record
from pyrolvm.processes import here

CONFIG, PARAMETERS, HISTORY = "config.json", "parameters.safetensors", "history.csv"


def save_run(fitted: Record, path: Path, extra: dict[str, Any] | None = None) -> Path:
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


def _config(fitted: Record) -> dict[str, Any]:
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
