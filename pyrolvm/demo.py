"""`python -m pyrolvm.demo`: a variational autoencoder on real digits, from data to ArviZ, in `demo-run/`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import pyrolvm
from pyrolvm import VAE, FittedModel
from pyrolvm.data import Dataset, load_dataset

FOLDER = Path("demo-run")
IMAGE = (8, 8)


def main(folder: Path = FOLDER, num_epochs: int = 150) -> FittedModel:
    """Fit, look, save; returns the fitted pair."""
    console = Console()
    digits = load_dataset("digits")
    train, held_out = digits.split(0.1, seed=0)
    console.print(
        f"[bold]{digits.num_rows} handwritten digits[/bold], 8 x 8 pixels; {held_out.num_rows} held out"
    )
    torch.manual_seed(0)
    vae = VAE(data_dim=64, latent_dim=2, likelihood="gaussian", hidden=(128, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pyrolvm.ConvergenceWarning)  # `_show` has the verdict
        fitted = pyrolvm.fit(
            vae,
            train,
            validation=held_out,
            batch_size=128,
            num_epochs=num_epochs,
            learning_rate=2e-3,
            kl_warmup=0.1,
            clip_norm=50.0,
        )
    fitted.save(folder)
    _show(console, fitted, held_out)
    _draw(folder, fitted, held_out)
    _export(folder, fitted, held_out)
    console.print(
        f"\nWritten to [bold]{folder}/[/bold]: " + ", ".join(sorted(p.name for p in folder.iterdir()))
    )
    return fitted


def _show(console: Console, fitted: FittedModel, held_out: Dataset) -> None:
    last = fitted.history.tail(100).mean()
    evidence = fitted.log_evidence(held_out, "importance", num_samples=200)
    table = Table(title="VAE 64-128-64-2, nats per datum")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    rows = {
        "ELBO, training": last["elbo"],
        "    expected log-likelihood": last["log_likelihood"],
        "    KL(q(z|x) || p(z))": last["kl"],
        "ELBO, held out": fitted.held_out_elbo,
        "log p(x), held out (200 importance samples)": evidence.mean().item(),
    }
    for name, value in rows.items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    seconds = fitted.history["seconds"].iloc[-1]
    console.print(
        f"{fitted.engine}; {len(fitted.history):,} steps in {seconds:.1f} s; {fitted.stopped_because}"
    )
    console.print(fitted.convergence.sentence)


def _draw(folder: Path, fitted: FittedModel, held_out: Dataset) -> None:
    from pyrolvm import plots

    grid = torch.linspace(-2.0, 2.0, 9)
    z = torch.cartesian_prod(-grid, grid)[:, [1, 0]]
    with torch.no_grad():
        traversal = fitted.model.decode(z)
    figures = {
        "elbo.png": plots.plot_elbo(fitted.history),
        "latents.png": plots.plot_latents(fitted.encode(held_out), held_out.labels),
        "reconstructions.png": plots.plot_reconstructions(
            held_out.values, fitted.reconstruct(held_out), IMAGE
        ),
        "samples.png": plots.plot_samples(fitted.sample(40, mean=True), IMAGE),
        "traversal.png": plots.plot_traversals(
            traversal.reshape(9, 9, -1), IMAGE, row_label="z[1]", column_label="z[0]"
        ),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")


def _export(folder: Path, fitted: FittedModel, held_out: Dataset) -> None:
    from pyrolvm.diagnostics.inference_data import save_inference_data

    idata = pyrolvm.to_inference_data(fitted, held_out.take(np.arange(50)), num_samples=200)
    save_inference_data(idata, folder / "inference_data.nc")


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
