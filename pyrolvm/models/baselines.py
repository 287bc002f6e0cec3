"""Baselines for score-function gradients: what to expect of a datum's cost before z is drawn.

    gradient = E_q [ (cost_n - b(x_n)) d log q(z_n | x_n) ],   unbiased for any b that does not see z_n

Mnih and Gregor (2014), "Neural variational inference and learning in belief networks", section 2.3.
Pyro's `TraceGraph_ELBO` subtracts them and trains them by least squares on the costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor, nn


class ScalarBaseline(nn.Module):
    """One learnable number for all data, in nats; works for any batch size.

    It replaces Pyro's decaying average, which is kept per row of the batch and breaks as soon as the batch
    size changes or the rows are shuffled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The expected cost of every row of `x` [batch, data_dim], as [batch]."""
        return self.bias.expand(len(x))


class InputBaseline(nn.Module):
    """A small network of the datum, in nats: some data cost more than others whatever z is.

    Parameters
    ----------
    data_dim : int
        Columns of its input.
    hidden_dim : int
        Units of its one hidden layer.
    """

    def __init__(self, data_dim: int, hidden_dim: int = 32):
        super().__init__()
        self.hidden = nn.Linear(data_dim, hidden_dim)
        self.slope = nn.Linear(hidden_dim, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The expected cost of every row of `x` [batch, data_dim], as [batch]."""
        return self.slope(torch.tanh(self.hidden(x))).squeeze(-1) + self.bias


def baseline_options(
    baseline: nn.Module | None, plate: pyro.plate, features: Tensor, shape: Callable[[], torch.Size]
) -> dict[str, Any]:
    """The `infer=` of a guide site whose score-function gradient uses `baseline`; {} without one.

    Parameters
    ----------
    baseline : Module or None
        Maps features [batch, ...] to the expected cost of each datum, [batch], in nats.
    plate : pyro.plate
        The data plate.
    features : Tensor [batch, ...]
        The input of the baseline.
    shape : callable
        The shape of the site's value, once it is drawn.
    """
    if baseline is None:
        return {}
    scaled = in_plate_units(baseline, plate)
    return {
        "baseline": {
            "nn_baseline": lambda features: as_cost(scaled(features), shape()),
            "nn_baseline_input": features,
        }
    }


def in_plate_units(baseline: Callable[[Tensor], Tensor], plate: pyro.plate) -> Callable[[Tensor], Tensor]:
    """Scale a per-datum baseline to costs that the data plate has multiplied by s = N/B.

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
    """Baselines [batch] in the shape of Pyro's costs of a site of `shape`, which drop leading dimensions of size 1.

    Otherwise a last batch of one row, or one vectorised particle, ends in an error about shapes.
    """
    value = value.expand(shape)
    while value.dim() and value.shape[0] == 1:
        value = value.squeeze(0)
    return value
