"""The bound on data that are not trained on, with the same noise every time it is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyrolvm.controls import Schedule, value_of
from pyrolvm.data.batch import Batch
from pyrolvm.inference.engine.optimizers import OptimizerSpec
from pyrolvm.inference.engine.problem import KL_WEIGHT, Problem
from pyrolvm.inference.engine.sharing import Weighed
from pyrolvm.inference.objectives import prepare
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.rows_plate import find_data_plate
from pyrolvm.processes import ALONE
from pyrolvm.seeds import Purpose, derived_seed

CHUNK_ROWS = 4096


class HeldOutBound:
    """The objective's bound per datum of held-out `data`, in nats, under common random numbers.

    Rows weigh as the training data's do, so that the value compares with the bound that is trained: with
    global latents m shared by N training rows, and held-out rows y_1..y_M,

        (1/M) sum_i E_q [log p(y_i, z_i | m) - log q(z_i)] - KL(q(m) || p(m)) / N.
    """

    num_rows: int
    """The held-out rows."""

    def __init__(self, problem: Problem, data: Batch, seed: int) -> None:
        self.seed = seed
        self.problem = replace(problem, data=data, minibatch=True, schedules=_final(problem))
        self.num_rows = data.num_rows or 1
        whole = torch.arange(data.num_rows, device=problem.program.device)
        has_plate = problem.structure.data_plate is not None
        # those who share the steps share the held-out rows
        self.processes = problem.processes if problem.sharing is not None and has_plate else ALONE
        whole = whole[self.processes.share(len(whole))]
        self.chunks = list(whole.split(CHUNK_ROWS)) if has_plate else [whole]
        sizes = {len(rows): rows for rows in self.chunks if len(rows)}
        self.problems = {n: self._counted(rows) if has_plate else self.problem for n, rows in sizes.items()}

    @torch.no_grad()
    def __call__(self, *stream: int) -> float:
        """The bound, nats per datum; `stream`: the number of another noise."""
        program, total = self.problem.program, 0.0
        mine = () if self.processes.is_first else (0, self.processes.rank)
        seed = derived_seed(self.seed, Purpose.HELD_OUT, *stream, *mine)
        with seeded(seed, program.device), program.scope(mode="predict"):
            for rows in self.chunks:
                total += self._bound(rows) * len(rows) if len(rows) else 0.0
        return sum(self.processes.gather(total)) / self.num_rows

    def _bound(self, rows: Tensor) -> float:
        """Of one chunk, nats per datum."""
        problem = self.problems[len(rows)]
        plate = problem.structure.data_plate
        if plate is None or plate.full_size != len(rows) or not problem.structure.global_latents:
            return float(problem.loss(rows).terms[0])
        with Weighed(plate.name, problem.num_rows / len(rows)):
            return float(problem.loss(rows).terms[0]) * len(rows) / problem.num_rows

    @torch.no_grad()
    def _counted(self, rows: Tensor) -> Problem:
        """The problem whose plate counts as many rows as the program's plate does for a chunk of this size.

        A plate that carries N counts N whatever the chunk; one of the batch's own length counts the chunk.
        """
        problem = self.problem
        batch = problem.batch(rows)
        with seeded(self.seed, problem.program.device):
            trace = Pair(problem.program, problem.structure, batch).model()
        own = problem.structure.data_plate
        plate = find_data_plate(trace, len(rows), named=(own.name,) if own else ())
        return replace(problem, structure=replace(problem.structure, data_plate=plate))


def bound_of(fitted: FittedModel, data: Batch, seed: int = 0, objective: Any = None) -> float:
    """The bound of a fit's parameters on `data`, weighed as held-out data are: nats per datum.

    `objective`: as passed to `fit`; by default the model's own.
    """
    objective = prepare(chosen_or_usual(objective, fitted.program), fitted.structure)
    problem = Problem(
        fitted.program, fitted.structure, objective, OptimizerSpec(), data, True, fitted.num_rows,
        schedules=dict(fitted.program.controls),
    )  # fmt: skip
    return HeldOutBound(problem, replace(data, rows=None, total=None), seed)()


def chosen_or_usual(objective: Any, program: Program) -> Any:
    """The objective as passed; by default that which the model names as its own, None if it names none."""
    usual = program.contract.objective() if program.contract is not None else None
    return usual if objective is None else objective


def _final(problem: Problem) -> dict[str, Schedule]:
    """The controls as they are at the end of the run, without a weight of the KL: what is judged is the bound."""
    schedules = {k: v for k, v in problem.schedules.items() if k != KL_WEIGHT}
    return {name: value_of(name, schedule, 1.0) for name, schedule in schedules.items()}
