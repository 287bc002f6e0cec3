"""Low-rank normals near a normal: where a low rank begins, and its other optima.

Of q = N(m, D^2 + B B') and p = N(m, A A'), with D = diag(1 / sqrt(diag (A A')^-1)) d in units of conditional standard
deviations and B = A b in whitened ones,

    -KL(q || p) = (log |S| - tr S) / 2 + constant,      S = A^-1 (D^2 + B B') A^-T,

which L-BFGS maximises from the first principal components and from several random b: in these units its curvature is
about 1 whatever those of the latents, and their correlations. It often has several optima, a hundredth of a nat apart,
that differ in which coordinates the factor takes whole (D_i = 0, a Heywood case of factor analysis).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrolvm.inference.log_joint.climbing import climb

STARTS = 8
MOST_SEARCHED = 128
"""Coordinates up to which several starts are taken."""
LEAST_OWN = 1e-2
"""Of its sd given the others, the least that a coordinate keeps of its own: at 0 a guide of Pyro has no density."""
WITHIN = 0.1
"""Nats of the best optimum that another one may lie below it and still count."""
SAME = 1e-3
"""Of a nat: two optima this near, with the same sds, are one."""
KEPT = 3


def own_share(parameters: Tensor) -> Tensor:
    """d of free parameters."""
    return (_grown(parameters).square() + LEAST_OWN**2).sqrt()


def _grown(parameters: Tensor) -> Tensor:
    """Parameters up to 1 as they are, which lets d come to 0; beyond exp(p - 1), whatever the units turn out to be."""
    size = parameters.abs()
    return torch.where(size <= 1, parameters, parameters.sign() * (size.clamp_min(1) - 1).exp())


def free(shares: Tensor) -> Tensor:
    """The inverse of `own_share`, far enough from 0 that the bound has a slope there."""
    found = (shares.square() - LEAST_OWN**2).clamp_min(LEAST_OWN).sqrt()
    return torch.where(found <= 1, found, 1 + found.clamp_min(1).log())


def conditional(scale_tril: Tensor) -> Tensor:
    """The sd of each coordinate given the others, 1 / sqrt(diag H), H^-1 = scale_tril scale_tril': [dim]."""
    if scale_tril.dim() == 1:
        return scale_tril
    return inverse(scale_tril).square().sum(0).rsqrt()


def inverse(scale_tril: Tensor) -> Tensor:
    """A^-1 of a triangle A [dim, dim]."""
    return torch.linalg.solve_triangular(scale_tril, torch.eye(len(scale_tril)).to(scale_tril), upper=False)


def nearest(scale_tril: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
    """(sd [dim], factor [dim, rank]) of the low ranks near N(m, A A'), A = `scale_tril` [dim, dim]; the nearest first.

    Distinct optima of the KL divergence, from `STARTS` starts; of more than `MOST_SEARCHED` coordinates that of the
    first principal components alone.
    """
    dim, unit = len(scale_tril), conditional(scale_tril)
    own = inverse(scale_tril) * unit  # A^-1 diag(unit)

    def nearness(parameters: Tensor) -> tuple[float, Tensor]:
        shares, b = own_share(parameters[:dim]), parameters[dim:].reshape(dim, rank)
        S = (own * shares.square()) @ own.T + b @ b.T
        L, failed = torch.linalg.cholesky_ex(S)
        if failed:
            return -torch.inf, torch.zeros_like(parameters)
        slope = torch.cholesky_inverse(L) - torch.eye(dim).to(L)
        grown = _grown(parameters[:dim])
        of_own = (own * (slope @ own)).sum(0) * grown * grown.abs().clamp_min(1)
        value = L.diagonal().log().sum() - 0.5 * S.trace()
        return float(value), torch.cat([of_own, (slope @ b).reshape(-1)])

    starts = [_components(scale_tril, unit, rank)]
    for seed in range(STARTS - 1 if dim <= MOST_SEARCHED else 0):
        b = torch.randn(dim, rank, generator=torch.Generator().manual_seed(seed)).to(unit) / (2 * rank) ** 0.5
        starts.append(torch.cat([unit.new_full((dim,), 0.5**0.5), b.reshape(-1)]))
    ends = sorted((climb(nearness, s, gradient_tolerance=1e-6).end for s in starts), key=lambda e: -e.value)
    found: list[tuple[float, Tensor, Tensor, Tensor]] = []
    for end in ends:
        D = unit * own_share(end.point[:dim])
        B = scale_tril @ end.point[dim:].reshape(dim, rank)
        sd = (D.square() + B.square().sum(1)).sqrt()
        known = any(v - end.value < SAME and bool(((sd / s).log().abs() < SAME).all()) for v, s, *_ in found)
        if not known and ends[0].value - end.value <= WITHIN:
            found.append((end.value, sd, D, B))
    return [(D, B / D[:, None]) for *_, D, B in found[:KEPT]]


def _components(scale_tril: Tensor, unit: Tensor, rank: int) -> Tensor:
    """The first principal components of the correlations above the mean of the rest, as parameters."""
    marginal = scale_tril.norm(dim=1)
    root = scale_tril / marginal[:, None]
    values, vectors = torch.linalg.eigh(root @ root.T)
    rest = values[: len(values) - rank].mean() if rank < len(values) else values.new_tensor(1e-2)
    B = vectors[:, -rank:] * (values[-rank:] - rest).clamp_min(1e-2 * rest.clamp_min(1e-4)).sqrt()
    b = torch.linalg.solve_triangular(scale_tril, marginal[:, None] * B, upper=False)
    return torch.cat([torch.ones_like(unit), b.reshape(-1)])
