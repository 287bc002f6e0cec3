"""Whether iterates are stationary: split R-hat, and the independent draws that they are worth.

Gelman, Carlin, Stern, Dunson, Vehtari and Rubin (2013), "Bayesian data analysis", section 11.4; Geyer (1992),
"Practical Markov chain Monte Carlo".
"""

from __future__ import annotations

import math

import numpy as np


def split_r_hat(iterates: np.ndarray) -> float:
    """Split R-hat of iterates [n, D], the root of the mean of squares over the D."""
    half = len(iterates) // 2
    parts = np.stack([iterates[:half], iterates[-half:]])  # [2, half, D]
    within = parts.var(1, ddof=1).mean(0)
    between = half * parts.mean(1).var(0, ddof=1)
    moving = within > 0
    if not moving.any():
        return 1.0
    squares = (half - 1) / half + between[moving] / within[moving] / half
    return math.sqrt(float(squares.mean()))


def effective_size(iterates: np.ndarray) -> float:
    """The independent draws that n correlated ones [n, D] are worth: n / (1 + 2 sum of autocorrelations).

    Of the autocorrelations averaged over the D, those of Geyer's positive pairs count.
    """
    n, moving = len(iterates), iterates.std(0) > 0
    if not moving.any():
        return float(n)
    centred = (iterates[:, moving] - iterates[:, moving].mean(0)) / iterates[:, moving].std(0)
    products = centred @ centred.T / (n * centred.shape[1])
    correlations = np.array([np.trace(products, k) for k in range(n)])
    pairs = correlations[1 : n - 1 : 2] + correlations[2:n:2]
    ended = np.flatnonzero(pairs <= 0)
    total = pairs[: ended[0]].sum() if len(ended) else pairs.sum()
    return float(n / max(1.0, 1 + 2 * total))
