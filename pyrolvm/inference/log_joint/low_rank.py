"""Low-rank normals near a normal: where a low rank begins, and its other optima.

Of q = N(m, D^2 + B B') and a normal with correlations R, both in units of the latter's standard deviations,

    -KL(q || p) = (log |D^2 + B B'| - tr(R^-1 (D^2 + B B'))) / 2 + constant,

which L-BFGS maximises from the first principal components and from several random B. It often has several optima, a
hundredth of a nat apart, that differ in which coordinates the factor takes whole (D_i = 0, a Heywood case of factor
analysis).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrolvm.inference.log_joint.climbing import climb

STARTS = 8
MOST_SEARCHED = 128
"""Coordinates up to which several starts are taken."""
LEAST_OWN = 1e-2
"""Of its sd, the least that a coordinate keeps of its own: at 0 a guide of Pyro would have no density."""
WITHIN = 0.1
"""Nats of the best optimum that another one may lie below it and still count."""
SAME = 1e-3
"""Of a nat: two optima this near, with the same sds, are one."""
KEPT = 3


def own_share(parameters: Tensor) -> Tensor:
    """D of free parameters, in units of the coordinate's sd."""
    return (parameters.square() + LEAST_OWN**2).sqrt()


def free(shares: Tensor) -> Tensor:
    """The inverse of `own_share`, far enough from 0 that the bound has a slope there."""
    return (shares.square() - LEAST_OWN**2).clamp_min(LEAST_OWN).sqrt()


def nearest(scale_tril: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
    """(sd [dim], factor [dim, rank]) of the low ranks near a covariance root root', `root` [dim, dim]; best first.

    Distinct optima of the KL divergence, from `STARTS` starts; of more than `MOST_SEARCHED` coordinates that of the
    first principal components alone.
    """
    marginal = scale_tril.norm(dim=1)
    root = scale_tril / marginal[:, None]
    dim = len(root)
    precision = torch.cholesky_inverse(root)

    def fit(parameters: Tensor) -> tuple[float, Tensor]:
        shares, B = own_share(parameters[:dim]), parameters[dim:].reshape(dim, rank)
        L, failed = torch.linalg.cholesky_ex(shares.square().diag() + B @ B.T)
        if failed:
            return -torch.inf, torch.zeros_like(parameters)
        slope = torch.cholesky_inverse(L) - precision
        value = L.diagonal().log().sum() - 0.5 * (precision * (L @ L.T)).sum()
        return float(value), torch.cat([slope.diagonal() * parameters[:dim], (slope @ B).reshape(-1)])

    generator = torch.Generator().manual_seed(0)
    starts = [_components(root, rank)]
    for _ in range(STARTS - 1 if dim <= MOST_SEARCHED else 0):
        B = torch.randn(dim, rank, generator=generator, dtype=root.dtype) / (2 * rank) ** 0.5
        starts.append(torch.cat([root.new_full((dim,), 0.5**0.5), B.reshape(-1)]))
    ends = sorted((climb(fit, s, gradient_tolerance=1e-6).end for s in starts), key=lambda e: -e.value)
    found: list[tuple[float, Tensor, Tensor]] = []
    for end in ends:
        shares, B = own_share(end.point[:dim]), end.point[dim:].reshape(dim, rank)
        sd = marginal * (shares.square() + B.square().sum(1)).sqrt()
        known = any(v - end.value < SAME and bool(((sd / s).log().abs() < SAME).all()) for v, s, _ in found)
        if not known and ends[0].value - end.value <= WITHIN:
            found.append((end.value, sd, torch.cat([shares[:, None], B], 1)))
    return [(marginal * own[:, 0], own[:, 1:] / own[:, :1]) for _, _, own in found[:KEPT]]


def _components(root: Tensor, rank: int) -> Tensor:
    """The first principal components above the mean of the rest, as parameters."""
    values, vectors = torch.linalg.eigh(root @ root.T)
    rest = values[: len(values) - rank].mean() if rank < len(values) else values.new_tensor(1e-2)
    rest = rest.clamp_min(1e-4)
    B = vectors[:, -rank:] * (values[-rank:] - rest).clamp_min(1e-2 * rest).sqrt()
    return torch.cat([free(rest.sqrt().expand(len(root))), B.reshape(-1)])
