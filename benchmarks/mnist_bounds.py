"""Bounds of the VAE and the PowerVAE on MNIST after a short schedule: `python -m benchmarks.mnist_bounds`.

784-200-200-50, tanh, Bernoulli decoder, images binarised at 1/2, Adam at 1e-3, batch 100. Needs MNIST's
idx files in $PYROLVM_DATA. Writes `benchmarks/results/mnist_bounds.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import pyrolvm
from benchmarks.machine import describe
from pyrolvm.data import load_mnist
from pyrolvm.inference.posterior.evidence import evidence_table

SETTINGS = {"hidden": (200, 200), "activation": "tanh"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rows", type=int, default=1000, help="test images for the evidence")
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mnist_bounds.json")
    options = parser.parse_args()
    train, test = ((load_mnist(split).values > 0.5).astype("float32") for split in ("train", "test"))
    models = {"VAE": {}, "PowerVAE, beta=4": {"beta": 4.0}, "PowerVAE, eta=2": {"eta": 2.0}}
    rows = [_row(name, keywords, train, test, options) for name, keywords in models.items()]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": describe(torch.device("cpu")),
        "epochs": options.epochs,
        "batch_size": 100,
        **SETTINGS,
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=2, default=str) + "\n")
    print(options.out.read_text())


def _row(name: str, keywords: dict, train, test, options: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    model = (pyrolvm.PowerVAE if keywords else pyrolvm.VAE)(784, 50, **SETTINGS, **keywords)
    start = time.perf_counter()
    fitted = pyrolvm.fit(
        model,
        train,
        validation=test,
        validate_every=600,
        batch_size=100,
        num_epochs=options.epochs,
        learning_rate=1e-3,
    )
    last = fitted.history.tail(600)[["elbo", "log_likelihood", "kl"]].mean()
    row = {
        "model": name,
        "engine": fitted.engine,
        "seconds": time.perf_counter() - start,
        "train_bound": last["elbo"],
        "train_log_likelihood": last["log_likelihood"],
        "train_kl": last["kl"],
        "test_bound": fitted.history["validation_elbo"].dropna().iloc[-1],
    }
    if not keywords:
        table = evidence_table(fitted.pair(test[: options.rows]), "importance", options.draws)
        row["test_log_evidence"] = table["log_evidence"].mean()
        row["evidence_rows"], row["evidence_draws"] = options.rows, options.draws
    return row


if __name__ == "__main__":
    main()
