"""Losses of Pyro, and of users, of which more or less is known: each is taken as `pyro.infer.SVI` takes it.

    WakeSleep      `ReweightedWakeSleep`: two losses, of model and guide
    TailAdaptive   `TraceTailAdaptive_ELBO`: a gradient without a bound; the ELBO of the same draws is reported
    Differentiable an object with `differentiable_loss`, such as `TraceTMC_ELBO` and `Trace_MMD`
    Recorded       an object with `loss_and_grads`: what it calls backward() on
    LossFunction   a callable loss(model, guide, *args, **kwargs), such as `EnergyDistance()`

What a loss is beside a likelihood and a KL is not known: those columns are nan.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from pyro.infer import Trace_MMD
from torch import Tensor

from pyrolvm.errors import ProgramError, SettingError
from pyrolvm.inference.objectives.base import Estimate, Objective, TraceObjective, kl_term
from pyrolvm.inference.program.pair import Pair
from pyrolvm.processes import sharing


class Foreign(Objective):
    """A loss of which nothing is known but its value and its gradient."""

    def __init__(self, loss: Any) -> None:
        self.elbo = loss

    def settings(self) -> dict[str, Any]:
        """Those of the object; of a function its name."""
        name = getattr(self.elbo, "__qualname__", type(self.elbo).__name__)
        own = Objective.settings(self.elbo) if hasattr(self.elbo, "__dict__") else {}
        return {"name": name, **own}

    def estimate(self, pair: Pair, controls: Mapping[str, Any]) -> Estimate:
        """The loss is both the surrogate and minus the bound."""
        program, batch = pair.program, pair.batch
        value, surrogate = self.losses(program.model, program.guide, batch.args, dict(batch.kwargs))
        value = torch.as_tensor(value, dtype=program.dtype, device=program.device).detach()
        unknown = torch.full_like(value, float("nan"))
        return Estimate(-value, surrogate, {"log_likelihood": unknown, "kl": unknown})

    def losses(self, model: Any, guide: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        """(the loss that is reported, the one whose gradient is taken)."""
        raise NotImplementedError


class LossFunction(Foreign):
    """A callable that `SVI` takes as `loss`."""

    def losses(self, model: Any, guide: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        """Its value, twice."""
        found = self.elbo(model, guide, *args, **kwargs)
        if not isinstance(found, Tensor):
            raise ProgramError(
                f"the loss returns {type(found).__name__}, through which no gradient passes: return a tensor, as "
                "Trace_ELBO().differentiable_loss does"
            )
        return found, found


class Differentiable(Foreign):
    """One of Pyro's objects with a differentiable loss."""

    def losses(self, model: Any, guide: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        """Its value, twice."""
        if sharing().count > 1 and isinstance(self.elbo, Trace_MMD):
            raise SettingError(
                "Trace_MMD compares all rows of a batch with each other, and each process has its own rows alone: take "
                "objective='info', or pass parallel=False"
            )
        found = self.elbo.differentiable_loss(model, guide, *args, **kwargs)
        return found, found


class WakeSleep(Foreign):
    """Pyro's `ReweightedWakeSleep`: the model's loss is reported, and the guide's is trained with it."""

    def losses(self, model: Any, guide: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        """Wake-theta, and its sum with the guide's loss."""
        theta, phi = self.elbo._loss(model, guide, args, kwargs)
        return theta, theta + phi


class Recorded(Foreign):
    """An object of the user's own: what it would call backward() on is what descends."""

    def losses(self, model: Any, guide: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        """What `loss_and_grads` returns (the first of a tuple), and the sum of what it goes back from."""
        parts: list[Tensor] = []
        usual, here = Tensor.backward, threading.get_ident()

        def backward(root: Tensor, *options: Any, **named: Any) -> None:
            if threading.get_ident() != here:  # another thread's own training
                return usual(root, *options, **named)
            parts.append(root)

        with mock.patch.object(Tensor, "backward", backward):
            value = self.elbo.loss_and_grads(model, guide, *args, **kwargs)
        first = value[0] if isinstance(value, tuple) else value
        if not parts and hasattr(self.elbo, "differentiable_loss"):  # no parameter stood in its traces
            parts = [self.elbo.differentiable_loss(model, guide, *args, **kwargs)]
        return first, sum(parts[1:], parts[0]) if parts else torch.zeros(())


class TailAdaptive(TraceObjective):
    """Pyro's `TraceTailAdaptive_ELBO`."""

    def parts(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any, Any]:
        """(ELBO, surrogate, KL) of all particles."""
        _, surrogate = self.elbo._differentiable_loss_particle(model_trace, guide_trace)  # type: ignore[attr-defined]
        bound = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
        return bound, surrogate, kl_term(model_trace, guide_trace)
