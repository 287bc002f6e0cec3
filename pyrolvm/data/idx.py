"""The idx format of MNIST: two zero bytes, a type code, the number of axes, their lengths, the values.

Source: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits", section
"The IDX file format". All numbers are big-endian.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pyrolvm.errors import DataError

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MOST_DEFLATE = 1032  # deflate cannot shrink by more: a header that claims more is damaged


def read_idx(path: Path, mmap: bool = False) -> np.ndarray:
    """The array of an idx file, or of one compressed with gzip (by its first bytes, not its name).

    Parameters
    ----------
    path : Path
        Of the file.
    mmap : bool
        Map an uncompressed file into memory, copy-on-write, instead of reading it.

    Returns
    -------
    ndarray
        In the machine's byte order; if mapped, in the file's.

    Raises
    ------
    DataError
        The file is not idx, is truncated or too long, or is compressed and to be mapped.
    """
    with path.open("rb") as stream:
        compressed = stream.read(2) == b"\x1f\x8b"
    if compressed and mmap:
        raise DataError(f"{path} is compressed and cannot be memory-mapped: unpack it with gunzip first")
    try:
        with gzip.open(path) if compressed else path.open("rb") as unpacked:
            return _read(unpacked, path, mmap, path.stat().st_size * (_MOST_DEFLATE if compressed else 1))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or truncated ({error}): fetch it again") from None


def _read(stream: BinaryIO | gzip.GzipFile, path: Path, mmap: bool, most: int) -> np.ndarray:
    dtype, shape = header(stream, path)
    offset = 4 + 4 * len(shape)
    wanted = math.prod(shape) * dtype.itemsize
    if offset + wanted > most:
        raise DataError(f"{path} is truncated: its header announces {list(shape)} values")
    if mmap and path.stat().st_size == offset + wanted:
        return np.memmap(path, dtype, mode="c", offset=offset, shape=shape)
    raw = stream.read(wanted + 1)
    if len(raw) != wanted:
        found = "more" if len(raw) > wanted else f"only {len(raw)}"
        raise DataError(f"{path} is damaged: its header announces {wanted} bytes of values, it holds {found}")
    return np.frombuffer(raw, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def header(stream: Any, path: Path | str) -> tuple[np.dtype, tuple[int, ...]]:
    """(type, shape) of the values that follow in an idx file. Raises `DataError`."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or magic[3] == 0:
        raise DataError(f"{path} is not an idx file: it begins with the bytes {magic.hex(' ') or '(none)'}")
    lengths = stream.read(4 * magic[3])
    if len(lengths) < 4 * magic[3]:
        raise DataError(f"{path} is truncated within its header: fetch it again")
    return np.dtype(_TYPES[magic[2]]), tuple(int(n) for n in np.frombuffer(lengths, ">u4"))
