"""Several draws of each datum: how they are taken, and the bound L_K of their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrolvm.inference.objectives.base import Estimate
from pyrolvm.inference.objectives.discrete import Run
from pyrolvm.inference.program.pair import Pair


class Several:
    """K draws of each datum: under a plate of their own, or one by one where the program does not stand that.

    Which is tried out once for a program.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._together: dict[Any, bool] = {}

    def runs(self, pair: Pair) -> list[int | None]:
        """What `pair.draw` takes, run by run."""
        key = (pair.program.model, pair.program.guide)
        if key not in self._together:
            self._together[key] = Pair(pair.program, pair.structure, pair.batch, "predict").vectorized
        return [self.number] if self._together[key] else [None] * self.number

    def bound(self, log_weights: Sequence[Tensor]) -> Tensor:
        """L_K = log (1/K) sum_k w_k of each cell, from log w of each run [draws, cells]."""
        return torch.cat(list(log_weights)).logsumexp(0) - math.log(self.number)


def multi_sample(runs: Sequence[Run], bound: Tensor, gain: Tensor, **terms: Tensor) -> Estimate:
    """A bound of several draws [cells] that is reported, and the `gain` [cells] whose gradient is taken."""
    scale = runs[0].densities.scale
    log_likelihood = torch.cat([r.densities.log_likelihood for r in runs]).mean(0)
    kl = torch.cat([r.densities.log_guide - r.densities.log_prior for r in runs]).mean(0)
    total = [(scale * term).sum() for term in (bound, gain, log_likelihood, kl)]
    named = {"log_likelihood": total[2], "kl": total[3]} | terms
    return Estimate(total[0].detach(), -total[1], {name: term.detach() for name, term in named.items()})
