"""Layers of discrete latents: bits, or categories of n states, and how networks give and take them.

    logits [..., num_logits]  ->  distribution of z         a network's output
    z                         ->  inputs [..., num_inputs]  what the next network sees

A bit enters a network as -1 or 1. A category enters by the corners of a cube, {-1, 1}^ceil(log2 n), as many numbers as
the bits that would count the states (Maddison et al. 2017); or as the one-hot vector itself. Both are
linear in z, and so are defined for a relaxed z as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.controls import exponential
from pyrolvm.errors import SettingError, count, one_of, positive

CODINGS = ("corners", "one_hot")

MOST_VALUES = {"alone": 2**14, "in a chain": 2**10}
"""The most values of a layer that models sum out: of a chain, a table of their pairs is made."""


class Bits(nn.Module):
    """Units that are 0 or 1: z [..., size].

    Parameters
    ----------
    size : int
        Units of the layer.
    """

    num_states = 2

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = self.num_logits = self.num_inputs = size

    def distribution(self, logits: Tensor) -> dist.TorchDistribution:
        """Of z, event [size], for logits [..., size]."""
        return dist.Bernoulli(logits=logits).to_event(1)

    def inputs(self, z: Tensor) -> Tensor:
        """-1 and 1."""
        return 2 * z - 1

    def one(self, like: Tensor) -> Tensor:
        """The values of a single unit, [num_states, ...], in the dtype of `like`."""
        return like.new_tensor([0.0, 1.0])

    def every(self, like: Tensor) -> Tensor:
        """All values of the layer: [num_states^size, ...]."""
        one = self.one(like)
        chosen = list(itertools.product(range(self.num_states), repeat=self.size))
        return one[torch.tensor(chosen, device=like.device)]

    def marginal(self, first: Tensor, nets: Iterable[nn.Module]) -> Tensor:
        """Log-probability of every value of the last of a chain of layers: [..., num_values].

        `first`: logits [..., num_logits] of the first layer; `nets`: of each later one, from the inputs of that before.
        """
        z = self.every(first)
        log_p = self.distribution(first.unsqueeze(-2)).log_prob(z)
        for net in nets:
            step = self.distribution(net(self.inputs(z)).unsqueeze(-2)).log_prob(z)  # from row to column
            top = log_p.amax(-1, keepdim=True)
            log_p = ((log_p - top).exp() @ step.exp()).log() + top
        return log_p

    @property
    def num_values(self) -> int:
        """num_states^size, often a large number."""
        return self.num_states**self.size

    def summable(self, num_layers: int) -> bool:
        """Whether `marginal` of so many layers is affordable."""
        return self.num_values <= MOST_VALUES["alone" if num_layers == 1 else "in a chain"]


class Categories(Bits):
    """Units of n states: one-hot vectors z [..., size, n].

    Parameters
    ----------
    size : int
        Units of the layer.
    num_states : int
        n, at least 2.
    coding : {"corners", "one_hot"}
        What networks see of them.
    """

    codes: Tensor

    def __init__(self, size: int, num_states: int, coding: str = "corners") -> None:
        super().__init__(size)
        self.num_states = count("num_states", num_states, 2)
        states = torch.arange(self.num_states)
        bits = torch.arange((self.num_states - 1).bit_length())
        corners = 2.0 * (states.unsqueeze(-1) >> bits & 1) - 1
        one_hot = one_of("coding", coding, CODINGS) == "one_hot"
        self.register_buffer("codes", torch.eye(self.num_states) if one_hot else corners)  # [n, width]
        self.num_logits, self.num_inputs = size * self.num_states, size * self.codes.shape[1]

    def distribution(self, logits: Tensor) -> dist.TorchDistribution:
        """Of z, event [size, n], for logits [..., size * n]."""
        logits = logits.unflatten(-1, (self.size, self.num_states))
        return dist.OneHotCategorical(logits=logits).to_event(1)

    def inputs(self, z: Tensor) -> Tensor:
        """The codes, [..., num_inputs]."""
        return (z @ self.codes).flatten(-2)

    def one(self, like: Tensor) -> Tensor:
        """The one-hot vectors [n, n]."""
        return torch.eye(self.num_states).to(like)


def make_units(size: int, num_states: int, coding: str = "corners") -> Bits:
    """Bits for two states, categories for more. Raises `SettingError` for sizes that are no such numbers."""
    size, num_states = count("latent_dim", size), count("num_states", num_states, 2)
    one_of("coding", coding, CODINGS)
    return Bits(size) if num_states == 2 else Categories(size, num_states, coding)


# ---------------------------------------------------------------------- temperatures of the relaxed units

TEMPERATURES = {2: (2 / 3, 1 / 2), 4: (1.0, 2 / 3), 8: (2 / 3, 2 / 5)}
"""n -> temperatures of guide and prior that Maddison et al. (2017, section 5.1 and appendix) found best."""

Temperature = float | Sequence[float] | None


def temperatures(num_states: int, guide: Temperature, prior: float | None) -> tuple[Any, float | None]:
    """The schedule of the guide's temperature, and the prior's; None of it is the guide's at each step.

    Where the guide's is not told they are the published ones of the nearest n. Two numbers are the first and the last
    of a run, with one factor from step to step. Raises `SettingError` unless all are positive.
    """
    if guide is None:
        nearest = min(TEMPERATURES, key=lambda n: abs(math.log2(n) - math.log2(num_states)))
        guide, published = TEMPERATURES[nearest]
        prior = published if prior is None else prior
    prior = None if prior is None else positive("prior_temperature", prior)
    if not isinstance(guide, Sequence):
        return positive("temperature", guide), prior
    if len(guide) != 2 or isinstance(guide, str):
        raise SettingError(
            f"temperature={guide!r} must be a number, or the first and the last of a run: (1.0, 0.5)"
        )
    return exponential(*(positive("temperature", one) for one in guide)), prior
