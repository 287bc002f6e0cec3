"""Fits on fixed draws: whether one is asked for or wins, the fit itself, and the verdict by importance weights.

`optimizer="auto"` takes it for a Gaussian AutoGuide of few latents on the whole data, where nothing is given that only
stochastic steps have: then the optimum is found to a gradient tolerance, and its error is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pyrolvm.errors import SettingError
from pyrolvm.inference.engine import TrainingState
from pyrolvm.inference.log_joint import Solution, Start, declined, declined_or_start, judge_guide, solve
from pyrolvm.inference.log_joint import judge as weigh
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.posterior.convergence import LEAST_STEPS, Convergence
from pyrolvm.inference.posterior.history import History
from pyrolvm.inference.program.noise import noise_state
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.training import averaged
from pyrolvm.inference.training.averaged import Averaged
from pyrolvm.inference.training.checkpoint import Checkpoint
from pyrolvm.inference.training.loop import Callback, Report
from pyrolvm.inference.training.setup import Setup

NAME = "lbfgs"
ELBOS = (None, "trace", "meanfield", "enum")
MOST_LATENTS, MOST_ROWS = 600, 20_000
"""Numbers in all latents and rows of the data up to which "auto" takes fixed draws, and starts are looked for."""
WEIGHED_ROWS = 5000
"""Rows of the data up to which a stochastic run is judged by weights of 4,000 draws."""


def choose(
    optimizer: Any, setup: Setup, given: dict[str, Any], seed: int
) -> tuple[Start | Averaged | None, str]:
    """(start of a fit on fixed draws, the reason for it); None where stochastic steps are taken.

    What is no Gaussian AutoGuide alone is fitted here, since whether it can be is seen at the end only.

    `given`: the settings that only stochastic steps have, those at their defaults left out.

    Raises
    ------
    SettingError
        `optimizer="lbfgs"` for a pair or with a setting that has no fixed draws.
    """
    if optimizer not in ("auto", NAME):
        return None, ""
    asked = optimizer == NAME
    if given:
        return _refused(asked, f"{', '.join(given)} is of stochastic steps, and optimizer='lbfgs' takes none")
    pair = pair_of(setup)
    if not asked and not is_small(setup, MOST_ROWS):
        return None, ""
    found: Start | Averaged | str
    if declined(pair) is None:
        found = declined_or_start(pair, seed)
        why = "a Gaussian guide of few latents on the whole data"
    else:
        why = "few parameters and latents on the whole data"
        found = averaged.declined(pair) or averaged.maximise(pair, setup.problem, seed)
    if isinstance(found, str):
        return _refused(asked, found)
    return found, "asked for" if asked else why


def _refused(asked: bool, reason: str) -> tuple[None, str]:
    if asked:
        raise SettingError(f"optimizer='lbfgs' cannot fit this: {reason}; leave optimizer out")
    return None, ""


def pair_of(setup: Setup) -> Pair:
    """The pair on the whole data."""
    batch = setup.batch.of(setup.batch.num_rows or 1)
    return Pair(setup.problem.program, setup.problem.structure, batch)


def is_small(setup: Setup, most_rows: int) -> bool:
    """Whether latents and rows are few, and the rows in memory."""
    if setup.streamed is not None:
        return False
    latents = setup.problem.structure.latents
    numbers = sum(math.prod(s.batch_shape) * math.prod(s.event_shape) for s in latents)
    return numbers <= MOST_LATENTS and setup.batch.num_rows <= most_rows


def place(setup: Setup, seed: int) -> LogJoint | None:
    """Start a Gaussian AutoGuide of few latents at the best mode, for stochastic steps; the log joint of all data."""
    if is_small(setup, MOST_ROWS):
        start = declined_or_start(pair_of(setup), seed)
        if isinstance(start, Start):
            start.place(pair_of(setup))
            return start.log_joint
    return None


def run(
    setup: Setup, start: Start | Averaged, seed: int, checkpoint: Checkpoint, callbacks: Sequence[Callback]
) -> tuple[Solution | Averaged, History]:
    """Solve, and record every iteration: nats per datum."""
    solution = start if isinstance(start, Averaged) else solve(pair_of(setup), start, seed)
    history = History(("elbo",), ("gradient_norm", "num_draws"))
    rows = torch.tensor(
        [[r["elbo"], r["gradient_norm"], r["num_draws"]] for r in solution.history], dtype=torch.float64
    ).reshape(-1, 3)
    if len(rows):
        rows[:, 0] /= setup.problem.structure.num_data
        history.append(0, rows[:, :1], rows[:, 1:], float(solution.history[-1]["seconds"]))
    program = setup.problem.program
    state = TrainingState(program.tensors(), {}, len(rows), noise_state(seed, program.device))
    for callback in callbacks:
        callback(Report(state.step, state.step, history, state))
    checkpoint.keep(state, history, None)
    return solution, history


def verdict_of(setup: Setup, solution: Solution | Averaged, seed: int) -> Convergence:
    """Of a fit on fixed draws."""
    if isinstance(solution, Averaged):
        found = judge_guide(solution.numbers, solution.drawn)
    else:
        found = weigh(pair_of(setup), solution, seed)
    return Convergence(found.converged, found.sentence, _per_datum(found.numbers, setup))


def weighed(
    setup: Setup, so_far: Convergence, steps: int, seed: int, log_joint: LogJoint | None = None
) -> Convergence:
    """`so_far`, the verdict of a stochastic run, with that of importance weights where they are cheap.

    `log_joint` is what `place` gave: a model that it places learns nothing, so that the steps have not changed it.
    Weights that move the answers contradict a bound that rises no more; weights that leave them say what a noisy bound
    cannot.
    """
    if so_far.converged is False or steps < LEAST_STEPS or not is_small(setup, WEIGHED_ROWS):
        return so_far
    pair = pair_of(setup)
    if declined(pair) is not None or setup.problem.structure.points:
        return so_far
    found = weigh(pair, seed=seed, log_joint=log_joint)
    numbers = so_far.numbers | _per_datum(found.numbers, setup)
    if found.converged and so_far.converged:
        sentence = f"{so_far.sentence}; {found.sentence.partition(': ')[2]}"
    else:
        sentence = found.sentence
    return Convergence(found.converged, sentence, numbers)


def _per_datum(numbers: dict[str, float], setup: Setup) -> dict[str, float]:
    found = {k: float(v) for k, v in numbers.items() if math.isfinite(v)}
    if "elbo" in found:
        found["elbo"] /= setup.problem.structure.num_data
    return found
