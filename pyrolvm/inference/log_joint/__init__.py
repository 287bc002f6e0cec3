"""The log joint of a program as a function of one vector, and what its derivatives are good for: fits without settings.

Everything here takes a `Pair` on the whole data whose latents have maps from the real numbers (discrete ones may be
summed out), and works in float64, whatever the program's type. `fit` does, for `optimizer="lbfgs"`:

    reason = declined(pair)                  one sentence if the pair cannot be fitted so, else None
    start = find_start(pair, seed)           modes, coordinates, how many modes, one sentence
    start.place(pair)                        the guide's location and scale from the start: for stochastic steps
    solution = solve(pair, start, seed)      fixed draws, doubled; the optimum now stands in the guide's parameters
    verdict = judge(pair, solution, seed)    converged, sentence, numbers; `judge(pair, seed=seed)` after stochastic
    steps
"""

from __future__ import annotations

from pyrolvm.inference.log_joint.solving import Solution, solve
from pyrolvm.inference.log_joint.start import Start, declined, declined_or_start, find_start
from pyrolvm.inference.log_joint.verdict import DRAWS, Drawn, Verdict, can_be_weighed, judge, judge_guide

__all__ = [
    "DRAWS",
    "Drawn",
    "Solution",
    "Start",
    "Verdict",
    "can_be_weighed",
    "declined",
    "declined_or_start",
    "find_start",
    "judge",
    "judge_guide",
    "solve",
]
