"""The eager engine: Python runs every step. Slow, but it runs every program that Pyro runs."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.engine.problem import Problem
from pyrolvm.inference.engine.state import TrainingState
from pyrolvm.inference.program.noise import generator_state, kept_generators, set_generator_state


class EagerEngine:
    """Runs steps one by one with torch's own optimiser."""

    name = "eager"
    setup_seconds = 0.0

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.leaves = list(problem.program.parameters.values())
        if not self.leaves:
            raise ProgramError("the program has no parameters, so there is nothing to fit")
        self.optimizer = problem.optimizer.build(self.leaves)
        self._live: TrainingState | None = None

    def initial_state(self, random: dict[str, Tensor]) -> TrainingState:
        """The state before the first step: the program's parameters as they are now."""
        return self._state(0, random)

    def run(self, state: TrainingState, rows: Tensor) -> tuple[TrainingState, Tensor]:
        """As `Engine.run`; the new state's tensors are the program's own, updated in place."""
        self._adopt(state)
        program, device = self.problem.program, self.problem.program.device
        controls = self.problem.controls(state.step, len(rows))
        rows = rows.to(device)
        with program.scope(), kept_generators(device):
            set_generator_state(state.random, device)
            terms = [self._update(r, c) for r, c in zip(rows, controls.tolist(), strict=True)]
            random = generator_state(device)
        return self._state(state.step + len(rows), random), torch.stack(terms).cpu()

    def _update(self, rows: Tensor, controls: list[float]) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = controls[0]
        gradients, terms = self.problem.gradients(rows, controls[1:])
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient
        if self.problem.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.leaves, self.problem.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return terms

    def _state(self, step: int, random: dict[str, Tensor]) -> TrainingState:
        names = self.problem.program.parameters
        slots = {
            name: {k: v for k, v in self.optimizer.state[leaf].items() if isinstance(v, Tensor)}
            for name, leaf in names.items()
            if leaf in self.optimizer.state
        }
        self._live = TrainingState(self.problem.program.tensors(), slots, step, random)
        return self._live

    def _adopt(self, state: TrainingState) -> None:
        """Load `state` into the program and the optimiser, unless it is loaded."""
        if state is self._live:
            return
        self.problem.program.load(state.parameters)
        self.optimizer.state.clear()
        for name, leaf in self.problem.program.parameters.items():
            if name in state.optimizer:
                self.optimizer.state[leaf] = {k: v.clone() for k, v in state.optimizer[name].items()}
