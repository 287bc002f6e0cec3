"""Objectives: bounds for any Pyro program, by draws and named terms, without host syncs.

`estimate(pair, controls)` returns an `Estimate`: the bound that is reported and the surrogate whose gradient is taken,
two names, never one. Pyro's own `Trace_ELBO`, `TraceGraph_ELBO`, `TraceMeanField_ELBO`, `TraceEnum_ELBO` and
`RenyiELBO` are accepted as they are.
"""

from pyrolvm.inference.objectives.base import Estimate, Objective
from pyrolvm.inference.objectives.choice import OBJECTIVES, as_objective, estimate, named, prepare
from pyrolvm.inference.objectives.concrete import Concrete
from pyrolvm.inference.objectives.disarm import DisARM
from pyrolvm.inference.objectives.free_bits import FreeBits
from pyrolvm.inference.objectives.info import InfoELBO
from pyrolvm.inference.objectives.lax import LAX
from pyrolvm.inference.objectives.mmd import mmd
from pyrolvm.inference.objectives.muprop import MuProp
from pyrolvm.inference.objectives.rebar import REBAR, RELAX
from pyrolvm.inference.objectives.renyi import RenyiELBO
from pyrolvm.inference.objectives.score import NVIL, REINFORCE
from pyrolvm.inference.objectives.vimco import VIMCO
from pyrolvm.inference.objectives.weighted import ImportanceWeighted

__all__ = [
    "LAX",
    "NVIL",
    "OBJECTIVES",
    "REBAR",
    "REINFORCE",
    "RELAX",
    "VIMCO",
    "Concrete",
    "DisARM",
    "Estimate",
    "FreeBits",
    "ImportanceWeighted",
    "InfoELBO",
    "MuProp",
    "Objective",
    "RenyiELBO",
    "as_objective",
    "estimate",
    "mmd",
    "named",
    "prepare",
]
