"""The log joint of a program as a function of one vector, and what derivatives of it are good for: fits without settings.

Everything here takes a `Pair` on the whole data whose latents have maps from the real numbers (discrete ones may be
summed out), and works in float64. `fit` does, for `optimizer="lbfgs"`:

    reason = declined(pair)                  one sentence if the pair cannot be fitted so, else None
    start = find_start(pair, seed)           modes, whitened coordinates, how many modes, one sentence
    start.place(pair.program)                the guide's location and scale at the start: for stochastic steps too
    solution = solve(pair, start, seed)      fixed draws, doubled; the optimum now stands in the guide's parameters
    verdict = judge(pair, solution, seed)    converged, sentence, numbers: by importance weights; also after stochastic steps,
                                             with `solution=None`
"""

from __future__ import annotations

from pyrolvm.inference.log_joint.interface import (
    Solution,
    Start,
    Verdict,
    declined,
    find_start,
    judge,
    solve,
)

__all__ = ["Solution", "Start", "Verdict", "declined", "find_start", "judge", "solve"]
