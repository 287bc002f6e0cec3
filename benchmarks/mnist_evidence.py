"""IWAE with 5,000 samples over MNIST's 10,000 test images: `python -m benchmarks.mnist_evidence`.

The VAE 784-200-200-50 (tanh, Bernoulli decoder) on images binarised at 1/2, Adam at 1e-3, batch 100; trained here,
or loaded from the run folder `--run` if that exists (else it is written there). Needs MNIST's idx files in
$PYROLVM_DATA. Writes `benchmarks/results/mnist_evidence.json`: seconds, own peak memory above that at the start
of the evaluation, the bounds L_1, L_50 and L_5000 with the standard errors of their means over images, and k-hat.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import pyrolvm
from benchmarks.machine import describe
from benchmarks.process import peak_megabytes
from pyrolvm.data import load_mnist
from pyrolvm.inference.posterior.evidence import iwae_bounds, khat_threshold

SETTINGS: dict[str, Any] = {"hidden": (200, 200), "activation": "tanh"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rows", type=int, default=10_000, help="test images")
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument(
        "--run", type=Path, default=None, help="run folder to load the fit from, or save it to"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mnist_evidence.json")
    options = parser.parse_args()
    fitted, training = _fitted(options)
    test = (load_mnist("test").values > 0.5).astype("float32")[: options.rows]
    iwae_bounds(fitted.pair(test[:10]), 50, (1, 50), progress=False)  # what the first run allocates for good
    before, start = _reset_peak(), time.perf_counter()
    table = iwae_bounds(fitted.pair(test), options.draws, sorted({1, 50, options.draws}))
    seconds = time.perf_counter() - start
    record = {
        "machine": describe(torch.device("cpu")),
        "training": training,
        "images": len(table),
        "draws": options.draws,
        "seconds": seconds,
        "draws per second": len(table) * options.draws / seconds,
        "own memory at the start, MB": before,
        "own peak memory above it, MB": peak_megabytes() - before,
        **_findings(table, options.draws),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2, default=str) + "\n")
    print(options.out.read_text())


def _fitted(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    if options.run is not None and options.run.exists():
        return pyrolvm.load(options.run), {"run": options.run.name}
    torch.manual_seed(0)
    train = (load_mnist("train").values > 0.5).astype("float32")
    start = time.perf_counter()
    model = pyrolvm.VAE(784, 50, **SETTINGS)
    fitted = pyrolvm.fit(model, train, batch_size=100, num_epochs=options.epochs, learning_rate=1e-3)
    if options.run is not None:
        fitted.save(options.run)
    return fitted, {
        "epochs": options.epochs,
        "batch_size": 100,
        **SETTINGS,
        "seconds": time.perf_counter() - start,
        "bound": fitted.elbo,
    }


def _findings(table: pd.DataFrame, draws: int) -> dict[str, Any]:
    """Means over images in nats per image, their standard errors, and how many k-hat trusts."""
    bounds = table.drop(columns="k_hat")
    limit = khat_threshold(draws)
    return {
        "bounds": bounds.mean().to_dict(),
        "standard errors over images": (bounds.std() / len(bounds) ** 0.5).to_dict(),
        "mean k-hat": float(table["k_hat"].mean()),
        f"share of images with k-hat above {limit:.2f}": float((table["k_hat"] > limit).mean()),
    }


def _reset_peak() -> float:
    """The process's own peak starts from now, where the system allows it: MB at this moment."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_megabytes()


if __name__ == "__main__":
    main()
