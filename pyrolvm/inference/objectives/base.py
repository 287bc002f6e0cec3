"""What an objective gives: a bound to report and a surrogate to descend."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.ops.provenance import detach_provenance
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import SettingError
from pyrolvm.inference.program.structure import Structure, sample_sites


class Estimate(NamedTuple):
    """One stochastic estimate over a batch, in nats, scaled to the whole data.

    bound: the lower bound on log p(x); higher is better.
    surrogate: minimise it; its gradient estimates that of -bound. Its value means nothing.
    log_likelihood: E_q[log p(x|z)]; kl: E_q[log q(z) - log p(z)]. Both nan where not defined.
    """

    bound: Tensor
    surrogate: Tensor
    log_likelihood: Tensor
    kl: Tensor


@singledispatch
def estimate(
    objective: Any, model: Callable, guide: Callable, args: tuple = (), kwargs: dict | None = None
) -> Estimate:
    """Estimate `objective` for (model, guide) on one batch; parameters are reached as Pyro reaches them.

    An ELBO class this package does not know is taken by its own `differentiable_loss`.
    """
    if not hasattr(objective, "differentiable_loss"):
        raise SettingError(
            f"objective must be a Pyro ELBO object such as pyro.infer.Trace_ELBO(), not {objective!r}"
        )
    loss = objective.differentiable_loss(model, guide, *args, **(kwargs or {}))
    unknown = torch.full_like(loss.detach(), float("nan"))
    return Estimate(-loss.detach(), loss, unknown, unknown)


def prepare(objective: ELBO | None, structure: Structure) -> ELBO:
    """A private copy of `objective` that knows the program's plates and so need not guess them."""
    if objective is None:
        objective = _default(structure)
    if isinstance(objective, type):
        raise SettingError(f"objective is the class {objective.__name__}: pass {objective.__name__}()")
    summed_out = [s.name for s in structure.sites if s.enumerated and not s.in_guide]
    if summed_out and not isinstance(objective, TraceEnum_ELBO):
        raise SettingError(
            f"the model asks for '{summed_out[0]}' to be summed out, which {type(objective).__name__} does not do "
            "(it would draw it from the prior): use TraceEnum_ELBO(), or give the guide a site for it"
        )
    objective = copy.copy(objective)
    if getattr(objective, "max_plate_nesting", 0) == float("inf"):
        vectorized = objective.vectorize_particles and objective.num_particles > 1
        objective.max_plate_nesting = structure.max_plate_nesting + int(vectorized)
    return objective


def _default(structure: Structure) -> ELBO:
    """Enumeration where sites ask for it; downstream costs and baselines for other discrete sites."""
    if any(s.enumerated for s in structure.sites):
        return TraceEnum_ELBO()
    return TraceGraph_ELBO() if any(s.discrete for s in structure.sites) else Trace_ELBO()


def kl_term(model_trace: Trace, guide_trace: Trace) -> Any:
    """sum over the guide's sites of log q(z) - log p(z), one draw, scaled as the traces are."""
    total: Any = 0.0
    for site in sample_sites(guide_trace):
        total = total + site["log_prob_sum"]
        if site["name"] in model_trace.nodes:
            total = total - model_trace.nodes[site["name"]]["log_prob_sum"]
    return detach_provenance(total)


def as_estimate(bound: Any, surrogate: Any, kl: Any) -> Estimate:
    """Gather tensors; the expected log-likelihood is what the bound and the KL leave."""
    bound, kl = (torch.as_tensor(t).detach() for t in (bound, kl))
    return Estimate(bound, torch.as_tensor(surrogate), bound + kl, kl)
