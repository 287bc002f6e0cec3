"""From what a user passes as `objective` to an `Objective` of the program's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from pyro.infer import (
    ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)

from pyrolvm.errors import SettingError, one_of
from pyrolvm.inference.objectives.base import Estimate, Objective
from pyrolvm.inference.objectives.concrete import Concrete
from pyrolvm.inference.objectives.disarm import DisARM
from pyrolvm.inference.objectives.enumeration import Enumeration
from pyrolvm.inference.objectives.foreign import (
    Differentiable,
    LossFunction,
    Recorded,
    TailAdaptive,
    WakeSleep,
)
from pyrolvm.inference.objectives.free_bits import FreeBits
from pyrolvm.inference.objectives.info import InfoELBO
from pyrolvm.inference.objectives.lax import LAX
from pyrolvm.inference.objectives.muprop import MuProp
from pyrolvm.inference.objectives.rebar import REBAR, RELAX
from pyrolvm.inference.objectives.renyi import PyroRenyi
from pyrolvm.inference.objectives.renyi import RenyiELBO as RenyiBound
from pyrolvm.inference.objectives.score import NVIL, REINFORCE
from pyrolvm.inference.objectives.trace import MeanField, TraceBound
from pyrolvm.inference.objectives.tracegraph import DownstreamCosts
from pyrolvm.inference.objectives.vimco import VIMCO
from pyrolvm.inference.objectives.weighted import ImportanceWeighted
from pyrolvm.inference.program.plain import PlainPair
from pyrolvm.inference.program.structure import Structure, refuse_bound

OBJECTIVES: dict[str, Callable[..., Any]] = {
    "trace": Trace_ELBO,
    "meanfield": TraceMeanField_ELBO,
    "tracegraph": TraceGraph_ELBO,
    "enum": TraceEnum_ELBO,
    "renyi": RenyiBound,
    "iwae": ImportanceWeighted,
    "info": InfoELBO,
    "free_bits": FreeBits,
    "reinforce": REINFORCE,
    "nvil": NVIL,
    "vimco": VIMCO,
    "muprop": MuProp,
    "disarm": DisARM,
    "rebar": REBAR,
    "relax": RELAX,
    "lax": LAX,
    "concrete": Concrete,
}
"""By name: what `fit(objective="trace")` and a model's `objective()` mean."""

KNOWN: dict[type[ELBO], Callable[[Any], Objective]] = {
    TraceMeanField_ELBO: MeanField,
    TraceGraph_ELBO: DownstreamCosts,
    TraceEnum_ELBO: Enumeration,
    RenyiELBO: PyroRenyi,
    ReweightedWakeSleep: WakeSleep,
    TraceTMC_ELBO: Differentiable,
    Trace_MMD: Differentiable,
    TraceTailAdaptive_ELBO: TailAdaptive,
    Trace_ELBO: TraceBound,
}
"""Pyro's objectives and our reading of them, the first that fits: the Jit forms are read as their plain ones."""
ESTIMATES = (
    "loss_and_grads",
    "differentiable_loss",
    "_differentiable_loss_particle",
    "_get_trace",
    "_get_traces",
)
"""The methods by which a class of a user's own changes what an objective of Pyro's estimates."""


def as_objective(elbo: Any) -> Objective:
    """An `Objective` as it is; Pyro's objects, and what else `SVI` takes as loss, read as one.

    Raises `SettingError` for anything else.
    """
    if isinstance(elbo, type):
        raise SettingError(f"objective is the class {elbo.__name__}: pass {elbo.__name__}()")
    if isinstance(elbo, Objective):
        return elbo
    for known, reading in KNOWN.items():
        if isinstance(elbo, known) and not _is_changed(type(elbo)):
            return reading(elbo)
    if isinstance(elbo, ELBO) and hasattr(elbo, "loss_and_grads"):
        return Recorded(elbo)
    if hasattr(elbo, "differentiable_loss"):
        return Differentiable(elbo)
    if callable(elbo):
        return LossFunction(elbo)
    raise SettingError(
        f"objective must be a Pyro ELBO object such as pyro.infer.Trace_ELBO(), or a function loss(model, guide), "
        f"not {elbo!r}"
    )


def _is_changed(kind: type) -> bool:
    """Whether a class outside of Pyro estimates otherwise than what it is derived from."""
    own = (c for c in kind.__mro__ if not c.__module__.startswith("pyro.infer"))
    return any(name in vars(c) for c in own for name in ESTIMATES)


def named(objective: Any) -> Any:
    """The ELBO that a name, or a pair (name, settings), means; anything else as it is.

    Raises `SettingError` for an unknown name or settings that it does not have.
    """
    name, settings = objective if isinstance(objective, tuple) else (objective, {})
    if not isinstance(name, str):
        return objective
    return OBJECTIVES[one_of("objective", name, OBJECTIVES)](**settings)


def prepare(objective: ELBO | str | tuple | None, structure: Structure) -> Objective:
    """A private copy of `objective` that knows the program's plates and so need not guess them."""
    objective = _default(structure) if objective is None else named(objective)
    if isinstance(objective, type):
        return as_objective(objective)  # raises
    summed_out = [s.name for s in structure.enumerated if not s.in_guide]
    sums = isinstance(objective, TraceEnum_ELBO | TraceTMC_ELBO) or getattr(objective, "sums_out", False)
    if summed_out and not sums:
        raise SettingError(
            f"the model asks for '{summed_out[0]}' to be summed out, which {type(objective).__name__} does not do "
            "(it would draw it from the prior): use TraceEnum_ELBO(), or give the guide a site for it"
        )
    if isinstance(objective, RenyiELBO | ImportanceWeighted):
        refuse_bound(structure, type(objective).__name__)
    objective = copy.copy(objective)
    if getattr(objective, "max_plate_nesting", 0) == float("inf"):
        vectorized = objective.vectorize_particles and objective.num_particles > 1
        objective.max_plate_nesting = structure.max_plate_nesting + int(vectorized)
    return as_objective(objective)


def _default(structure: Structure) -> ELBO:
    """Enumeration where sites ask for it; downstream costs and baselines for other discrete sites."""
    if structure.enumerated:
        return TraceEnum_ELBO()
    return TraceGraph_ELBO() if any(s.discrete for s in structure.sites) else Trace_ELBO()


def estimate(
    objective: Any,
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: dict | None = None,
    **controls: Any,
) -> Estimate:
    """One estimate of `objective` for plain functions, whose parameters are reached as Pyro reaches them."""
    return as_objective(objective).estimate(PlainPair(model, guide, args, kwargs), controls)
