"""Floating-point types: their names in settings, and which data they cannot hold."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyrolvm.data.columns import listed
from pyrolvm.data.survey import survey
from pyrolvm.errors import one_of, warn_user

DTYPES = {"float32": torch.float32, "float64": torch.float64}
"""Names of the types that a fit can compute in."""

STEPS = 1000
"""A standard deviation should span at least so many neighbouring floating-point numbers."""
WIDEST = 1e6
"""Standard deviations above this, or below its inverse, are out of an optimiser's reach."""

_MOST = 2**22  # numbers looked at: of large data some rows


def as_dtype(value: str | torch.dtype) -> torch.dtype:
    """The type of a name in `DTYPES`, or the type itself; `SettingError` for another."""
    return DTYPES[one_of("dtype", str(value).removeprefix("torch."), DTYPES)]


def check_precision(
    x: np.ndarray | Tensor,
    columns: list[str] | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "the data",
) -> None:
    """Warn of columns that lose information in `dtype`, or whose spread no optimiser reaches.

    Parameters
    ----------
    x : array or tensor [rows, ...]
        The data before they are cast to `dtype`; missing values (NaN) are left out.
    columns : list of str, optional
        Names of the entries of a row.
    dtype : torch.dtype
        The type that the fit computes in.
    name : str
        Name of the data in the warning.

    Notes
    -----
    Neighbouring numbers near m differ by about eps * |m|; in float32 eps is 2^-23. A warning names the columns

    - of whole numbers beyond 2 / eps, which are rounded;
    - whose standard deviation spans fewer than `STEPS` neighbouring numbers at their largest value;
    - whose standard deviation is above `WIDEST` or below its inverse.

    Constant columns are in no warning.
    """
    if not (x.ndim and math.prod(x.shape)):
        return
    values = _sample(x)  # [rows, columns]
    values = np.where(np.isfinite(values), values, np.nan)
    seen = survey([(values, None)])
    largest, spread = (
        np.fmax(-seen.low, seen.high),
        np.sqrt(seen.squares / np.maximum(seen.number, 1)),
    )  # [columns]
    eps = torch.finfo(dtype).eps
    rounded = ((values == np.rint(values)) | np.isnan(values)).all(0) & (largest > 2 / eps)
    coarse = (spread < STEPS * eps * largest) & ~rounded
    far = ((spread > WIDEST) | (spread < 1 / WIDEST)) & ~rounded & ~coarse
    kind = str(dtype).removeprefix("torch.")
    wider = " or fit in float64" if dtype != torch.float64 else ""
    for found, fault, advice in (
        (rounded, f"whole numbers that {kind} rounds", f"leave out what only numbers the rows,{wider}"),
        (coarse, f"values too near to each other for {kind}", f"standardise the data{wider}"),
        (far, "values on a scale that training does not reach", "standardise the data"),
    ):
        held = np.flatnonzero(found & (seen.high > seen.low))
        if len(held):
            called = listed(columns[i] if columns else int(i) for i in held)
            first = f"values up to {largest[held[0]]:g}, standard deviation {spread[held[0]]:g}"
            warn_user(f"{name}: {fault} in column {called} ({first}): {advice}")


def _sample(x: np.ndarray | Tensor) -> np.ndarray:
    """Values [rows, columns] in float64; of large data evenly spaced rows."""
    part = x[:: max(1, int(np.prod(x.shape)) // _MOST)]
    if isinstance(part, Tensor):
        part = part.detach().to("cpu", torch.float64).numpy()
    return np.asarray(part, np.float64).reshape(len(part), -1)
