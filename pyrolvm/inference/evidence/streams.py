"""Means of weights that come in chunks of draws: O(rows) memory, whatever the number of draws."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class StreamingLogMeanExp:
    """log of a mean of exponentials over draws that come in chunks.

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


@dataclass
class StreamingBound:
    """The mean over groups of K draws of each group's log mean exp: the K-sample bound L_K.

    `mean` and `squares` (of the distances from it) are Welford's, over the `count` groups that are full.
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
        while len(log_weight):
            room = self.group_size - self.group.count
            self.group.add(log_weight[:room])
            log_weight = log_weight[room:]
            if self.group.count == self.group_size:
                self._close()

    def _close(self) -> None:
        value, self.group = self.group.value, StreamingLogMeanExp.empty(self.mean.unsqueeze(0))
        self.count += 1
        step = value - self.mean
        self.mean = self.mean + step / self.count
        self.squares = self.squares + step * (value - self.mean)

    @property
    def value(self) -> Tensor:
        """L_K: [cells]."""
        return self.mean

    @property
    def standard_error(self) -> Tensor:
        """Of `value`, [cells]; NaN of a single group."""
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
