"""A Gaussian on whole numbers: each takes the probability of what rounds to it.

J. Ho, A. Jain and P. Abbeel, "Denoising diffusion probabilistic models", NeurIPS 2020, equation 13.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all
from torch.special import log_ndtr

from pyrolvm.errors import DataError
from pyrolvm.models.base import first_row_where


class DiscretisedNormal(dist.TorchDistribution):
    """N(loc, scale^2) rounded to 0, ..., levels - 1; the first and the last level take the tails.

    Parameters
    ----------
    loc, scale : Tensor [...]
        Of the Gaussian, in levels.
    levels : int
        How many values there are.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012

    def __init__(self, loc: Tensor, scale: Tensor, levels: int) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        """The levels."""
        return constraints.integer_interval(0, self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """loc within the levels; that of the rounded value but for the rounding."""
        return self.loc.clamp(0, self.levels - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretisedNormal:
        """The same for more rows."""
        shape = torch.Size(batch_shape)
        return DiscretisedNormal(self.loc.expand(shape), self.scale.expand(shape), self.levels)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        """Levels [*sample_shape, *batch_shape], as floating numbers."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            return (
                torch.normal(self.loc.expand(shape), self.scale.expand(shape))
                .round()
                .clamp(0, self.levels - 1)
            )

    def log_prob(self, value: Tensor) -> Tensor:
        """log of the probability of each level [...], nats, to full precision far in the tails."""
        above, below = (value + 0.5 - self.loc) / self.scale, (value - 0.5 - self.loc) / self.scale
        # by symmetry, the side where both are small: differences of numbers near 1 have no digits
        flip = above + below > 0
        high, low = torch.where(flip, -below, above), torch.where(flip, -above, below)
        first, last = value <= 0, value >= self.levels - 1
        open_low, open_high = torch.where(flip, last, first), torch.where(flip, first, last)
        log_high = torch.where(open_high, torch.zeros_like(high), log_ndtr(high))
        gap = log_ndtr(low) - log_high
        inside = log_high + torch.log(-torch.expm1(torch.where(open_low, -torch.ones_like(gap), gap)))
        return torch.where(open_low, log_high, inside)


def check_levels(x: Tensor, levels: int) -> None:
    """Raise `DataError` naming the first entry of x [rows, columns] that is none of 0, ..., levels - 1."""
    where = first_row_where(x, lambda part: (part != part.round()) | (part < 0) | (part > levels - 1))
    if where is None:
        return
    row, column = where
    raise DataError(
        f"levels={levels} needs whole numbers from 0 to {levels - 1}, but row {row}, column {column} is "
        f"{x[row, column].item():.6g} (the data range from {x.min().item():.6g} to {x.max().item():.6g}): "
        "leave levels out for other numbers"
    )
