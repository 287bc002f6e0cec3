"""Missing entries: NaN in data [rows, data_dim], for models built with missing="mask".

The likelihood is that of the entries observed, x_o, the others being summed or integrated out,

    p(x_o | z) = product over observed d of p(x_d | z),

which is right where entries are missing at random: whether one is missing may depend on what was observed, but
not on what is missing (Rubin 1976, "Inference and missing data", Biometrika 63). An encoder sees the data with
the columns' means in the gaps, and beside them which entries are there (Nazabal et al. 2020, "Handling incomplete
heterogeneous data using VAEs"; Mattei and Frellsen 2019, "MIWAE").
"""

from __future__ import annotations

from typing import Any, Literal

import pyro
import torch
from torch import Tensor, nn

from pyrolvm.errors import DataError, one_of
from pyrolvm.models.base import check_finite, first_row_where

Missing = Literal["mask"] | None
HINT = ', or keep them by missing="mask" (in the shell --missing mask)'


def as_missing(value: Any) -> Missing:
    """`value` if it is "mask" or None. Raises `SettingError`."""
    return one_of("missing", value, (None, "mask"))


def check_entries(x: Tensor, missing: Missing) -> None:
    """Raise `DataError` unless all entries of x [rows, columns] are finite or, where they may be missing, NaN."""
    if missing is None:
        check_finite(x, HINT)
        return
    where = first_row_where(x, torch.isinf)
    if where is not None:
        row, column = where
        raise DataError(
            f"the data hold {x[row, column].item()} at row {row}, column {column}: only NaN stands for what is missing"
        )


def check_columns_seen(x: Tensor) -> None:
    """Raise `DataError` if a column of the training data x [rows, columns] is missing in every row."""
    empty = x.isnan().all(0)
    if bool(empty.any()):
        column = int(empty.nonzero()[0])
        raise DataError(
            f"column {column} is missing in all {len(x)} rows, so nothing can be learned of it: leave it out"
        )


def filled(x: Tensor) -> Tensor:
    """x [rows, columns] with the columns' means in place of what is missing."""
    return torch.where(x.isnan(), x.nanmean(0), x)


def observe(name: str, p: Any, x: Tensor | None, missing: Missing) -> Tensor:
    """The site of data x [batch, data_dim] with distribution `p`, independent over features.

    With missing="mask", entries that are NaN have no density, and the value of the site has 0 for them.
    """
    if x is None or missing is None:
        return pyro.sample(name, p, obs=x)
    seen, values = without_gaps(p, x)
    return pyro.sample(name, seen, obs=values)


def without_gaps(p: Any, x: Tensor) -> tuple[Any, Tensor]:
    """`p`, independent over features, of the entries of x [..., data_dim] that are not NaN; and x, 0 elsewhere."""
    present = ~x.isnan()
    return p.base_dist.mask(present).to_event(1), torch.where(present, x, torch.zeros_like(x))


class MaskAware(nn.Module):
    """Give an encoder what is missing: x [..., data_dim] as (x with the gaps filled, 1 where observed).

    Parameters
    ----------
    net : Module
        Takes [..., 2 * data_dim].
    data_dim : int

    Attributes
    ----------
    fill : buffer [data_dim]
        What stands in the gaps: 0, or the columns' means once a model has started from data.
    """

    fill: Tensor

    def __init__(self, net: nn.Module, data_dim: int) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("fill", torch.zeros(data_dim))

    def forward(self, x: Tensor) -> Any:
        """What `net` makes of x [..., data_dim]."""
        present = ~x.isnan()
        return self.net(torch.cat([torch.where(present, x, self.fill), present.to(x.dtype)], -1))
