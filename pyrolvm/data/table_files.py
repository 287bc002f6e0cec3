"""Tables on disk: csv and tsv by pandas, parquet by pyarrow, h5ad by anndata."""

from __future__ import annotations

import tempfile
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm.data.columns import check_names, find_column, find_columns
from pyrolvm.data.dataset import Dataset
from pyrolvm.data.numeric import check_finite, frame_to_numpy
from pyrolvm.errors import DataError, warn_user

_DAMAGED = (pd.errors.ParserError, pd.errors.ParserWarning, EOFError, zlib.error, OSError)


def frame_to_dataset(
    frame: pd.DataFrame, name: str, columns: Sequence[str] | None, labels: str | None
) -> Dataset:
    """The chosen columns of a table as values, and one more as labels.

    Raises
    ------
    DataError
        A column is missing, named twice or not numeric.
    """
    names = [str(c) for c in frame.columns]
    unlabelled = [i for i, c in enumerate(names) if c != labels]
    kept = unlabelled if columns is None else find_columns(columns, names, name)
    held = None if labels is None else labels_to_numpy(frame.iloc[:, find_column(labels, names, name)])
    values = frame_to_numpy(frame.iloc[:, kept], name)
    return Dataset(values, [names[i] for i in kept], held, name)


def labels_to_numpy(column: pd.Series) -> np.ndarray:
    """Labels as numbers if they are, else as text."""
    numeric = pd.api.types.is_numeric_dtype(column.dtype)
    return frame_to_numpy(column.to_frame())[:, 0] if numeric else column.astype(str).to_numpy(dtype=str)


def read_csv(
    path: Path, columns: Sequence[str] | None, labels: str | None, header: bool | None, separator: str
) -> Dataset:
    """A csv or tsv file, also compressed; a first row of numbers is data unless `header=True`.

    Raises
    ------
    DataError
        The file is empty, ragged, damaged, not UTF-8 or separated otherwise, two columns have one name, or a
        column is missing or not numeric.
    """
    try:
        with warnings.catch_warnings():
            # pandas only warns of rows that are longer than the header, and cuts them
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = _parse(path, header, separator)
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} is empty") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 (byte {error.start}): save it as UTF-8") from None
    except _DAMAGED as error:
        raise DataError(f"{path} cannot be read: {_why(error, separator)}") from None
    _check_separator(frame, path)
    return frame_to_dataset(_without_index(frame, path, columns), str(path), columns, labels)


def _parse(path: Path, header: bool | None, separator: str) -> pd.DataFrame:
    options: dict[str, Any] = {"sep": separator, "index_col": False, "low_memory": False}
    first = pd.read_csv(path, sep=separator, header=None, nrows=1, dtype=str, keep_default_na=False)
    cells = [str(cell) for cell in first.iloc[0]]
    if header is None:
        header = not _is_data(cells)
        if not header:
            warn_user(
                f"{path} has no header: its first row is numbers, so it is read as data and the columns are "
                "called column_0, column_1, ...; type header=False to agree or header=True if they are names"
            )
    if header:  # pandas would rename the second
        check_names([cell for cell in cells if cell], str(path))
    frame = pd.read_csv(path, header=0 if header else None, **options)
    return frame if header else frame.set_axis([f"column_{i}" for i in range(frame.shape[1])], axis=1)


def _is_data(cells: list[str]) -> bool:
    """Whether a first row is numbers, other than the 0, 1, 2, ... that unnamed columns are written as."""
    numbers = pd.to_numeric(pd.Series(cells), errors="coerce")
    if numbers.isna().any():
        return False
    counts = len(cells) > 2 and (np.diff(numbers) == 1).all() and numbers[0] in (0, 1)
    return not counts


def _why(error: BaseException, separator: str) -> str:
    text = " ".join(str(error).replace("Error tokenizing data. C error:", "").split())
    if "Expected" in text or isinstance(error, pd.errors.ParserWarning):
        kind = "tabs" if separator == "\t" else "commas"
        where = text.rstrip(".") if "Expected" in text else "its rows are longer than its header"
        return f"its rows differ in length ({where}): is it separated by {kind}?"
    return f"it is damaged or truncated ({text})"


def _check_separator(frame: pd.DataFrame, path: Path) -> None:
    names = "".join(str(c) for c in frame.columns)
    for mark, word in ((";", "semicolons"), ("\t", "tabs"), (",", "commas"), ("|", "bars")):
        if frame.shape[1] == 1 and mark in names:
            raise DataError(
                f"{path} seems to be separated by {word}: a .csv file must have commas and a .tsv file tabs"
            )


def _without_index(frame: pd.DataFrame, path: Path, columns: Sequence[str] | None) -> pd.DataFrame:
    """Leave out the row numbers that `DataFrame.to_csv` writes as a first column without a name."""
    if columns is not None or frame.shape[1] < 2 or str(frame.columns[0]) != "Unnamed: 0":
        return frame
    index = frame.iloc[:, 0]
    counts = pd.api.types.is_integer_dtype(index.dtype) and (np.diff(index) == 1).all()
    if not counts:
        return frame
    warn_user(f"{path}: the first column has no name and counts the rows, so it is left out")
    return frame.iloc[:, 1:]


def read_parquet(
    path: Path, columns: Sequence[str] | None, labels: str | None, allow_missing: bool, mmap: bool = False
) -> Dataset:
    """A parquet file, one row group at a time into one array, so that it is never in memory twice.

    With `mmap` the array is mapped from a temporary file without a name, and never in memory as a whole.

    Raises
    ------
    DataError
        pyarrow is not installed, the file is damaged, two columns have one name, or a column is missing or
        not numeric.
    """
    pq = optional("pyarrow.parquet", "parquet", "pip install 'pyrolvm[files]'")
    arrow = optional("pyarrow", "parquet", "pip install 'pyrolvm[files]'")
    try:
        with pq.ParquetFile(path) as file, tempfile.TemporaryDirectory() as folder:
            room = Path(folder) if mmap else None
            return _from_parquet(file, path, columns, labels, allow_missing, room)
    except (arrow.ArrowException, OSError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"{path} is damaged, truncated or not parquet ({text})") from None


def _from_parquet(
    file: Any,
    path: Path,
    columns: Sequence[str] | None,
    labels: str | None,
    allow_missing: bool,
    folder: Path | None,
) -> Dataset:
    empty = file.schema_arrow.empty_table().to_pandas(ignore_metadata=True)
    index = (file.schema_arrow.pandas_metadata or {}).get("index_columns", [])
    names = [c for c in empty.columns if c not in index]
    check_names(names, str(path))
    unlabelled = [c for c in names if c != labels]
    kept = unlabelled if columns is None else [names[i] for i in find_columns(columns, names, str(path))]
    wanted = kept if labels is None else [*kept, names[find_column(labels, names, str(path))]]
    values: np.ndarray | None = None
    held: list[np.ndarray] = []
    row = 0
    for group in range(file.num_row_groups):
        frame = file.read_row_group(group, columns=wanted).to_pandas(ignore_metadata=True)
        part = frame_to_dataset(frame, str(path), kept, labels)
        check_finite(part.values, str(path), kept, allow_missing, first_row=row)
        values = _room(values, file.metadata.num_rows, part.values, folder)
        values[row : row + part.num_rows] = part.values
        held += [] if part.labels is None else [part.labels]
        row += part.num_rows
    if values is None:
        return frame_to_dataset(empty, str(path), kept, labels)
    if isinstance(values, np.memmap) and values.filename is not None:  # its name goes, the map stays
        values = np.memmap(values.filename, values.dtype, "c", shape=values.shape)
    return Dataset(values, kept, np.concatenate(held) if held else None, str(path))


def _room(values: np.ndarray | None, num_rows: int, part: np.ndarray, folder: Path | None) -> np.ndarray:
    """The array to fill, in a file of `folder` if there is one; widened when a later row group needs it."""
    dtype = part.dtype if values is None else np.result_type(values, part)
    if values is not None and values.dtype == dtype:
        return values
    shape = (num_rows, part.shape[1])
    room = (
        np.empty(shape, dtype) if folder is None else np.memmap(folder / dtype.str, dtype, "w+", shape=shape)
    )
    if values is not None:
        room[:] = values
    return room


def read_h5ad(path: Path, columns: Sequence[str] | None, labels: str | None, layer: str | None) -> Dataset:
    """The matrix X of an AnnData file, or one of its layers, dense, genes as columns; `labels` is of `obs`.

    Raises
    ------
    DataError
        anndata is not installed, the file is damaged, two genes have one name, or a layer, gene or column of
        obs is missing.
    """
    anndata = optional("anndata", "h5ad", "pip install 'pyrolvm[files]'")
    try:
        table = anndata.read_h5ad(path)
    except Exception as error:  # anndata and h5py raise errors of many types for a damaged file
        raise DataError(f"{path} is damaged or not h5ad ({' '.join(str(error).split())})") from None
    matrix = _matrix(table, layer, path)
    names = [str(c) for c in table.var_names]
    kept = list(range(len(names))) if columns is None else find_columns(columns, names, str(path))
    values = matrix if columns is None else matrix[:, kept]
    values = np.asarray(values.toarray() if hasattr(values, "toarray") else values)
    of_rows = [str(c) for c in table.obs.columns]
    held = (
        None
        if labels is None
        else labels_to_numpy(table.obs.iloc[:, find_column(labels, of_rows, f"{path} (obs)")])
    )
    return Dataset(values, [names[i] for i in kept], held, str(path))


def _matrix(table: Any, layer: str | None, path: Path) -> Any:
    """X, or the layer of that name."""
    layers = [str(name) for name in table.layers]
    if layer in layers:
        return table.layers[layer]
    has = f"its layers are {', '.join(layers)}" if layers else "it has no layers"
    if layer is not None:
        raise DataError(f"{path} has no layer {layer!r}: {has}")
    if table.X is None:
        hint = f"type key={layers[0]} for a layer" if layers else "store the counts in adata.X"
        raise DataError(f"{path} has no matrix X, and {has}: {hint}")
    return table.X


def optional(module: str, kind: str, command: str, doing: str = "reading") -> ModuleType:
    """Import what only this kind of file needs.

    Raises
    ------
    DataError
        It is not installed; the message has the command that installs it.
    """
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise DataError(f"{doing} {kind} needs {module.split('.')[0]}: type {command}") from None
