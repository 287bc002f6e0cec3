"""Rows held out of data that are read in their order: a random share of every run of rows."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from pyrolvm.data.plan import RUN, held_out_of_run, num_held_out

_CACHED_RUNS = 4


@dataclass(frozen=True)
class Holdout:
    """Which of N rows are held out, those of `split_rows`: of each run of `RUN` rows its share, drawn at random.

    Any stretch is computed without the others.

    Parameters
    ----------
    num_rows : int
        N.
    share : float
        Strictly between 0 and 1.
    seed : int
        The same seed holds out the same rows.
    name : str
        Of `share` in messages.

    Raises
    ------
    SettingError
        One of the parts would have no rows.
    """

    num_rows: int
    share: float
    seed: int = 0
    name: str = "validation"
    _runs: OrderedDict[int, np.ndarray] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        num_held_out(self.num_rows, self.share, self.name)

    def mask(self, start: int, stop: int) -> np.ndarray:
        """Whether each of the rows `start .. stop - 1` is held out: bool [stop - start]."""
        parts = [self._run(i) for i in range(start // RUN, -(-stop // RUN))]
        first = start // RUN * RUN
        return np.concatenate(parts)[start - first : stop - first]

    def _run(self, index: int) -> np.ndarray:
        if index not in self._runs:
            self._runs[index] = held_out_of_run(index, self.num_rows, self.share, self.seed).numpy()
            while len(self._runs) > _CACHED_RUNS:
                self._runs.popitem(last=False)
        return self._runs[index]
