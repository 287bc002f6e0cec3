"""Where NaN began: the steps are repeated eagerly and every site is checked."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrolvm.controls import controlled
from pyrolvm.inference.engine.eager import EagerEngine
from pyrolvm.inference.engine.problem import Problem
from pyrolvm.inference.engine.state import TrainingState
from pyrolvm.inference.program.noise import kept_generators, set_generator_state
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import sample_sites


def explain(problem: Problem, good: TrainingState, rows: Tensor) -> str:
    """The first step, and the site or parameter, that is not finite, as a sentence.

    Parameters
    ----------
    good : TrainingState
        The last state that is finite.
    rows : tensor [K, batch]
        The rows of the K steps after it.
    """
    engine = EagerEngine(problem)
    state = good.clone()
    for row in rows:
        before = state.clone()
        state, terms = engine.run(state, row.unsqueeze(0))
        if not torch.isfinite(terms[0, 0]):
            return (
                f"the bound is {terms[0, 0].item()} at step {state.step}: {_bad_site(problem, before, row)}"
            )
        if name := state.not_finite(good):
            return f"the parameter '{name}' is not finite after step {state.step} (its gradient was not)"
    return f"the bound or a parameter is not finite between steps {good.step + 1} and {state.step}"


def skip_bad_steps(problem: Problem, good: TrainingState, rows: Tensor) -> tuple[TrainingState, Tensor]:
    """Repeat the steps `rows` [K, batch] from `good`, without the updates that are not finite.

    Returns
    -------
    state : TrainingState
        After the K steps.
    terms : tensor [K, terms]
        In nats per datum, of all steps.
    """
    engine = EagerEngine(problem)
    state, kept = good, []
    for row in rows:
        before = state.clone()
        state, terms = engine.run(state, row.unsqueeze(0))
        kept.append(terms)
        if state.not_finite(good) or not torch.isfinite(terms[0, 0]):
            # the noise advances, so that the next step differs
            state = TrainingState(before.parameters, before.optimizer, before.step + 1, state.random)
            problem.program.load(state.parameters)
    return state, torch.cat(kept)


def _bad_site(problem: Problem, state: TrainingState, rows: Tensor) -> str:
    program, device = problem.program, problem.program.device
    program.load(state.parameters)
    rows = rows.to(device)
    if (sharing := problem.sharing) is not None:
        problem, rows = sharing.local, rows.index_select(0, sharing.places)
    batch = problem.batch(rows)
    with problem.program.scope(batch), kept_generators(device), torch.no_grad():
        set_generator_state(state.random, device)
        with controlled(problem.values_at(state.step + 1)):
            model, guide = Pair(program, problem.structure, batch, "train").draw()
        traces = [("guide", guide), ("model", model)]
        for role, trace in traces:
            for site in sample_sites(trace):
                value = site["value"]
                if not torch.isfinite(value).all():
                    return f"site '{site['name']}' of the {role} took a value that is not finite"
                if not torch.isfinite(site["fn"].log_prob(value)).all():
                    return f"site '{site['name']}' of the {role} has a log-density that is not finite"
    return "its terms are finite one by one but not together"
