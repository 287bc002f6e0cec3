"""`TraceGraph_ELBO`: score-function gradients with only downstream costs, and baselines.

Schulman et al. 2015, "Gradient estimation using stochastic computation graphs"; Mnih & Gregor 2014,
"Neural variational inference and learning in belief networks" (the baselines).
"""

from __future__ import annotations

from typing import Any

from pyro.infer.tracegraph_elbo import _compute_elbo
from pyro.poutine.trace_struct import Trace

from pyrolvm.inference.objectives.base import TraceObjective, kl_term


class DownstreamCosts(TraceObjective):
    """Pyro's `TraceGraph_ELBO`."""

    def parts(self, model_trace: Trace, guide_trace: Trace) -> tuple[Any, Any, Any]:
        """(bound, surrogate, KL) of one pair of traces."""
        return *_compute_elbo(model_trace, guide_trace), kl_term(model_trace, guide_trace)
