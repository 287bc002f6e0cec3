"""Rows that lie in files and are read when they are needed, a block at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from pyrolvm.data.columns import listed
from pyrolvm.data.dataset import Dataset
from pyrolvm.data.far.blocks import Blocks
from pyrolvm.data.far.holdout import Holdout
from pyrolvm.data.numeric import check_finite
from pyrolvm.data.survey import Survey, survey
from pyrolvm.data.transforms import Transform
from pyrolvm.errors import DataError, SettingError, count


class Piece(NamedTuple):
    """The rows of a view within one block: its kept rows `first .. stop - 1`."""

    block: int
    first: int
    stop: int

    @property
    def num_rows(self) -> int:
        """How many they are."""
        return self.stop - self.first


@dataclass(frozen=True, eq=False, repr=False)
class StreamedDataset:
    """Rows of files, in their order, without those held out, transformed as they are read.

    Parameters
    ----------
    blocks : Blocks
        The files.
    allow_missing : bool
        Whether missing values stay, as NaN.
    transforms : tuple of Transform
        Applied to what is read, one after the other.
    vectors : bool
        Whether rows, of whatever shape, are flattened.
    holdout : Holdout, optional
        Rows that this view leaves out or, with `held_out`, those that it has alone.
    relabel : callable, optional
        Labels as they are read -> labels.
    part : (int, int, int)
        (a, b, of): of the view's N rows, those from N a / of to N b / of.
    window_rows : int, optional
        Rows that `fit` has in memory at a time, and shuffles; by default as many as 128 MiB hold.
    """

    blocks: Blocks
    allow_missing: bool = False
    transforms: tuple[Transform, ...] = ()
    vectors: bool = False
    holdout: Holdout | None = None
    held_out: bool = False
    relabel: Callable[[np.ndarray], np.ndarray] | None = None
    part: tuple[int, int, int] = (0, 1, 1)
    window_rows: int | None = None

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.row_shape))
        files = self.blocks.files
        lines = [
            f"StreamedDataset {self.name!r}: {self.num_rows} rows of {shape or 1} values, {self.blocks.dtype}",
            f"  {len(files.paths)} {files.kind[1:]} files, {len(self.blocks.blocks)} blocks",
        ]
        if self.columns:
            lines.append(f"  columns: {listed(self.columns)}")
        return "\n".join(lines)

    # ------------------------------------------------------------------ what is known without reading

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.blocks.files.name

    @property
    def columns(self) -> list[str] | None:
        """Names of the entries of a row."""
        return self.blocks.columns if len(self.row_shape) == 1 else None

    @property
    def has_labels(self) -> bool:
        """Whether rows have labels."""
        return self.blocks.has_labels

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row."""
        return (math.prod(self.blocks.row_shape),) if self.vectors else self.blocks.row_shape

    @cached_property
    def num_rows(self) -> int:
        """The rows of this view."""
        return sum(piece.num_rows for piece in self.pieces)

    @property
    def row_bytes(self) -> int:
        """Bytes of the values of a row as they are read."""
        return max(1, math.prod(self.row_shape)) * self.blocks.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all values, were they in memory."""
        return self.num_rows * self.row_bytes

    def fingerprint(self) -> str:
        """A digest of the files, what is taken of them and what is done to it, without reading rows."""
        parts: list[Any] = [self.blocks.fingerprint(), self.blocks.columns, self.vectors, self.held_out]
        parts += [[t.to_dict() for t in self.transforms]]
        if self.holdout is not None:
            parts += [self.holdout.share, self.holdout.seed]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    # ------------------------------------------------------------------ other views of the same rows

    def share(self, process: int, num_processes: int) -> StreamedDataset:
        """The rows of one of several processes, consecutive ones; together they have each row once."""
        count("num_processes", num_processes)
        if not 0 <= process < num_processes:
            raise SettingError(f"process={process} is none of {num_processes}, which are counted from 0")
        return replace(self, part=(process, process + 1, num_processes))

    def split(
        self, fraction: float = 0.1, seed: int = 0, name: str = "fraction"
    ) -> tuple[StreamedDataset, StreamedDataset]:
        """Hold out a random part of the rows: `(train, held_out)`, disjoint, each in the order of the files.

        The same rows as `Dataset.split` and `fit(validation=fraction, seed=seed)` hold out: of every 65,536 consecutive
        rows the same share.

        Parameters
        ----------
        fraction : float
            Share of the rows, strictly between 0 and 1.
        seed : int
            The same seed holds out the same rows.

        Raises
        ------
        SettingError
            One of the parts would have no rows, or rows are held out already.
        """
        if self.holdout is not None:
            raise SettingError(f"{self.name} is split already: split once")
        held = Holdout(sum(b.num_rows for b in self.blocks.blocks), fraction, seed, name)
        return replace(self, holdout=held), replace(self, holdout=held, held_out=True)

    def as_vectors(self) -> StreamedDataset:
        """The same rows as vectors [rows, values]."""
        return self if len(self.row_shape) == 1 else replace(self, vectors=True)

    def transformed(self, transform: Transform) -> StreamedDataset:
        """The same rows, transformed as they are read."""
        return replace(self, transforms=(*self.transforms, transform))

    def standardise(self, per_column: bool = True) -> tuple[StreamedDataset, Transform]:
        """Values of mean 0 and standard deviation 1, with the transform that undoes it; as of `Dataset`.

        The rows are read once, to find means and deviations.
        """
        transform = self.survey().standardise(self.name, self.columns, per_column)
        return self.transformed(transform), transform

    def binarise(self, threshold: float | None = None) -> tuple[StreamedDataset, Transform]:
        """Values 0 and 1, with the transform; as of `Dataset`. The rows are read once, to find the extremes."""
        transform = self.survey().binarise(self.name, threshold)
        return self.transformed(transform), transform

    # ------------------------------------------------------------------ reading

    def survey(self) -> Survey:
        """Extremes, means, deviations and labels, by one pass over the rows."""
        return survey((part.values, part.labels) for part in self.parts())

    def parts(self) -> Iterator[Dataset]:
        """All rows in their order, a block at a time."""
        reader = self.reader()
        yield from (reader.piece(i) for i in range(len(self.pieces)))

    def load(self) -> Dataset:
        """All rows in memory."""
        return self.reader().rows(0, self.num_rows)

    def sample(self, num_rows: int) -> Dataset:
        """At most so many rows, evenly spaced over all; one pass over the blocks that hold them."""
        if num_rows >= self.num_rows:
            return self.load()
        wanted = np.linspace(0, self.num_rows - 1, num_rows).astype(np.int64)
        reader = self.reader()
        own = [wanted[(wanted >= a) & (wanted < b)] - a for a, b in itertools.pairwise(reader.starts)]
        return joined((reader.piece(i).take(rows) for i, rows in enumerate(own) if len(rows)), num_rows)

    def reader(self) -> Reader:
        """Reads rows, and keeps the block that it read last."""
        return Reader(self)

    @cached_property
    def starts(self) -> np.ndarray:
        """The number of the first row of each block, all files' rows counted: [blocks + 1]."""
        return np.concatenate([[0], np.cumsum([b.num_rows for b in self.blocks.blocks])]).astype(np.int64)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The view's rows, block by block."""
        kept = [self._kept(i) for i in range(len(self.blocks.blocks))]
        sizes = [
            b.num_rows if k is None else int(k.sum()) for b, k in zip(self.blocks.blocks, kept, strict=True)
        ]
        total = sum(sizes)
        low, high = (total * share // self.part[2] for share in self.part[:2])
        found, before = [], 0
        for i, size in enumerate(sizes):
            first, stop = max(low - before, 0), min(high - before, size)
            found += [Piece(i, first, stop)] if first < stop else []
            before += size
        return found

    def _kept(self, block: int) -> np.ndarray | None:
        """Which rows of a block belong to the view, its part left aside; None for all."""
        if self.holdout is None:
            return None
        mask = self.holdout.mask(int(self.starts[block]), int(self.starts[block + 1]))
        return mask if self.held_out else ~mask


class Reader:
    """Reads the rows of a view; the last block stays, so that rows in their order are read once."""

    def __init__(self, data: StreamedDataset) -> None:
        self.data = data
        self._block: tuple[int, tuple[np.ndarray, np.ndarray | None]] | None = None
        self.starts = np.concatenate([[0], np.cumsum([p.num_rows for p in data.pieces])])

    def piece(self, index: int, first: int = 0, stop: int | None = None) -> Dataset:
        """Rows `first .. stop - 1` of a piece."""
        data, piece = self.data, self.data.pieces[index]
        values, labels = self._read(piece.block)
        rows = slice(piece.first + first, piece.stop if stop is None else piece.first + stop)
        kept = data._kept(piece.block)
        chosen = rows if kept is None else np.flatnonzero(kept)[rows]
        values, labels = values[chosen], None if labels is None else labels[chosen]
        if labels is not None and data.relabel is not None:
            labels = data.relabel(labels)
        values = values.reshape(len(values), *data.row_shape)
        for transform in data.transforms:
            values = transform.apply(values)
        return Dataset(values, data.columns, labels, data.name)

    def rows(self, first: int, stop: int) -> Dataset:
        """Rows `first .. stop - 1` of the view."""
        starts = self.starts
        places = range(np.searchsorted(starts, first, "right") - 1, np.searchsorted(starts, stop, "left"))
        cuts = ((i, max(first - starts[i], 0), min(stop, starts[i + 1]) - starts[i]) for i in places)
        return joined((self.piece(*cut) for cut in cuts), stop - first)

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        if self._block is None or self._block[0] != index:
            self._block = None  # not two at a time
            blocks = self.data.blocks
            block = blocks.blocks[index]
            try:
                values, labels = blocks.read(block)
            finally:  # what was read of a file that was written again, or refused in it, means nothing
                blocks.files.check_unchanged(block.file)
            called = blocks.files.called(block.file)
            check_finite(values, called, blocks.columns, self.data.allow_missing, first_row=block.first)
            self._block = index, (values, labels)
        return self._block[1]


def joined(parts: Iterable[Dataset], num_rows: int) -> Dataset:
    """The rows of all parts, `num_rows` of them, as one data set; the parts are not in memory together."""
    whole: Dataset | None = None
    labels, row = list[np.ndarray](), 0
    for part in parts:
        if whole is None:
            whole = replace(
                part, values=np.empty((num_rows, *part.values.shape[1:]), part.values.dtype), labels=None
            )
        whole.values[row : row + part.num_rows] = part.values
        labels += [] if part.labels is None else [part.labels]
        row += part.num_rows
    if whole is None:
        raise DataError("there are no rows of data")
    return replace(whole, labels=np.concatenate(labels) if labels else None)
