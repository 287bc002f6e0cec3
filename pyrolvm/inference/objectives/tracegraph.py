"""`TraceGraph_ELBO`: score-function gradients with only downstream costs, and baselines.

Schulman et al. 2015, "Gradient estimation using stochastic computation graphs"; Mnih & Gregor 2014,
"Neural variational inference and learning in belief networks" (the baselines).
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pyro
import pyro.infer.tracegraph_elbo as pyros
import torch
from pyro.ops.provenance import detach_provenance
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyrolvm.inference.objectives.base import TraceObjective, kl_term
from pyrolvm.inference.objectives.own import Made

AVERAGE = "use_decaying_avg_baseline"
_construct = pyros._construct_baseline


class DownstreamCosts(TraceObjective):
    """Pyro's `TraceGraph_ELBO`.

    The averages of `use_decaying_avg_baseline` are buffers of the objective's own, and so stand in checkpoints: one per
    site, of the shape of its costs.
    """

    def __init__(self, elbo: pyro.infer.ELBO) -> None:
        super().__init__(elbo)
        self.averages = Made()

    def parts(self, model_trace: Trace, guide_trace: Trace) -> tuple[Any, Any, Any]:
        """(bound, surrogate, KL) of one pair of traces."""
        with mock.patch.object(pyros, "_construct_baseline", self._baseline):
            found = pyros._compute_elbo(model_trace, guide_trace)
        self.averages.settle()
        return *found, kl_term(model_trace, guide_trace)

    def _baseline(self, node: str, site: Any, cost: Tensor) -> tuple[bool, Any, Any]:
        """As Pyro's, which keeps the average as a parameter that is replaced in every step.

        average <- (1 - beta) cost + beta average
        """
        options = site["infer"].get("baseline", {})
        if not options.get(AVERAGE):
            return _construct(node, site, cost)
        others = {k: v for k, v in options.items() if k not in (AVERAGE, "baseline_beta")}
        rest = dict(site, infer={**site["infer"], "baseline": others})
        used, loss, baseline = _construct(node, rest, cost)
        fresh = node not in self.averages.made
        costs = detach_provenance(cost).detach()
        kept: Any = self.averages.get(node, lambda: _Average(costs), costs)
        average: Tensor = kept.value
        if average.shape != costs.shape:  # rows held out: their bound has no use for a baseline
            return used, loss, baseline
        old, beta = average.clone(), options.get("baseline_beta", 0.90)
        if torch.is_grad_enabled() and not fresh:
            average.copy_((1 - beta) * costs + beta * old)
        baseline = baseline + old
        return True, torch.pow(costs - baseline, 2.0).sum() if used else loss, baseline


class _Average(nn.Module):
    """A decaying average of the costs of a site, from 0."""

    value: Tensor

    def __init__(self, cost: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros_like(cost))
