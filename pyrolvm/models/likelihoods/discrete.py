"""Likelihoods of zeros and ones, and of categories."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrolvm.errors import DataError, SettingError, count
from pyrolvm.models.likelihoods.base import Likelihood, first_outside, refused, shares


class Bernoulli(Likelihood):
    """x_d ~ Bernoulli(logit = out_d), for zeros and ones."""

    def elements(self, logits: Tensor) -> dist.TorchDistribution:  # type: ignore[override]
        """Batch [..., data_dim]."""
        return dist.Bernoulli(logits=logits)

    def check(self, x: Tensor) -> None:
        """Zeros and ones."""
        check_binary(x)

    def start(self, x: Tensor) -> Tensor:
        """The logits of the columns' shares of ones, each pulled to 1/2 by two further rows."""
        ones, number = shares(x)
        return ((ones + 1) / (number + 2)).logit()


class Categorical(Likelihood):
    """x_d is one of the codes 0, ..., K - 1, with probabilities softmax(out_d1, ..., out_dK).

    Parameters
    ----------
    data_dim : int
        Features of a row.
    num_categories : int
        K, the same for all features.

    Notes
    -----
    Codes have no mean: the `.mean` of its distributions, and so a reconstruction, is the most probable code. The
    probabilities are `model.likelihood_dist(z).base_dist.probs` [..., data_dim, K].
    """

    setting = "the number of categories"

    def __init__(self, data_dim: int, num_categories: int | str | None = None) -> None:
        super().__init__(data_dim)
        if num_categories is None:
            raise SettingError(
                "a categorical likelihood needs its number of categories: write it as likelihood='categorical:6' "
                "for codes 0 to 5"
            )
        words = isinstance(num_categories, str) and num_categories.isdecimal()
        self.parts = count("num_categories", int(num_categories) if words else num_categories, least=2)

    def elements(self, *logits: Tensor) -> dist.TorchDistribution:
        """Batch [..., data_dim]."""
        return Codes(logits=torch.stack(logits, -1))

    def check(self, x: Tensor) -> None:
        """Whole numbers from 0 to K - 1."""
        found = first_outside(x, lambda part: (part >= 0) & (part < self.parts) & (part == part.round()))
        if found is not None:
            high = x[~x.isnan()].max().item()
            whole = found[2] == round(found[2]) and found[2] >= 0
            instead = (
                f"write likelihood='categorical:{high + 1:.0f}'" if whole else "number the categories from 0"
            )
            raise refused(found, f"{self.parts} categories are the codes 0 to {self.parts - 1}", instead)

    def start(self, x: Tensor) -> Tensor:
        """The logarithms of the columns' shares of each category, one further row in each."""
        number = torch.stack([(x == k).sum(0) for k in range(self.parts)]) + 1  # [K, data_dim]
        return (number / number.sum(0)).log().flatten()


class Codes(dist.Categorical):
    """A categorical distribution of codes as floating numbers, whose `mean` is the most probable one."""

    @property
    def mean(self) -> Tensor:
        """The most probable code [...]: an average of codes means nothing."""
        return self.logits.argmax(-1).to(self.logits.dtype)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Codes [*sample_shape, ...] in the type of the logits."""
        return super().sample(torch.Size(sample_shape)).to(self.logits.dtype)


def check_binary(x: Tensor, instead: str = ', or say likelihood="gaussian"') -> None:
    """Raise `DataError` naming the first entry of x [rows, columns] that is neither 0 nor 1 (nor missing).

    `instead` ends the sentence: what a model has for other data.
    """
    found = first_outside(x, lambda part: (part == 0) | (part == 1))
    if found is None:
        return
    row, column, value = found
    known = x[~x.isnan()] if x.is_floating_point() else x
    low, high = known.min().item(), known.max().item()
    raise DataError(
        f"a Bernoulli decoder needs zeros and ones, but row {row}, column {column} is "
        f"{value:.6g} (the data range from {low:.6g} to {high:.6g}): binarise them, e.g. "
        f"(x > {_threshold(low, high):g}).float(){instead}"
    )


def _threshold(low: float, high: float) -> float:
    """A cut that splits the range found: 0.5 for data within [0, 1], else its middle."""
    return 0.5 if low >= 0 and high <= 1 else (low + high) / 2
