"""What a posterior with a known answer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Moments = tuple[Tensor, Tensor]
"""Means and standard deviations of every entry of every latent, in the program's order."""


@dataclass(frozen=True)
class Posterior:
    """A program on data.

    Attributes
    ----------
    model : callable
    data : tuple of tensor
    exact : callable, optional
        Its moments, where they are known; else `references.json` has them of a long NUTS run.
    gaussian : bool
        Whether a full-rank normal can be within 10% of every sd.
    quick : bool
        Whether its verdicts are among the quick tests.
    unseen : bool
        Whether much of it lies where no start leads, so that a fit elsewhere is wrong and cannot know.
    of : tuple, optional
        (another program's name, its draws -> draws of this one): the same posterior, easier to draw from there.
    """

    model: Callable[..., Any]
    data: tuple[Tensor, ...] = ()
    exact: Callable[[], Moments] | None = None
    gaussian: bool = False
    quick: bool = True
    unseen: bool = False
    of: tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] | None = None


def random(seed: int) -> torch.Generator:
    """A generator of this seed."""
    return torch.Generator().manual_seed(seed)
