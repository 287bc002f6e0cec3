"""VIMCO: the importance-weighted bound of discrete latents, with a baseline from the other draws of the datum.

    L_K = log (1/K) sum_k w_k,      w_k = p(x, b_k) / q(b_k | x)
    dL_K = sum_k (L_K - L_{-k}) d log q(b_k | x) + sum_k v_k d log w_k,        v_k = w_k / sum_j w_j

L_{-k} is L_K with log w_k replaced by the mean of the other log w_j, which knows nothing of b_k: the estimate is
unbiased.

A. Mnih and D. J. Rezende, "Variational inference for Monte Carlo objectives", ICML 2016.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyrolvm.errors import count
from pyrolvm.inference.objectives.base import Estimate, Objective
from pyrolvm.inference.objectives.discrete import drawn, score
from pyrolvm.inference.objectives.several import Several, multi_sample
from pyrolvm.inference.program.pair import Pair


class VIMCO(Objective):
    """L_K of each datum, for any discrete latents; reparameterised sites beside them have their path gradient.

    Parameters
    ----------
    num_particles : int
        K, the draws of each datum, at least 2.
    """

    def __init__(self, num_particles: int = 5) -> None:
        super().__init__()
        self.num_particles: int = count("num_particles", num_particles, 2)
        self.several = Several(self.num_particles)

    def estimate(self, pair: Pair, controls: Any) -> Estimate:
        """L_K, and its surrogate."""
        runs = [drawn(pair, draws) for draws in self.several.runs(pair)]
        log_weights = [r.densities.log_weight for r in runs]  # [K, cells] together
        bound = self.several.bound(log_weights)  # [cells]
        signal = bound.detach() - left_out(torch.cat(log_weights).detach())  # [K, cells]
        gain = bound + (signal * torch.cat([score(r, "VIMCO") for r in runs])).sum(0)
        return multi_sample(runs, bound, gain)


def left_out(log_weight: Tensor) -> Tensor:
    """L_{-k} for each k: [K, cells] from log w [K, cells]."""
    K = len(log_weight)
    others = (log_weight.sum(0) - log_weight) / (K - 1)  # [K, cells]
    own = torch.eye(K, dtype=torch.bool, device=log_weight.device).unsqueeze(-1)  # [K, K, 1]
    replaced = torch.where(own, others.unsqueeze(1), log_weight)  # row k: log w with entry k replaced
    return replaced.logsumexp(1) - math.log(K)
