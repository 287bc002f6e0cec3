"""Baselines for score-function gradients: what to expect of a datum's cost before z is drawn.

    gradient = E_q [ (cost_n - b(x_n)) d log q(z_n | x_n) ],   unbiased for any b that does not see z_n

Mnih and Gregor (2014), "Neural variational inference and learning in belief networks", section 2.3.
Pyro's `TraceGraph_ELBO` subtracts them and trains them by least squares on the costs.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from torch import Tensor, nn


class ScalarBaseline(nn.Module):
    """One learnable number for all data, in nats; works for any batch size.

    It takes the place of Pyro's decaying average, which is kept per row of the batch and breaks as soon as
    the batch size changes or the rows are shuffled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The expected cost of every row of `x` [batch, data_dim], as [batch]."""
        return self.bias.expand(len(x))


class InputBaseline(nn.Module):
    """A small network of the datum, in nats: some data cost more than others whatever z is."""

    def __init__(self, data_dim: int, hidden_dim: int = 32):
        super().__init__()
        self.hidden = nn.Linear(data_dim, hidden_dim)
        self.slope = nn.Linear(hidden_dim, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The expected cost of every row of `x` [batch, data_dim], as [batch]."""
        return self.slope(torch.tanh(self.hidden(x))).squeeze(-1) + self.bias


def in_plate_units(baseline: Callable[[Tensor], Tensor], plate: pyro.plate) -> Callable[[Tensor], Tensor]:
    """Let a baseline that speaks of one datum meet costs that the data plate has scaled by s = N/B.

    The value is s b(x) and its gradient that of b(x): so the least-squares loss, (s cost - s b)^2, pulls
    on b as s (cost - b)^2 would, which is the full-data regression seen through a minibatch. With s b(x)
    in full the pull would grow as s^2 and drown the bound's gradient.
    """
    scale = plate.size / plate.subsample_size

    def scaled(x: Tensor) -> Tensor:
        value = baseline(x)
        return value + (scale - 1) * value.detach()

    return scaled


def as_cost(value: Tensor, shape: torch.Size) -> Tensor:
    """Give baselines [batch] the shape that Pyro's costs of a site of `shape` have: leading ones are dropped.

    Without it a last batch of one row, or one vectorised particle, ends in an error about shapes.
    """
    value = value.expand(shape)
    while value.dim() and value.shape[0] == 1:
        value = value.squeeze(0)
    return value
