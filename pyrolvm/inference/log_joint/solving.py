"""A Gaussian guide at the optimum of its bound on fixed draws, from every mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyrolvm.inference.log_joint.families import Family
from pyrolvm.inference.log_joint.fixed import Optimum, maximise
from pyrolvm.inference.log_joint.start import Start, find_start
from pyrolvm.inference.program.pair import Pair
from pyrolvm.seeds import Purpose, derived_seed


@dataclass(frozen=True)
class Solution:
    """An optimum of the bound on fixed draws; it stands in the guide's parameters.

    Attributes
    ----------
    start : Start
    optimum : Optimum
        Of the mode with the best bound.
    """

    start: Start
    optimum: Optimum

    @property
    def history(self) -> list[dict[str, float]]:
        """A row an iteration: step, elbo (nats in total, on the fixed draws), gradient_norm, num_draws, seconds."""
        return self.optimum.history

    @property
    def converged(self) -> bool:
        """Whether the gradient is flat and doubling the draws moves nothing by more than a tenth of an sd."""
        return self.optimum.converged

    @property
    def numbers(self) -> dict[str, float]:
        """gradient_norm, fresh_gradient, moved and monte_carlo_error (sds), num_draws, elbo (nats in total), modes."""
        o = self.optimum
        return {
            "elbo": o.elbo,
            "gradient_norm": o.gradient,
            "fresh_gradient": o.fresh_gradient,
            "moved": o.moved,
            "monte_carlo_error": o.monte_carlo_error,
            "num_draws": float(len(o.normals)),
            "modes": float(self.start.modes),
        }


@torch.no_grad()
def solve(pair: Pair, start: Start | None = None, seed: int = 0, num_draws: int | None = None) -> Solution:
    """Maximise the bound on fixed draws from every mode, and leave the best in the guide's parameters.

    Parameters
    ----------
    pair : Pair
        On the whole data, not `declined`.
    start : Start, optional
        Found by default.
    num_draws : int, optional
        Their number; by default they are doubled until the optimum stays.

    Raises
    ------
    ProgramError, DivergenceError
        As `find_start`.
    """
    start = start or find_start(pair, seed)
    family = Family(pair.program, start.log_joint)
    noise = derived_seed(seed, Purpose.NOISE, 1) % 2**31
    found = [maximise(start.log_joint, p, family.kind, family.rank, noise, num_draws) for p in start.places]
    best = max(found, key=lambda optimum: optimum.elbo)
    family.write(best.q)
    return Solution(start, best)
