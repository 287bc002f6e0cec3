"""The eager engine: Python runs every step. Slow, but it runs every program that Pyro runs."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.engine.draws import by_inversion
from pyrolvm.inference.engine.entries import blank_slots, collected, is_per_row, places_of, put_back, taken
from pyrolvm.inference.engine.problem import Problem
from pyrolvm.inference.engine.state import TrainingState
from pyrolvm.inference.engine.watch import Watch
from pyrolvm.inference.program.noise import generator_state, kept_generators, set_generator_state


class EagerEngine:
    """Runs steps one by one with torch's own optimiser."""

    name = "eager"
    setup_seconds = 0.0

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        parameters = problem.program.parameters
        if not parameters:
            raise ProgramError("the program has no parameters, so there is nothing to fit")
        self.tables = {name: parameters[name] for name in problem.tables}
        self.slots = {name: blank_slots(problem.optimizer, table) for name, table in self.tables.items()}
        # of a table the optimiser holds the entries of a batch, which are exchanged in every step
        entries = {name: table[:1].detach().clone().requires_grad_() for name, table in self.tables.items()}
        self.leaves = parameters | entries
        self.optimizer = problem.optimizer.build(list(self.leaves.values()))
        self._live: TrainingState | None = None
        self._later: dict[str, dict[str, Tensor]] = {}

    def initial_state(self, random: dict[str, Tensor]) -> TrainingState:
        """The state before the first step: the program's parameters as they are now."""
        return self._state(0, random)

    def run(
        self, state: TrainingState, rows: Tensor, watch: Watch | None = None
    ) -> tuple[TrainingState, Tensor]:
        """As `Engine.run`; the new state's tensors are the program's own, updated in place."""
        self._adopt(state)
        program, device = self.problem.program, self.problem.program.device
        controls = self.problem.controls(state.step, len(rows))
        rows = rows.to(device)
        with program.scope(), kept_generators(device), by_inversion():
            set_generator_state(state.random, device)
            terms = []
            for i, (r, c) in enumerate(zip(rows, controls.tolist(), strict=True)):
                terms.append(self._update(r, c))
                if watch is not None:
                    watch.passed(state.step + i + 1)
            random = generator_state(device)
        return self._state(state.step + len(rows), random), torch.stack(terms).cpu()

    def _update(self, rows: Tensor, controls: list[float]) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = controls[0]
        gradients, terms = self.problem.gradients(rows, controls[1:], grow=True)
        if len(gradients) > len(self.leaves):
            self._grow()
        found = dict(zip(self.leaves, gradients, strict=True))
        places = places_of(rows) if self.tables else rows
        for name in self.tables:
            self._take(name, rows)
            if (gradient := found[name]) is not None:
                found[name] = collected(gradient, places)
        for name, leaf in self.leaves.items():
            leaf.grad = found[name]
        if self.problem.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.leaves.values(), self.problem.optimizer.clip_norm)
        for name in self.tables:
            if (gradient := self.leaves[name].grad) is not None:
                self.leaves[name].grad = gradient.index_select(0, places)
        self.optimizer.step()
        for leaf in self.leaves.values():  # as `zero_grad`, which also tells the profiler
            leaf.grad = None
        for name in self.tables:
            self._put_back(name, rows)
        return terms

    def _grow(self) -> None:
        """Take in the parameters that a branch of the program has made, with the state they had in a checkpoint."""
        for name, leaf in self.problem.program.parameters.items():
            if name not in self.leaves:
                self.leaves[name] = leaf
                self.optimizer.param_groups[0]["params"].append(leaf)
                if name in self._later:
                    self.optimizer.state[leaf] = {k: v.clone() for k, v in self._later[name].items()}

    def _take(self, name: str, rows: Tensor) -> None:
        """Give the optimiser the entries of `rows`, and of its slots."""
        leaf = self.leaves[name]
        leaf.data = self.tables[name].detach().index_select(0, rows)
        if self.optimizer.state.get(leaf):
            self.optimizer.state[leaf] |= taken(self.slots[name], rows)

    def _put_back(self, name: str, rows: Tensor) -> None:
        slots, state = self.slots[name], self.optimizer.state.get(self.leaves[name])
        if state:
            put_back(list(slots.values()), rows, [state[slot] for slot in slots])
        put_back([self.tables[name]], rows, [self.leaves[name]])

    def _state(self, step: int, random: dict[str, Tensor]) -> TrainingState:
        slots = {
            name: {k: v for k, v in self.optimizer.state[leaf].items() if isinstance(v, Tensor)}
            | (self.slots.get(name, {}))
            for name, leaf in self.leaves.items()
            if leaf in self.optimizer.state
        }
        self._live = TrainingState(self.problem.program.tensors(), slots, step, random)
        return self._live

    def _adopt(self, state: TrainingState) -> None:
        """Load `state` into the program and the optimiser, unless it is loaded."""
        if state is self._live:
            return
        self.problem.program.load(state.parameters, later=state.optimizer.keys() - self.leaves.keys())
        self._later = {name: own for name, own in state.optimizer.items() if name not in self.leaves}
        self.optimizer.state.clear()
        for name, leaf in self.leaves.items():
            if name in state.optimizer:
                self.optimizer.state[leaf] = {k: v.clone() for k, v in state.optimizer[name].items()}
        for name, table in self.tables.items():
            self.slots[name] = {
                k: v.clone() for k, v in state.optimizer.get(name, {}).items() if is_per_row(v, table)
            } or blank_slots(self.problem.optimizer, table)
