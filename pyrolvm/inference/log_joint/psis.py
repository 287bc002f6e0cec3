"""k-hat: how heavy the tail of a datum's importance weights is (Pareto-smoothed importance sampling).

The M largest of S weights, minus the next one, are modelled as draws from a generalised Pareto distribution

    p(w) = (1 / sigma) (1 + k w / sigma)^(-1 / k - 1),    M = ceil(min(S / 5, 3 sqrt(S))),

whose shape k gives the number of moments of the weights, 1 / k. Below 1/2 the variance is finite and the central
limit theorem holds; up to `khat_threshold(S)` the estimate is reliable at S draws; above it the
estimate, its standard error and its effective sample size are not.

For p = Normal(0, 1) and a too narrow q = Normal(0, s^2), s < 1, the weight is w(z) ~ exp(z^2 (1/s^2 - 1) / 2)
and P_q(w > t) ~ P(|z| > a), a^2 = 2 log t / (1/s^2 - 1), falls as exp(-a^2 / (2 s^2)) = t^(-1 / (1 - s^2)):
k = 1 - s^2. A q at least as wide as p has bounded weights, k <= 0.

Vehtari, Simpson, Gelman, Yao, Gabry (2024), "Pareto smoothed importance sampling", JMLR 25(72).
Zhang and Stephens (2009), "A new and efficient estimation method for the generalized Pareto distribution",
Technometrics 51, for the fit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHORTEST_TAIL = 5
MEMORY = 2**20  # numbers in memory at once

SAME = 1e-3
"""Log-weights within this range, in nats, count as equal: the guide is then exact for every purpose."""


def tail_length(num_samples: int) -> int:
    """M = ceil(min(S / 5, 3 sqrt(S))), the number of weights in the tail."""
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def khat_threshold(num_samples: int) -> float:
    """min(1 - 1 / log10(S), 0.7): up to this k-hat, S draws suffice (Vehtari et al. 2024, section 3.2.4)."""
    return min(1 - 1 / math.log10(max(num_samples, 2)), 0.7)


def pareto_khat(log_weight: Tensor) -> Tensor:
    """k-hat of each datum.

    Parameters
    ----------
    log_weight : tensor [draws, rows]
        All log-weights, in nats.

    Returns
    -------
    tensor [rows], float64
        NaN with fewer than 21 draws, whose tail has fewer than five; -inf if the weights are equal up to rounding,
        as those of an exact guide are. Of discrete latents many weights may be equal: where they fill a quarter of
        the tail the shape is of those above them, and of fewer than five it is inf if they outweigh the others, else
        -inf.
    """
    M = tail_length(len(log_weight))
    return khat_of_largest(log_weight.topk(min(M + 1, len(log_weight)), dim=0).values, M)


def khat_of_largest(largest: Tensor, length: int) -> Tensor:
    """k-hat from the M + 1 largest log-weights [M + 1, rows] in any order, M = `length`: [rows], float64."""
    if length < SHORTEST_TAIL or len(largest) <= length:
        return torch.full_like(largest[0], math.nan, dtype=torch.float64)
    ordered = largest.double().sort(dim=0).values.T  # [rows, M + 1]
    weights = (ordered - ordered[:, -1:]).exp()  # the largest is 1: shape does not depend on scale
    excess = weights[:, 1:] - weights[:, :1]  # [rows, M], rising
    parts = excess.split(max(1, MEMORY // (length * _grid_size(length))))
    k = torch.cat([generalized_pareto_shape(part) for part in parts])
    rounding = 16 * torch.finfo(largest.dtype).eps * largest.amax(0).abs().double()
    rise = ordered - ordered[:, :1]
    above = rise[:, 1:] > rounding.unsqueeze(1)
    for row in (~above[:, _quartile(length)]).nonzero().flatten().tolist():
        k[row] = _shape_above_ties(excess[row, above[row]], weights[row])
    return torch.where(rise[:, -1] > SAME + rounding, k, -math.inf)


def _shape_above_ties(excess: Tensor, weights: Tensor) -> float:
    """The shape of what exceeds the equal weights at the cutoff, `excess` ascending; `weights`: the tail and they."""
    if len(excess) >= SHORTEST_TAIL:
        return float(generalized_pareto_shape(excess.unsqueeze(0)))
    return math.inf if excess.sum() > weights.sum() / 2 else -math.inf


def _quartile(length: int) -> int:
    """The place of the lower quartile of a tail."""
    return int(length / 4 + 0.5) - 1


def generalized_pareto_shape(x: Tensor) -> Tensor:
    """k of a generalised Pareto distribution for each row of x [rows, M], ascending and positive: [rows].

    Zhang and Stephens (2009): with b = -k / sigma, the profile likelihood has

        k(b) = mean_i log(1 - b x_i),      l(b) = M (log(-b / k(b)) - k(b) - 1)

    and b is averaged over a grid (their equation 7, with x* the lower quartile) weighted by the likelihood.
    k is then shrunk towards 1/2 as if by ten further draws (Vehtari et al. 2024, appendix G).
    """
    M = x.shape[1]
    m = _grid_size(M)
    j = torch.arange(1, m + 1, dtype=x.dtype, device=x.device)
    quartile, largest = x[:, _quartile(M)], x[:, -1]  # [rows]
    tiny = torch.finfo(x.dtype).tiny
    spread = (1 - (m / (j - 0.5)).sqrt()) / (3 * quartile.clamp_min(tiny).unsqueeze(1))
    b = spread + 1 / largest.clamp_min(tiny).unsqueeze(1)  # [rows, m]
    k = torch.log1p(-b.unsqueeze(2) * x.unsqueeze(1)).mean(2)
    likelihood = M * (torch.log(-b / k) - k - 1)
    b = (b * likelihood.nan_to_num(-math.inf).softmax(1)).sum(1, keepdim=True)
    k = torch.log1p(-b * x).mean(1)
    return (M * k + 10 * 0.5) / (M + 10)


def _grid_size(length: int) -> int:
    return 30 + math.isqrt(length)
