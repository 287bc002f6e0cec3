"""The best Gaussian for each datum: local variational parameters, refined by gradient from a guide's own.

For z of all local latents together, [D] for each datum,

    L_n(loc, C) = E_q[log p(x_n, z)] + H[q],    q = Normal(loc, C C'),    H = D/2 (1 + log 2 pi) + sum_i log C_ii

with C diagonal ("mean_field") or lower triangular ("full"). Draws are antithetic and of identity second
moment, so that E_q[log p] is exact, not estimated, where log p(x_n, z) is quadratic in z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Normal

from pyrolvm.diagnostics.sites import NORMALS, base_of, latent_node
from pyrolvm.errors import ProgramError
from pyrolvm.inference.posterior.evidence.chunks import joint_draws
from pyrolvm.inference.program.pair import Pair

MOMENT_DRAWS = 500
RATES = (4.0, 2.0, 1.0)
"""Rounds of the climb, by their share of the learning rate; each takes its units from what the last one found."""


@dataclass(frozen=True)
class Gaussians:
    """One Gaussian per datum: loc [rows, D], scale_tril [rows, D, D]."""

    loc: Tensor
    scale_tril: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """z = loc + C noise: [draws, rows, D]."""
        return self.loc + torch.einsum("nij,snj->sni", self.scale_tril, noise)

    @property
    def log_det(self) -> Tensor:
        """log det C: [rows]."""
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @property
    def entropy(self) -> Tensor:
        """H[q] in nats: [rows]."""
        return self.log_det + 0.5 * self.loc.shape[-1] * (1 + math.log(2 * math.pi))

    def where(self, chosen: Tensor, other: Gaussians) -> Gaussians:
        """Those of the `chosen` rows, bool [rows], and the `other` ones elsewhere."""
        scale_tril = torch.where(chosen[:, None, None], self.scale_tril, other.scale_tril)
        return Gaussians(torch.where(chosen[:, None], self.loc, other.loc), scale_tril)

    def mean_field(self) -> Gaussians:
        """The same means and variances without correlations."""
        return Gaussians(self.loc, torch.diag_embed(self.scale_tril.square().sum(-1).sqrt()))

    def log_prob_at(self, noise: Tensor) -> Tensor:
        """log q(loc + C noise): [draws, rows]."""
        return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) - self.log_det


class LogJoint:
    """log p(x_n, z) of the rows of one pair, as a function of z [draws, rows, D]."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.sites = pair, pair.structure.local_latents
        self._repeated = lru_cache(None)(pair.repeated)
        for site in self.sites:
            if len(site.plates) > 1:
                raise ProgramError(
                    f"'{site.name}' stands in plates besides the data plate ({', '.join(site.plates)}): its "
                    "Gaussian gaps are not implemented; declare those dimensions by .to_event"
                )
        self.sizes = [math.prod(s.event_shape) for s in self.sites]

    def __call__(self, z: Tensor) -> Tensor:
        """[draws, rows] in nats, float64."""
        if self.pair.vectorized:
            return self._at(self.pair, z)
        if not self.pair.structure.chunkable:
            return torch.cat([self._at(self.pair, part) for part in z.split(1)])
        # draws at once for networks that know no further dimension: as rows
        return self._at(self._repeated(len(z)), z.reshape(1, -1, z.shape[-1])).reshape(z.shape[:2])

    def _at(self, pair: Pair, z: Tensor) -> Tensor:
        values = {}
        for site, part in zip(self.sites, z.split(self.sizes, -1), strict=True):
            value = part.reshape(*part.shape[:2], *site.event_shape)
            values[site.name] = value if pair.vectorized else value.squeeze(0)
        return pair.log_prob(pair.model(len(z) if pair.vectorized else None, given=values), pair.is_local)


@torch.no_grad()
def guide_gaussians(pair: Pair) -> tuple[Gaussians, str]:
    """The guide's q(z | x) as Gaussians, and its family: "mean_field", "full" or "other".

    Of "other" (several sites, flows) they are the Gaussians of its first two moments.
    """
    sites = pair.structure.local_latents
    model, guide = pair.draw(2 if pair.vectorized else None)
    for site in sites:
        _check_real(model, site.name)
    found = _exact(pair, latent_node(guide, sites[0].name)) if len(sites) == 1 else None
    return found or (_moments(pair), "other")


def _check_real(model: Trace, name: str) -> None:
    nodes: Any = model.nodes
    support = nodes[name]["fn"].support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if type(support).__name__ not in ("_Real", "_RealVector"):
        raise ProgramError(
            f"'{name}' is not on the real line (its support is {support}), so no Gaussian fits it: gaps are for "
            "real latents"
        )


def _exact(pair: Pair, node: Any) -> tuple[Gaussians, str] | None:
    """The Gaussians of a guide's site, and their family; None if it is not Gaussian."""
    fn = node["fn"]
    full, event_dims = isinstance(fn, NORMALS), len(fn.event_shape)
    if not full and not isinstance(base_of(fn), Normal):
        return None
    loc, scale = (pair.spread(node, v, event_dims)[0] for v in (fn.mean, fn.variance.sqrt()))
    if not full:
        return Gaussians(loc, torch.diag_embed(scale)), "mean_field"
    return Gaussians(loc, pair.spread(node, fn.scale_tril, 2)[0].reshape(*loc.shape, -1)), "full"


def _moments(pair: Pair) -> Gaussians:
    """Gaussians of the first two moments of the guide's draws."""
    names = [s.name for s in pair.structure.local_latents]
    parts = joint_draws(pair, MOMENT_DRAWS)
    z = torch.cat(
        [torch.cat([pair.values(g, n) for n in names], -1) for _, g, _ in parts]
    )  # [draws, rows, D]
    centred = z - z.mean(0)
    covariance = torch.einsum("sni,snj->nij", centred, centred) / (len(z) - 1)
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    jitter = 1e-6 * covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * eye
    return Gaussians(z.mean(0), torch.linalg.cholesky(covariance + jitter))


def balanced_noise(num_samples: int, rows: int, dim: int, like: Tensor) -> Tensor:
    """Standard normal [num_samples, rows, dim] in antithetic pairs, of identity second moment where it can be."""
    half = torch.randn(max(1, num_samples // 2), rows, dim, dtype=like.dtype, device=like.device)
    if len(half) >= 2 * dim:
        second = torch.einsum("sni,snj->nij", half, half) / len(half)
        root = torch.linalg.cholesky(second.double())
        half = torch.linalg.solve_triangular(root, half.double().permute(1, 2, 0), upper=False).to(like.dtype)
        half = half.permute(2, 0, 1)
    return torch.cat([half, -half])


def bound(log_joint: LogJoint, q: Gaussians, noise: Tensor) -> Tensor:
    """L_n of every row, [rows] in nats, at given noise [draws, rows, D]."""
    return log_joint(q.at(noise)).mean(0) + q.entropy


def num_climbs(num_steps: int) -> int:
    """Steps that `refine` takes in all."""
    return len(RATES) * max(1, num_steps // len(RATES))


def refine(
    log_joint: LogJoint,
    start: Gaussians,
    family: str,
    num_steps: int,
    learning_rate: float,
    watch: Callable[[], None] = lambda: None,
) -> Gaussians:
    """Climb L_n from `start` by Adam, in units of the scales found so far, the rate falling to zero."""
    q = start.mean_field() if family == "mean_field" else start
    for rate in RATES:
        q = _climb(log_joint, q, family, num_climbs(num_steps) // len(RATES), rate * learning_rate, watch)
    return q


def _climb(
    log_joint: LogJoint,
    start: Gaussians,
    family: str,
    num_steps: int,
    learning_rate: float,
    watch: Callable[[], None],
) -> Gaussians:
    """loc = loc_0 + C_0 shift and C = C_0 (diag(exp(log_scale)) + lower), all three from zero."""
    rows, dim = start.loc.shape
    shift, log_scale = (torch.zeros_like(start.loc).requires_grad_() for _ in range(2))
    lower = torch.zeros_like(start.scale_tril).requires_grad_()
    leaves = [shift, log_scale] + ([lower] if family == "full" else [])
    optimizer = torch.optim.Adam(leaves, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    draws = 2 * max(8, 2 * dim) if dim <= 16 else 32

    def current() -> Gaussians:
        step = torch.diag_embed(log_scale.exp()) + lower.tril(-1)
        moved = (start.scale_tril @ shift.unsqueeze(-1)).squeeze(-1)
        return Gaussians(start.loc + moved, start.scale_tril @ step)

    for _ in range(num_steps):
        loss = -bound(log_joint, current(), balanced_noise(draws, rows, dim, start.loc)).sum()
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            leaf.grad = gradient
        optimizer.step()
        schedule.step()
        watch()
    with torch.no_grad():
        return current()
