"""Quasi-Newton ascent of a function of one vector: scipy's L-BFGS-B, made to step back from where the function ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

MEMORY = 20
"""Pairs that L-BFGS keeps."""
ITERATIONS, EVALUATIONS = 400, 1500
STEP_BACK = 1e3
"""Nats, relative to the largest loss so far, that a point counts as where the function is not finite: a number that
line searches can interpolate."""

Function = Callable[[Tensor], tuple[float, Tensor]]


@dataclass(frozen=True)
class Step:
    """A point [dim] on the way up, the value there and the gradient [dim]."""

    point: Tensor
    value: float
    slope: Tensor


@dataclass(frozen=True)
class Ascent:
    """The steps of a climb, the last one its end; `flat` if the gradient is below the tolerance there."""

    steps: list[Step]
    flat: bool
    evaluations: int

    @property
    def end(self) -> Step:
        """The last step."""
        return self.steps[-1]


def climb(
    function: Function,
    start: Tensor,
    *,
    gradient_tolerance: float = 1e-4,
    iterations: int = ITERATIONS,
    evaluations: int = EVALUATIONS,
) -> Ascent:
    """Maximise `function` (value and gradient) from `start` [dim] until the gradient is below the tolerance."""
    seen: dict[bytes, Step] = {}
    steps: list[Step] = []
    worst = -math.inf

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal worst
        point = torch.from_numpy(x.copy())
        value, slope = function(point)
        if not (math.isfinite(value) and bool(slope.isfinite().all())):
            return max(worst, 0.0) + STEP_BACK * max(1.0, abs(worst)), np.zeros_like(x)
        worst = max(worst, -value)
        seen[x.tobytes()] = Step(point, value, slope)
        return -value, -slope.numpy()

    def passed(x: np.ndarray) -> None:
        if (step := seen.get(np.asarray(x).tobytes())) is not None:
            steps.append(step)
        seen.clear()

    loss(start.numpy())
    if not seen:
        return Ascent([Step(start, -math.inf, torch.zeros_like(start))], False, 1)
    steps.extend(seen.values())
    options = {
        "maxcor": MEMORY,
        "maxiter": iterations,
        "maxfun": evaluations,
        "gtol": gradient_tolerance,
        "ftol": 0.0,
        "maxls": 40,
    }
    found = minimize(loss, start.numpy(), jac=True, method="L-BFGS-B", callback=passed, options=options)
    return Ascent(steps, bool(steps[-1].slope.abs().max() <= gradient_tolerance), int(found.nfev))


def rows_of(found: Ascent, num_draws: int, done: int, began: float) -> list[dict[str, float]]:
    """A row of the history for each step, the first being the start."""
    seconds = time.perf_counter() - began
    return [
        {
            "step": done + i + 1,
            "elbo": step.value,
            "gradient_norm": float(step.slope.abs().max()),
            "num_draws": num_draws,
            "seconds": seconds,
        }
        for i, step in enumerate(found.steps)
    ]
