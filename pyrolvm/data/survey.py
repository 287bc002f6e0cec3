"""What one pass over the rows finds out: extremes, means, deviations, labels. Nothing is kept of a row.

Means and sums of squares of parts are put together as of Chan, Golub and LeVeque (1979), "Updating formulae and a
pairwise algorithm for computing sample variances":

    m = m_a + d n_b / n,     M = M_a + M_b + d^2 n_a n_b / n,     d = m_b - m_a,     n = n_a + n_b.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pyrolvm.data.transforms import Transform
from pyrolvm.errors import DataError, SettingError

_CHUNK = 2**20
"""Numbers that are taken in double precision at a time."""


@dataclass
class Survey:
    """Per entry of a row, in float64, missing values left out: how many, mean, sum of squares about it, extremes.

    Parameters
    ----------
    number, mean, squares, low, high : ndarray [entries of a row]
    labels : ndarray, optional
        The different labels in their order.
    """

    number: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    low: np.ndarray
    high: np.ndarray
    row_shape: tuple[int, ...] = ()
    labels: np.ndarray | None = None

    def overall(self) -> Survey:
        """Of all entries together, [1]."""
        total = self.number.sum()
        mean = (self.number * self.mean).sum() / max(total, 1)
        squares = (self.squares + self.number * (self.mean - mean) ** 2).sum()
        ends = np.fmin.reduce(self.low), np.fmax.reduce(self.high)
        total, mean, squares, low, high = (np.array([v]) for v in (total, mean, squares, *ends))
        return Survey(total, mean, squares, low, high)

    def standardise(self, name: str, columns: list[str] | None, per_column: bool = True) -> Transform:
        """To mean 0 and deviation 1. Raises `DataError` for a column that is constant or all missing."""
        found = self if per_column else self.overall()
        # a minimum and a maximum, because the deviation of a constant is not always exactly zero
        constant = ~(found.high > found.low)
        if constant.any():
            first = int(np.argmax(constant))
            which = repr(columns[first]) if columns and per_column else first
            raise DataError(
                f"{name} cannot be standardised: column {which} is constant "
                f"({constant.sum()} such of {len(constant)}): leave it out, or type per_column=False"
            )
        shape = self.row_shape if per_column else ()
        deviation = np.sqrt(found.squares / found.number)
        return Transform("standardise", found.mean.reshape(shape), deviation.reshape(shape))

    def binarise(self, name: str, threshold: float | None = None) -> Transform:
        """To whether values exceed `threshold`, by default halfway between the extremes.

        Raises `DataError` if all values are equal or missing, `SettingError` for a threshold that divides none.
        """
        low, high = float(np.fmin.reduce(self.low)), float(np.fmax.reduce(self.high))
        if not high > low:
            raise DataError(f"{name} cannot be binarised: its lowest value is {low}, its highest {high}")
        middle = (low + high) / 2 if threshold is None else float(threshold)
        if not low <= middle < high:
            raise SettingError(
                f"threshold={middle:g} divides no values: choose one from {low:g} to below {high:g}"
            )
        return Transform("binarise", np.asarray(low), np.asarray(high - low), middle)


def survey(parts: Iterable[tuple[np.ndarray, np.ndarray | None]]) -> Survey:
    """Of the rows of all parts: (values [rows, ...], labels [rows] or None), each looked at once."""
    whole: Survey | None = None
    for values, labels in parts:
        shape, rows = values.shape[1:], values.reshape(len(values), -1)
        step = max(1, _CHUNK // max(1, rows.shape[1]))
        for first in range(0, len(rows), step):
            found = _of(rows[first : first + step].astype(np.float64))
            whole = found if whole is None else _together(whole, found)
        if whole is not None:
            whole.row_shape = shape
            whole.labels = _merged(whole.labels, labels)
    if whole is None:
        raise DataError("there are no rows of data")
    return whole


def _of(rows: np.ndarray) -> Survey:
    """Of rows [rows, entries] in memory."""
    there = ~np.isnan(rows)
    number = there.sum(0).astype(np.float64)
    mean = np.where(there, rows, 0.0).sum(0) / np.maximum(number, 1)
    squares = np.where(there, rows - mean, 0.0)
    squares = (squares * squares).sum(0)
    return Survey(number, mean, squares, np.fmin.reduce(rows), np.fmax.reduce(rows))


def _together(a: Survey, b: Survey) -> Survey:
    number, apart = a.number + b.number, b.mean - a.mean
    share = b.number / np.maximum(number, 1)
    return Survey(
        number,
        a.mean + apart * share,
        a.squares + b.squares + apart**2 * a.number * share,
        np.fmin(a.low, b.low),
        np.fmax(a.high, b.high),
        labels=a.labels,
    )


def _merged(known: np.ndarray | None, labels: np.ndarray | None) -> np.ndarray | None:
    if labels is None:
        return known
    found = np.unique(labels)
    return found if known is None else np.union1d(known, found)
