"""The maximum mean discrepancy of two samples (Gretton et al. 2012).

    MMD^2(q, p) = E k(z, z') + E k(u, u') - 2 E k(z, u),      z, z' ~ q and u, u' ~ p independent,

0 exactly where q = p, for the kernels here, of squared distance r = |a - b|^2 and bandwidth s,

    rbf   k = exp(-r / (2 s^2)),          imq   k = 1 / (1 + r / (2 s^2)).

Of n draws of q and m of p the *unbiased* statistic (their lemma 6) leaves out the pairs of a draw with itself, and
can be negative; the *v* statistic keeps them, is never negative, and too large on average by

    (1 - E k(z, z')) / n + (1 - E k(u, u')) / m.

A. Gretton, K. Borgwardt, M. Rasch, B. Schoelkopf and A. Smola, "A kernel two-sample test", JMLR 13 (2012).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pyrolvm.errors import SettingError, one_of

Bandwidth = float | str | Sequence[float]

KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "rbf": lambda h: (-h).exp(),
    "imq": lambda h: 1 / (1 + h),
}
"""k as a function of r / (2 s^2)."""
RULES: dict[str, Callable[[Tensor, int], Tensor | float]] = {
    # the expected squared distance of two draws from N(0, I)
    "dimension": lambda between, dim: 2.0 * dim,
    # exp(-mean_d (a - b)_d^2 / dim), in the code of the InfoVAE's authors
    "authors": lambda between, dim: float(dim * dim),
    "median": lambda between, dim: between.detach().flatten(-2).median(-1).values[..., None, None],
}
"""2 s^2 by name, from the squared distances of draws of q and p [..., n, m] and their dimension."""
STATISTICS = ("unbiased", "v")


def check_mmd(kernel: str, bandwidth: Bandwidth, statistic: str) -> None:
    """Raise `SettingError` for what `mmd` does not know."""
    one_of("kernel", kernel, KERNELS)
    one_of("statistic", statistic, STATISTICS)
    if isinstance(bandwidth, str):
        one_of("bandwidth", bandwidth, RULES)
        return
    values = _several(bandwidth)
    if not values or not all(isinstance(s, int | float) and 0 < s < math.inf for s in values):
        raise SettingError(
            f"bandwidth={bandwidth!r} must be a positive number, several of them, or one of {', '.join(RULES)}"
        )


def mmd(
    z: Tensor,
    u: Tensor,
    kernel: str = "rbf",
    bandwidth: Bandwidth = "dimension",
    statistic: str = "unbiased",
    rows: int | None = None,
) -> Tensor:
    """MMD^2 of the draws z [..., n, dim] of q and u [..., m, dim] of p: [...], differentiable.

    Parameters
    ----------
    kernel : {"rbf", "imq"}
    bandwidth : float, sequence of float, or {"dimension", "authors", "median"}
        s in the units of z; of several, the kernel is the mean. By name: "dimension" s^2 = dim, "authors"
        s^2 = dim^2 / 2, "median" 2 s^2 = the median of the squared distances between z and u.
    statistic : {"unbiased", "v"}
        Needs two draws of each, or one.
    rows : int, optional
        "v" of these draws has the expectation of "v" of so many rows; needs two draws of each.
    """
    within_q, within_p, between = squares(z, z), squares(u, u), squares(z, u)
    n, m = between.shape[-2:]
    terms = []
    for scale in _scales(bandwidth, between, z.shape[-1]):
        of_q, of_p, of_both = (KERNELS[kernel](r / scale) for r in (within_q, within_p, between))
        pairs = _mean(of_q, n, statistic, rows) + _mean(of_p, m, statistic, rows)
        terms.append(pairs - 2 * of_both.mean((-2, -1)))
    return sum(terms[1:], terms[0]) / len(terms)


def squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [..., n, m] of a [..., n, dim] and b [..., m, dim]."""
    lengths = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
    return (lengths - 2 * a @ b.mT).clamp(min=0)


def _scales(bandwidth: Bandwidth, between: Tensor, dim: int) -> list[Tensor | float]:
    """2 s^2 of each kernel."""
    if isinstance(bandwidth, str):
        return [RULES[bandwidth](between, dim)]
    return [2.0 * float(s) ** 2 for s in _several(bandwidth)]


def _several(bandwidth: Any) -> list[Any]:
    return [bandwidth] if isinstance(bandwidth, numbers.Real) else list(bandwidth)


def _mean(values: Tensor, n: int, statistic: str, rows: int | None) -> Tensor:
    """The mean of k over the pairs of one sample, values [..., n, n]."""
    if statistic == "v" and rows in (None, n):
        return values.mean((-2, -1))
    diagonal = values.diagonal(dim1=-2, dim2=-1).sum(-1)
    apart = (values.sum((-2, -1)) - diagonal) / (n * (n - 1))
    if statistic == "unbiased" or rows is None:
        return apart
    return apart + (diagonal / n - apart) / rows  # one pair in `rows` is of a row with itself
