"""`TraceGraph_ELBO`: score-function gradients with only downstream costs, and baselines.

Schulman et al. 2015, "Gradient estimation using stochastic computation graphs"; Mnih & Gregor 2014,
"Neural variational inference and learning in belief networks" (the baselines).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer import TraceGraph_ELBO
from pyro.infer.tracegraph_elbo import _compute_elbo

from pyrolvm.inference.objectives.base import Estimate, as_estimate, estimate, kl_term


@estimate.register
def _tracegraph_elbo(
    objective: TraceGraph_ELBO, model: Callable, guide: Callable, args: tuple = (), kwargs: dict | None = None
) -> Estimate:
    bound: Any = 0.0
    surrogate: Any = 0.0
    kl: Any = 0.0
    for model_trace, guide_trace in objective._get_traces(model, guide, args, kwargs or {}):
        elbo, loss = _compute_elbo(model_trace, guide_trace)
        bound, surrogate = bound + elbo, surrogate + loss
        kl = kl + kl_term(model_trace, guide_trace)
    n = objective.num_particles
    return as_estimate(bound / n, surrogate / n, kl / n)
