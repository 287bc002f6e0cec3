"""Tests that numbers are uniform on [0, 1], or symmetric around 1/2."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.stats import binom, chisquare, kstest, norm


def p_values(u: np.ndarray) -> dict[str, float]:
    """Tests of `u` [R]: Kolmogorov's sees shifts, chi-square in 20 bins or fewer, of 5 or more expected, shapes."""
    counts = np.histogram(u, bins=max(2, min(20, len(u) // 5)), range=(0, 1))[0]
    uniform = {"kolmogorov_p": kstest(u, "uniform").pvalue, "chi_square_p": chisquare(counts).pvalue}
    return {name: float(p) for name, p in uniform.items()} | {"symmetry_p": symmetry_p(u)}


def symmetry_p(u: np.ndarray) -> float:
    """p-value of the test that `u` [R] is symmetric around 1/2, against shifts of it.

    The largest gap between the distribution functions of u and 1 - u, as in Yao et al. (2018). They take the
    two-sample Kolmogorov test for it, as if u and 1 - u were independent, which rejects symmetric numbers too
    often. Given the distances |u - 1/2| the signs are fair coins, so that R times the gap is the largest
    |sum of signs| of a random walk, whatever the distribution (Butler 1969): its limit is that of sup |B|,

        Pr(sup |B| < c) = sum_k (-1)^k [Phi((2 k + 1) c) - Phi((2 k - 1) c)].
    """
    signs = np.sign(u - 0.5)[np.argsort(-np.abs(u - 0.5), kind="stable")]
    c = np.abs(np.cumsum(signs)).max() / np.sqrt(len(u))
    if c < 0.3:  # the series needs many terms there, and the probability is 1
        return 1.0
    k = np.arange(-20, 21)
    inside = ((-1.0) ** k * (norm.cdf((2 * k + 1) * c) - norm.cdf((2 * k - 1) * c))).sum()
    return float(np.clip(1 - inside, 0, 1))


@lru_cache(maxsize=32)
def ecdf_band(count: int, points: int = 100, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper [points - 1] that the distribution function of `count` uniforms keeps between.

    At z = i / points, and at all of them together with probability `level`: the pointwise binomial band whose
    own level is such that simulated functions stay inside (Säilynoja, Bürkner and Vehtari 2022, "Graphical
    test for discrete uniformity", algorithm 2).
    """
    z = np.arange(1, points) / points
    rng = np.random.default_rng(0)
    cells = rng.multinomial(count, np.full(points, 1 / points), size=2000)
    below = cells.cumsum(1)[:, :-1]  # [simulations, points - 1]
    tail = np.minimum(binom.cdf(below, count, z), binom.sf(below - 1, count, z))
    gamma = np.quantile(2 * tail.min(1), 1 - level)
    return binom.ppf(gamma / 2, count, z) / count, binom.ppf(1 - gamma / 2, count, z) / count
