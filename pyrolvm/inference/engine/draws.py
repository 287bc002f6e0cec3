"""How the engines draw categories: by one uniform number for each draw, both alike.

`torch.multinomial` takes one exponential number for each category of each draw, and a logarithm of it; in a step of a
small mixture that is a third of the time. Here k is the first category whose cumulative weight exceeds u times the
total (inversion), u from torch's default generator as before. A category of weight 0 is never drawn.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
from torch import Tensor

FEW = 8
"""Categories up to which the sums are written out, for the compiled step to keep them in registers."""


@contextmanager
def by_inversion() -> Iterator[None]:
    """Single draws of `torch.multinomial` by inversion, in this thread."""
    usual, thread = torch.multinomial, threading.get_ident()

    def multinomial(input: Tensor, num_samples: int, replacement: bool = False, **options: Any) -> Tensor:
        if num_samples != 1 or options or threading.get_ident() != thread:
            return usual(input, num_samples, replacement, **options)
        return inverted(input).unsqueeze(-1)

    with mock.patch.object(torch, "multinomial", multinomial):
        yield


def inverted(weights: Tensor) -> Tensor:
    """A category for each row of weights [..., categories], which need not sum to 1: int64 [...]."""
    noise = torch.rand(weights.shape[:-1], dtype=weights.dtype, device=weights.device)
    if weights.shape[-1] > FEW:
        sums = weights.cumsum(-1)
        passed = (noise * sums[..., -1]).unsqueeze(-1) >= sums[..., :-1]
        return passed.sum(-1)
    *some, total = accumulate(weights.unbind(-1))
    at = noise * total  # below the total, also rounded: u is at most 1 - 2^-24
    found = torch.zeros(at.shape, dtype=torch.int64, device=at.device)
    for edge in some:
        found = found + (at >= edge)
    return found
