"""One way in for data on disk: `read` takes a data set's name or a file of any known kind."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyrolvm.data.dataset import Dataset
from pyrolvm.data.embedded import DATASETS, load_dataset, unknown_name
from pyrolvm.data.far.scan import is_far, scan
from pyrolvm.data.idx import read_idx
from pyrolvm.data.numeric import check_finite, check_numeric
from pyrolvm.data.table_files import read_csv, read_h5ad, read_parquet
from pyrolvm.errors import DataError, did_you_mean

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet", ".npy", ".npz", ".idx", ".idx.gz", ".h5ad")
"""The kinds of file `read` knows; idx files may also be called `...-ubyte(.gz)`, as MNIST's are."""

# Which kinds an option is for: given with another, it would be ignored without a word
PICKLE = b"\x80"
"""The first byte of a pickle."""
_OPTIONS = {
    "key": (".npz", ".h5ad"),
    "header": (".csv", ".tsv"),
    "mmap": (".npy", ".idx", ".parquet"),
    "labels": (".csv", ".tsv", ".parquet", ".h5ad"),
}


def read(
    source: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    *,
    labels: str | None = None,
    key: str | None = None,
    header: bool | None = None,
    mmap: bool = False,
    allow_missing: bool = False,
) -> Dataset:
    """Read a data set of `DATASETS` by its name, or a file by its suffix (`SUFFIXES`).

    Parameters
    ----------
    source : str or path
        A name such as `"digits"`, or the path of a file; a folder, a pattern or a URL of files as `scan` takes them,
        all of whose rows are then read into memory.
    columns : sequence of str, optional
        Names of the columns to take, in this order, each once; positions where the columns have no names.
    labels : str, optional
        The column to keep apart as labels, e.g. a class: of a table, or of `obs` of an h5ad file.
    key : str, optional
        The array to take from an npz file that has several, or the layer of an h5ad file in place of X.
    header : bool, optional
        Whether a csv's first row is names; by default it is unless it is all numbers.
    mmap : bool
        Map an npy or idx file into memory, copy-on-write, instead of reading it; a parquet file is unpacked
        into a temporary file, which is mapped.
    allow_missing : bool
        Keep missing values as NaN, for a model that accepts them.

    Returns
    -------
    Dataset
        Values [rows, columns], or [rows, ...] from arrays, of the type they were found in.

    Raises
    ------
    DataError
        There is no such name or file, the file is empty, damaged or of another kind, a column is missing,
        named twice or not numeric, a value is missing or infinite, or there are fewer than two rows.
    """
    if is_far(source):
        check_far(source, key=key, header=header, mmap=mmap or None)
        return scan(source, columns, labels=labels, allow_missing=allow_missing).load()
    path = _existing(source)
    if path is None:
        dataset = load_dataset(str(source))
        return dataset if columns is None else dataset.select(columns)
    kind = _kind(path)
    _check_options(path, kind, labels=labels, key=key, header=header, mmap=mmap or None)
    if kind in (".csv", ".tsv"):
        dataset = read_csv(path, columns, labels, header, "," if kind == ".csv" else "\t")
    elif kind == ".parquet":
        dataset = read_parquet(path, columns, labels, allow_missing, mmap)
    elif kind == ".h5ad":
        dataset = read_h5ad(path, columns, labels, key)
    else:
        array = read_idx(path, mmap) if kind == ".idx" else _read_numpy(path, key, mmap)
        check_numeric(array, str(path))
        dataset = Dataset(array, None, None, str(path))
        dataset = dataset if columns is None else dataset.select(columns)
    if dataset.num_rows < 2:
        raise DataError(f"{path} has too few rows of data: {dataset.num_rows}, and at least 2 are needed")
    if dataset.values.size == 0:
        raise DataError(f"{path} has no columns of data: its shape is {list(dataset.values.shape)}")
    check_finite(dataset.values, str(path), dataset.columns, allow_missing)
    return dataset


def _existing(source: str | os.PathLike[str]) -> Path | None:
    """The file meant by `source`, or None where it is the name of a data set."""
    if isinstance(source, str) and source.replace("-", "_") in DATASETS:
        return None
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            _missing(path, isinstance(source, str) and str(path.parent) == "." and not path.suffix)
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} may not be read by you: change its permissions")
    return path


def _missing(path: Path, may_be_name: bool) -> str:
    if may_be_name:
        return f"{unknown_name(str(path))}; nor is there a file of that name"
    if not path.parent.is_dir():
        return f"there is no file {path}: its folder {path.parent} does not exist"
    hint = did_you_mean(path.name, [p.name for p in path.parent.iterdir()], lambda n: str(path.parent / n))
    return f"there is no file {path}: {hint}".rstrip(": ")


def _kind(path: Path) -> str:
    """The suffix that tells what is in a file, without `.gz`."""
    name = path.name.lower()
    stem = name.removesuffix(".gz")
    if stem.endswith("-ubyte"):
        return ".idx"
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix.removesuffix(".gz")
    raise DataError(f"{path} is of no known kind: the suffixes are {', '.join(SUFFIXES)}")


def _check_options(path: Path, kind: str, **options: object) -> None:
    for option, value in options.items():
        if value is not None and kind not in _OPTIONS[option]:
            raise DataError(f"{option}= is for {', '.join(_OPTIONS[option])}, not for {path}: leave it out")


def check_far(source: object, **options: object) -> None:
    """Raise `DataError` for an option that many files, or files elsewhere, do not have."""
    for option, value in options.items():
        if value is not None:
            raise DataError(f"{option}= is for single files, not for {source}: leave it out")


def _read_numpy(path: Path, key: str | None, mmap: bool) -> np.ndarray:
    """The array of an npy file, or of an npz file by its key. Nothing is ever unpickled."""
    try:
        if mmap:
            return np.load(path, mmap_mode="c", allow_pickle=False)
        # opened here, because numpy leaves its own handle open when an npz file is damaged
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else loaded[_key(path, loaded.files, key)]
    except DataError:
        raise
    except (ValueError, EOFError, OSError, KeyError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:
        text = " ".join(str(error).split())
        if "Object arrays" in text or _starts(path, PICKLE):
            raise DataError(
                f"{path} holds Python objects (pickles), which are never loaded: "
                "save an array of numbers, e.g. np.save(path, x.astype(float))"
            ) from None
        if "pickled" in text:  # numpy's word for whatever has no header of its own
            raise DataError(f"{path} is not a numpy file: it does not begin as one") from None
        raise DataError(f"{path} is damaged, truncated or not a numpy file ({text})") from None


def _starts(path: Path, begin: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(begin)) == begin


def _key(path: Path, keys: list[str], key: str | None) -> str:
    if key is None and len(keys) == 1:
        return keys[0]
    if key in keys:
        return str(key)
    if key is None:
        raise DataError(f"{path} holds {len(keys)} arrays: type key= and one of {keys}")
    raise DataError(f"{path} has no array {key!r}: {did_you_mean(key, keys)}it holds {keys}")
