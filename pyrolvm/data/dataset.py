"""A data set in memory: values with what is known about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm.data.columns import check_names, find_columns, listed
from pyrolvm.data.numeric import check_numeric
from pyrolvm.data.plan import split_rows
from pyrolvm.data.survey import Survey, survey
from pyrolvm.data.transforms import Transform
from pyrolvm.errors import DataError, warn_user


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Rows of data with what is known about them.

    Parameters
    ----------
    values : ndarray [rows, ...]
        Numbers or booleans, of the type they were found in.
    columns : list of str, optional
        Names of the entries of a row, where rows are vectors; each once.
    labels : ndarray [rows], optional
        One label per row, e.g. the class.
    name : str
        Its name in messages and reports.
    factors : DataFrame, optional
        Ground truth per row, e.g. the latent variables or the factors of variation.
    truth : dict, optional
        Ground truth of the whole: the parameters of a simulator.

    Raises
    ------
    DataError
        The parts do not fit together, or the values are not numeric.
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
        check_names(self.columns or [], self.name)
        for part, held in (("labels", self.labels), ("factors", self.factors)):
            if held is not None and len(held) != len(self.values):
                raise DataError(f"{self.name} has {len(self.values)} rows but {len(held)} {part}")

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.values.shape[1:]))
        lines = [f"Dataset {self.name!r}: {self.num_rows} rows of {shape or 1} values, {self.values.dtype}"]
        if self.columns:
            lines.append(f"  columns: {listed(self.columns)}")
        if self.labels is not None:
            lines.append(f"  labels: {listed(np.unique(self.labels).tolist())}")
        if self.factors is not None:
            lines.append(f"  factors: {listed(self.factors.columns)}")
        if self.truth:
            lines.append(f"  truth: {listed(self.truth)}")
        return "\n".join(lines)

    @property
    def has_labels(self) -> bool:
        """Whether rows have labels."""
        return self.labels is not None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row."""
        return self.values.shape[1:]

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

        Raises
        ------
        DataError
            A column is missing (the message lists similar names) or named twice, or rows are not vectors.
        """
        if self.values.ndim != 2:
            shape = list(self.values.shape)
            raise DataError(
                f"{self.name} has no columns to choose: its shape is {shape}, not [rows, columns]"
            )
        names = self.columns or [str(i) for i in range(self.values.shape[1])]
        positions = find_columns(columns, names, self.name)
        chosen = None if self.columns is None else [self.columns[i] for i in positions]
        return replace(self, values=self.values[:, positions], columns=chosen)

    def as_vectors(self) -> Dataset:
        """The same rows as vectors [rows, values]: images flattened, single numbers as one column.

        Rows of more than two axes are rarely meant to be vectors: a warning names their shape.
        """
        if self.values.ndim == 2:
            return self
        flat = self.values.reshape(self.num_rows, -1)
        if self.values.ndim > 3:
            warn_user(
                f"{self.name} has rows of shape {list(self.values.shape[1:])}: each is flattened to a vector of "
                f"{flat.shape[1]} values"
            )
        return replace(self, values=flat)

    def split(self, fraction: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Hold out a random part of the rows: `(train, held_out)`, disjoint, each in the order of the data.

        Parameters
        ----------
        fraction : float
            Share of the rows that is held out, strictly between 0 and 1.
        seed : int
            The same seed holds out the same rows, and the same as `fit(validation=fraction, seed=seed)`.

        Raises
        ------
        SettingError
            One of the parts would have no rows.
        """
        train, held_out = split_rows(self.num_rows, fraction, seed, "fraction")
        return self.take(train.numpy()), self.take(held_out.numpy())

    def standardise(self, per_column: bool = True) -> tuple[Dataset, Transform]:
        """Values of mean 0 and standard deviation 1, with the transform that undoes it.

        Parameters
        ----------
        per_column : bool
            One mean and deviation per entry of a row; False takes one of each for all, as images with
            constant pixels need. Both leave out missing values.

        Raises
        ------
        DataError
            A column is constant or all missing.
        """
        transform = self.survey().standardise(self.name, self.columns, per_column)
        return self.transformed(transform), transform

    def binarise(self, threshold: float | None = None) -> tuple[Dataset, Transform]:
        """Values 0 and 1: whether they exceed `threshold`, by default halfway between lowest and highest.

        Missing values stay missing.

        Raises
        ------
        DataError
            All values are equal or missing.
        SettingError
            No value exceeds the threshold, or all do.
        """
        transform = self.survey().binarise(self.name, threshold)
        return self.transformed(transform), transform

    def transformed(self, transform: Transform) -> Dataset:
        """The same rows with transformed values."""
        return replace(self, values=transform.apply(self.values))

    def survey(self) -> Survey:
        """Extremes, means and deviations of the entries of a row; the different labels."""
        return survey([(self.values, self.labels)])
