"""Matrix products in less than float32: `python -m benchmarks.precision`.

The VAE 784-400-20 and the convolutional one on MNIST, binarised at 1/2, by the compiled engine: as usual, with
`torch.set_float32_matmul_precision` at "high" (TF32 on CUDA) and "medium" (bfloat16 where the processor has it), and
under `torch.autocast` to bfloat16. The time of a step is the median over repetitions, in turns; log p(x) is of held-out
rows by importance sampling in full precision, nats per datum, the mean over seeds with its standard error. Needs
MNIST's idx files in $PYROLVM_DATA. Writes `results/precision.md` and `.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

import pyrolvm
from benchmarks.machine import describe
from benchmarks.rows.vae import convolutional, in_pyro, shallow, start
from pyrolvm.data import load_mnist

RESULTS = Path(__file__).parent / "results"
FEW = 100
"""Steps whose time is taken at once."""
ROWS, DRAWS = 2000, 50
SETTINGS: dict[str, tuple[str, bool]] = {
    "float32": ("highest", False),
    '"high"': ("high", False),
    '"medium"': ("medium", False),
    "autocast, bfloat16": ("highest", True),
}
MODELS = {
    "VAE 784-400-20, batch 512": (512, shallow),
    "convolutional VAE, batch 128": (128, convolutional),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="of the runs whose log p(x) is compared")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    data = {split: (load_mnist(split).values > 0.5).astype("float32") for split in ("train", "test")}
    path = RESULTS / "precision.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    for name in options.models:
        rows[name] = _row(name, data, options)
        record = {"machine": describe(torch.device(options.device)), "steps": options.steps, "rows": rows}
        path.write_text(json.dumps(record, indent=1, default=str) + "\n")
        (RESULTS / "precision.md").write_text(_page(record))


@contextmanager
def _within(setting: str, device: str) -> Iterator[None]:
    precision, cast = SETTINGS[setting]
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cast):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _row(name: str, data: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    fit = partial(_fit, name, data, options.device)
    found = {s: [fit(s, seed, options.steps) for seed in range(options.seeds)] for s in SETTINGS}
    times: dict[str, list[float]] = {s: [] for s in SETTINGS}
    for _ in range(options.repeats):
        for setting in SETTINGS:
            times[setting].append(fit(setting, 0, FEW, evaluate=False)[0])
    return {
        s: {"us": median(times[s]), "all us": times[s], "log p(x)": [value for _, value in found[s]]}
        for s in SETTINGS
    }


def _fit(
    name: str, data: dict[str, Any], device: str, setting: str, seed: int, steps: int, evaluate: bool = True
) -> tuple[float, float]:
    """Microseconds a step, and log p(x) of held-out rows."""
    batch_size, networks = MODELS[name]
    model, guide = in_pyro(start(networks), networks)
    with _within(setting, device):
        fitted = pyrolvm.fit(
            model, data["train"], guide=guide, batch_size=batch_size, num_steps=steps, seed=seed,
            learning_rate=1e-3, engine="compiled", device=device, progress=False,
        )  # fmt: skip
    seconds = float(fitted.history["seconds"].iloc[-1])
    held_out = data["test"][:ROWS]
    value = fitted.log_evidence(held_out, "importance", DRAWS, progress=False).mean() if evaluate else 0.0
    return seconds / steps * 1e6, float(value)


def _page(record: dict[str, Any]) -> str:
    lines = ["# Matrix products in less than float32", "", "`python -m benchmarks.precision`", ""]
    lines += [
        f"log p(x) of {ROWS:,} test images after {record['steps']:,} steps, nats per datum, {DRAWS} draws each.",
        "",
    ]
    lines += ["| program | setting | microseconds a step | times as fast | log p(x) |"]
    lines += ["| --- | --- | ---: | ---: | ---: |"]
    for name, row in record["rows"].items():
        for setting, cell in row.items():
            found = cell["log p(x)"]
            error = stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
            ratio = row["float32"]["us"] / cell["us"]
            lines += [
                f"| {name} | {setting} | {cell['us']:,.0f} | {ratio:.2f} | {mean(found):.2f} ± {error:.2f} |"
            ]
    lines += ["", "## Measured on", "", *(f"- {k}: {v}" for k, v in record["machine"].items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
