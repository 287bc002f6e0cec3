"""`TraceEnum_ELBO`: discrete sites summed out exactly (Foerster et al. 2018, "DiCE").

What the model enumerates is marginalised inside the bound, so the KL is that of the guide's own
sites; where the guide itself enumerates, the split into likelihood and KL is not reported.
"""

from __future__ import annotations

from typing import Any

from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.poutine.trace_struct import Trace

from pyrolvm.inference.objectives.base import TraceObjective, kl_term
from pyrolvm.inference.program.structure import sample_sites


class Enumeration(TraceObjective):
    """Pyro's `TraceEnum_ELBO`."""

    def parts(self, model_trace: Trace, guide_trace: Trace) -> tuple[Any, Any, Any]:
        """(bound, surrogate, KL) of one pair of traces."""
        bound = _compute_dice_elbo(model_trace, guide_trace)
        kl = float("nan") if _enumerates(guide_trace) else kl_term(model_trace, guide_trace)
        return bound, -bound, kl


def _enumerates(guide_trace: Trace) -> bool:
    keys = ("_enumerate_dim", "_enum_total")
    return any(key in site["infer"] for site in sample_sites(guide_trace) for key in keys)
