"""Parquet files as one table, by pyarrow's dataset: only the chosen columns are read, a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np

from pyrolvm.data.columns import check_names, find_column, find_columns
from pyrolvm.data.far.blocks import Block, names_digest
from pyrolvm.data.far.locations import Files, reached
from pyrolvm.data.numeric import choose
from pyrolvm.data.table_files import labels_to_numpy, optional
from pyrolvm.errors import DataError

INSTALL = "pip install 'pyrolvm[files]'"
_OPENED_AT_ONCE = 8


class ParquetBlocks:
    """Blocks of parquet files of the same columns and types: their row groups. Attributes as of `Blocks`."""

    def __init__(
        self, files: Files, columns: Sequence[str | int] | None, labels: str | None, allow_missing: bool
    ) -> None:
        self.files, self.labels, self.allow_missing = files, labels, allow_missing
        self._fragments = _fragments(files)
        self._footers = [fragment.metadata for fragment in self._fragments]
        self._types = [self._types_of(i) for i in range(len(self._fragments))]
        names, called = list(self._types[0]), files.called(0)
        unlabelled = [name for name in names if name != labels]
        kept = unlabelled if columns is None else [names[i] for i in find_columns(columns, names, called)]
        self._kept = kept
        self.columns: list[str] | None = kept
        self.row_shape: tuple[int, ...] = (len(kept),)
        self.has_labels = labels is not None
        apart = [] if labels is None else [names[find_column(labels, names, called)]]
        self._wanted = list(dict.fromkeys([*kept, *apart]))  # a column may be both
        for i in range(1, len(self._types)):
            self._check_alike(i, whole=columns is None)
        self.dtype = self._dtype()
        if not allow_missing:
            self._check_nulls()
        self.blocks = list(self._groups())

    def _groups(self) -> Iterator[Block]:
        """All row groups that have rows."""
        for i, footer in enumerate(self._footers):
            first = 0
            for group in range(footer.num_row_groups):
                rows = footer.row_group(group).num_rows
                if rows:
                    yield Block(i, first, rows, group)
                first += rows

    def read(self, block: Block) -> tuple[np.ndarray, np.ndarray | None]:
        """As `Blocks.read`."""
        with reached(self.files.called(block.file)):
            group = self._fragments[block.file].subset(row_group_ids=[block.group])
            table = group.to_table(columns=self._wanted)
        values = np.empty((table.num_rows, *self.row_shape), self.dtype)
        for j, name in enumerate(self._kept):
            column = table.column(name)
            if column.null_count and not self.allow_missing:  # the footer did not count them
                self._refuse_nulls(column.null_count, block.file, block.group, name)
            values[:, j] = _numbers(column)
        if self.labels is None:
            return values, None
        return values, labels_to_numpy(table.column(self.labels).to_pandas())

    def fingerprint(self) -> str:
        """As `Blocks.fingerprint`: of the footers, which have the extremes of every column and row group."""
        return names_digest(self.files, [repr(f.to_dict()).encode() for f in self._footers])

    def _types_of(self, index: int) -> dict[str, Any]:
        """Column -> type, without what pandas wrote as an index."""
        schema = self._fragments[index].physical_schema
        check_names(schema.names, self.files.called(index))
        hidden = (schema.pandas_metadata or {}).get("index_columns", [])
        return {field.name: field.type for field in schema if field.name not in hidden}

    def _check_alike(self, index: int, whole: bool) -> None:
        """Raise `DataError` where the columns that are read are others than in the first file."""
        first, own = self._types[0], self._types[index]
        here, there = self.files.called(index), self.files.called(0)
        for name in self._wanted:
            if name not in own:
                raise DataError(
                    f"{here} has no column {name!r}, which {there} has: all files of a set must be alike"
                )
            if own[name] != first[name]:
                raise DataError(
                    f"the column {name!r} is {own[name]} in {here} and {first[name]} in {there}: all files of a set "
                    "must be alike"
                )
        more = [name for name in own if name not in first]
        if more and whole:
            raise DataError(
                f"{here} has a column {more[0]!r}, which {there} has not: choose columns that all have (columns=...)"
            )

    def _dtype(self) -> np.dtype:
        """The common numeric type of the columns; of whole numbers and gaps a floating one."""
        found, called = list[Any](), self.files.called(0)
        numeric = {name: dtype for name, kind in self._types[0].items() if (dtype := _numpy_type(kind))}
        for name in self._kept:
            if name not in numeric:
                raise DataError(
                    f"{called}: column {name!r} holds {self._types[0][name]}, not numbers: {choose(list(numeric))}"
                )
            whole = numeric[name].kind != "f" and self.allow_missing
            found.append(np.dtype(np.float64) if whole else numeric[name])
        if not found:
            raise DataError(f"{called} has no columns of data")
        return np.result_type(*found)

    def _check_nulls(self) -> None:
        """Raise `DataError` where a footer counts missing values in a column that is read: without reading any."""
        for i, footer in enumerate(self._footers):
            places = {footer.schema.column(j).path: j for j in range(footer.num_columns)}
            for group in range(footer.num_row_groups):
                for name in self._kept:
                    known = footer.row_group(group).column(places[name]).statistics
                    if known is not None and known.has_null_count and known.null_count:
                        self._refuse_nulls(known.null_count, i, group, name)

    def _refuse_nulls(self, number: int, file: int, group: int, name: str) -> NoReturn:
        raise DataError(
            f"{self.files.called(file)}: {number} values of column {name!r} are missing in its row group {group}: "
            "fill or drop such rows first, or keep NaN by allow_missing=True (in the shell --allow-missing) for a "
            "model that accepts it"
        )


def _fragments(files: Files) -> list[Any]:
    """The files as fragments of a dataset, their footers read."""
    module = optional("pyarrow.dataset", "parquet", INSTALL)
    arrow_fs = optional("pyarrow.fs", "parquet", INSTALL)
    where = (
        arrow_fs.LocalFileSystem()
        if files.is_local
        else arrow_fs.PyFileSystem(arrow_fs.FSSpecHandler(files.fs))
    )

    def opened(index: int) -> Any:
        called = files.called(index)
        with reached(called):
            try:
                fragment = module.ParquetFileFormat().make_fragment(files.paths[index], filesystem=where)
                fragment.ensure_complete_metadata()
            except (OSError, ValueError) as error:
                if "arquet" in str(error):
                    text = " ".join(str(error).split())
                    raise DataError(f"{called} is damaged, truncated or not parquet ({text})") from None
                raise
        return fragment

    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:  # elsewhere each costs a journey
        return list(pool.map(opened, range(len(files.paths))))


def _numpy_type(kind: Any) -> np.dtype | None:
    """The type of a column of real numbers or booleans, else None."""
    try:
        dtype = np.dtype(kind.to_pandas_dtype())
    except (NotImplementedError, TypeError):
        return None
    return dtype if dtype.kind in "fiub" else None


def _numbers(column: Any) -> np.ndarray:
    """The entries of a column; what is missing is NaN."""
    if not column.null_count:
        return column.to_numpy()
    return column.to_pandas().astype("Float64").to_numpy(np.float64, na_value=np.nan)
