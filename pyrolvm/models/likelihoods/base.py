"""The contract of a likelihood, and what all of them use."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pyro.distributions as dist
from torch import Tensor, nn

from pyrolvm.errors import DataError, positive
from pyrolvm.models.base import first_row_where


class Likelihood(nn.Module):
    """p(x | z) from a decoder's output, with whatever parameters it has of its own.

    A new one sets `parts` and defines `elements`; `check` refuses data outside its support, and `start` finds the
    output that a decoder begins at.

    Parameters
    ----------
    data_dim : int
        Features of a row.

    Attributes
    ----------
    parts : int
        Numbers that the decoder gives for each feature.
    setting : str
        What stands after the colon of its name ("categorical:6"), in words; empty if nothing may.
    """

    parts: int = 1
    setting: str = ""

    def __init__(self, data_dim: int) -> None:
        super().__init__()
        self.data_dim = data_dim

    def forward(self, out: Tensor) -> dist.TorchDistribution:
        """p(x | z) with event [data_dim], for out [..., parts * data_dim]."""
        return self.elements(*out.chunk(self.parts, -1)).to_event(1)

    def elements(self, *parts: Tensor) -> dist.TorchDistribution:
        """The features' distributions, batch [..., data_dim], from `parts` tensors of that shape."""
        raise NotImplementedError(f"{type(self).__name__} must define elements(self, *parts)")

    def check(self, x: Tensor) -> None:
        """Raise `DataError` naming the first entry of x [rows, data_dim] outside the support; by default none is.

        Missing entries (NaN) are inside.
        """

    def start(self, x: Tensor) -> Tensor | None:
        """Where to begin: a decoder's output for which every row has the distribution of the columns of `x`.

        Parameters of the likelihood's own may be set on the way.

        Parameters
        ----------
        x : Tensor [rows, data_dim]
            Training data, in which entries may be missing (NaN).

        Returns
        -------
        Tensor [parts * data_dim] or None
            None to leave the decoder as it was made.
        """
        return None


def first_outside(x: Tensor, inside: Callable[[Tensor], Tensor]) -> tuple[int, int, float] | None:
    """Row, column and value of the first entry of x [rows, columns] that is neither `inside` nor missing; or None."""
    where = first_row_where(x, lambda part: ~(inside(part) | part.isnan()))
    return None if where is None else (where[0], where[1], x[tuple(where)].item())


def refused(found: tuple[int, int, float], needs: str, instead: str) -> DataError:
    """The sentence about an entry that `first_outside` found."""
    row, column, value = found
    return DataError(f"{needs}, but row {row}, column {column} is {value:.6g}: {instead}")


def positive_in_words(name: str, value: float | str) -> float:
    """`value`, perhaps in words ("2.5"), as a positive finite number. Raises `SettingError`."""
    with suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    return positive(name, value)


def shares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number [columns] of the entries of x [rows, columns] that are not missing."""
    return x.nansum(0), (~x.isnan()).sum(0)
