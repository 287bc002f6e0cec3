"""From a run folder back to a `FittedModel`. Nothing in the folder is executed."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyrolvm.data.batch import Batch
from pyrolvm.errors import ProgramError, RunFolderError
from pyrolvm.files import FORMAT, read_json, read_tensors
from pyrolvm.inference.posterior.convergence import recorded
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.posterior.saving import CONFIG, HISTORY, PARAMETERS
from pyrolvm.inference.posterior.suiting import suited
from pyrolvm.inference.program.devices import placed, resolve_device
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.routes import row_guide
from pyrolvm.inference.program.structure import Plate, Site, Structure

KEYS = [
    "model",
    "settings",
    "columns",
    "num_rows",
    "dtype",
    "arguments",
    "structure",
    "controls",
    "engine",
    "stopped_because",
]
OBJECTIVE = "objective."


@placed
def load_run(
    path: Path,
    registry: Mapping[str, Any],
    model: Any = None,
    guide: Any = None,
    device: str = "cpu",
    example: Any = None,
) -> FittedModel:
    """Read a run folder.

    Parameters
    ----------
    path : Path
    registry : mapping
        Class name -> the models that may be built from their recorded arguments.
    model, guide
        Of a pair of the user's own.
    example : data, optional
        Rows like those that the program was fitted to, where it cannot run without: a folder keeps none.

    Raises
    ------
    RunFolderError
        The folder is missing, damaged, or of another program or version.
    """
    if not path.is_dir():
        raise RunFolderError(f"{path} is not a folder: name the folder that a run was saved in")
    config = _read_config(path)
    tensors, _ = read_tensors(path / PARAMETERS)
    saved = {k.removeprefix("program/"): v for k, v in tensors.items()}
    try:
        return _rebuilt(path, config, saved, registry, model, guide, device, example)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise RunFolderError(f"{path / CONFIG} is damaged: {type(error).__name__} {error}") from None


def _rebuilt(
    path: Path,
    config: dict[str, Any],
    saved: dict[str, Tensor],
    registry: Mapping[str, Any],
    model: Any,
    guide: Any,
    device: str,
    example: Any,
) -> FittedModel:
    if model is None:
        model = _build(config["model"], registry, path, saved)
    guide = row_guide(config.get("guide")) if guide is None else guide
    where = torch.device(resolve_device(device))
    program = Program(model, guide, device=where, dtype=_dtype(config["dtype"], path))
    program.controls = {str(k): float(v) for k, v in config["controls"].items()}
    zeros = _placeholder(config["arguments"], path)
    zeros = None if zeros is None else zeros.to(where)
    given = suited(program, example, zeros) if example is not None else None
    placeholder = given or zeros
    _initialise(program, placeholder, saved, path)
    structure = _structure(config["structure"])
    _fill(program, saved, structure)
    known = None if zeros is None or zeros.shared else zeros  # else every argument is asked for
    alone = known is not None and len(list(known.parts())) < 2  # then it stands for what is drawn anew
    return FittedModel(
        program,
        structure,
        read_history(path),
        settings=config["settings"],
        example=given or (placeholder if alone else None),
        num_rows=int(config["num_rows"]),
        engine=config["engine"],
        stopped_because=config["stopped_because"],
        convergence=recorded(config.get("convergence")),
        columns=config["columns"],
        arguments=config["arguments"],
        call=given or known,
    )


def _fill(program: Program, saved: dict[str, Tensor], structure: Structure) -> None:
    """Give the program what was saved; it is then as `fit` left it."""
    own = program.tensors()
    beside = {k: v for k, v in saved.items() if k not in own and k.startswith(OBJECTIVE)}
    program.load({k: v for k, v in saved.items() if k not in beside})
    moved = {k: v.to(program.device) for k, v in beside.items()}
    program.buffers |= moved  # for a fit that begins here: `init`
    program.complete_guide([s.name for s in structure.sites if s.left_to_prior])
    if program.contract is not None:
        program.contract.fresh = False
    program.settle()


def _initialise(program: Program, placeholder: Batch | None, saved: dict[str, Tensor], path: Path) -> None:
    """Make every parameter exist, by running the pair if construction did not."""
    program.collect()
    if {k for k in saved if not k.startswith(OBJECTIVE)} == program.tensors().keys():
        return
    if placeholder is None:
        raise RunFolderError(
            f"an argument of the program of {path} is an object, which the folder does not keep: pass a call's "
            f"arguments, pyrolvm.load('{path}', ..., example=(x, ...))"
        )
    try:
        program.initialise(placeholder, seed=0, validate=False)
    except ProgramError as error:
        raise RunFolderError(
            f"the program of {path} does not run on zeros in place of its data, which the folder does not keep: pass "
            f"some rows, pyrolvm.load('{path}', ..., example=x) ({error})"
        ) from error


class _NotKeptError(Exception):
    """An argument was an object, which a file does not give back."""


def _placeholder(arguments: dict[str, Any], path: Path) -> Batch | None:
    """A call with zeros for the data; None if an argument is an object, which a file does not give back."""
    shared = set[str]()

    def made(record: Any, name: str) -> Any:
        if record is None:
            return None
        if "setting" in record:
            raise _NotKeptError
        if "shape" in record:
            shared.update({name} if record.get("shared") else ())
            return torch.zeros(record["shape"], dtype=_dtype(record["dtype"], path))
        if "value" in record:
            return record["value"]
        if "dict" in record:
            return {k: made(v, f"{name}[{k!r}]") for k, v in record["dict"].items()}
        kind = tuple if "tuple" in record else list
        return kind(made(v, f"{name}[{i}]") for i, v in enumerate(record[kind.__name__]))

    try:
        args = tuple(made(record, f"args[{i}]") for i, record in enumerate(arguments["positional"]))
        kwargs = {k: made(record, k) for k, record in arguments["keyword"].items()}
    except _NotKeptError:
        return None
    batch = Batch(args, kwargs, shared=frozenset(shared))
    return batch.of(max(int(arguments["total"]), len(batch.indices)))


def _structure(record: dict[str, Any]) -> Structure:
    plate = record["data_plate"]
    lists = {k: tuple(v) for k, v in record.items() if isinstance(v, list) and k != "sites"}
    made: Any = Site
    sites = tuple(
        made(**{k: tuple(v) if isinstance(v, list) else v for k, v in site.items()})
        for site in record["sites"]
    )
    return Structure(
        **{**record, **lists, "sites": sites, "data_plate": None if plate is None else Plate(**plate)}
    )


def _dtype(name: Any, path: Path) -> torch.dtype:
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise RunFolderError(f"{path / CONFIG} is damaged: {name!r} is no type of tensors")
    return found


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path / CONFIG)
    if not isinstance(config, dict) or "format" not in config:
        raise RunFolderError(f"{path / CONFIG} is not the record of a run")
    if config["format"] != FORMAT:
        raise RunFolderError(
            f"{path} is a run of format {config['format']}, this version reads format {FORMAT}: use the version "
            f"of pyrolvm that wrote it ({config.get('versions', {}).get('pyrolvm', 'unknown')})"
        )
    missing = set(KEYS) - set(config)
    if missing:
        raise RunFolderError(f"{path / CONFIG} lacks {', '.join(sorted(missing))}: it is damaged")
    return config


def read_history(path: Path) -> pd.DataFrame:
    """history.csv of the run in `path`, without loading its model."""
    try:
        text = (path / HISTORY).read_text(encoding="utf-8")
        history = pd.read_csv(io.StringIO(text))
    except FileNotFoundError:
        raise RunFolderError(f"{path / HISTORY} does not exist: is {path} the folder of a run?") from None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path / HISTORY} is damaged: {error}") from None
    if not text.endswith("\n") or "step" not in history:
        raise RunFolderError(
            f"{path / HISTORY} is damaged: it is cut off; restore it from a copy or fit again"
        )
    return history


def _build(record: dict[str, Any], registry: Mapping[str, Any], path: Path, saved: dict[str, Tensor]) -> Any:
    if record["name"] not in registry or record["arguments"] is None:
        raise RunFolderError(
            f"the run in {path} is of '{record['name']}', which cannot be built from the file alone (nothing in a "
            f"run folder is executed): pass it, pyrolvm.load('{path}', model=..., guide=...)"
        )
    cls, arguments = registry[record["name"]], record["arguments"]
    try:
        with torch.device("meta"):  # takes no memory, whatever sizes a damaged file may name
            shapes = {k: tuple(v.shape) for k, v in cls(**arguments).state_dict(keep_vars=True).items()}
    except NotImplementedError:  # an operation of the constructor that has no shape-only form
        return cls(**arguments)
    except Exception as error:
        raise RunFolderError(
            f"{path / CONFIG} names arguments that {record['name']} cannot be built with: {error}"
        ) from None
    wrong = [k for k, shape in shapes.items() if k in saved and tuple(saved[k].shape) != shape]
    if wrong:
        raise RunFolderError(
            f"{path / CONFIG} is damaged: with its arguments '{wrong[0]}' would have the shape {shapes[wrong[0]]}, and "
            f"{PARAMETERS} has {tuple(saved[wrong[0]].shape)}"
        )
    return cls(**arguments)
