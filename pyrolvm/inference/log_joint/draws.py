"""Standard normal draws for a deterministic bound: Sobol points, antithetic, with exact moments.

Of one run, the draws have mean 0 and, from 4 for each coordinate on, the identity as covariance: the bound of a
Gaussian posterior is then exact at any number of them. With fewer their variances are 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

PER_COORDINATE = 4
"""Draws per coordinate below which a full covariance would fit the draws instead of the posterior."""
MOST_SOBOL = SobolEngine.MAXDIM


def fixed_normals(num_draws: int, dim: int, seed: int) -> Tensor:
    """[num_draws, dim] float64, `num_draws` even; another seed gives an independent set."""
    half = num_draws // 2
    if dim <= MOST_SOBOL:
        points = SobolEngine(dim, scramble=True, seed=seed % 2**31).draw(half, dtype=torch.float64)
        z = torch.special.ndtri(points.clamp(1e-10, 1 - 1e-10))
    else:
        z = torch.randn(half, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = torch.cat([z, -z])
    if num_draws >= PER_COORDINATE * dim:
        L = torch.linalg.cholesky(z.T @ z / num_draws)
        return torch.linalg.solve_triangular(L, z.T, upper=False).T
    return z / z.square().mean(0).sqrt()


def least_draws(dim: int, full: bool) -> int:
    """The number to begin with: 64, doubled for a full covariance until there are 4 for each coordinate."""
    M = 64
    while full and PER_COORDINATE * dim > M:
        M *= 2
    return M
