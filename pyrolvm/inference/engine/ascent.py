"""Approximate coordinate ascent on a fixed set of draws: the guide to convergence, then a step of the model, in turn.

With noise e_1, ..., e_S drawn once, the bound is a function of the guide's parameters phi and the model's theta,

    L(theta, phi) = (1/S) sum_s log p_theta(x, z_s) - log q_phi(z_s),    z_s = z(e_s, phi),

and the steps of a run take turns: the odd ones maximise over phi at the present theta, the even ones raise L over theta
at that phi. Both are torch's own L-BFGS with a line search, on all data. A step that would lower L leaves its
parameters as they were, so that L never falls. Parameters that the model reads (a prior made of the encoder, say) are
the model's.

It is variational EM (Neal and Hinton 1998), approximate because of the draws and of the finite steps.

R. M. Neal and G. E. Hinton, "A view of the EM algorithm that justifies incremental, sparse, and other variants", 1998.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from torch import Tensor

from pyrolvm.errors import ProgramError, SettingError
from pyrolvm.inference.engine.problem import Problem
from pyrolvm.inference.engine.state import TrainingState
from pyrolvm.inference.engine.watch import Watch
from pyrolvm.inference.program.noise import generator_state, kept_generators, set_generator_state
from pyrolvm.inference.program.structure import sample_sites
from pyrolvm.plates import data_rows

LEAST_DRAWS = 4
"""With fewer fixed draws a guide can fit them instead of the posterior: of one draw the bound has no maximum."""
GUIDE_ITERATIONS, MODEL_ITERATIONS = 100, 10
"""Of L-BFGS: the most between two looks at whether the guide has converged, and those of a step of the model."""
MOST_LOOKS = 20
CONVERGED = 1e-6
"""Nats per datum that `GUIDE_ITERATIONS` must gain for the guide to go on."""


class CoordinateAscent:
    """An engine whose odd steps fit the guide and whose even steps improve the model.

    Parameters
    ----------
    problem : Problem
        With the data whole, and an objective of several draws.

    Raises
    ------
    SettingError
        The data are taken in minibatches, or the objective has too few draws.
    ProgramError
        A guide site is not reparameterised, so that the bound on fixed draws has another gradient.
    """

    name = "eager"
    setup_seconds = 0.0

    def __init__(self, problem: Problem) -> None:
        if problem.minibatch:
            raise SettingError("coordinate ascent takes the data whole: leave batch_size out")
        self.problem, self.note = problem, "coordinate ascent by L-BFGS, run eagerly: asked for"
        self.model, self.guide = _halves(problem)

    def initial_state(self, random: dict[str, Tensor]) -> TrainingState:
        """The state before the first step; `random` is the noise of all of them."""
        return TrainingState(self.problem.program.tensors(), {}, 0, random)

    def run(
        self, state: TrainingState, rows: Tensor, watch: Watch | None = None
    ) -> tuple[TrainingState, Tensor]:
        """As `Engine.run`."""
        program = self.problem.program
        program.load(state.parameters)
        terms = []
        for i, step_rows in enumerate(rows.to(program.device)):
            guide_turn = (state.step + i) % 2 == 0
            with program.scope(), self._fixed(state.random):
                terms.append(self._turn(self.guide if guide_turn else self.model, step_rows, guide_turn))
            if watch is not None:
                watch.passed(state.step + i + 1)
        return TrainingState(program.tensors(), {}, state.step + len(rows), state.random), torch.stack(terms)

    def _turn(self, leaves: list[Tensor], rows: Tensor, to_convergence: bool) -> Tensor:
        bound, terms = self._at(rows)
        if not leaves:
            return terms
        iterations, looks = (GUIDE_ITERATIONS, MOST_LOOKS) if to_convergence else (MODEL_ITERATIONS, 1)
        for _ in range(looks):
            before, (last, last_terms) = [leaf.detach().clone() for leaf in leaves], (bound, terms)
            self._climb(leaves, rows, iterations)
            bound, terms = self._at(rows)
            if not bound >= last:  # nor if it is not finite
                with torch.no_grad():
                    for leaf, value in zip(leaves, before, strict=True):
                        leaf.copy_(value)
                return last_terms
            if bound - last < CONVERGED:
                break
        return terms

    def _climb(self, leaves: list[Tensor], rows: Tensor, iterations: int) -> None:
        optimizer = torch.optim.LBFGS(
            leaves,
            max_iter=iterations,
            tolerance_grad=1e-9,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )
        # in data, not per datum: the first step of L-BFGS is as long as the gradient is large
        scale = max(1, self.problem.structure.num_data)

        def closure() -> Tensor:
            set_generator_state(self._random, self.problem.program.device)
            loss = self.problem.loss(rows).surrogate * scale
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
            return loss.detach()

        optimizer.step(closure)
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _at(self, rows: Tensor) -> tuple[float, Tensor]:
        """The bound at the fixed draws, and all terms, nats per datum."""
        set_generator_state(self._random, self.problem.program.device)
        terms = self.problem.loss(rows).terms.cpu()
        return float(terms[0]), terms

    @contextmanager
    def _fixed(self, random: dict[str, Tensor]) -> Iterator[None]:
        self._random = random
        with kept_generators(self.problem.program.device):
            yield


def _halves(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """(parameters that the model reads, the others)."""
    program, batch = problem.program, problem.data
    rows = torch.arange(problem.num_rows, device=program.device)
    before = generator_state(program.device)
    with (
        program.untouched(),
        program.scope(),
        kept_generators(program.device),
        data_rows(problem.num_rows, rows),
    ):
        set_generator_state(before, program.device)
        with torch.no_grad():
            guide = pyro.poutine.trace(program.guide).get_trace(*batch.args, **batch.kwargs)
        for site in sample_sites(guide):
            if not getattr(site["fn"], "has_rsample", False) and not site["is_observed"]:
                raise ProgramError(
                    f"the guide's site '{site['name']}' is not reparameterised, so that the bound on fixed draws does "
                    "not have the gradient that is followed: train jointly (leave alternate out)"
                )
        model = pyro.poutine.trace(pyro.poutine.replay(program.model, trace=guide))
        total = torch.as_tensor(model.get_trace(*batch.args, **batch.kwargs).log_prob_sum())
        leaves = list(program.parameters.values())
        found = (
            torch.autograd.grad(total, leaves, allow_unused=True)
            if total.requires_grad
            else [None] * len(leaves)
        )
    parts = zip(leaves, found, strict=True)
    read = {id(leaf) for leaf, gradient in parts if gradient is not None}
    return [p for p in leaves if id(p) in read], [p for p in leaves if id(p) not in read]
