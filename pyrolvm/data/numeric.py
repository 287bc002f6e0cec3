"""What counts as numeric data: numpy arrays of real numbers, from arrays, tables and lists."""

from __future__ import annotations

import shlex
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm.data.columns import check_names
from pyrolvm.errors import DataError

_KINDS = {"c": "complex numbers", "U": "text", "S": "text", "T": "text", "M": "dates", "m": "durations"}
_CHUNK = 2**22


def as_array(value: Any, name: str = "data") -> np.ndarray:
    """A numeric or boolean numpy array of `value`; tables and lists are converted, arrays not copied.

    Parameters
    ----------
    value : array, DataFrame, Series or nested list of numbers
        The data.
    name : str
        Its name in messages.

    Raises
    ------
    DataError
        Text, dates, objects, complex, masked or sparse values, ragged lists, or two columns of one name.
    """
    if isinstance(value, pd.DataFrame):
        return frame_to_numpy(value, name)
    if isinstance(value, pd.Series):
        return frame_to_numpy(value.to_frame(str(value.name)), name)[:, 0]
    if isinstance(value, np.ma.MaskedArray):
        raise DataError(f"{name} is a masked array, whose mask would be lost: pass {name}.filled(np.nan)")
    if hasattr(value, "toarray"):
        raise DataError(f"{name} is a sparse matrix: pass {name}.toarray()")
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{name} is not an array of numbers (are its rows of one length?): {error}") from None
    check_numeric(array, name)
    return array


def check_numeric(array: np.ndarray, name: str) -> None:
    """Raise `DataError` unless the array holds real numbers or booleans."""
    if array.dtype.kind in "fiub":
        return
    kind = "named fields" if array.dtype.names else _KINDS.get(array.dtype.kind, "Python objects")
    raise DataError(
        f"{name} holds {kind} (numpy dtype {array.dtype}), not real numbers: pass an array of numbers, "
        "e.g. x.astype(float)"
    )


def frame_to_numpy(frame: pd.DataFrame, name: str = "data") -> np.ndarray:
    """The columns of a table as one array [rows, columns] of their common numeric type; NA becomes NaN.

    Raises
    ------
    DataError
        A column is not numeric (the message has its first entry that is not a number, and the numeric
        columns), or two columns have one name.
    """
    check_names([str(c) for c in frame.columns], name)
    if not len(frame):  # columns without entries have no type that means anything
        return np.empty(frame.shape)
    numeric = numeric_columns(frame)
    for position in range(frame.shape[1]):
        if not _is_numeric(frame.dtypes.iloc[position]):
            raise DataError(f"{name}: {_offence(frame.iloc[:, position])}: {choose(numeric)}")
    arrays = [_column_to_numpy(frame.iloc[:, i]) for i in range(frame.shape[1])]
    if not arrays:
        return np.empty((len(frame), 0))
    return np.stack(arrays, axis=1).astype(np.result_type(*arrays), copy=False)


def numeric_columns(frame: pd.DataFrame) -> list[str]:
    """Names of the columns that hold real numbers or booleans."""
    return [str(c) for c, dtype in zip(frame.columns, frame.dtypes, strict=True) if _is_numeric(dtype)]


def choose(columns: list[str]) -> str:
    """The part of a message that shows how to choose among `columns`."""
    if not columns:
        return "it has no numeric column"
    shown, more = columns[:12], f" and {len(columns) - 12} more" if len(columns) > 12 else ""
    shell = shlex.quote(",".join(shown))
    return f"correct it, or choose from the numeric columns{more}: columns={shown} (in the shell --columns {shell})"


def check_finite(
    array: np.ndarray, name: str, columns: list[str] | None, allow_nan: bool = False, first_row: int = 0
) -> None:
    """Raise `DataError` naming the first row and column of `array` [rows, ...] that is not finite.

    Rows are taken in chunks, so that a memory-mapped array is never in memory as a whole. `first_row` is the
    number of the first one, where the array is a part.
    """
    if array.dtype.kind != "f":
        return
    step = max(1, _CHUNK // max(1, array[:1].size))
    for first in range(0, len(array), step):
        chunk = array[first : first + step]
        bad = np.isinf(chunk) if allow_nan else ~np.isfinite(chunk)
        if bad.any():
            row, *rest = (int(i) for i in np.argwhere(bad)[0])
            _refuse(chunk[(row, *rest)], _place(first_row + first + row, rest, columns), name)


def _place(row: int, rest: list[int], columns: list[str] | None) -> str:
    if not rest:
        return f"row {row}"
    if len(rest) > 1:
        return f"row {row}, index {tuple(rest)}"
    return f"row {row}, column {repr(columns[rest[0]]) if columns else rest[0]}"


def _refuse(value: Any, place: str, name: str) -> None:
    if np.isnan(value):
        raise DataError(
            f"{name}: a value is missing at {place} (rows count from 0): fill or drop such rows first, "
            "or keep NaN by allow_missing=True (in the shell --allow-missing) for a model that accepts it"
        )
    raise DataError(f"{name}: the value at {place} (rows count from 0) is {value}: replace or drop such rows")


def _is_numeric(dtype: Any) -> bool:
    return pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_complex_dtype(dtype)


def _offence(column: pd.Series) -> str:
    """What is wrong with a column that is not numeric: its first entry that is no number."""
    if pd.api.types.is_complex_dtype(column.dtype):
        return f"column {str(column.name)!r} holds complex numbers"
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    if column.dtype != object and not pd.api.types.is_string_dtype(column.dtype):
        return f"column {str(column.name)!r} holds {column.dtype}, not numbers"
    wrong = pd.to_numeric(column, errors="coerce").isna() & column.notna()
    if not wrong.any():
        return f"column {str(column.name)!r} holds {column.dtype}, not numbers: convert it with pd.to_numeric"
    row = int(np.argmax(wrong.to_numpy()))
    return f"column {str(column.name)!r} holds {str(column.iloc[row])!r} at row {row} (from 0), not a number"


def _column_to_numpy(column: pd.Series) -> np.ndarray:
    if isinstance(column.dtype, np.dtype):
        return column.to_numpy()
    # pandas' nullable and arrow types would become Python objects
    if column.isna().any():
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    return column.to_numpy(dtype=getattr(column.dtype, "numpy_dtype", np.dtype(np.float64)))
