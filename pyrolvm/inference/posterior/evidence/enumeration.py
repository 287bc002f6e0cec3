"""log p(x) by summing out discrete latents: exact, per datum.

    log p(x_n) = log sum_k p(k) p(x_n | k)

by variable elimination (`inference/program/sums.py`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.sums import all_states, log_sums


def summed_out(
    pair: Pair, num_samples: int | None, given: dict[str, Tensor], held: dict[str, Tensor]
) -> Tensor:
    """log sum p(x, z) over every latent without a value in `given`.

    Returns
    -------
    tensor [draws, rows]
        In nats.

    Raises
    ------
    ProgramError
        The sum couples data.
    """
    trace = all_states(pair, num_samples, _countable, given={**given, **held})
    return log_sums(pair, trace, num_samples or 1, held)


def enumerable(fn: Any) -> bool:
    """Whether a distribution is discrete and can enumerate its values; vectors of independent ones cannot."""
    if getattr(fn, "reinterpreted_batch_ndims", 0) > 0:
        return False
    return bool(getattr(fn, "has_enumerate_support", False))


def _countable(site: Any) -> bool:
    return not site["is_observed"] and enumerable(site["fn"])
