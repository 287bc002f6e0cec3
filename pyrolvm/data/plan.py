"""Which rows each training step sees, as a pure function of a seed and the step's number.

The rows form one endless stream: the concatenation of one permutation of all rows per epoch. Step `t`
takes the stream's positions `[t * B, (t + 1) * B)`. Hence every row is visited exactly once per epoch,
every batch has exactly `B` rows whether or not `B` divides `N`, and each place of a batch is uniform
over the rows, so that the minibatch estimate `N / B * sum` is unbiased. A batch that straddles two epochs
can hold a row twice.

Nothing is remembered between calls but a cache: training resumes at any step by asking for that step.
"""

from __future__ import annotations

import numbers
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrolvm.errors import DataError, SettingError, count
from pyrolvm.seeds import Purpose, derived_seed

# Permutations of short data are drawn many epochs at a time: one generator per epoch would cost more
# than the training steps themselves. The block's size depends on N alone, so the plan stays pure.
_BLOCK_ROWS, _BLOCK_EPOCHS = 2**14, 256
_CACHED_BLOCKS = 2
RUN = 2**16
"""Rows of a run: of each the same share is held out, so that any stretch of a split is known without the others."""


@dataclass(frozen=True)
class BatchPlan:
    """The rows of every step: `plan.rows(first_step, num_steps)`.

    Parameters
    ----------
    num_rows : int
        N, the rows of the whole data.
    batch_size : int, optional
        B, the rows of each step; `None` takes all rows in their order at every step.
    seed : int
        Not negative; the same seed gives the same rows, on any device.

    Raises
    ------
    DataError
        `batch_size` is larger than `num_rows`, or there are no rows.
    SettingError
        `batch_size` is not a positive integer, or `seed` is not a non-negative one.
    """

    num_rows: int
    batch_size: int | None = None
    seed: int = 0
    _blocks: OrderedDict[int, Tensor] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise DataError(f"a batch plan needs at least one row but num_rows={self.num_rows}")
        count("seed", self.seed, least=0)
        if self.batch_size is not None and count("batch_size", self.batch_size) > self.num_rows:
            raise DataError(
                f"batch_size={self.batch_size} is larger than the data's {self.num_rows} rows: "
                f"give {self.num_rows} or less, or leave batch_size out for all rows"
            )

    @property
    def rows_per_step(self) -> int:
        """B, or N where `batch_size` is None."""
        return self.num_rows if self.batch_size is None else self.batch_size

    def num_steps(self, num_epochs: int) -> int:
        """The least number of steps that visits every row `num_epochs` times."""
        return -(-num_epochs * self.num_rows // self.rows_per_step)

    def rows(self, first_step: int, num_steps: int) -> Tensor:
        """Row indices of steps `first_step .. first_step + num_steps - 1`: int64 [num_steps, batch_size].

        Without a batch size the result is a view of one `arange` (do not write to it).
        """
        if first_step < 0 or num_steps < 0:
            raise SettingError(f"steps cannot be negative: first_step={first_step}, num_steps={num_steps}")
        if self.batch_size is None:
            return torch.arange(self.num_rows).expand(num_steps, self.num_rows)
        start = first_step * self.batch_size
        return self._stream(start, start + num_steps * self.batch_size).reshape(num_steps, self.batch_size)

    def most_steps(self, first_step: int, num_steps: int) -> int:
        """How many of these steps have their rows at hand at once: all."""
        return num_steps

    def kept(self, num_steps: int) -> Tensor:
        """Rows on which bounds of different times are compared: those of the first steps, as `rows`."""
        return self.rows(0, num_steps)

    def _stream(self, start: int, stop: int) -> Tensor:
        """Positions `[start, stop)` of the endless stream of rows: [stop - start], memory of its own."""
        length = self._epochs_per_block * self.num_rows
        parts = [torch.empty(0, dtype=torch.int64)]
        while start < stop:
            index, offset = divmod(start, length)
            parts.append(self._block(index)[offset : offset + stop - start])
            start += len(parts[-1])
        return torch.cat(parts)

    @property
    def _epochs_per_block(self) -> int:
        return max(1, min(_BLOCK_EPOCHS, _BLOCK_ROWS // self.num_rows))

    def _block(self, index: int) -> Tensor:
        """The permutations of one block of epochs, end to end: [epochs_per_block * num_rows]."""
        if index not in self._blocks:
            self._blocks[index] = self._draw_block(index)
            if len(self._blocks) > _CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(index)
        return self._blocks[index]

    def _draw_block(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, Purpose.PLAN, index))
        epochs = range(self._epochs_per_block)
        return torch.cat([torch.randperm(self.num_rows, generator=generator) for _ in epochs])


def is_share(validation: Any) -> bool:
    """Whether it is a share of the rows, and not data of its own."""
    return isinstance(validation, numbers.Real) and not isinstance(validation, bool)


def split_rows(num_rows: int, share: float, seed: int = 0, name: str = "validation") -> tuple[Tensor, Tensor]:
    """Which rows are trained on and which are held out: the one splitter of the package.

    Parameters
    ----------
    num_rows : int
        N.
    share : float
        Share of the rows that is held out, strictly between 0 and 1.
    seed : int
        The same arguments give the same rows.
    name : str
        The name of `share` in messages.

    Returns
    -------
    train, held_out : Tensor
        Row indices, int64, sorted, disjoint, all rows together.

    Raises
    ------
    SettingError
        One of the parts would have no rows.
    """
    num_held_out(num_rows, share, name)
    runs = range(-(-num_rows // RUN))
    held_out = torch.cat([held_out_of_run(index, num_rows, share, seed) for index in runs])
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def held_out_of_run(index: int, num_rows: int, share: float, seed: int) -> Tensor:
    """Which rows of a run `split_rows` holds out, a pure function of the arguments: bool [rows of the run]."""
    start, stop = index * RUN, min((index + 1) * RUN, num_rows)
    number = round(share * stop) - round(share * start)
    runs = (index,) if num_rows > RUN else ()
    generator = torch.Generator().manual_seed(derived_seed(seed, Purpose.SPLIT, *runs))
    held_out = torch.zeros(stop - start, dtype=torch.bool)
    held_out[torch.randperm(stop - start, generator=generator)[:number]] = True
    return held_out


def num_held_out(num_rows: int, share: float, name: str = "validation") -> int:
    """How many rows a share holds out. Raises `SettingError` where one of the parts would have none."""
    held_out = round(share * num_rows) if 0 < share < 1 else 0
    if not 0 < held_out < num_rows:
        left = "to train on" if held_out else "to hold out"
        raise SettingError(
            f"{name}={share} of {num_rows} rows leaves 0 {left}: give a share between 0 and 1, such as 0.1"
        )
    return held_out
