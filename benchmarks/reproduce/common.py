"""What the reproductions share: arguments, MNIST in bits of our own, Glorot's start, rows kept, and the table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe
from pyrolvm.data import load_mnist

RESULTS = Path(__file__).parents[1] / "results"


def arguments(doc: str | None, name: str, scale: float) -> argparse.ArgumentParser:
    """The arguments of every reproduction; `scale` is the share of the paper's schedule that runs by default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scale", type=float, default=scale, help=f"share of the paper's schedule, from its start ({scale})"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path("reproduce") / name,
        help="a run that is there goes on from where it stopped; a larger --scale goes on too",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.md", help="the table, in markdown")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--test-rows", type=int, default=10_000, help="test images that are evaluated")
    return parser


def binary_mnist(split: str, copies: int = 1, rows: int | None = None, seed: int = 0) -> Tensor:
    """MNIST with each pixel drawn as a bit, its grey level the probability: [copies * rows, 784].

    The draws are ours, fixed by the seed; no one else's file is read. Several copies stand in for a binarisation drawn
    anew for each minibatch.
    """
    grey = torch.from_numpy(load_mnist(split).values)[:rows]
    generator = torch.Generator().manual_seed(1000 * seed + (split == "test"))
    return torch.cat([torch.bernoulli(grey, generator=generator) for _ in range(copies)])


def glorot(model: nn.Module) -> nn.Module:
    """Weights uniform as in Glorot and Bengio (2010), biases 0."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def kept(folder: Path, settings: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row of the table; from `folder` if it was computed there with the same settings."""
    path = folder / "row.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] == json.loads(json.dumps(settings)):
            return found["row"]
    row = compute()
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, "row": row}, indent=2) + "\n")
    return row


def gathered(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows that these folders keep, whichever run they are of: a table may be made by several commands."""
    files = [folder / "row.json" for folder in folders]
    return [json.loads(file.read_text())["row"] for file in files if file.exists()]


def write_table(
    path: Path,
    title: str,
    notes: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """A page of one or more tables (a row with other columns begins another one), and what it was measured on."""
    lines = [f"# {title}", "", *[f"{note}\n" for note in notes]]
    columns: list[str] = []
    for row in rows:
        if list(row) != columns:
            columns = list(row)
            lines += ["", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines.append("| " + " | ".join(_cell(value) for value in row.values()) + " |")
    lines += ["", "## Measured on", ""]
    lines += [f"- {key}: {value}" for key, value in describe(torch.device("cpu")).items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value)
