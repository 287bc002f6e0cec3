"""Enumerate, sample or relax: variance and time of every estimator on four programs with discrete latents.

    python -m benchmarks.estimators variance      gradients at one point of each program, by `gradient_variance`
    python -m benchmarks.estimators time          a gradient, eager, and a step of the compiled loop
    python -m benchmarks.estimators table         benchmarks/results/estimators.md of both

The programs: a Bernoulli VAE of 8 bits on 100 binarised digits; a mixture of three normals, 200 rows; a hidden Markov
model of three states, 40 sequences of 20 steps; a factor model of 4 bits, 200 rows of 8 columns. States are one-hot, so
that they can be relaxed. Each pair is trained first, by DisARM where its latents are bits, else by NVIL; the point is
the same for all estimators. What has networks or temperatures of its own trains them for `OWN_STEPS` steps from there,
at a hundredth of the learning rate, and is then measured at the point itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

import pyrolvm
from benchmarks.machine import describe
from pyrolvm.data import load_dataset
from pyrolvm.diagnostics import gradient_variance
from pyrolvm.errors import PyrolvmError
from pyrolvm.inference.objectives import NVIL, REBAR, RELAX

RESULTS = Path(__file__).parent / "results" / "estimators.json"
PROGRAMS = ["Bernoulli VAE", "mixture", "hidden Markov model", "factor model"]
SUMMED = {"enumerate": "parallel"}
STEPS, OWN_STEPS, DRAWS, RATE = 1000, 300, 200, 0.01
TIMED_STEPS = 400
ESTIMATORS: dict[str, Callable[[], Any]] = {
    "reinforce": lambda: "reinforce",
    "tracegraph": lambda: "tracegraph",
    "nvil": lambda: NVIL(normalise=False),
    "vimco": lambda: "vimco",
    "muprop": lambda: "muprop",
    "disarm": lambda: "disarm",
    "rebar": REBAR,
    "relax": RELAX,
    "concrete": lambda: "concrete",
    "concrete, straight-through": lambda: ("concrete", {"straight_through": True}),
}


class Case(NamedTuple):
    """A program: model and guide as `fit` takes them, and the same with everything summed out."""

    name: str
    model: Any
    guide: Any
    x: Tensor
    trained_by: str
    summed: tuple[Any, Any]


def nothing(x: Tensor) -> None:
    """Nothing is left for the guide."""


def normals(x: Tensor) -> tuple[Tensor, Tensor]:
    """(means, move): the parameters that mixture and chain share."""
    means = pyro.param("means", torch.tensor([-1.5, 0.3, 1.5]))
    start = (0.6 * torch.eye(3) + 0.4 / 3).to(x)
    return means, pyro.param("move", start, constraint=constraints.simplex)


def mixture(x: Tensor) -> None:
    """k ~ w, x | k ~ N(means_k, 0.7^2)."""
    weights = pyro.param("weights", torch.full((3,), 1 / 3), constraint=constraints.simplex)
    means = pyro.param("means", torch.tensor([-1.5, 0.3, 1.5]))
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.OneHotCategorical(weights), infer=SUMMED)
        pyro.sample("x", dist.Normal(k @ means, 0.7), obs=x)


def of_mixture(x: Tensor) -> None:
    """q(k | x), logits linear in x."""
    slope, shift = pyro.param("slope", torch.tensor([-1.0, 0.0, 1.0])), pyro.param("shift", torch.zeros(3))
    with pyro.plate("rows", len(x)):
        pyro.sample("k", dist.OneHotCategorical(logits=x.unsqueeze(-1) * slope + shift))


def chain(x: Tensor) -> None:
    """k_t ~ move[k_(t-1)], x_t | k_t ~ N(means[k_t], 0.7^2)."""
    means, move = normals(x)
    with pyro.plate("rows", len(x)):
        k = None
        for t in pyro.markov(range(x.shape[1])):
            probs = torch.full((3,), 1 / 3) if k is None else k @ move
            k = pyro.sample(f"k_{t}", dist.OneHotCategorical(probs), infer=SUMMED)
            pyro.sample(f"x_{t}", dist.Normal(k @ means, 0.7), obs=x[:, t])


def of_chain(x: Tensor) -> None:
    """q(k_t | x_t), each step by itself."""
    slope, shift = pyro.param("slope", torch.tensor([-1.0, 0.0, 1.0])), pyro.param("shift", torch.zeros(3))
    with pyro.plate("rows", len(x)):
        for t in range(x.shape[1]):
            logits = x[:, t].unsqueeze(-1) * slope + shift
            pyro.sample(f"k_{t}", dist.OneHotCategorical(logits=logits))


def factors(x: Tensor) -> None:
    """b_i ~ Bernoulli(0.3), x | b ~ N(sum_i b_i loadings_i, I)."""
    loadings = pyro.param("loadings", torch.eye(4).repeat(1, 2))
    with pyro.plate("rows", len(x)):
        bits = [pyro.sample(f"b_{i}", dist.Bernoulli(0.3), infer=SUMMED) for i in range(4)]
        loc = sum(b.unsqueeze(-1) * loadings[i] for i, b in enumerate(bits))
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def of_factors(x: Tensor) -> None:
    """q(b_i | x), logits linear in x."""
    weights = pyro.param("weights", torch.eye(4).repeat(1, 2).T.clone())
    logits = x @ weights + pyro.param("shift", -2 * torch.ones(4))
    with pyro.plate("rows", len(x)):
        for i in range(4):
            pyro.sample(f"b_{i}", dist.Bernoulli(logits=logits[:, i]))


def simulated(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Data of mixture, chain and factor model."""

    def states(rows: int) -> Tensor:
        return torch.randint(3, (rows,), generator=generator)

    rows = 2.0 * (states(200) - 1) + 0.7 * torch.randn(200, generator=generator)
    k = [states(40)]
    for _ in range(19):
        stays = torch.rand(40, generator=generator) < 0.8
        k.append(torch.where(stays, k[-1], states(40)))
    sequences = 2.0 * (torch.stack(k, 1) - 1) + 0.7 * torch.randn(40, 20, generator=generator)
    bits = (torch.rand(200, 4, generator=generator) < 0.3).float()
    columns = bits @ (1.5 * torch.eye(4).repeat(1, 2)) + torch.randn(200, 8, generator=generator)
    return rows, sequences, columns


def cases() -> Iterator[Case]:
    """The four programs."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    rows, sequences, columns = simulated(generator)
    images = torch.from_numpy(load_dataset("digits").binarise()[0].values[:100]).float()
    net = pyrolvm.BernoulliVAE(64, 8)

    def exactly(x: Tensor) -> None:  # log p(x) itself: the sum over all settings of the 8 bits
        with pyrolvm.data_plate(x):
            pyro.module("net", net)
            pyro.factor("x", net.log_marginal(x))

    yield Case("Bernoulli VAE", net, None, images, "disarm", (exactly, nothing))
    yield Case("mixture", mixture, of_mixture, rows, "nvil", (mixture, nothing))
    yield Case("hidden Markov model", chain, of_chain, sequences, "nvil", (chain, nothing))
    yield Case("factor model", factors, of_factors, columns, "disarm", (factors, nothing))


def trained(case: Case) -> Any:
    """The pair at the point where all are measured."""
    torch.manual_seed(0)
    return pyrolvm.fit(
        case.model, case.x, guide=case.guide, objective=case.trained_by, num_steps=STEPS, learning_rate=RATE,
        progress=False,
    )  # fmt: skip


def measured(case: Case, objective: Any, fitted: Any) -> dict[str, Any]:
    """Variance of the gradient in the parameters of guide and model, with 95 % intervals."""
    if hasattr(objective, "modules") and objective.modules():
        source = copy.deepcopy(fitted.model) if case.guide is None else case.model
        torch.manual_seed(0)
        pyrolvm.fit(
            source, case.x, guide=case.guide, objective=objective, num_steps=OWN_STEPS, init=fitted,
            learning_rate=RATE / 100, progress=False, engine="eager",
        )  # fmt: skip
    table = gradient_variance(fitted, objective, case.x, num_samples=DRAWS, progress=False)
    return {
        row["group"]: {k: row[k] for k in ("variance", "variance_low", "variance_high", "snr", "bound")}
        for _, row in table.iterrows()
    }


def timed(model: Any, guide: Any, x: Tensor, objective: Any) -> dict[str, Any]:
    """Seconds of one eager gradient, and of a step of the compiled loop: medians."""
    options: dict[str, Any] = {"num_steps": TIMED_STEPS, "learning_rate": 1e-4, "progress": False}
    torch.manual_seed(0)
    fitted = pyrolvm.fit(model, x, guide=guide, objective=objective, engine="compiled", **options)
    seconds = fitted.history["seconds"].to_numpy()
    torch.manual_seed(0)
    once = pyrolvm.fit(
        model, x, guide=guide, objective=objective, engine="eager", **(options | {"num_steps": 40})
    )
    eager = once.history["seconds"].diff().median()
    return {
        "compiled": (seconds[-1] - seconds[len(seconds) // 2]) / (len(seconds) - 1 - len(seconds) // 2),
        "eager": eager,
    }


def each(
    part: Callable[[Case, str, Callable[[], Any]], dict[str, Any]], kept: dict[str, Any], programs: list[str]
) -> None:
    """Every estimator on every program; what refuses a program is kept as its sentence."""
    for case in cases():
        for name, make in {"enumerate": lambda: None, **ESTIMATORS}.items():
            if case.name not in programs:
                continue
            row = kept.setdefault(f"{case.name}/{name}", {})
            start = time.perf_counter()
            try:
                row |= part(case, name, make)
            except PyrolvmError as error:
                row["refused"] = str(error)
            shown = row.get("refused", row.get("guide", row.get("all")))
            print(f"{case.name}, {name}: {time.perf_counter() - start:.1f} s, {shown}", flush=True)
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


def variances(kept: dict[str, Any], programs: list[str]) -> None:
    """The part "variance"."""
    points: dict[str, Any] = {}

    def part(case: Case, name: str, make: Callable[[], Any]) -> dict[str, Any]:
        if name == "enumerate":
            points[case.name] = trained(case)
            model, guide = case.summed
            table = gradient_variance(model, None, case.x, guide=guide, num_samples=3, progress=False)
            assert table["variance"].max() < 1e-9  # nothing is drawn
            return {"model": {"variance": 0.0}}
        return measured(case, make(), points[case.name])

    each(part, kept, programs)


def times(kept: dict[str, Any], programs: list[str]) -> None:
    """The part "time"."""

    def part(case: Case, name: str, make: Callable[[], Any]) -> dict[str, Any]:
        if "refused" in kept.get(f"{case.name}/{name}", {}):
            return {}
        summed = name == "enumerate"
        model, guide = case.summed if summed else (case.model, case.guide)
        return timed(model, guide, case.x, make())

    each(part, kept, programs)


def table(kept: dict[str, Any], programs: list[str]) -> None:
    """benchmarks/results/estimators.md."""
    lines = [
        "# Estimators: variance and time",
        "",
        "`python -m benchmarks.estimators`: see there for the programs.",
        "",
    ]
    lines += [
        "Variance: trace of the covariance of one gradient of minus the bound, nats per datum squared, with its"
    ]
    lines += [
        f"95 % interval, {DRAWS} draws, at one point of each program, where training by an unbiased estimator has"
    ]
    lines += [
        f"ended after {STEPS} steps. Mean: norm of the mean gradient in the guide's parameters. ms: a step, eager"
    ]
    lines += ["and compiled, on one thread and a machine that nobody else used.", ""]
    head = ("estimator", "variance, guide", "variance, model", "mean, guide", "ms, eager", "ms, compiled")
    for title in programs:
        lines += [f"## {title}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        rows = {k.split("/")[1]: r for k, r in kept.items() if k.startswith(f"{title}/")}
        for name, row in rows.items():
            if "refused" not in row:
                lines.append(f"| {name} | {' | '.join(_cells(row))} |")
        refusing = [name for name, row in rows.items() if "refused" in row]
        if refusing:
            lines += ["", f"Refuse it: {', '.join(refusing)}. {rows[refusing[0]]['refused']}."]
        lines += [""]
    lines += ["## Measured on", "", *(f"- {k}: {v}" for k, v in describe(torch.device("cpu")).items())]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _cells(row: dict[str, Any]) -> list[str]:
    guide = row.get("guide")
    mean = "-" if guide is None else f"{guide['snr'] * guide['variance'] ** 0.5:.2g}"
    times = [f"{1e3 * row[k]:.3g}" if k in row else "-" for k in ("eager", "compiled")]
    return [_spread(guide), _spread(row.get("model")), mean, *times]


def _spread(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    if not found["variance"]:
        return "0"
    return f"{found['variance']:.3g} ({found['variance_low']:.3g} to {found['variance_high']:.3g})"


def main() -> None:
    """One part, kept in benchmarks/results/estimators.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["variance", "time", "table"])
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    warnings.simplefilter("ignore")
    options = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    {"variance": variances, "time": times, "table": table}[options.part](kept, options.programs)


if __name__ == "__main__":
    main()
