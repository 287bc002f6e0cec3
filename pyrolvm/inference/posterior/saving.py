"""The run folder: plain files, no pickles, nothing in it is executed.

config.json              format, versions, model, settings
parameters.safetensors   parameters and buffers by name
history.csv              one row per step
checkpoint/              the training state, if `fit` was asked to keep it there
"""

from __future__ import annotations

import contextlib
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyro
import torch

from pyrolvm._version import __version__
from pyrolvm.data.arrays import Batch
from pyrolvm.errors import RunFolderError
from pyrolvm.files import (
    FORMAT,
    Writer,
    json_writer,
    read_json,
    read_tensors,
    tensor_writer,
    write_together,
)
from pyrolvm.inference.program.devices import resolve_device
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import inspect_program
from pyrolvm.plates import arange_rows

if TYPE_CHECKING:
    from pyrolvm.inference.posterior.fitted import FittedModel

CONFIG, PARAMETERS, HISTORY = "config.json", "parameters.safetensors", "history.csv"


def save_run(fitted: FittedModel, path: Path, extra: dict[str, Any] | None = None) -> Path:
    """Write the run folder; its files are replaced when all are whole, other files in it are left alone.

    `extra` is kept in config.json under "run"; `load_run` does not look at it.
    """
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is a file: name a folder to save the run in")
    example = dict(fitted.example.tensors())
    tensors = {f"program/{k}": v for k, v in fitted.program.tensors().items()}
    tensors |= {f"example/{k}": v for k, v in example.items()}
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


def _config(fitted: FittedModel) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": model_record(fitted.model),
        "settings": fitted.settings,
        "columns": fitted.columns,
        "num_rows": fitted.num_rows,
        "dtype": str(fitted.program.dtype).removeprefix("torch."),
        "arguments": [list(map(_name_or_none, _positional(fitted.example))), sorted(fitted.example.kwargs)],
        "engine": fitted.engine,
        "stopped_because": fitted.stopped_because,
        "versions": versions(),
    }


def _positional(batch: Batch) -> list[Any]:
    return list(batch.args)


def _name_or_none(value: Any) -> bool:
    return value is not None


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


def load_run(
    path: Path, registry: dict[str, Any], model: Any = None, guide: Any = None, device: str = "cpu"
) -> FittedModel:
    """Read a run folder. `registry` maps class names to the models that may be built from their arguments."""
    from pyrolvm.inference.posterior.fitted import FittedModel

    if not path.is_dir():
        raise RunFolderError(f"{path} is not a folder: name the folder that a run was saved in")
    config = _read_config(path)
    tensors, _ = read_tensors(path / PARAMETERS)
    history = _read_history(path / HISTORY)
    if model is None:
        model = _build(config["model"], registry, path)
    program = Program(
        model, guide, device=torch.device(resolve_device(device)), dtype=getattr(torch, config["dtype"])
    )
    example = _example(config, tensors).to(program.device)
    rows = arange_rows(example.num_rows, program.device)
    program.initialise(example, (config["num_rows"], rows), seed=0)
    program.load({k.removeprefix("program/"): v for k, v in tensors.items() if k.startswith("program/")})
    structure = inspect_program(program, example, (config["num_rows"], rows))
    return FittedModel(
        program=program,
        structure=structure,
        history=history,
        settings=config["settings"],
        example=example,
        num_rows=config["num_rows"],
        engine=config["engine"],
        stopped_because=config["stopped_because"],
        columns=config["columns"],
    )


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path / CONFIG)
    if not isinstance(config, dict) or "format" not in config:
        raise RunFolderError(f"{path / CONFIG} is not the record of a run")
    if config["format"] != FORMAT:
        raise RunFolderError(
            f"{path} is a run of format {config['format']}, this version reads format {FORMAT}: use the version "
            f"of pyrolvm that wrote it ({config.get('versions', {}).get('pyrolvm', 'unknown')})"
        )
    missing = {
        "model",
        "settings",
        "columns",
        "num_rows",
        "dtype",
        "arguments",
        "engine",
        "stopped_because",
    } - set(config)
    if missing:
        raise RunFolderError(f"{path / CONFIG} lacks {', '.join(sorted(missing))}: it is damaged")
    return config


def _read_history(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from None


def _build(record: dict[str, Any], registry: dict[str, Any], path: Path) -> Any:
    if record["name"] not in registry or record["arguments"] is None:
        raise RunFolderError(
            f"the run in {path} is of '{record['name']}', which cannot be built from the file alone (nothing in a "
            f"run folder is executed): pass it, pyrolvm.load('{path}', model=..., guide=...)"
        )
    return registry[record["name"]](**record["arguments"])


def _example(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Batch:
    positional, keywords = config["arguments"]
    args = tuple(tensors[f"example/args[{i}]"] if given else None for i, given in enumerate(positional))
    return Batch(args, {k: tensors.get(f"example/{k}") for k in keywords}, config["columns"])
