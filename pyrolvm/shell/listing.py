"""`models`, `datasets`, `compare`: tables."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

from pyrolvm.data import DATASETS
from pyrolvm.inference.posterior.history import held_out_elbo
from pyrolvm.inference.posterior.loading import read_history
from pyrolvm.models import REGISTRY
from pyrolvm.runs import NamedModel, described
from pyrolvm.runs.saved import count_parameters, read_config, read_evidence
from pyrolvm.shell.printing import caution, note, print_table

COMPARED = {name: name for name in ("run", "model", "parameters", "steps")}
COMPARED |= {"elbo": "ELBO", "held_out": "held out", "evidence": "evidence"}


def list_models() -> None:
    """`pyrolvm models`."""
    rows = []
    for name, cls in REGISTRY.items():
        first = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").replace("`", "")
        options = [
            k if p.default is p.empty else f"{k}={json.dumps(p.default, default=str)}"
            for k, p in NamedModel(name, cls=cls).options.items()
        ]
        rows.append([name, first, ", ".join(options)])
    print_table(["model", "what it is", "options"], rows)


def list_datasets() -> None:
    """`pyrolvm datasets`."""
    rows = [[d.name, d.num_rows, d.num_columns, d.description, d.source] for d in DATASETS.values()]
    print_table(["data set", "rows", "columns", "what it is", "source"], rows)


def compare(paths: list[Path]) -> None:
    """`pyrolvm compare`."""
    runs = [_facts(path) for path in paths]
    kinds = [kind for run in runs for kind in run["estimates"]]
    evidence = max(kinds, key=kinds.count, default=None)  # (data, method, draws) that most runs have
    for run in runs:
        run["evidence"] = run["estimates"].get(evidence, math.nan)
    key = next((k for k in ("evidence", "held_out") if all(not math.isnan(r[k]) for r in runs)), "elbo")
    points = [run["run"] for run in runs if run["point"]]
    runs.sort(key=lambda r: -r[key] if not math.isnan(r[key]) else math.inf)
    print_table([*COMPARED.values()], [[run[k] for k in COMPARED] for run in runs])
    note(f"nats per datum; sorted by {COMPARED[key]}{_of(evidence)}")
    if points:
        caution(f"no bound, but the log p(x, z) of a point estimate: {', '.join(points)}")
    if len({r["data"] for r in runs}) > 1:
        caution("the runs were fitted to different data: their bounds do not compare")


def _of(evidence: tuple | None) -> str:
    if evidence is None:
        return ""
    data, method, draws = evidence
    return f"; evidence of {data} by {method}" + (f" with {draws:,} draws" if draws else "")


def _facts(path: Path) -> dict[str, Any]:
    """What the files of a run hold, without building its model."""
    config, history = read_config(path), read_history(path)
    data = config["run"].get("data") or {}
    shown = {k: v for k, v in (config["model"].get("arguments") or {}).items() if k != "data_dim"}
    noted = {(e["data"], e["method"], e["num_samples"]): e["mean"] for e in read_evidence(path)}
    return {
        "run": str(path),
        "model": described(config["model"].get("name"), shown or None),
        "parameters": count_parameters(path),
        "steps": int(history["step"].max()) if len(history) else 0,
        "elbo": float(history["elbo"].tail(100).mean()),
        "held_out": held_out_elbo(history, (config.get("settings") or {}).get("kept_step")),
        "data": (data.get("sha256"), json.dumps(data.get("transforms"))),
        "estimates": noted,
        "point": any(s.get("local") and s.get("point") for s in config["structure"]["sites"]),
    }
