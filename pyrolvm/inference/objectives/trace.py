"""The evidence lower bound from traces: `Trace_ELBO` and `TraceMeanField_ELBO`.

    ELBO = E_q[ log p(x, z) - log q(z | x) ]

Gradients as in Pyro: reparameterised sites by the path, others by the score function with the costs
of their own plates only (Ranganath et al. 2014, "Black box variational inference", section 3.1).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.trace_elbo import _compute_log_r
from pyro.infer.util import check_fully_reparametrized, is_identically_zero, is_validation_enabled
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions.kl import kl_divergence

from pyrolvm.inference.objectives.base import Estimate, TraceObjective, kl_term
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import given_first, sample_sites


class TraceBound(TraceObjective):
    """Pyro's `Trace_ELBO`."""

    def parts(self, model_trace: Trace, guide_trace: Trace) -> tuple[Any, Any, Any]:
        """(bound, surrogate, KL) of one pair of traces."""
        surrogate = -_surrogate_elbo(model_trace, guide_trace)
        with torch.no_grad():  # these are reported
            bound = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
            return bound, surrogate, kl_term(model_trace, guide_trace)


def _surrogate_elbo(model_trace: Trace, guide_trace: Trace) -> Any:
    elbo: Any = model_trace.log_prob_sum()
    log_r = None
    for site in sample_sites(guide_trace):
        _, score_function, entropy = site["score_parts"]
        if not is_identically_zero(entropy):
            elbo = elbo - entropy.sum()
        if not is_identically_zero(score_function):
            log_r = log_r or _compute_log_r(model_trace, guide_trace)
            cost = log_r.sum_to(site["cond_indep_stack"])
            elbo = elbo + (cost.detach() * score_function).sum()
    return elbo


class MeanField(TraceObjective):
    """Pyro's `TraceMeanField_ELBO`: KL(q(z|x) || p(z)) in closed form where torch knows it, else by the draw.

    By the draw also where the guide draws a site before what its prior depends on: there the closed form is no part of
    the KL. Pyro takes it there too, and warns.
    """

    def estimate(self, pair: Pair, controls: Mapping[str, Any]) -> Estimate:
        """As Pyro, without its warning."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Failed to verify mean field restriction", UserWarning)
            return super().estimate(pair, controls)

    def parts(self, model_trace: Trace, guide_trace: Trace) -> tuple[Any, Any, Any]:
        """(bound, surrogate, KL) of one pair of traces."""
        observed = [s["log_prob_sum"] for s in sample_sites(model_trace) if s["is_observed"]]
        kl = sum(_site_kl(site, model_trace, guide_trace) for site in sample_sites(guide_trace))
        bound = sum(observed) - kl
        return bound, -bound, kl

    def site_kl(self, model_trace: Trace, guide_trace: Trace, name: str) -> Any:
        """In closed form where the sum has it so."""
        return _site_kl(guide_trace.nodes[name], model_trace, guide_trace)


def _site_kl(guide_site: Any, model_trace: Trace, guide_trace: Trace) -> Tensor:
    model_site: Any = model_trace.nodes.get(guide_site["name"])
    if model_site is None:  # auxiliary
        return guide_site["log_prob_sum"]
    try:
        if not given_first(model_trace, guide_trace, guide_site["name"]):
            raise NotImplementedError
        kl = kl_divergence(guide_site["fn"], model_site["fn"])
    except NotImplementedError:
        if is_validation_enabled():
            check_fully_reparametrized(guide_site)
        return guide_site["log_prob_sum"] - model_site["log_prob_sum"]
    return torch.as_tensor(scale_and_mask(kl, scale=guide_site["scale"], mask=guide_site["mask"])).sum()
