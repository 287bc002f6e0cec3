"""Estimates of the bound at given parameters, on the same rows and noise, so that their differences are precise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from pyrolvm.data.plan import BatchPlan
from pyrolvm.inference.engine import Engine, Problem, TrainingState
from pyrolvm.inference.training.evaluation import HeldOutBound

RACE_STEPS = 60
"""Of each rate that is tried."""
ESTIMATES = 24
"""M, noisy bounds of one estimate: steps at rate zero."""
HELD_OUT_PASSES, FEW_ROWS = 4, 1000
"""Passes over held-out data of at most so many rows; of more, one."""


@dataclass
class Bounds:
    """Noisy bounds of a run, by its own engine: steps at rate zero.

    Parameters
    ----------
    problem, engine, plan
        Of the run.
    random : dict
        The state of the generators that every estimate begins with.
    held_out : HeldOutBound, optional
        The bound of held-out data, which is then estimated instead.
    first_step : int
        Where schedules are at their ends.
    """

    problem: Problem
    engine: Engine
    plan: BatchPlan
    random: dict[str, Tensor]
    held_out: HeldOutBound | None = None
    first_step: int = 0

    def __call__(self, state: TrainingState, parameters: dict[str, Tensor]) -> np.ndarray:
        """Noisy bounds [M] at `parameters`, nats per datum. `state` must not share memory with the program's."""
        if self.held_out is not None:
            self.problem.program.load(self.whole(parameters))
            passes = HELD_OUT_PASSES if self.held_out.num_rows <= FEW_ROWS else 1
            return np.array([self.held_out(i) for i in range(passes)])
        self.problem.optimizer.still = True
        try:
            step = max(state.step, self.first_step)
            parameters = self.problem.program.tensors() | parameters  # engines copy what they take in
            still = TrainingState(parameters, state.optimizer, step, self.random)
            _, terms = self.engine.run(still, self.plan.kept(ESTIMATES))
        finally:
            self.problem.optimizer.still = False
        return terms[:, 0].double().numpy().copy()

    def ready(self, state: TrainingState) -> TrainingState:
        """The start of a race: after one step at rate zero, which makes the slots of the optimiser.

        The first step of a run is eager; here all rates have it in common. A class of the user's own may take its
        slots from the rate, and begins anew at each.
        """
        if not isinstance(self.problem.optimizer.optimizer, str):
            return replace(state.clone(), step=self.first_step)
        self.problem.optimizer.still = True
        try:
            # with the controls as they will be in the end
            start = replace(state.clone(), step=self.first_step)
            return self.engine.run(start, self.plan.kept(1))[0].clone()
        finally:
            self.problem.optimizer.still = False

    def raced(self, rate: float, ready: TrainingState) -> float:
        """The bound at the end of a few steps at this rate; -inf where it is lost."""
        self.problem.optimizer.learning_rate = rate
        start = ready.clone()
        end, terms = self.engine.run(start, self.plan.kept(RACE_STEPS))
        score = float(terms[-RACE_STEPS // 4 :, 0].mean())
        return score if end.not_finite(start) is None and math.isfinite(score) else -math.inf

    def whole(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """A copy, with what a branch of the program has made since."""
        return _copied(self.problem.program.tensors() | parameters)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in tensors.items()}
