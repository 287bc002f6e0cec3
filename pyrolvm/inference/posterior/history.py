"""The record of a run: one row per step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrolvm.errors import RunFolderError


class History:
    """Terms, controls and seconds of every step, and the held-out bound where it was computed.

    Bounds are in nats per datum (in total, where the program has no data plate); higher is better.

    Parameters
    ----------
    terms : sequence of str
        Columns that the objective reports, the bound first.
    controls : sequence of str
        Columns of controls, in the order of `append`.
    """

    def __init__(
        self, terms: Sequence[str] = ("elbo",), controls: Sequence[str] = ("learning_rate",)
    ) -> None:
        self.terms, self.controls = tuple(terms), tuple(controls)
        self._chunks: list[np.ndarray] = []

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return ("step", *self.terms, *self.controls, "validation_elbo", "seconds")

    @property
    def seconds(self) -> float:
        """Seconds spent in steps so far."""
        return float(self._chunks[-1][-1, -1]) if self._chunks else 0.0

    def append(self, first_step: int, terms: Tensor, controls: Tensor, seconds: float) -> None:
        """Add a chunk of K steps.

        Parameters
        ----------
        first_step : int
            Steps done before the chunk.
        terms : tensor [K, len(self.terms)]
            In nats per datum.
        controls : tensor [K, len(self.controls)]
            The value at each step.
        seconds : float
            What the chunk took.
        """
        k = len(terms)
        steps = torch.arange(first_step + 1, first_step + k + 1, dtype=torch.float64)[:, None]
        took = self.seconds + seconds * torch.arange(1, k + 1, dtype=torch.float64)[:, None] / k
        nothing = torch.full((k, 1), torch.nan, dtype=torch.float64)
        self._chunks.append(torch.cat([steps, terms.double(), controls.double(), nothing, took], 1).numpy())

    def record_validation(self, elbo: float) -> None:
        """Note the held-out bound at the last step."""
        self._chunks[-1][-1, -2] = elbo

    def column(self, name: str) -> np.ndarray:
        """One column, [steps]."""
        i = self.columns.index(name)
        return np.concatenate([c[:, i] for c in self._chunks]) if self._chunks else np.empty(0)

    def recent(self, column: str, num_steps: int = 100) -> float:
        """The mean of a column over the last steps; nan if there are none."""
        if not self._chunks:
            return float("nan")
        place, parts, left = self.columns.index(column), list[np.ndarray](), num_steps
        for chunk in reversed(self._chunks):
            parts.append(chunk[-left:, place])
            left -= len(parts[-1])
            if left <= 0:
                break
        return float(np.concatenate(parts).mean())

    def rows(self, after: int = 0) -> Iterator[dict[str, float | int | None]]:
        """The steps after step `after`, one dict each; None where a column has no value."""
        for chunk in self._chunks:
            for row in chunk[chunk[:, 0] > after] if chunk[-1, 0] > after else ():
                values = [None if np.isnan(v) else float(v) for v in row]
                yield dict(zip(self.columns, [int(row[0]), *values[1:]], strict=True))

    def frame(self) -> pd.DataFrame:
        """The record as a table; columns that were never used are left out."""
        frame = pd.DataFrame(self.tensor().numpy(), columns=list(self.columns)).astype({"step": np.int64})
        return frame.drop(columns=[c for c in ("validation_elbo",) if frame[c].isna().all()])

    def tensor(self) -> Tensor:
        """The record as one tensor, for a checkpoint."""
        values = np.concatenate(self._chunks) if self._chunks else np.empty((0, len(self.columns)))
        return torch.from_numpy(values)

    def load(self, values: Tensor) -> None:
        """Restore a record of `tensor`. Raises `RunFolderError` if its columns differ."""
        if values.shape[1] != len(self.columns):
            raise RunFolderError("the checkpoint's history has other columns: it is of another objective")
        self._chunks = [values.numpy().copy()] if len(values) else []


def held_out_elbo(history: pd.DataFrame, kept_step: int | None = None) -> float:
    """The held-out bound of the parameters kept, in nats per datum; nan if there is none.

    Parameters
    ----------
    history : DataFrame
        As returned by `History.frame`.
    kept_step : int, optional
        The step whose parameters were restored. By default the last evaluation counts.
    """
    if "validation_elbo" not in history:
        return float("nan")
    values = history.set_index("step")["validation_elbo"].dropna()
    if kept_step is not None and kept_step in values.index:
        return float(values.loc[kept_step])
    return float(values.iloc[-1]) if len(values) else float("nan")
