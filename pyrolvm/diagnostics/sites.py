"""One latent site of a pair of traces: its distribution in the guide, its mean, its KL from the prior."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from pyrolvm.errors import ProgramError
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import given_first, sample_sites

MOMENT_DRAWS = 1000
NORMALS = (MultivariateNormal, LowRankMultivariateNormal)


def latent_node(guide: Trace, name: str) -> Any:
    """The guide's node that `name` is drawn at.

    AutoGuides draw an auxiliary and set the site to a function of it: where the support is the real line, the
    auxiliary is the latent itself.
    """
    nodes: Any = guide.nodes
    node = nodes[name]
    if not isinstance(base_of(node["fn"]), Delta):
        return node
    drawn = (s for s in sample_sites(guide) if s["infer"].get("is_auxiliary") and s["name"] != name)
    return next((s for s in drawn if torch.equal(s["value"], node["value"])), node)


def latent_mean(pair: Pair, node: Any) -> Tensor:
    """The mean of a guide's site given what it depends on, else its draw: [draws, rows, D]."""
    fn, event_dims = node["fn"], len(node["fn"].event_shape)
    try:
        mean = fn.mean
    except (NotImplementedError, AttributeError):
        mean = torch.full((), torch.nan)
    if mean.shape[mean.dim() - event_dims :] != fn.event_shape or not bool(torch.isfinite(mean).all()):
        mean = node["value"].to(torch.get_default_dtype())
    return pair.spread(node, mean, event_dims).double()


def site_kl(pair: Pair, model: Trace, guide: Trace, name: str) -> tuple[Tensor, str]:
    """KL(q || p) of each dimension of a site given the latents above it, and how it was computed.

    Returns
    -------
    tensor [draws, rows, D]
        Nats.
    str
        "exact": closed form. "marginal": closed form of each dimension's marginal, which do not add up to the KL where
        q has correlations. "moments": of the Gaussians of each dimension's first two moments, where q or p does not
        fall into dimensions (a flow, a mixture); with a Gaussian p, at most the KL of the marginal. "monte carlo":
        log q - log p at the draws, of the site as one where q is a function of an auxiliary (D = 1), and of a site that
        is drawn before what its prior depends on.
    """
    nodes: Any = model.nodes
    q_node, p_node = latent_node(guide, name), nodes[name]
    q, kind = _marginals(q_node["fn"])
    p, p_kind = _marginals(p_node["fn"])
    event_dims = len(q_node["fn"].event_shape)
    if isinstance(q, Delta):
        return _of_auxiliary(pair, model, guide, name), "monte carlo"
    if q.event_shape or p.event_shape:
        q, p, kind = _moments(q), _moments(p), "moments"
    elif p_kind == "marginal":
        kind = p_kind
    try:
        if not given_first(model, guide, name):
            raise NotImplementedError
        return pair.spread(q_node, kl_divergence(q, p), event_dims).double(), kind
    except NotImplementedError:
        value = q_node["value"]
        difference = q.log_prob(value) - p.log_prob(value)
        return pair.spread(q_node, difference, event_dims).double(), "monte carlo"


def _of_auxiliary(pair: Pair, model: Trace, guide: Trace, name: str) -> Tensor:
    """log q - log p [draws, rows, 1] of a function of an auxiliary: the Delta has the Jacobian, the latter the rest."""
    sources = {name, f"{name}_unconstrained", f"{name}_aux"}
    drawn = {s["name"] for s in sample_sites(guide) if s["infer"].get("is_auxiliary") and pair.is_local(s)}
    if drawn and not drawn & sources:  # one vector for all latents of a datum
        if len(pair.structure.local_latents) > 1:
            raise ProgramError(
                f"the guide draws '{name}' together with other latents: its own KL is not known"
            )
        sources |= drawn
    log_q = pair.log_prob(guide, lambda s: s["name"] in sources)
    log_p = pair.log_prob(model, lambda s: s["name"] == name)
    return (log_q - log_p).unsqueeze(-1)


def base_of(fn: Distribution) -> Distribution:
    """What stands below `to_event`."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


def _moments(fn: Any) -> Normal:
    """The normals of each dimension's first two moments; of 1000 draws where they have no closed form."""
    if not fn.event_shape:  # each dimension stands alone
        return fn if isinstance(fn, Normal) else Normal(fn.mean, fn.variance.sqrt(), validate_args=False)
    try:
        mean, variance = fn.mean, fn.variance
    except (NotImplementedError, AttributeError):
        draws = fn.sample((MOMENT_DRAWS,))
        mean, variance = draws.mean(0), draws.var(0)
    return Normal(mean, variance.sqrt(), validate_args=False)


def _marginals(fn: Distribution) -> tuple[Distribution, str]:
    """The distribution of each dimension: a multivariate normal's marginals, else the base of an Independent."""
    if isinstance(fn, NORMALS):
        return Normal(fn.mean, fn.variance.sqrt(), validate_args=False), "marginal"
    return base_of(fn), "exact"
