"""Likelihoods of counts: Poisson, negative binomial, and both with further zeros.

The decoder's first part is the logarithm of the mean. Densities are written in it, so that a mean which
underflows has one too. Above `LOG_LIMIT` the mean grows linearly in the decoder's output,

    mean = exp(out),                                  out <= LOG_LIMIT
    mean = exp(LOG_LIMIT) (1 + out - LOG_LIMIT),      beyond,

so that a step too far neither overflows nor loses its gradient.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyrolvm.models.likelihoods.base import Likelihood, first_outside, positive_in_words, refused, shares

LOG_LIMIT = 20.0
"""exp(LOG_LIMIT) is 4.9e8."""
STIRLING = 100.0
"""From here on Stirling's series to 1 / y^3 is exact in float64."""


class Poisson(Likelihood):
    """x_d ~ Poisson(exp(out_d)), for counts."""

    def elements(self, out: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        """Batch [..., data_dim]."""
        return LogPoisson(log_mean(out))

    def check(self, x: Tensor) -> None:
        """Whole numbers from 0."""
        check_counts(x, type(self).__name__)

    def start(self, x: Tensor) -> Tensor:
        """The logarithms of the columns' means, half a count added."""
        total, number = shares(x)
        return ((total + 0.5) / number.clamp(min=1)).log()


class NegativeBinomial(Poisson):
    """x_d ~ Poisson(g exp(out_d)), g ~ Gamma(r_d, r_d), for counts that vary more than Poisson's.

    The mean is exp(out_d), the variance mean + mean^2 / r_d.

    Parameters
    ----------
    data_dim : int
        Features of a row.
    concentration : float, optional
        r, the same for all features; by default learned, one number for each.
    """

    setting = "the concentration r"
    fixed_concentration: Tensor | None

    def __init__(self, data_dim: int, concentration: float | str | None = None) -> None:
        super().__init__(data_dim)
        if concentration is None:
            self.log_concentration = nn.Parameter(torch.zeros(data_dim))
        fixed = (
            None if concentration is None else torch.tensor(positive_in_words("concentration", concentration))
        )
        self.register_buffer("fixed_concentration", fixed)

    @property
    def concentration(self) -> Tensor:
        """r, [data_dim], or [] if fixed."""
        if self.fixed_concentration is not None:
            return self.fixed_concentration
        return log_mean(self.log_concentration).exp()

    def elements(self, out: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        """Batch [..., data_dim]."""
        return GammaPoisson(self.concentration, log_mean(out) - self.concentration.log())

    def start(self, x: Tensor) -> Tensor:
        """As Poisson's; r at its estimate by moments, between 0.1 and 100."""
        _, number = shares(x)
        mean = x.nanmean(0)
        variance = (x - mean).square().nansum(0) / number.clamp(min=1)
        moments = mean.square() / (variance - mean).clamp(min=1e-6)
        if self.fixed_concentration is None:
            self.log_concentration.data.copy_(moments.nan_to_num(1.0).clamp(0.1, 100).log())
        return super().start(x)


class WithFurtherZeros(Likelihood):
    """x_d is 0 with probability sigmoid(gate_d), else as in the likelihood that it stands before."""

    parts = 2

    def elements(self, *parts: Tensor) -> dist.TorchDistribution:
        """Batch [..., data_dim]."""
        out, gate = parts
        return ZeroInflated(super().elements(out), gate_logits=gate)

    def start(self, x: Tensor) -> Tensor:
        """As without further zeros; these begin at a share of 0.1."""
        out: Any = super().start(x)
        return torch.cat([out, torch.full_like(out, 0.1).logit()])


class ZeroInflatedPoisson(WithFurtherZeros, Poisson):
    """`Poisson` with further zeros; `gate` is the decoder's second part."""


class ZeroInflatedNegativeBinomial(WithFurtherZeros, NegativeBinomial):
    """`NegativeBinomial` with further zeros; `gate` is the decoder's second part."""


class LogPoisson(dist.Poisson):
    """Poisson by the logarithm of its rate."""

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.exp(), validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """In nats, [...]; x log_rate - exp(log_rate) - log x!."""
        return value * self.log_rate - self.rate - (value + 1).lgamma()

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """To another batch shape."""
        new = self._get_checked_instance(LogPoisson, _instance)
        new.log_rate = self.log_rate.expand(batch_shape)
        return super().expand(batch_shape, new)


class GammaPoisson(dist.NegativeBinomial):
    """Negative binomial whose density keeps its digits as total_count grows towards Poisson."""

    def __init__(self, total_count: Tensor, logits: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(total_count, logits=logits, validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """In nats, [...]."""
        r, logits = self.total_count, self.logits
        power = r * logsigmoid(-logits) + value * logsigmoid(logits)
        return power + log_rising(r, value) - (value + 1).lgamma()

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """To another batch shape."""
        return super().expand(batch_shape, self._get_checked_instance(GammaPoisson, _instance))


class ZeroInflated(dist.ZeroInflatedDistribution):
    """Pyro's, with a probability of the gate that is not kept: once kept, densities would be computed from it."""

    @property
    def gate(self) -> Tensor:
        """The probability of a further zero."""
        return self.gate_logits.sigmoid()


def log_mean(out: Tensor) -> Tensor:
    """The logarithm of the mean that a decoder's output [...] stands for; see the head of this file."""
    return torch.where(out > LOG_LIMIT, LOG_LIMIT + (out - LOG_LIMIT).clamp(min=0).log1p(), out)


def log_rising(base: Tensor, by: Tensor) -> Tensor:
    """log Gamma(base + by) - log Gamma(base), broadcast, for base > 0 and by >= 0.

    Notes
    -----
    The difference of two numbers near base log base has no digits left for large ones. With Stirling's series S,

        = (base + by - 1/2) log1p(by / base) + by (log base - 1) + S(base + by) - S(base).
    """
    large = base.clamp(min=STIRLING)
    series = _stirling(large + by) - _stirling(large)
    difference = (large + by - 0.5) * (by / large).log1p() + by * (large.log() - 1) + series
    small = base.clamp(max=STIRLING)
    return torch.where(base < STIRLING, (small + by).lgamma() - small.lgamma(), difference)


def _stirling(y: Tensor) -> Tensor:
    return 1 / (12 * y) - 1 / (360 * y**3)


def check_counts(x: Tensor, likelihood: str) -> None:
    """Raise `DataError` naming the first entry of x [rows, columns] that is no count (nor missing)."""
    found = first_outside(x, lambda part: (part >= 0) & (part == part.round()))
    if found is not None:
        negative = (
            "counts are not negative" if found[2] < 0 else "pass the counts as they were, before any scaling"
        )
        raise refused(
            found,
            f"a {likelihood} likelihood needs whole numbers from 0",
            f'{negative}, or say likelihood="gaussian"',
        )
