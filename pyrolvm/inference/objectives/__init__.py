"""Objectives: a Pyro `ELBO` as a pure scalar of (parameters, batch, noise), without host syncs.

`estimate(objective, model, guide, args, kwargs)` returns an `Estimate`: the bound that is reported
and the surrogate whose gradient is taken, two names, never one. Pyro's own `Trace_ELBO`,
`TraceGraph_ELBO`, `TraceMeanField_ELBO`, `TraceEnum_ELBO` and `RenyiELBO` are accepted as they are.
"""

from pyrolvm.inference.objectives import enumeration, renyi, trace, tracegraph  # noqa: F401  (register)
from pyrolvm.inference.objectives.base import Estimate, estimate, prepare
from pyrolvm.inference.objectives.renyi import RenyiELBO

__all__ = ["Estimate", "RenyiELBO", "estimate", "prepare"]
