"""A data set in memory, and the reversible transforms of its values."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm.data.numeric import check_numeric
from pyrolvm.errors import DataError


@dataclass(frozen=True, eq=False)
class Transform:
    """A map of the values that can be undone and written as JSON.

    Without a threshold it is affine, `(x - offset) / scale`, and `undo` is its exact inverse. With one it is
    the indicator `x > threshold`; `undo` then places 0 and 1 (and probabilities between) at the lowest and
    highest value of the data, which is the scale a picture is drawn on, not the values that were there.

    Args:
        kind: how it was made: `"standardise"` or `"binarise"`.
        offset: a scalar, or one number per entry of a row.
        scale: the same, positive.
        threshold: of an indicator.
    """

    kind: str
    offset: np.ndarray
    scale: np.ndarray
    threshold: float | None = None

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Transformed values of the shape of `x` [rows, ...]: float32, or float64 where `x` needs it."""
        dtype = np.result_type(x.dtype, np.float32)
        if self.threshold is not None:
            return (x > self.threshold).astype(dtype)
        return ((x - self.offset) / self.scale).astype(dtype)

    def undo(self, x: np.ndarray) -> np.ndarray:
        """The values that `apply` maps to `x` [rows, ...], of its shape and at least float32."""
        return (x * self.scale + self.offset).astype(np.result_type(x.dtype, np.float32))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, from which `from_dict` makes the same transform again."""
        d = {"kind": self.kind, "offset": self.offset.tolist(), "scale": self.scale.tolist()}
        return d if self.threshold is None else {**d, "threshold": self.threshold}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Transform:
        """The transform that `to_dict` wrote.

        Raises:
            DataError: an entry is missing or no number, or a scale is not positive.
        """
        try:
            offset, scale = (np.asarray(d[k], np.float64) for k in ("offset", "scale"))
            threshold = None if d.get("threshold") is None else float(d["threshold"])
            transform = cls(str(d["kind"]), offset, scale, threshold)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a transform (kind, offset, scale are needed): {error!r}") from None
        if not (np.isfinite(offset).all() and (scale > 0).all()):
            raise DataError("not a transform: its offset must be finite and its scale positive")
        return transform


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows of data with what is known about them.

    Args:
        values: numbers or booleans [rows, ...], of the type they were found in.
        columns: names of the entries of a row, where rows are vectors.
        labels: one label per row, e.g. the class: [rows].
        name: what messages and reports call it.
        factors: ground truth per row, e.g. the latent variables or the factors of variation.
        truth: ground truth of the whole: the parameters a simulator used.

    Raises:
        DataError: the parts do not fit together, or the values are not numeric.
    """

    values: np.ndarray
    columns: list[str] | None = None
    labels: np.ndarray | None = None
    name: str = "data"
    factors: pd.DataFrame | None = None
    truth: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_numeric(self.values, self.name)
        if self.values.ndim == 0:
            raise DataError(f"{self.name} is a single number, not rows: pass an array [rows, columns]")
        if self.columns is not None and self.values.shape[1:] != (len(self.columns),):
            raise DataError(
                f"{self.name} has {len(self.columns)} column names but values of shape {self.values.shape}"
            )
        for part, held in (("labels", self.labels), ("factors", self.factors)):
            if held is not None and len(held) != len(self.values):
                raise DataError(f"{self.name} has {len(self.values)} rows but {len(held)} {part}")

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.values)

    def take(self, rows: np.ndarray) -> Dataset:
        """The given rows, by index or mask, with their labels and factors."""
        return replace(
            self,
            values=self.values[rows],
            labels=None if self.labels is None else self.labels[rows],
            factors=None if self.factors is None else self.factors.iloc[rows].reset_index(drop=True),
        )

    def select(self, columns: Sequence[str | int]) -> Dataset:
        """The named columns, in the order given; where columns have no names, their positions from 0.

        Raises:
            DataError: there is no such column (the message says which are near), or rows are not vectors.
        """
        if self.values.ndim != 2:
            shape = list(self.values.shape)
            raise DataError(
                f"{self.name} has no columns to choose: its shape is {shape}, not [rows, columns]"
            )
        names = self.columns or [str(i) for i in range(self.values.shape[1])]
        positions = [find_column(c, names, self.name) for c in columns]
        if not positions:
            raise DataError(f"{self.name}: no columns were chosen: name at least one of {_some(names)}")
        chosen = None if self.columns is None else [self.columns[i] for i in positions]
        return replace(self, values=self.values[:, positions], columns=chosen)

    def split(self, fraction: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Hold out a random part of the rows: `(train, held_out)`, disjoint, each in the order of the data.

        Args:
            fraction: of the rows that are held out, strictly between 0 and 1; at least one row is.
            seed: the same seed holds out the same rows.
        """
        held = max(1, round(fraction * self.num_rows))
        if not 0 < fraction < 1 or held >= self.num_rows:
            raise DataError(
                f"fraction={fraction} of {self.num_rows} rows does not leave rows in both parts: "
                "type a number between 0 and 1, e.g. 0.1"
            )
        mask = np.zeros(self.num_rows, dtype=bool)
        mask[np.random.default_rng(seed).permutation(self.num_rows)[:held]] = True
        return self.take(~mask), self.take(mask)

    def standardise(self, per_column: bool = True) -> tuple[Dataset, Transform]:
        """Values of mean 0 and standard deviation 1, with the transform that undoes it.

        Args:
            per_column: one mean and deviation per entry of a row; False takes one of each for all, which
                is what images with constant pixels need. Missing values are left out of both.

        Raises:
            DataError: a column is constant or all missing.
        """
        values = self.values.astype(np.float64)
        axis = 0 if per_column else None
        self._check_varying(values, per_column)
        transform = Transform(
            "standardise", np.asarray(np.nanmean(values, axis)), np.asarray(np.nanstd(values, axis))
        )
        return replace(self, values=transform.apply(self.values)), transform

    def binarise(self, threshold: float | None = None) -> tuple[Dataset, Transform]:
        """Values 0 and 1: whether they exceed `threshold`, by default halfway between lowest and highest.

        Raises:
            DataError: all values are equal or some are missing.
        """
        low, high = float(self.values.min()), float(self.values.max())
        if not high > low:
            raise DataError(f"{self.name} cannot be binarised: its lowest value is {low}, its highest {high}")
        middle = (low + high) / 2 if threshold is None else float(threshold)
        transform = Transform("binarise", np.asarray(low), np.asarray(high - low), middle)
        return replace(self, values=transform.apply(self.values)), transform

    def _check_varying(self, values: np.ndarray, per_column: bool) -> None:
        rows = values.reshape(self.num_rows, -1) if per_column else values.reshape(-1, 1)
        # a minimum and a maximum, because the deviation of a constant is not always exactly zero
        constant = ~(np.fmax.reduce(rows) > np.fmin.reduce(rows))
        if constant.any():
            first = int(np.argmax(constant))
            name = repr(self.columns[first]) if self.columns and per_column else first
            raise DataError(
                f"{self.name} cannot be standardised: column {name} is constant "
                f"({constant.sum()} such of {len(constant)}): leave it out, or type per_column=False"
            )


def find_column(column: str | int, names: Sequence[str], source: str) -> int:
    """Position of `column` among `names`.

    Raises:
        DataError: it is not there; the message says which names are near.
    """
    if str(column) in names:
        return list(names).index(str(column))
    near = difflib.get_close_matches(str(column), names, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {_some(names)}"
    raise DataError(f"{source} has no column {str(column)!r}: {hint}")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:20]))
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"
