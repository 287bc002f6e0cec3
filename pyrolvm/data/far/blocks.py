"""Blocks: the rows of many files in parts that are read at once, each by itself.

A block of parquet is a row group; one of npy or idx is a run of rows of about `BLOCK_BYTES`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from pyrolvm.data.columns import find_columns
from pyrolvm.data.far.locations import Files, reached
from pyrolvm.data.idx import header as idx_header
from pyrolvm.data.numeric import check_numeric
from pyrolvm.errors import DataError

BLOCK_BYTES = 2**22
STRETCHES, STRETCH = 16, 2**12
"""How many stretches of a file tell it from others, evenly spaced, and their bytes."""


class Block(NamedTuple):
    """Consecutive rows of one file.

    Attributes
    ----------
    file : int
        Which of the files.
    first : int
        Its first row within the file.
    num_rows : int
    group : int
        Which row group of the file, or run of rows.
    """

    file: int
    first: int
    num_rows: int
    group: int


class Blocks(Protocol):
    """Files as blocks of rows.

    Attributes
    ----------
    files : Files
    blocks : list of Block
        In the order of the rows.
    columns : list of str or None
        Names of the entries of a row.
    row_shape : tuple of int
    dtype : numpy.dtype
        Of the values as `read` returns them.
    has_labels : bool
    """

    files: Files
    blocks: list[Block]
    columns: list[str] | None
    row_shape: tuple[int, ...]
    dtype: np.dtype
    has_labels: bool

    def read(self, block: Block) -> tuple[np.ndarray, np.ndarray | None]:
        """(values [rows, ...], labels [rows] or None) of a block."""

    def fingerprint(self) -> str:
        """A digest of the files' names and sizes and of some of what is in them: other data have another."""


def names_digest(files: Files, heads: Sequence[bytes]) -> str:
    """The SHA-256 of names and sizes of files, and of parts of them."""
    digest = hashlib.sha256()
    for path, size in zip(files.paths, files.sizes, strict=True):
        digest.update(f"{path.rpartition('/')[2]} {size} ".encode())
    for head in heads:
        digest.update(head)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Header:
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass
class ArrayBlocks:
    """Blocks of npy or idx files of rows of one shape and type."""

    files: Files
    chosen: Sequence[str | int] | None = None
    columns: list[str] | None = None
    has_labels: bool = False
    blocks: list[Block] = field(init=False)
    row_shape: tuple[int, ...] = field(init=False)
    dtype: np.dtype = field(init=False)

    def __post_init__(self) -> None:
        self._headers = [self._header(i) for i in range(len(self.files.paths))]
        first = self._headers[0]
        for i, header in enumerate(self._headers):
            self._check_alike(i, header, first)
        self._positions = self._chosen(first.shape[1:])
        width = math.prod(first.shape[1:]) * first.dtype.itemsize
        step = max(1, BLOCK_BYTES // max(1, width))
        self.blocks = [
            Block(i, row, min(step, header.shape[0] - row), row // step)
            for i, header in enumerate(self._headers)
            for row in range(0, header.shape[0], step)
        ]
        self.row_shape = first.shape[1:] if self._positions is None else (len(self._positions),)
        self.dtype = first.dtype.newbyteorder("=")

    def read(self, block: Block) -> tuple[np.ndarray, None]:
        """As `Blocks.read`."""
        header, called = self._headers[block.file], self.files.called(block.file)
        width = math.prod(header.shape[1:]) * header.dtype.itemsize
        with (
            reached(called),
            self.files.fs.open(self.files.paths[block.file], "rb", cache_type="none") as stream,
        ):
            stream.seek(header.offset + block.first * width)
            raw = stream.read(block.num_rows * width)
        if len(raw) < block.num_rows * width:
            raise DataError(f"{called} is truncated: its header announces {header.shape[0]} rows")
        rows = np.frombuffer(raw, header.dtype).reshape(block.num_rows, *header.shape[1:])
        rows = rows if self._positions is None else rows[:, self._positions]
        return rows.astype(self.dtype, copy=False), None

    def fingerprint(self) -> str:
        """As `Blocks.fingerprint`: of stretches of each file, the first with its header and the last with its end."""
        stretches = [
            (path, int(start))
            for path, size in zip(self.files.paths, self.files.sizes, strict=True)
            for start in np.unique(np.linspace(0, max(0, size - STRETCH), STRETCHES, dtype=np.int64))
        ]
        paths, starts = zip(*stretches, strict=True)
        with reached(self.files.name):
            heads = self.files.fs.cat_ranges(list(paths), list(starts), [s + STRETCH for s in starts])
        return names_digest(self.files, heads)

    def _header(self, index: int) -> _Header:
        called = self.files.called(index)
        with reached(called), self.files.fs.open(self.files.paths[index], "rb") as stream:
            if self.files.kind == ".idx":
                dtype, shape = idx_header(stream, called)
            else:
                dtype, shape = _npy_header(stream, called)
            offset = stream.tell()
        check_numeric(np.empty(0, dtype), called)
        if not shape:
            raise DataError(f"{called} is a single number, not rows")
        wanted = offset + math.prod(shape) * dtype.itemsize
        if self.files.sizes[index] and self.files.sizes[index] < wanted:
            raise DataError(f"{called} is truncated: its header announces {list(shape)} values")
        return _Header(dtype, shape, offset)

    def _check_alike(self, index: int, header: _Header, first: _Header) -> None:
        for what, own, wanted in (
            ("rows of shape", list(header.shape[1:]), list(first.shape[1:])),
            ("values of type", header.dtype, first.dtype),
        ):
            if own != wanted:
                raise DataError(
                    f"{self.files.called(index)} has {what} {own}, and {self.files.called(0)} {wanted}: all files of "
                    "a set must be alike"
                )

    def _chosen(self, row_shape: tuple[int, ...]) -> list[int] | None:
        if self.chosen is None:
            return None
        if len(row_shape) != 1:
            raise DataError(
                f"{self.files.name} has no columns to choose: its rows are of shape {list(row_shape)}"
            )
        return find_columns(self.chosen, [str(i) for i in range(row_shape[0])], self.files.name)


def _npy_header(stream: Any, called: str) -> tuple[np.dtype, tuple[int, ...]]:
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, fortran, dtype = read[np.lib.format.read_magic(stream)](stream)
    except (ValueError, KeyError, EOFError) as error:
        raise DataError(f"{called} is damaged or not a numpy file ({' '.join(str(error).split())})") from None
    if fortran and len(shape) > 1:
        raise DataError(f"{called} is stored by columns (Fortran order): save np.ascontiguousarray(x)")
    return dtype, shape
