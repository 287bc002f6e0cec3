"""Halves of MNIST, figure 4 of Maddison, Mnih and Teh (2017): `python -m benchmarks.reproduce.concrete_halves`.

The lower half of a digit from its upper half, 392-240-240-392 and 392-240-240-240-392, units of -1 and 1, linear
layers. 10^7 steps of Adam, minibatches of 64, Glorot's start; `--scale` takes the first part. Concrete: temperature
2/3, learning rate 3e-4, weight decay 1e-3 (of the gradient, as in torch's Adam). VIMCO, which is NVIL at m = 1: the
paper searches {1e-4, 3e-4, 1e-3} and {0, 1e-2, 1e-1, 1} and does not tell the choice; here 3e-4 and 0, without the
paper's early stopping. The paper also centres the layers by running means, which is left out. Both objectives have m
draws from p(z | x_top); all are evaluated by 100 draws of the discrete units.

50,000 of MNIST's training images; the binarisation is ours, by the seed. Needs MNIST's idx files in $PYROLVM_DATA.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyrolvm
from benchmarks.reproduce.common import arguments, binary_mnist, gathered, glorot, kept, write_table
from pyrolvm import StructuredPrediction
from pyrolvm.inference.objectives import NVIL, VIMCO, Concrete, Objective

STEPS, BATCH, DRAWS = 10_000_000, 64, 100
PAPER = {  # (layers, m): test Concrete, test VIMCO, train Concrete, train VIMCO
    (2, 1): (58.5, 61.4, 54.2, 59.3),
    (2, 5): (54.3, 54.5, 49.2, 52.7),
    (2, 50): (53.4, 51.8, 48.2, 49.6),
    (3, 1): (56.3, 59.7, 51.6, 58.4),
    (3, 5): (52.7, 53.5, 46.9, 51.6),
    (3, 50): (52.0, 50.2, 45.9, 47.9),
}
NAMES = ("Concrete", "VIMCO")
WEIGHT_DECAY = {"Concrete": 1e-3, "VIMCO": 0.0}


def objective(name: str, m: int) -> Objective:
    if name == "Concrete":
        return Concrete(2 / 3, None, num_particles=m)
    return NVIL() if m == 1 else VIMCO(m)


def folder_of(key: tuple[int, int, str], options: argparse.Namespace) -> Path:
    """Where a row keeps its checkpoint and its numbers."""
    return options.checkpoints / "-".join(map(str, key))


def run(
    key: tuple[int, int, str], train: Tensor, test: Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """Train (or go on) and evaluate one row of the table."""
    layers, m, name = key
    folder = folder_of(key, options)
    steps = round(options.scale * STEPS)
    torch.manual_seed(options.seed)
    model = glorot(StructuredPrediction(784, num_layers=layers, num_particles=m))
    fitted = pyrolvm.fit(
        model,
        train,
        objective=objective(name, m),
        learning_rate=options.learning_rate,
        optimizer_options={"weight_decay": WEIGHT_DECAY[name]},
        batch_size=BATCH,
        num_steps=steps,
        seed=options.seed,
        device=options.device,
        checkpoint=folder,
        resume=True,
        engine="compiled",
    )

    def judged() -> dict[str, Any]:
        place = NAMES.index(name)
        row: dict[str, Any] = {
            "model": "-".join(["392", *["240"] * layers, "392"]),
            "m": m,
            "objective": name,
        }
        for part, rows, column in (("test", test, place), ("train", train, place + 2)):
            found = -fitted.log_evidence(rows[: options.test_rows], "importance", DRAWS)
            row |= {
                f"{part} NLL": f"{found.mean():.2f} ± {found.std() / len(found) ** 0.5:.2f}",
                f"{part} NLL, paper": PAPER[layers, m][column],
            }
        share = f"{steps / STEPS:.3%}"
        return row | {
            "steps": steps,
            "share of the schedule": share,
            "seconds": round(fitted.history["seconds"].iloc[-1]),
        }

    return kept(folder, {"steps": steps, "test_rows": options.test_rows}, judged)


def main() -> None:
    parser = arguments(__doc__, "concrete_halves", scale=1.0)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3], choices=[2, 3])
    parser.add_argument("--m", type=int, nargs="+", default=[1, 5, 50], choices=[1, 5, 50])
    parser.add_argument("--objectives", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    options = parser.parse_args()
    train, test = (binary_mnist(split, seed=options.seed) for split in ("train", "test"))
    for key in [(n, m, o) for n in options.layers for m in options.m for o in options.objectives]:
        run(key, train[:50_000], test, options)
        notes = [
            f"`python -m benchmarks.reproduce.concrete_halves --scale {options.scale} --test-rows {options.test_rows} "
            f"--learning-rate {options.learning_rate} --seed {options.seed}`",
            f"NLL of the lower half given the upper one, nats per image, {DRAWS} draws of the discrete units, the "
            f"first {options.test_rows} images, with the standard error over images. The binarisation is ours, by the "
            "seed.",
        ]
        rows = gathered([folder_of((*key, name), options) for key in PAPER for name in NAMES])
        write_table(options.out, "Concrete: halves of MNIST", notes, rows)


if __name__ == "__main__":
    main()
