"""Data that are read as they are trained on: a buffer of rows that the steps take theirs from.

The buffer is the training data of the problem as far as the engines know: tensors of 2 H + R rows. Two halves hold the
windows of a `WindowPlan`; they are filled between chunks of steps, in place, while another thread reads the next one.
The last R rows stay: bounds that are compared during a run are of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyrolvm.data.batch import Batch
from pyrolvm.data.dataset import Dataset
from pyrolvm.data.far.streamed import StreamedDataset, joined
from pyrolvm.data.far.windows import WindowPlan
from pyrolvm.data.plan import is_share
from pyrolvm.data.precision import check_precision
from pyrolvm.errors import DataError, SettingError, count
from pyrolvm.inference.posterior.suiting import suited
from pyrolvm.inference.program.program import Program
from pyrolvm.processes import Processes

WINDOW_BYTES = 2**27
"""Of a window, by default: there are up to three in memory."""
HELD_OUT_BYTES = 2**26
"""Of the held-out rows that bounds are computed on: of more, evenly spaced ones."""
KEPT_STEPS = 60
"""Steps whose rows stay in the buffer."""


@dataclass(frozen=True)
class StreamedPlan(WindowPlan):
    """A `WindowPlan` whose windows are read into the buffer when their rows are asked for.

    Parameters
    ----------
    places : slice
        The places of a batch whose rows are this process's, `batch_size` of them.
    whole_batch, total : int
        The rows of a step and of the data, of all processes.
    read : callable
        Window -> its rows, in the order of the stream.
    suit : callable
        Those as the program takes them.
    """

    places: slice = field(default_factory=lambda: slice(None))
    whole_batch: int = 1
    total: int = 1
    read: Callable[[int], Dataset] | None = None
    suit: Callable[[Dataset], Batch] | None = None
    buffer: list[Batch] = field(default_factory=list, compare=False, repr=False)
    held: dict[int, int] = field(default_factory=dict, compare=False, repr=False)
    ahead: dict[int, Ahead] = field(default_factory=dict, compare=False, repr=False)

    def rows(self, first_step: int, num_steps: int) -> Tensor:
        """As of `WindowPlan`, of the rows of all processes [num_steps, whole_batch]; those of others are 0."""
        windows = self.windows(first_step, num_steps)
        assert len(windows) <= 2, "steps of more windows than the buffer has halves"
        for window in windows:
            self._hold(window)
        if windows:
            self._read_ahead(windows[-1] + 1)
        return self._placed(super().rows(first_step, num_steps))

    def kept(self, num_steps: int) -> Tensor:
        """Rows that stay in the buffer, in the place of those of the first steps: [num_steps, whole_batch]."""
        rows = torch.arange(num_steps * self.rows_per_step) % self._num_kept + 2 * self.window
        return self._placed(rows.reshape(num_steps, -1))

    def num_steps(self, num_epochs: int) -> int:
        """As of `BatchPlan`, the same for all processes."""
        return -(-num_epochs * self.total // self.whole_batch)

    @property
    def _num_kept(self) -> int:
        """R."""
        return min(self.window, KEPT_STEPS * self.rows_per_step)

    def _placed(self, rows: Tensor) -> Tensor:
        if self.whole_batch == self.rows_per_step:
            return rows
        found = rows.new_zeros(len(rows), self.whole_batch)
        found[:, self.places] = rows
        return found

    def _hold(self, window: int) -> None:
        """Have a window in its half of the buffer."""
        assert self.read is not None
        assert self.suit is not None
        if self.held.get(window % 2) == window:
            return
        begun = self.ahead.pop(window, None)
        found = self.suit(self.read(window) if begun is None else begun.result())
        if not self.buffer:
            most = max(2 * self.window + self._num_kept, self.whole_batch)  # trial steps take rows 0 .. B - 1
            self.buffer.append(_blank(found, most, self.total))
            self._write(found.take(self._shuffle(window)[: self._num_kept]), 2 * self.window)
        self._write(found, window % 2 * self.window)
        self.held[window % 2] = window

    def _write(self, rows: Batch, place: int) -> None:
        for (_, whole), (_, part) in zip(self.buffer[0].tensors(), rows.tensors(), strict=True):
            whole[place : place + len(part)].copy_(part)

    def _read_ahead(self, window: int) -> None:
        if window not in self.ahead and self.held.get(window % 2) != window:
            self.ahead.clear()
            self.ahead[window] = Ahead(self.read, window)


class Ahead:
    """`function(*args)` on a thread of its own; `result()` waits for it, and raises what it raised."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._found: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, *args), daemon=True)
        self._thread.start()

    def _run(self, function: Any, *args: Any) -> None:
        try:
            self._found = function(*args)
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        """What the function returned."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        found, self._found = self._found, None  # not held here as well
        return found


@dataclass(frozen=True)
class Streamed:
    """Training data that are read as they are needed: their buffer, their plan, and how many they are."""

    data: StreamedDataset
    plan: StreamedPlan
    num_rows: int

    @property
    def batch(self) -> Batch:
        """The buffer."""
        return self.plan.buffer[0]

    @property
    def start(self) -> Batch:
        """The rows of the first window."""
        return self.batch.take(torch.arange(self.plan.window, device=self.batch.indices.device))

    def fingerprint(self) -> str:
        """Of the data, not of the rows that the buffer holds now."""
        return self.data.fingerprint()


def stream(
    program: Program, data: StreamedDataset, batch_size: int | None, seed: int, processes: Processes
) -> Streamed:
    """Read the first window, and plan the others.

    Raises
    ------
    SettingError
        There is no batch size.
    DataError
        There are fewer rows than in a batch, or they do not suit the program.
    """
    if batch_size is None:
        raise SettingError(
            f"{data.name} is read as it is trained on, in batches: give batch_size, such as batch_size=256; or read it "
            "whole (`.load()`)"
        )
    if program.row_guide is not None:
        raise SettingError(
            "a guide with parameters for each row needs rows that stay in memory: load the data (`.load()`), or take "
            "an amortised guide"
        )
    total, places = data.num_rows, processes.share(count("batch_size", batch_size))
    own = replace(data, part=(places.start, places.stop, batch_size))
    size = places.stop - places.start
    if not size or own.num_rows < size:
        raise DataError(
            f"batch_size={batch_size} does not suit {total} rows and {processes.count} processes: each process needs "
            "at least one row of each batch, and as many rows as it takes"
        )
    # whole batches, so that none crosses from one window into the next, and as many of them in all processes
    most = -(-batch_size // processes.count)
    wanted = (data.window_rows or WINDOW_BYTES // data.row_bytes) // most
    window = max(1, min(total // batch_size, wanted)) * size
    reader, lock = own.reader(), threading.Lock()

    def read(index: int) -> Dataset:
        with lock:
            return joined((reader.piece(*cut) for cut in plan.contents(index)), window)

    def suit(rows: Dataset) -> Batch:
        if not plan.buffer:  # as they were read: after a cast it is too late
            check_precision(rows.values, rows.columns, program.dtype)
        return suited(program, rows)

    sizes = [piece.num_rows for piece in own.pieces]
    plan = StreamedPlan(own.num_rows, size, seed, sizes, window, places, batch_size, total, read, suit)
    plan.rows(0, 1)
    return Streamed(data, plan, total)


def parted(data: StreamedDataset, validation: Any, seed: int) -> tuple[StreamedDataset, Any]:
    """(rows to train on, held-out data in memory), of a share of the rows or of data of their own.

    Of more held-out rows than fit into `HELD_OUT_BYTES`, those are evenly spaced ones.
    """
    if validation is not None and is_share(validation):
        data, validation = data.split(float(validation), seed, "validation")
    if isinstance(validation, StreamedDataset):
        validation = validation.sample(max(1, HELD_OUT_BYTES // validation.row_bytes))
    return data, validation


def _blank(like: Batch, num_rows: int, total: int) -> Batch:
    """Tensors of so many rows, of the types and shapes of those of a batch, as part of `total` rows."""
    carrying = {name for name, _ in like.lengths()}
    blank = like.map(lambda name, t: t.new_zeros(num_rows, *t.shape[1:]) if name in carrying else t)
    return replace(blank, rows=None, total=total)
