"""Importance weights log p(x, z) - log q(z) per datum, from a pair of traces.

The weight of a datum sums the log-densities of its sites over every dimension except those of the plates
that all sites share. The scale that all sites share (N/B of a minibatch, `poutine.scale` around the
whole program) is kept apart, because it belongs outside a log-mean-exp: with it inside, the "bound"
of a minibatch can exceed the evidence. The same holds for weights of rows, a tensor scale around the whole program.
A scale of some sites only (a power of the likelihood) is part of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import SettingError
from pyrolvm.inference.program.structure import sample_sites

PARTICLES = "num_particles_vectorized"


@dataclass(frozen=True)
class LogDensities:
    """Log-densities of one trace pair per particle and cell of the shared plates, in nats, unscaled.

    Attributes
    ----------
    log_prior, log_likelihood, log_guide : tensor [particles, cells]
        log p(z), log p(x | z) and log q(z).
    score : tensor [particles, cells] or None
        The part of log_guide from sites that are not reparameterised.
    scale : float or tensor [cells]
        The factor that belongs outside the logarithm.
    sizes : dict
        Batch dimension, negative -> its size, of the particles and the shared plates: a cell of the program's shapes.
    """

    log_prior: Tensor
    log_likelihood: Tensor
    log_guide: Tensor
    score: Tensor | None
    scale: Any
    sizes: dict[int, int]

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) - log q(z): [particles, cells], nats."""
        return self.log_likelihood + self.log_prior - self.log_guide

    def in_place(self, value: Tensor, event_dims: int = 0) -> Tensor:
        """`value` [particles, cells] as it stands beside a site's value [batch..., event...]: to multiply them."""
        depth = -min(self.sizes, default=0)
        shape = [self.sizes.get(dim, 1) for dim in range(-depth, 0)]
        return value.reshape(*shape, *(1,) * event_dims)


def log_densities(
    model_trace: Trace, guide_trace: Trace, *, skip: Iterable[str] = (), keep: Iterable[str] | None = None
) -> LogDensities:
    """Per-datum log-densities of a pair of traces with log_probs computed.

    Parameters
    ----------
    skip : iterable of str
        Sites to leave out (global latents held at the guide's draw).
    keep : iterable of str, optional
        The shared plates whose cells stay apart; all by default.

    Raises
    ------
    SettingError
        A latent is outside a subsampled plate, so that N/B would stay inside the exponent.
    """
    skip = set(skip)
    in_model = [s for s in sample_sites(model_trace) if s["name"] not in skip]
    in_guide = [s for s in sample_sites(guide_trace) if s["name"] not in skip]
    sites = in_model + in_guide
    shared = _shared_frames(sites)
    kept = shared if keep is None else [f for f in shared if f.name in set(keep)]
    dims, particles = _kept_dims(sites, kept)
    scale, inner = _divided_scale(sites, shared, dims)
    device = sites[0]["unscaled_log_prob"].device if sites else None

    def gather(part: list[dict[str, Any]]) -> Tensor:
        terms = [_cells(site, inner(site["scale"]), dims, _moves(site, kept)) for site in part]
        return sum(terms[1:], terms[0]) if terms else torch.zeros((1,) * len(dims), device=device)

    unreached = [s for s in in_guide if not getattr(s["fn"], "has_rsample", False)]
    parts = [
        gather([s for s in in_model if not s["is_observed"]]),
        gather([s for s in in_model if s["is_observed"]]),
        gather(in_guide),
        gather(unreached),
    ]
    parts = list(torch.broadcast_tensors(*parts))
    sizes = dict(zip(dims, parts[0].shape, strict=True))
    parts = [_as_matrix(p, particles) for p in parts]
    return LogDensities(parts[0], parts[1], parts[2], parts[3] if unreached else None, scale, sizes)


def _shared_frames(sites: list[dict[str, Any]]) -> list[Any]:
    """The plates that all sites stand in, leftmost first, where the site has them that has them most to the left."""
    stacks = [
        {f.name: f for f in s["cond_indep_stack"] if f.vectorized and f.name != PARTICLES} for s in sites
    ]
    names = set.intersection(*(set(stack) for stack in stacks)) if stacks else set()
    frames = [sorted((stack[name] for name in names), key=lambda f: f.dim) for stack in stacks]
    return min(frames, key=lambda shared: [f.dim for f in shared], default=[])


def _moves(site: dict[str, Any], kept: list[Any]) -> list[tuple[int, int]]:
    """(dimension of a site's plate, where the weights have that plate), where these differ."""
    own = {f.name: f.dim for f in site["cond_indep_stack"] if f.vectorized}
    return [(own[f.name], f.dim) for f in kept if own[f.name] != f.dim]


def _divided_scale(
    sites: list[dict[str, Any]], shared: list[Any], dims: list[int]
) -> tuple[Any, Callable[[Any], Any]]:
    """The scale outside the logarithm, and a function from a site's scale to the part inside."""
    scales = [s["scale"] for s in sites]
    if scales and all(isinstance(scale, Tensor) for scale in scales):
        rows = _by_cell(scales[0], dims, {f.dim: f.size for f in shared if f.dim in dims})
        if rows is not None:
            _check_inside(sites, shared)
            return rows, lambda scale: _ratio(scale, scales[0])
    outside = scales[0] if scales and all(_same(scale, scales[0]) for scale in scales) else None
    if outside is None:
        outside = math.prod(f.full_size / f.size for f in shared)
    _check_inside(sites, shared)
    return outside, lambda scale: 1.0 if _same(scale, outside) else scale / outside


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return math.isclose(a, b, rel_tol=1e-12)


def _by_cell(scale: Tensor, dims: list[int], sizes: dict[int, int]) -> Tensor | None:
    """A tensor scale as one number per cell, [cells]; None if it differs within a cell, or between particles."""
    shape = (1,) * (max([scale.dim(), *(-d for d in dims)]) - scale.dim()) + tuple(scale.shape)
    if any(shape[d] > 1 for d in range(-len(shape), 0) if d not in sizes):
        return None
    wide = [sizes.get(d, 1) for d in range(-len(shape), 0)]
    return scale.reshape(shape).expand(wide).reshape(-1)


def _ratio(scale: Tensor, outside: Tensor) -> Tensor:
    """scale / outside, 1 where both are 0 (a row of weight 0)."""
    ones = torch.ones_like(outside)
    return torch.where(outside == 0, ones, scale / torch.where(outside == 0, ones, outside))


def _check_inside(sites: list[dict[str, Any]], shared: list[Any]) -> None:
    """Refuse a subsampled plate with a latent outside it: N/B would stay inside the exponent."""
    kept = {f.name for f in shared}
    for site in sites:
        for frame in site["cond_indep_stack"]:
            elsewhere = frame.vectorized and frame.name not in kept and frame.name != PARTICLES
            if elsewhere and frame.full_size != frame.size:
                outsiders = [
                    s["name"] for s in sites if frame.name not in {f.name for f in s["cond_indep_stack"]}
                ]
                raise SettingError(
                    f"this objective averages weights per datum, but '{outsiders[0]}' is outside the "
                    f"subsampled plate '{frame.name}': use Trace_ELBO for programs with global latents, "
                    "or pass the data whole (batch_size=None)"
                )


def _kept_dims(sites: list[dict[str, Any]], shared: list[Any]) -> tuple[list[int], int | None]:
    """The batch dimensions to keep, leftmost first, and the particle dimension or None."""
    particle = {f.dim for s in sites for f in s["cond_indep_stack"] if f.name == PARTICLES}
    dims = sorted(particle | {f.dim for f in shared})
    return dims, (min(particle) if particle else None)


def _cells(site: dict[str, Any], scale: Any, dims: list[int], moves: list[tuple[int, int]]) -> Tensor:
    """A site's scaled log-density with all dimensions but `dims` summed out."""
    log_prob = scale_and_mask(site["unscaled_log_prob"], scale=scale, mask=site["mask"])
    depth = max([log_prob.dim(), *(-d for d in dims)])
    log_prob = log_prob.reshape((1,) * (depth - log_prob.dim()) + tuple(log_prob.shape))
    log_prob = log_prob.movedim([here for here, _ in moves], [there for _, there in moves])
    others = [d for d in range(-depth, 0) if d not in dims]
    return log_prob.sum(others) if others else log_prob


def _as_matrix(value: Tensor, particles: int | None) -> Tensor:
    return value.reshape(value.shape[0] if particles is not None else 1, -1)
