"""Which rows each step uses of data that are read as they are needed: a shuffle through windows.

The rows form one endless stream, as those of a `BatchPlan` do: pass after pass, each row once in a pass. In every pass
the blocks of the files come in a new random order. The stream is cut into windows of H rows, and the rows of a window
are permuted; step t takes the places `[t B, (t + 1) B)`. So two rows can meet in a batch if the stream holds them in
one window (or on both sides of the edge between two, in the one batch that crosses it): rows of one block in every pass
but for those on both sides of an edge, rows of two among G blocks of R rows in about H / (G R) of the passes. With
H = N the shuffle is that of a `BatchPlan`. A window over the edge between two passes mixes rows of both.

All of it is a pure function of the seed and the step: training resumes at any step without reading what lies before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pyrolvm.data.plan import BatchPlan
from pyrolvm.errors import DataError
from pyrolvm.seeds import Purpose, derived_seed

_BLOCKS, _ROWS = 0, 1
_CACHED = 3


@dataclass(frozen=True)
class WindowPlan(BatchPlan):
    """The windows of every step and the places in them.

    Parameters
    ----------
    sizes : sequence of int
        Rows of each block, `num_rows` in all.
    window : int
        H, the rows of a window; at least `batch_size`.

    Notes
    -----
    Windows lie in a buffer of 2 H places: window k in the first half if k is even, else in the second.
    """

    sizes: Sequence[int] = ()
    window: int = 1
    _orders: dict[int, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _shuffles: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size is None or self.window < self.batch_size:
            raise DataError(f"a window of {self.window} rows is smaller than batch_size={self.batch_size}")

    def rows(self, first_step: int, num_steps: int) -> Tensor:
        """Places in the buffer of steps `first_step .. first_step + num_steps - 1`: int64 [num_steps, batch_size]."""
        size = self.rows_per_step
        start, stop = first_step * size, (first_step + num_steps) * size
        parts = [torch.empty(0, dtype=torch.int64)]
        for k in self.windows(first_step, num_steps):
            low, high = max(start - k * self.window, 0), min(stop - k * self.window, self.window)
            parts.append(self._shuffle(k)[low:high] + k % 2 * self.window)
        return torch.cat(parts).reshape(num_steps, size)

    def windows(self, first_step: int, num_steps: int) -> range:
        """The windows that these steps take rows of."""
        size = self.rows_per_step
        return range(first_step * size // self.window, -(-(first_step + num_steps) * size // self.window))

    def most_steps(self, first_step: int, num_steps: int) -> int:
        """How many of these steps stay in one window; 1 for a step that crosses into the next."""
        place = first_step * self.rows_per_step % self.window
        return max(1, min(num_steps, (self.window - place) // self.rows_per_step))

    def contents(self, window: int) -> list[tuple[int, int, int]]:
        """(block, first, stop) of the rows of a window, in the order of the stream."""
        found, place = [], window * self.window
        while place < (window + 1) * self.window:
            number, within = divmod(place, self.num_rows)
            order, ends = self._order(number)
            i = int(np.searchsorted(ends, within, "right"))
            size = self.sizes[order[i]]
            first = within - (int(ends[i]) - size)
            stop = min(size, first + (window + 1) * self.window - place)
            found.append((int(order[i]), first, stop))
            place += stop - first
        return found

    def _order(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(the blocks, the ends of their rows) in the order of a pass."""
        if number not in self._orders:
            order = self._drawn(len(self.sizes), _BLOCKS, number).numpy()
            self._orders[number] = order, np.cumsum(np.asarray(self.sizes)[order])
            _forget(self._orders)
        return self._orders[number]

    def _shuffle(self, window: int) -> Tensor:
        if window not in self._shuffles:
            self._shuffles[window] = self._drawn(self.window, _ROWS, window)
            _forget(self._shuffles)
        return self._shuffles[window]

    def _drawn(self, length: int, *index: int) -> Tensor:
        seed = derived_seed(self.seed, Purpose.PLAN, *index)
        return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def _forget(cache: dict) -> None:
    """Keep what was asked for last."""
    while len(cache) > _CACHED:
        del cache[next(iter(cache))]
