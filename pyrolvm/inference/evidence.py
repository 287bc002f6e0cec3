"""Estimators of log p(x), one value per datum, in nats.

    prior       log (1/S) sum_s p(x | z_s),                     z_s ~ p(z)
    importance  log (1/S) sum_s p(x, z_s) / q(z_s | x),         z_s ~ q(z | x)
    iwae        the mean over S/K groups of the K-sample bound L_K (Burda et al. 2016), K = num_particles
    exact       the model's own `log_marginal(x)`

Both estimates underestimate log p(x) on average (Jensen), the less the more draws. Where a program has
global latents these are drawn from the guide, so that the value is the log posterior predictive
density of each datum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrolvm.data.arrays import Batch
from pyrolvm.errors import SettingError
from pyrolvm.inference.draws import BUDGET, posterior_draws, prior_draws, refuse_enumeration
from pyrolvm.inference.program import Program
from pyrolvm.inference.structure import Structure

METHODS = ("exact", "importance", "iwae", "prior")


@dataclass
class StreamingLogMeanExp:
    """log of a mean of exponentials over draws that come in chunks: O(rows) memory.

    Also the sum of squares, for the standard error and the effective sample size of the weights.
    """

    log_sum: Tensor
    log_squares: Tensor
    count: int = 0

    @classmethod
    def empty(cls, like: Tensor) -> StreamingLogMeanExp:
        """Nothing seen yet, for as many cells as `like` [draws, cells]."""
        start = torch.full_like(like[0], -math.inf, dtype=torch.float64)
        return cls(start, start.clone())

    def add(self, log_weight: Tensor) -> None:
        """Add draws: log_weight [draws, cells]."""
        log_weight = log_weight.double()
        self.log_sum = torch.logaddexp(self.log_sum, log_weight.logsumexp(0))
        self.log_squares = torch.logaddexp(self.log_squares, (2 * log_weight).logsumexp(0))
        self.count += len(log_weight)

    @property
    def value(self) -> Tensor:
        """log mean exp: [cells]."""
        return self.log_sum - math.log(self.count)

    @property
    def effective_sample_size(self) -> Tensor:
        """(sum w)^2 / sum w^2: [cells], between 1 and the number of draws."""
        return (2 * self.log_sum - self.log_squares).exp()

    @property
    def standard_error(self) -> Tensor:
        """Of `value`, by the delta method: the relative standard error of the mean weight, [cells]."""
        relative = (self.count / self.effective_sample_size - 1.0).clamp_min(0.0)
        return (relative / max(self.count - 1, 1)).sqrt()


def estimate_log_evidence(
    program: Program,
    structure: Structure,
    batch: Batch,
    *,
    method: str,
    num_samples: int,
    num_particles: int | None = None,
    vectorized: bool,
    total: int,
) -> Tensor:
    """log p(x) per datum for one chunk of rows: [rows], float64. See the module's docstring."""
    refuse_enumeration(structure, f"method='{method}'")
    if structure.joint_guide and method != "prior":
        raise SettingError(
            f"the guide draws the latents of all data at once ('{structure.joint_guide}'), so there is no density "
            "per datum: use method='prior', or a guide that is independent over data such as AutoNormal"
        )
    draw = prior_draws if method == "prior" else posterior_draws
    group = _group_size(method, num_samples, num_particles)
    at_once = max(1, min(group, BUDGET // max(1, _numel(batch)))) if vectorized else 1
    groups = []
    for _ in range(num_samples // group):
        stream = None
        for first in range(0, group, at_once):
            count = min(at_once, group - first)
            draws = draw(program, structure, batch, count, vectorized=vectorized, total=total)
            weights = draws.log_likelihood if method == "prior" else draws.log_weight
            assert weights is not None
            stream = stream or StreamingLogMeanExp.empty(weights)
            stream.add(weights)
        assert stream is not None
        groups.append(stream.value)
    return torch.stack(groups).mean(0)


def _group_size(method: str, num_samples: int, num_particles: int | None) -> int:
    if num_samples < 1:
        raise SettingError(f"num_samples must be at least 1, not {num_samples}")
    if method != "iwae":
        return num_samples
    group = num_particles or min(50, num_samples)
    if num_samples % group:
        raise SettingError(f"num_samples={num_samples} must be a multiple of num_particles={group}")
    return group


def _numel(batch: Batch) -> int:
    return sum(t.numel() for _, t in batch.tensors())


def exact_log_evidence(model: Any, batch: Batch) -> Tensor:
    """The model's closed form: [rows]. Raises `SettingError` if it has none."""
    log_marginal = getattr(model, "log_marginal", None)
    if log_marginal is None:
        raise SettingError(
            f"{type(model).__name__} has no exact log p(x) (no method `log_marginal`): use "
            "method='importance' with num_samples=1000 or more"
        )
    return log_marginal(*batch.args, **batch.kwargs)
