"""The MNIST rows of Grathwohl et al. (2018), and REBAR's short log: `python -m benchmarks.reproduce.relax`.

Belief networks of 200 bits in each layer: one or two linear layers, or one with networks of two tanh layers of 200.
2,000,000 steps of Adam with beta2 = 0.99999 and minibatches of 24; `--scale` takes the first part of them. The paper
searches each estimator's learning rate, of which it gives the candidates and not the choice; here `--learning-rate`
is one for all (3e-4, that of the log in REBAR's repository), and it is the rate of the control variates too, which
REBAR's code trains ten times as fast. RELAX has its best network, four ReLU layers of 200, without weight decay. The
other columns of the paper seem to be REBAR's.

"Best bound" is the highest mean over a pass of the training bound, one draw; the paper's numbers of the nonlinear
model under REBAR and RELAX come from a code in which three layers share one estimate. The variance is that of the
guide's gradient, the trace of its covariance for a minibatch of 24 (nats per datum), with all estimators at the
parameters that the first of `--estimators` trained; networks, temperatures and averages have `--own-steps` steps of
their own there.

50,000 training images and the other 10,000 of MNIST's training set for validation; the binarisation is ours, by the
seed. Needs MNIST's idx files in $PYROLVM_DATA. The whole schedule takes hours to days on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

import pyrolvm
from benchmarks.reproduce.common import arguments, binary_mnist, gathered, glorot, kept, write_table
from pyrolvm import BernoulliVAE, FittedModel
from pyrolvm.diagnostics import gradient_variance
from pyrolvm.inference.objectives import NVIL, REBAR, RELAX, Concrete, MuProp, Objective

STEPS, BATCH, EPOCH = 2_000_000, 24, 2084
MODELS: dict[str, dict[str, Any]] = {
    "nonlinear": {"nonlinear": True},
    "linear, 1 layer": {},
    "linear, 2 layers": {"num_layers": 2},
}
ESTIMATORS: dict[str, Callable[[], Objective]] = {
    "REBAR": REBAR,
    "RELAX": lambda: RELAX(hidden=200, num_layers=4),
    "MuProp": MuProp,
    "NVIL": lambda: NVIL(hidden=100),
    "Concrete": lambda: Concrete(2 / 3, 1 / 2),
}
BEST = {  # highest training bound
    "nonlinear": (-81.01, -78.13, -101.1, -101.5, -102.2),
    "linear, 1 layer": (-111.6, -111.20, -111.7, -112.5, -111.3),
    "linear, 2 layers": (-98.22, -98.00, -99.07, -99.6, -99.62),
}
VALIDATION = {  # highest validation bound of REBAR and RELAX
    "nonlinear": (-111.12, -119.19),
    "linear, 1 layer": (-114.32, -113.62),
    "linear, 2 layers": (-101.20, -100.85),
}
LOG = {2084: -231.03, 4168: -156.87, 6252: -143.47, 8336: -137.65}
"""Training bound of REBAR on two linear layers, by step: README of REBAR's code."""


def run(
    name: str, estimator: str, train: Tensor, held_out: Tensor, options: argparse.Namespace
) -> tuple[dict[str, Any], FittedModel]:
    """Train (or go on) one model by one estimator; its row of the table and the fitted model."""
    folder = folder_of(name, estimator, options)
    steps = round(options.scale * STEPS)
    torch.manual_seed(options.seed)
    model = glorot(BernoulliVAE(784, 200, **MODELS[name]))
    fitted = pyrolvm.fit(
        model,
        train,
        objective=ESTIMATORS[estimator](),
        learning_rate=options.learning_rate,
        optimizer_options={"betas": (0.9, 0.99999)},
        batch_size=BATCH,
        num_steps=steps,
        validation=held_out,
        validate_every=EPOCH,
        seed=options.seed,
        device=options.device,
        checkpoint=folder,
        resume=True,
        engine="compiled",
    )
    row = kept(folder, {"steps": steps}, lambda: judged(name, estimator, fitted))
    return row, fitted


def judged(name: str, estimator: str, fitted: FittedModel) -> dict[str, Any]:
    """A row: ours beside the paper's."""
    place = list(ESTIMATORS).index(estimator)
    bound, held_out = fitted.history["elbo"], fitted.history["validation_elbo"].dropna()
    passes = bound.rolling(EPOCH).mean()
    published = VALIDATION[name]
    return {
        "model": name,
        "estimator": estimator,
        "best bound": round(passes.max(), 2),
        "best bound, paper": BEST[name][place],
        "best validation bound": round(held_out.max(), 2),
        "best validation bound, paper": published[place] if place < len(published) else None,
        "steps": len(bound),
        "share of the schedule": f"{len(bound) / STEPS:.3%}",
        "seconds": round(fitted.history["seconds"].iloc[-1]),
        **{f"step {step}": round(passes.iloc[step - 1], 2) for step in LOG if step <= len(passes)},
    }


def trained_alone(objective: Objective, model: BernoulliVAE, train: Tensor, num_steps: int) -> Objective:
    """Train the objective's own networks and temperatures on minibatches, the model as it is."""
    torch.manual_seed(0)
    optimizer: torch.optim.Optimizer | None = None
    with pyro.get_param_store().scope():
        for _ in range(num_steps):
            x = train[torch.randint(len(train), (BATCH,))]
            loss = objective.differentiable_loss(model.model, model.guide, x) / BATCH
            own = [p for module in objective.modules().values() for p in module.parameters()]
            if own:
                optimizer = optimizer or torch.optim.Adam(own, lr=1e-3)
                for parameter, gradient in zip(own, torch.autograd.grad(loss, own), strict=True):
                    parameter.grad = gradient
                optimizer.step()
    return objective


def variances(
    name: str, fitted: FittedModel, train: Tensor, options: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Rows with the variance of the guide's gradient of each estimator, at the parameters of one fit."""
    several = {
        e: trained_alone(ESTIMATORS[e](), fitted.model, train, options.own_steps) for e in options.estimators
    }
    if "NVIL" in several:  # of the unbiased one: the normalised gradient has another length
        several["NVIL, not normalised"] = trained_alone(
            NVIL(100, normalise=False), fitted.model, train, options.own_steps
        )
    table = gradient_variance(fitted, several, train[:BATCH], num_samples=options.variance_draws)
    rows = [
        {
            "model": name,
            "estimator": row["objective"],
            "variance of the guide's gradient": round(row["variance"], 3),
            "95 % interval": f"{row['variance_low']:.3f} to {row['variance_high']:.3f}",
            "at step": len(fitted.history),
            "parameters of": options.estimators[0],
        }
        for _, row in table[table["group"] == "guide"].iterrows()
    ]
    return {"rows": rows}


def main() -> None:
    parser = arguments(__doc__, "relax", scale=1.0)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--own-steps", type=int, default=1000)
    parser.add_argument("--variance-draws", type=int, default=100, help="0 leaves the variances out")
    options = parser.parse_args()
    images = binary_mnist("train", seed=options.seed)
    train, held_out = images[:50_000], images[50_000:]
    for name in options.models:
        first: FittedModel | None = None
        for estimator in options.estimators:
            _, fitted = run(name, estimator, train, held_out, options)
            first = first or fitted
            write_table(options.out, "RELAX: the MNIST rows", _notes(options), rows_of(options))
        if first is None or not options.variance_draws:
            continue
        settings = {"steps": len(first.history), "estimators": options.estimators}
        settings |= {"own_steps": options.own_steps, "draws": options.variance_draws}
        kept(_variances_of(name, options), settings, partial(variances, name, first, train, options))
        write_table(options.out, "RELAX: the MNIST rows", _notes(options), rows_of(options))


def folder_of(name: str, estimator: str, options: argparse.Namespace) -> Path:
    """Where a row keeps its checkpoint and its numbers."""
    return options.checkpoints / f"{name.replace(', ', '-').replace(' ', '-')}-{estimator}"


def _variances_of(name: str, options: argparse.Namespace) -> Path:
    return folder_of(name, options.estimators[0], options) / "variances"


def rows_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows that are kept, bounds first, then variances."""
    bounds = gathered([folder_of(name, e, options) for name in MODELS for e in ESTIMATORS])
    return bounds + [
        r for f in gathered([_variances_of(name, options) for name in MODELS]) for r in f["rows"]
    ]


def _notes(options: argparse.Namespace) -> list[str]:
    log = ", ".join(f"{bound} at step {step}" for step, bound in LOG.items())
    return [
        f"`python -m benchmarks.reproduce.relax --scale {options.scale} --learning-rate {options.learning_rate} "
        f"--own-steps {options.own_steps} --seed {options.seed}`",
        "Bounds in nats per image, of training a mean over a pass. The binarisation is ours, by the seed. REBAR's log "
        f"of two linear layers: {log}.",
        "NVIL divides the guide's gradient by the deviation of the costs, so that its variance is of a shorter one; "
        "the one that is not normalised compares with the others.",
    ]


if __name__ == "__main__":
    main()
