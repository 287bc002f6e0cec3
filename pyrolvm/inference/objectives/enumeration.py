"""`TraceEnum_ELBO`: discrete sites summed out exactly (Foerster et al. 2018, "DiCE").

What the model enumerates is marginalised inside the bound, so the KL is that of the guide's own
sites; where the guide itself enumerates, the split into likelihood and KL is not reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer import TraceEnum_ELBO
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.poutine.trace_struct import Trace

from pyrolvm.inference.objectives.base import Estimate, as_estimate, estimate, kl_term
from pyrolvm.inference.program.structure import sample_sites


@estimate.register
def _traceenum_elbo(
    objective: TraceEnum_ELBO, model: Callable, guide: Callable, args: tuple = (), kwargs: dict | None = None
) -> Estimate:
    bound: Any = 0.0
    kl: Any = 0.0
    for model_trace, guide_trace in objective._get_traces(model, guide, args, kwargs or {}):
        bound = bound + _compute_dice_elbo(model_trace, guide_trace)
        kl = kl + (float("nan") if _enumerates(guide_trace) else kl_term(model_trace, guide_trace))
    n = objective.num_particles
    return as_estimate(bound / n, -bound / n, kl / n)


def _enumerates(guide_trace: Trace) -> bool:
    keys = ("_enumerate_dim", "_enum_total")
    return any(key in site["infer"] for site in sample_sites(guide_trace) for key in keys)
