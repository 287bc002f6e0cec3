"""Means of weights that come in chunks of draws: O(rows) memory, whatever the number of draws."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolvm.inference.log_joint.psis import khat_of_largest, tail_length


@dataclass
class StreamingLogMeanExp:
    """log of a mean of exponentials over draws that come in chunks.

    Attributes
    ----------
    log_sum, log_squares : tensor [cells], float64
        log sum w and log sum w^2.
    count : int
        Draws so far.
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
        """log mean exp: [cells], nats."""
        return self.log_sum - math.log(self.count)

    @property
    def effective_sample_size(self) -> Tensor:
        """(sum w)^2 / sum w^2: [cells], between 1 and the number of draws."""
        return (2 * self.log_sum - self.log_squares).exp()

    @property
    def standard_error(self) -> Tensor:
        """Of `value` by the delta method, the relative standard error of the mean weight: [cells], nats."""
        relative = (self.count / self.effective_sample_size - 1.0).clamp_min(0.0)
        return (relative / max(self.count - 1, 1)).sqrt()


@dataclass
class StreamingBound:
    """The K-sample bound L_K: the mean over groups of K draws of each group's log mean exp.

    Attributes
    ----------
    group_size : int
        K.
    group : StreamingLogMeanExp
        The group that is not full yet.
    mean, squares : tensor [cells], float64
        Mean, and sum of squared deviations from it, over the full groups, in nats.
    count : int
        Full groups.
    """

    group_size: int
    group: StreamingLogMeanExp
    mean: Tensor
    squares: Tensor
    count: int = 0

    @classmethod
    def empty(cls, like: Tensor, group_size: int) -> StreamingBound:
        """Nothing seen yet, for as many cells as `like` [draws, cells]."""
        zeros = torch.zeros_like(like[0], dtype=torch.float64)
        return cls(group_size, StreamingLogMeanExp.empty(like), zeros, zeros.clone())

    def add(self, log_weight: Tensor) -> None:
        """Add draws: log_weight [draws, cells]."""
        K = self.group_size
        if self.group.count:
            room = K - self.group.count
            self.group.add(log_weight[:room])
            log_weight = log_weight[room:]
            if self.group.count == K:
                self._merge(self.group.value.unsqueeze(0))
                self.group = StreamingLogMeanExp.empty(self.mean.unsqueeze(0))
        whole = len(log_weight) // K
        if whole:
            groups = log_weight[: whole * K].double().reshape(whole, K, -1)
            self._merge(groups.logsumexp(1) - math.log(K))
        if len(log_weight) % K:
            self.group.add(log_weight[whole * K :])

    def _merge(self, values: Tensor) -> None:
        """Add the log mean exp [groups, cells] of full groups (Chan et al. 1979)."""
        total = self.count + len(values)
        mean = values.mean(0)
        step = mean - self.mean
        self.squares = self.squares + (values - mean).square().sum(0)
        self.squares = self.squares + step.square() * (self.count * len(values) / total)
        self.mean = self.mean + step * (len(values) / total)
        self.count = total

    @property
    def value(self) -> Tensor:
        """L_K: [cells], nats."""
        return self.mean

    @property
    def standard_error(self) -> Tensor:
        """Of `value`: [cells], nats; NaN for a single group."""
        if self.count < 2:
            return torch.full_like(self.mean, math.nan)
        return (self.squares / (self.count * (self.count - 1))).sqrt()


@dataclass
class LargestWeights:
    """The `size` largest of the log-weights seen so far: [at most size, cells]."""

    size: int
    values: Tensor | None = None

    def add(self, log_weight: Tensor) -> None:
        """Add draws: log_weight [draws, cells]."""
        seen = log_weight if self.values is None else torch.cat([self.values, log_weight])
        self.values = seen.topk(self.size, dim=0, sorted=False).values if len(seen) > self.size else seen

    def k_hat(self, num_samples: int) -> Tensor:
        """k-hat of the `num_samples` draws so far: [cells]."""
        assert self.values is not None  # draws were added
        return khat_of_largest(self.values, tail_length(num_samples))
