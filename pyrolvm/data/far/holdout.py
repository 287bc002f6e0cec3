"""Rows held out of data that are read in their order: a random share of every run of rows."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch

from pyrolvm.data.plan import num_held_out, split_rows
from pyrolvm.seeds import Purpose, derived_seed

RUN = 2**16
"""Rows of a run. Data of one run are split as data in memory are."""
_CACHED_RUNS = 4


@dataclass(frozen=True)
class Holdout:
    """Which of N rows are held out: of each run of `RUN` rows its share, drawn at random.

    A pure function of its arguments, of which any stretch is computed without the others.

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
            self._runs[index] = self._drawn(index)
            while len(self._runs) > _CACHED_RUNS:
                self._runs.popitem(last=False)
        return self._runs[index]

    def _drawn(self, index: int) -> np.ndarray:
        start, stop = index * RUN, min((index + 1) * RUN, self.num_rows)
        mask = np.zeros(stop - start, bool)
        if self.num_rows <= RUN:
            mask[split_rows(self.num_rows, self.share, self.seed)[1].numpy()] = True
        else:
            number = round(self.share * stop) - round(self.share * start)
            seed = derived_seed(self.seed, Purpose.SPLIT, index)
            order = torch.randperm(stop - start, generator=torch.Generator().manual_seed(seed))
            mask[order[:number].numpy()] = True
        return mask
