"""What stands in the gaps of data: draws of the missing entries given those observed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolvm.data.batch import Batch
from pyrolvm.errors import DataError, SettingError
from pyrolvm.inference.program.draws import Draws
from pyrolvm.inference.program.structure import Structure


@dataclass(frozen=True, repr=False)
class Imputation:
    """Data with their gaps filled; entries that were observed are as they were.

    Attributes
    ----------
    mean : tensor [rows, data_dim]
        The average of the draws of each missing entry; of categories, the most frequent one.
    lower, upper : tensor [rows, data_dim]
        The ends of the equal-tailed interval.
    missing : tensor [rows, data_dim], bool
        Which entries were missing.
    interval : float
        The mass of the interval.
    """

    mean: Tensor
    lower: Tensor
    upper: Tensor
    missing: Tensor
    interval: float

    def __repr__(self) -> str:
        number, rows = int(self.missing.sum()), int(self.missing.any(1).sum())
        return f"Imputation of {number:,} entries in {rows:,} rows, with {self.interval:.0%} intervals"


def impute(batch: Batch, structure: Structure, chunks: Iterable[Draws], interval: float) -> Imputation:
    """What is missing in the first tensor of `batch`, from draws of its rows, some at a time."""
    if not 0 < interval < 1:
        raise SettingError(f"interval is the mass between lower and upper, between 0 and 1, not {interval}")
    data = next((t for _, t in batch.tensors()), None)
    names = [s.name for s in structure.observed]
    if data is None or len(names) != 1 or not data.is_floating_point():
        raise SettingError(
            f"there is no one table of data to impute: the observed sites are {', '.join(names)}"
        )
    [name], parts, first = names, [], 0
    categorical = structure.observed[0].family in ("Codes", "Categorical")
    for draws in chunks:
        made = draws.predicted[name]  # [num_samples, rows, data_dim]
        known = data[first : first + made.shape[1]]
        first += made.shape[1]
        if made.shape[1:] != known.shape:
            raise DataError(f"the site '{name}' makes rows of {list(made.shape[2:])}, not those of the data")
        parts.append(_summary(known, made.to(known.dtype), interval, categorical))
    mean, lower, upper = (torch.cat(each) for each in zip(*parts, strict=True))
    return Imputation(mean, lower, upper, data.isnan(), interval)


def _summary(
    known: Tensor, made: Tensor, interval: float, categorical: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Centre, lower and upper end [rows, data_dim] of draws [num_samples, rows, data_dim], where `known` has gaps."""
    gaps = known.isnan()
    if not bool(gaps.any()):
        return known, known, known
    each = made[:, gaps]  # [num_samples, gaps]
    ends = each.new_tensor([(1 - interval) / 2, (1 + interval) / 2])
    centre = each.mode(0).values if categorical else each.mean(0)
    found = (
        centre,
        *(each.quantile(end, dim=0, interpolation="nearest" if categorical else "linear") for end in ends),
    )
    return tuple(known.masked_scatter(gaps, values) for values in found)  # type: ignore[return-value]
