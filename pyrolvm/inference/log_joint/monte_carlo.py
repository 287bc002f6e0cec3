"""The Monte Carlo error of an optimum on fixed draws: how far other draws would have moved it.

On other draws the optimum is off by K^-1 times their gradient here, K being minus the second derivatives of the bound:
the sandwich formula of DADVI (Giordano, Ingram and Broderick 2024, section 3.3), with sets of quasi-random draws in
place of single ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyrolvm.inference.log_joint.families import FULL, LOW_RANK, POINT, Gaussian
from pyrolvm.inference.log_joint.modes import Place

DIFFERENCE = 1e-4
"""Step of the differences that second derivatives are taken by."""


def curved_errors(
    slope: Callable[[Tensor], Tensor],
    gaussian: Callable[[Tensor], Gaussian],
    parameters: Tensor,
    slopes: Tensor,
    still: Tensor,
) -> tuple[Tensor, Tensor]:
    """Standard errors of location and log-sd [dim].

    Parameters
    ----------
    slope : callable
        Parameters [size] -> gradient of the bound on its own draws [size].
    gaussian : callable
        Parameters -> q.
    parameters : tensor [size]
        Of the optimum.
    slopes : tensor [replicates, size]
        The gradient there on independent sets of draws.
    still : tensor [size, directions]
        Orthonormal, along which neither bound nor q changes.
    """

    def told(parameters: Tensor) -> Tensor:
        q = gaussian(parameters)
        return torch.cat([q.location, q.scale.log()])

    K = _curvature(slope, parameters) + still @ still.T
    if not K.isfinite().all():  # a bound without an optimum, where parameters went off
        unknown = torch.full_like(gaussian(parameters).location, torch.nan)
        return unknown, unknown
    moves = torch.linalg.lstsq(K, slopes.T).solution.T
    spread = (moves @ torch.func.jacrev(told)(parameters).T).square().mean(0).sqrt()
    return spread.tensor_split(2)


def _curvature(slope: Callable[[Tensor], Tensor], parameters: Tensor) -> Tensor:
    """Minus the second derivatives [size, size] by differences of gradients."""
    rows = []
    for step in DIFFERENCE * torch.eye(len(parameters), dtype=parameters.dtype):
        rows.append((slope(parameters - step) - slope(parameters + step)) / (2 * DIFFERENCE))
    K = torch.stack(rows)
    return (K + K.T) / 2


def location_errors(place: Place, q: Gaussian, slopes: Tensor) -> Tensor:
    """Standard errors of the location [dim] from its gradients on independent sets of draws [replicates, dim].

    For many parameters: the inverse of the second derivatives is the covariance of a full Gaussian at its optimum, else
    that at the mode, which misses some where the posterior is skewed.
    """
    if q.kind == POINT:
        return torch.zeros_like(q.location)
    if q.kind in (FULL, LOW_RANK) and place.scale_tril.dim() == 2:
        # gradients with respect to v are A' times those with respect to u
        of_u = torch.linalg.solve_triangular(place.scale_tril.T, slopes.T, upper=True).T
        moves = of_u @ q.covariance
    else:
        moves = place.times(slopes)
    return moves.square().mean(0).sqrt()
