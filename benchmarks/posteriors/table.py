"""One way of fitting on one posterior: its errors, its time, and what it said of itself."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

from benchmarks.posteriors.posterior import Posterior
from benchmarks.posteriors.programs import POSTERIORS
from benchmarks.posteriors.reference import moments
from pyrolvm.errors import PyrolvmError
from pyrolvm.inference.log_joint import declined_or_start, judge, solve
from pyrolvm.inference.log_joint.families import Family, Gaussian
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.response import respond
from pyrolvm.inference.posterior.pathfinder import pathfinder
from pyrolvm.inference.posterior.suiting import suited
from pyrolvm.inference.program.checks import inspect_program
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import Program

FAMILIES = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "AutoDiagonalNormal": AutoDiagonalNormal,
}
MEAN, RATIO = 0.1, (0.9, 1 / 0.9)
"""Right: means within 0.1 reference sd, sds within 10%."""
WRONG_MEAN, WRONG_RATIO = 0.25, (0.75, 1.33)
"""Wrong enough that silence counts against a method: what the verdict is to notice."""
DRAWS = 20_000


def pair_of(posterior: Posterior, guide: object, seed: int = 0) -> Pair:
    """The program on its data, with a guide."""
    program = Program(posterior.model, guide, dtype=torch.float64)
    batch = suited(program, posterior.data)
    program.initialise(batch, seed)
    return Pair(program, inspect_program(program, batch), batch)


@dataclass(frozen=True)
class Outcome:
    """What a method gave.

    Attributes
    ----------
    error : float
        The largest difference of a mean, in reference sds.
    least, most : float
        Ratios of sds to the reference's.
    said : str
        "right", "flagged" or "" of a method that says nothing.
    """

    error: float
    least: float
    most: float
    seconds: float
    said: str
    sentence: str = ""

    @property
    def right(self) -> bool:
        return self.error <= MEAN and self.least >= RATIO[0] and self.most <= RATIO[1]

    @property
    def wrong(self) -> bool:
        return not (self.error <= WRONG_MEAN and self.least >= WRONG_RATIO[0] and self.most <= WRONG_RATIO[1])

    @property
    def silent(self) -> bool:
        """Wrong, and nothing said."""
        return self.wrong and self.said != "flagged"

    @property
    def cell(self) -> str:
        word = "wrong" if self.wrong else "right" if self.right else "near"
        said = f", {self.said}" if self.said else ""
        return f"{word}{said}: {self.error:.2f} [{self.least:.2f}, {self.most:.2f}] {self.seconds:.1f} s"


def outcome(name: str, values: Tensor, seconds: float, said: str, sentence: str = "") -> Outcome:
    """From draws [draws, entries] of every entry of every latent."""
    return outcome_of_moments(name, values.mean(0), values.std(0), seconds, said, sentence)


def outcome_of_moments(
    name: str, mean: Tensor, sd: Tensor, seconds: float, said: str, sentence: str = ""
) -> Outcome:
    """From the mean and sd of every entry of every latent."""
    wanted, unit = moments(name)
    varying = unit > 1e-9
    error = ((mean - wanted).abs() / unit)[varying].nan_to_num(torch.inf)
    ratio = (sd / unit)[varying].nan_to_num(torch.inf)
    return Outcome(float(error.max()), float(ratio.min()), float(ratio.max()), seconds, said, sentence)


def _drawn(log_joint: LogJoint, q: Gaussian) -> Tensor:
    z = torch.randn(DRAWS, q.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return log_joint.scalars(q.at(z))[0].detach()


def fitted(name: str, family: str, seed: int = 0) -> dict[str, Outcome]:
    """A family with nothing said: the fit, and for a mean field its linear response."""
    began = time.perf_counter()
    pair = pair_of(POSTERIORS[name], FAMILIES[family], seed)
    start = declined_or_start(pair, seed)
    if isinstance(start, str):
        raise PyrolvmError(start)
    solution = solve(pair, start, seed)
    verdict = judge(pair, solution, seed)
    seconds = time.perf_counter() - began
    log_joint, q = start.log_joint, Family(pair.program, start.log_joint).read()
    said = "right" if verdict.converged else "flagged"
    found = {family: outcome(name, _drawn(log_joint, q), seconds, said, verdict.sentence)}
    if family == "AutoNormal":
        response = respond(solution.optimum, seed)
        values = _drawn(log_joint, response.q if response.kept else q)
        # what linear response puts right is no longer wrong; where it is refused, the guide's verdict stands
        kept = "kept" if response.kept else said
        found["linear response"] = outcome(name, values, time.perf_counter() - began, kept)
    return found


def paths(name: str, seed: int = 0) -> Outcome:
    """Multi-path Pathfinder."""
    posterior, began = POSTERIORS[name], time.perf_counter()
    found = pathfinder(posterior.model, posterior.data, 4000, seed=seed)
    values = torch.cat([v.reshape(4000, -1) for v in found.draws.values()], 1)
    return outcome(name, values, time.perf_counter() - began, "right" if found.reliable else "flagged")


def svi(name: str, family: str, steps: int, learning_rate: float, seed: int = 0) -> Outcome:
    """Pyro's own SVI with its usual settings, which says nothing of itself."""
    posterior, began = POSTERIORS[name], time.perf_counter()
    torch.set_default_dtype(torch.float64)
    try:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = FAMILIES[family](posterior.model)
        run = SVI(posterior.model, guide, pyro.optim.Adam({"lr": learning_rate}), Trace_ELBO())
        for _ in range(steps):
            run.step(*posterior.data)
        seconds = time.perf_counter() - began
        with torch.no_grad(), pyro.plate("draws", DRAWS, dim=-3):
            drawn = guide(*posterior.data)
        values = torch.cat([drawn[n].reshape(DRAWS, -1) for n in drawn], 1)
    finally:
        torch.set_default_dtype(torch.float32)
    return outcome(name, values, seconds, "")
