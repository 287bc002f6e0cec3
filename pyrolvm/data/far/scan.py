"""`scan`: rows of many files, here or elsewhere, as data that are read when they are needed."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pyrolvm.data.far.blocks import ArrayBlocks, Blocks
from pyrolvm.data.far.locations import find_files, is_far
from pyrolvm.data.far.parquet import ParquetBlocks
from pyrolvm.data.far.streamed import StreamedDataset
from pyrolvm.errors import DataError, count

__all__ = ["is_far", "scan"]


def scan(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    columns: Sequence[str] | None = None,
    *,
    labels: str | None = None,
    allow_missing: bool = False,
    window_rows: int | None = None,
) -> StreamedDataset:
    """The rows of parquet, npy or idx files that are alike, without reading them.

    Parameters
    ----------
    source : str, path or sequence of them
        A folder (with the folders in it), a pattern such as `"data/*.parquet"`, a file, or a list of files; local, or
        by any URL that fsspec opens: `"s3://bucket/data/*.parquet"`, `"gs://..."`, `"https://..."`.
    columns : sequence of str, optional
        Names of the columns to read, in this order; positions where the columns have no names.
    labels : str, optional
        The column of a parquet file to keep apart as labels.
    allow_missing : bool
        Keep missing values as NaN, for a model that accepts them.
    window_rows : int, optional
        Rows that `fit` has in memory at a time and shuffles, see `WindowPlan`; by default as many as 128 MiB hold.

    Returns
    -------
    StreamedDataset
        What `fit(..., batch_size=...)` trains on and `write_answers` asks about.

    Raises
    ------
    DataError
        No file is found, a place cannot be reached, files are of several kinds or not alike in their columns, types or
        rows, a column is missing, named twice or not numeric, or there are fewer than two rows.
    """
    files = find_files(source)
    blocks: Blocks
    if files.kind == ".parquet":
        blocks = ParquetBlocks(files, columns, labels, allow_missing)
    elif labels is not None:
        raise DataError(f"labels= is for parquet, not for {files.name}: leave it out")
    else:
        blocks = ArrayBlocks(files, columns)
    if window_rows is not None:
        count("window_rows", window_rows)
    data = StreamedDataset(blocks, allow_missing, window_rows=window_rows)
    if data.num_rows < 2:
        raise DataError(f"{files.name} has too few rows of data: {data.num_rows}, and at least 2 are needed")
    if 0 in data.row_shape:
        raise DataError(f"{files.name} has no columns of data: its rows are of shape {list(data.row_shape)}")
    return data
