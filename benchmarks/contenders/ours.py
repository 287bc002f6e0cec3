"""pyrolvm's engines, driven as `fit` drives them: chunks of steps, a copy of the state and a NaN check around each."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.contenders.base import Runner, UnavailableError
from benchmarks.rows import Case
from pyrolvm.data.arrays import as_batch
from pyrolvm.errors import PyrolvmError
from pyrolvm.inference.engine import Engine, Problem, choose_engine
from pyrolvm.inference.engine.optimizers import OptimizerSpec
from pyrolvm.inference.objectives import prepare
from pyrolvm.inference.program.checks import inspect_program
from pyrolvm.inference.program.noise import noise_state
from pyrolvm.inference.program.program import Program


def make_problem(case: Case) -> Problem:
    """What `fit` makes of a program before it chooses an engine."""
    batch = as_batch(case.data, device=case.device)
    program = Program(*case.row.pyro(case.start()), device=case.device)
    rows = case.rows(0, 1)[0]
    first = batch.take(rows) if case.row.batch_size is not None else batch
    program.initialise(first, case.seed)
    structure = inspect_program(program, first)
    return Problem(
        program,
        structure,
        prepare(case.row.elbo(), structure),
        OptimizerSpec(learning_rate=case.row.learning_rate),
        batch,
        minibatch=case.row.batch_size is not None,
        num_rows=case.num_rows,
    )


class Eager(Runner):
    """`pyrolvm.fit(..., engine="eager")`."""

    title = "pyrolvm eager"
    name = "eager"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.engine = self._choose(case)
        self._state = self.engine.initial_state(noise_state(case.seed, case.device))

    def _choose(self, case: Case) -> Engine:
        try:
            self._problem = make_problem(case)
            return choose_engine(self.name, self._problem, 10**6)[0]
        except PyrolvmError as error:
            raise UnavailableError(str(error)) from error

    def run(self, first: int, num_steps: int) -> Tensor:
        """As `Runner.run`."""
        if first != self._state.step:
            raise ValueError(f"step {first} does not follow on step {self._state.step}")
        good = self._state.clone()  # what fit would go back to
        self._state, terms = self.engine.run(self._state, self.case.plan.rows(first, num_steps))
        finite = [torch.isfinite(t).all() for t in self._state.parameters.values()]
        if not (bool(torch.stack(finite).all()) and bool(torch.isfinite(terms[:, 0]).all())):
            raise UnavailableError(f"not finite after step {good.step}")
        return terms[:, self._problem.terms.index(self.case.row.reported)]


class Compiled(Eager):
    """`pyrolvm.fit(..., engine="compiled")`."""

    title = "pyrolvm compiled"
    name = "compiled"
