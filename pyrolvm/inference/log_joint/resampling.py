"""Draws put right: Pareto-smoothed importance weights, and draws taken again by them.

The largest weights of S are replaced by the quantiles of the generalised Pareto distribution fitted to them (`psis`),
and no weight exceeds the largest raw one: Vehtari, Simpson, Gelman, Yao and Gabry (2024), JMLR 25(72).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolvm.inference.log_joint.psis import SHORTEST_TAIL, generalized_pareto_shape, pareto_khat, tail_length


@dataclass(frozen=True)
class Weights:
    """Smoothed weights of S draws.

    Attributes
    ----------
    normalised : tensor [S]
        They sum to 1.
    khat : float
        -inf if all weights are equal.
    """

    normalised: Tensor
    khat: float

    @property
    def effective_share(self) -> float:
        """Effective sample size over S: 1 / (S sum of squares)."""
        return float(1 / (self.normalised.square().sum() * len(self.normalised)))

    def mean(self, values: Tensor) -> Tensor:
        """Of values [S, ...]: [...]."""
        return torch.tensordot(self.normalised, values, 1)

    def sd(self, values: Tensor) -> Tensor:
        """Of values [S, ...]: [...]."""
        return self.mean((values - self.mean(values)).square()).sqrt()

    def resample(self, num_draws: int, generator: torch.Generator) -> Tensor:
        """Numbers of draws [num_draws], each as often as its weight wants, to within one (systematic resampling)."""
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        places = (torch.arange(num_draws, dtype=torch.float64) + offset) / num_draws
        chosen = torch.searchsorted(self.normalised.cumsum(0), places).clamp_max(len(self.normalised) - 1)
        return chosen[torch.randperm(num_draws, generator=generator)]


def smoothed(log_weight: Tensor) -> Weights:
    """The smoothed weights of log-weights [S] in nats; draws where the density ends weigh nothing."""
    log_weight = torch.nan_to_num(log_weight.detach().double(), nan=-math.inf, posinf=-math.inf)
    khat = float(pareto_khat(log_weight[:, None])[0])
    ordered, order = log_weight.sort()
    M = tail_length(len(log_weight))
    if math.isfinite(khat) and M >= SHORTEST_TAIL:
        ordered = torch.cat([ordered[:-M], _tail(ordered[-M - 1 :])])
    smooth = torch.empty_like(ordered)
    smooth[order] = ordered
    return Weights(smooth.softmax(0), khat)


def _tail(largest: Tensor) -> Tensor:
    """The expected order statistics [M] of the fitted tail, from the M + 1 largest log-weights, ascending."""
    top, cut = largest[-1], (largest[0] - largest[-1]).exp()
    excess = (largest[1:] - top).exp() - cut
    k = generalized_pareto_shape(excess[None])[0]
    # sigma by the mean of what the shape leaves: E[x] = sigma / (1 - k) has no meaning for k >= 1, the median has
    probabilities = (torch.arange(1, len(excess) + 1, dtype=torch.float64) - 0.5) / len(excess)
    unit = (
        torch.expm1(-k * torch.log1p(-probabilities)) / k
        if abs(float(k)) > 1e-6
        else -torch.log1p(-probabilities)
    )
    middle = len(excess) // 2
    sigma = excess[middle] / unit[middle]
    return (cut + sigma * unit).log().clamp_max(0.0) + top
