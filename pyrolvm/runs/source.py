"""Where data come from: a data set's name, or files, and what to take of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyrolvm.data import DATASETS, StreamedDataset, load_dataset, read, scan
from pyrolvm.data.far import is_far
from pyrolvm.data.far.locations import find_files
from pyrolvm.data.readers import check_far
from pyrolvm.errors import DataError, SettingError

TEXT = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
NAMED_COLUMNS = (*TEXT, ".parquet", ".h5ad")
KEYED = (".npz", ".h5ad")
MAPPABLE = (".npy", ".idx", "-ubyte", ".parquet")
MAPPED_BYTES = 2**28
"""Files from this size on are mapped where their kind allows it, and never in memory as a whole."""
CHOICES = ("columns", "labels", "key", "header", "allow_missing")
"""Parameters of `pyrolvm.data.read` that are part of the recipe."""


@dataclass(frozen=True)
class Source:
    """Which data: a data set's name or a file, and what to take of it.

    Parameters
    ----------
    text : str
        The name or the path.
    columns, labels, key, header, allow_missing
        As `pyrolvm.data.read` takes them.
    options : dict
        Of a named data set's loader, e.g. {"split": "test"}.
    """

    text: str
    columns: list[str] | None = None
    labels: str | None = None
    key: str | None = None
    header: bool | None = None
    allow_missing: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def read(self, streamed: bool = False) -> Any:
        """The data set; all errors are `DataError` or `SettingError`.

        Of many files, or files elsewhere, those from `MAPPED_BYTES` on are not read yet, and likewise a large file
        where that is asked for (`streamed`), which is otherwise mapped.
        """
        if self.is_named:
            dataset = load_dataset(self.text, **self.options)
            return dataset if self.columns is None else dataset.select(self.columns)
        if self.options:
            raise SettingError(
                f"the options {', '.join(self.options)} are of data sets by name, not for the file {self.text}"
            )
        if is_far(self.text):
            check_far(self.called, key=self.key, header=self.header)
            data = self._scanned()
            return data if data.num_bytes >= MAPPED_BYTES else data.load()
        path = Path(self.text).expanduser()
        large = self.ends_in(MAPPABLE) and path.is_file() and path.stat().st_size >= MAPPED_BYTES
        if large and streamed:
            return self._scanned()
        return read(self.text, mmap=large, **{name: getattr(self, name) for name in CHOICES})

    def _scanned(self) -> StreamedDataset:
        return scan(self.text, self.columns, labels=self.labels, allow_missing=self.allow_missing)

    @property
    def called(self) -> str:
        """The name in messages: of several files the first, and how many more."""
        first, *more = self.text.split("\n")
        return f"{first} and {len(more)} more" if more else first

    @property
    def is_named(self) -> bool:
        """Whether it is a data set of the list."""
        return self.text.replace("-", "_") in DATASETS

    def ends_in(self, suffixes: tuple[str, ...]) -> bool:
        """Whether it is a file of one of these kinds."""
        return not self.is_named and self.text.lower().endswith(suffixes)

    def like(self, record: dict[str, Any]) -> Source:
        """With the columns, key and header of the data recorded, where none are given, and their missing values."""
        columns, chosen = record.get("columns"), self.columns
        if chosen and columns and chosen != columns and sorted(chosen) == sorted(columns):
            raise DataError(
                f"columns={','.join(chosen)} are the run's columns in another order than its {','.join(columns)}: "
                "leave columns out, they are taken by name"
            )
        many = not self.is_named and is_far(self.text) and find_files(self.text).kind == ".parquet"
        has = {
            "columns": self.is_named or self.ends_in(NAMED_COLUMNS) or many,
            "key": self.ends_in(KEYED),
            "header": self.ends_in(TEXT),
        }
        taken: Any = {n: record.get(n) for n, has_it in has.items() if has_it and getattr(self, n) is None}
        missing = self.allow_missing or bool(record.get("allow_missing"))
        return replace(self, allow_missing=missing, **taken)
