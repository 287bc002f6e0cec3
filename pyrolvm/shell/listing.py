"""`models`, `datasets`, `compare`: tables."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import safe_open

from pyrolvm.data import DATASETS
from pyrolvm.errors import RunFolderError
from pyrolvm.files import read_json
from pyrolvm.inference.posterior.history import held_out_elbo
from pyrolvm.inference.posterior.saving import CONFIG, HISTORY, PARAMETERS
from pyrolvm.models import REGISTRY
from pyrolvm.shell.pairs import Pair
from pyrolvm.shell.runs import EVIDENCE
from pyrolvm.shell.tables import console, print_table


def list_models() -> None:
    """`pyrolvm models`."""
    print_table(["model", "what it is", "options"], [_model_row(name, cls) for name, cls in REGISTRY.items()])


def _model_row(name: str, cls: type) -> list[str]:
    first = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").replace("`", "")
    options = [
        k if p.default is p.empty else f"{k}={json.dumps(p.default, default=str)}"
        for k, p in Pair(name, cls=cls).options.items()
    ]
    return [name, first, ", ".join(options)]


def list_datasets() -> None:
    """`pyrolvm datasets`."""
    rows = [[d.name, d.num_rows, d.num_columns, d.description, d.source] for d in DATASETS.values()]
    print_table(["data set", "rows", "columns", "what it is", "source"], rows)


def compare(paths: list[Path]) -> None:
    """`pyrolvm compare`."""
    runs = [_facts(path) for path in paths]
    evidence = _common_evidence(runs)
    for run in runs:
        run["evidence"] = run["estimates"].get(evidence, math.nan)
    key = next((k for k in ("evidence", "held_out") if all(not math.isnan(r[k]) for r in runs)), "elbo")
    runs.sort(key=lambda r: -r[key] if not math.isnan(r[key]) else math.inf)
    columns = ["run", "model", "parameters", "steps", "ELBO", "held out", "evidence"]
    keys = ["run", "model", "parameters", "steps", "elbo", "held_out", "evidence"]
    print_table(columns, [[r[k] for k in keys] for r in runs])
    console().print(f"nats per datum; sorted by {columns[keys.index(key)]}{_of(evidence)}", style="dim")
    if len({r["data"] for r in runs}) > 1:
        console().print("the runs were fitted to different data: their bounds do not compare", style="yellow")


def _of(evidence: tuple | None) -> str:
    if evidence is None:
        return ""
    data, method, draws = evidence
    return f"; evidence of {data} by {method}" + (f" with {draws:,} draws" if draws else "")


def _common_evidence(runs: list[dict[str, Any]]) -> tuple | None:
    """The estimate (data, method, draws) that most runs have."""
    kinds = [kind for run in runs for kind in run["estimates"]]
    return max(kinds, key=kinds.count) if kinds else None


def _facts(path: Path) -> dict[str, Any]:
    """What the files of a run say, without building its model."""
    config = read_json(path / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise RunFolderError(f"{path / CONFIG} is not the record of a run")
    history = _history(path)
    run = config.get("run") or {}
    data = run.get("data") or {}
    return {
        "run": str(path),
        "model": _described(config["model"]),
        "parameters": _count(path / PARAMETERS),
        "steps": int(history["step"].max()) if len(history) else 0,
        "elbo": float(history["elbo"].tail(100).mean()),
        "held_out": held_out_elbo(history, (config.get("settings") or {}).get("kept_step")),
        "data": (data.get("sha256"), json.dumps(data.get("transforms"))),
        "estimates": _estimates(path / EVIDENCE),
    }


def _history(path: Path) -> pd.DataFrame:
    try:
        history = pd.read_csv(path / HISTORY)
        return history[
            [c for c in ("step", "elbo", "validation_elbo") if c in {"step", "elbo"} | set(history)]
        ]
    except FileNotFoundError:
        raise RunFolderError(f"{path / HISTORY} does not exist: is {path} the folder of a run?") from None
    except (ValueError, KeyError) as error:
        raise RunFolderError(f"{path / HISTORY} is damaged: {error}") from None


def _described(model: dict[str, Any]) -> str:
    arguments = {k: v for k, v in (model.get("arguments") or {}).items() if k != "data_dim"}
    said = ", ".join(f"{k}={v}" for k, v in arguments.items())
    return f"{model.get('name')}({said})" if said else str(model.get("name"))


def _count(path: Path) -> int:
    """Numbers in the file of parameters that the program itself holds."""
    try:
        with safe_open(path, framework="np") as file:
            shapes = [file.get_slice(k).get_shape() for k in file.keys() if k.startswith("program/")]  # noqa: SIM118
    except Exception as error:  # safetensors raises its own and the system's
        raise RunFolderError(f"{path} cannot be read: {error}") from None
    return sum(math.prod(shape) for shape in shapes)


def _estimates(path: Path) -> dict[tuple, float]:
    entries = read_json(path) if path.exists() else []
    return {(e["data"], e["method"], e["num_samples"]): e["mean"] for e in entries}
