"""Answers of many rows, written part by part: a folder of parquet files, one npy file, or a zarr group.

All of it comes together in a folder `OUT.progress`: the values of every part, and after them its note. A process that
is killed leaves whole parts, and goes on behind them when it is started again; several processes write parts of their
own. When all parts are there they become `OUT`, which therefore is whole or is not there, and the folder is removed.
Here `OUT` is a renamed folder or file; elsewhere parquet parts are copied, while `OUT.progress` stays until all are.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm.data.far.locations import PROGRESS
from pyrolvm.data.far.parquet import INSTALL
from pyrolvm.data.far.places import Place
from pyrolvm.data.table_files import optional
from pyrolvm.errors import SettingError

SUFFIXES = (".parquet", ".npy", ".zarr")
Columns = dict[str, np.ndarray]


def check_answer_file(out: Place) -> None:
    """Raise `SettingError` or `DataError` for a file that cannot be written, before anything is computed."""
    if out.suffix not in SUFFIXES:
        raise SettingError(
            f"{out.text}: many rows are written as they come, to one of {', '.join(SUFFIXES)}: change the suffix"
        )
    if out.fs is None and not Path(out.path).absolute().parent.is_dir():
        raise SettingError(f"{out.text}: there is no folder {Path(out.path).absolute().parent}")
    if out.suffix == ".parquet":
        optional("pyarrow.parquet", "parquet", INSTALL, "writing")
    if out.suffix == ".zarr":
        optional("zarr", "zarr", "pip install zarr", "writing")


@dataclass(frozen=True)
class AnswerFile:
    """A file, or folder, of answers, and the notes of which parts of it are done.

    Parameters
    ----------
    place : Place
        Its suffix gives the kind.
    num_rows : int
        Of the whole answer.
    part_rows : int
        Of every part but the last.
    """

    place: Place
    num_rows: int
    part_rows: int

    @property
    def num_parts(self) -> int:
        """How many parts there are."""
        return -(-self.num_rows // self.part_rows)

    def rows(self, part: int) -> tuple[int, int]:
        """The first row of a part, and the first after it."""
        return part * self.part_rows, min((part + 1) * self.part_rows, self.num_rows)

    def begin(self, record: dict[str, Any], overwrite: bool) -> bool:
        """Begin the file (True), or go on with one that was begun for the same `record` (JSON-able).

        Raises
        ------
        SettingError
            The file is there and finished, or was begun for something else.
        """
        record = json.loads(json.dumps({**record, "num_rows": self.num_rows, "part_rows": self.part_rows}))
        if overwrite:
            self.withdraw()
            self.place.remove()
        if self._record.exists():
            self._check_same(json.loads(self._record.read()), record)
            for name in self._values.names():
                if name.startswith("."):  # what a process was killed at
                    self._values.within(name).remove()
            return False
        if self.place.exists():
            raise SettingError(
                f"{self.place.text} is there already: give another file, or overwrite it (overwrite=True, --overwrite)"
            )
        self.withdraw()
        self._record.put(json.dumps(record, indent=2).encode())
        return True

    def make_room(self, columns: Columns) -> None:
        """Make the arrays that parts are written into, of the kinds of `columns` of some rows; once, by one process."""
        if self.place.suffix == ".zarr":
            self._make_zarr(columns)

    def done(self) -> set[int]:
        """The parts that were written."""
        return {int(name[:-5]) for name in self._progress.names() if name[:-5].isdecimal()}

    def write(self, part: int, columns: Columns, note: dict[str, Any]) -> None:
        """Write the values of a part, then its note (JSON-able)."""
        if self.place.suffix == ".zarr":
            self._write_zarr(part, columns)
        else:
            write = _parquet_bytes if self.place.suffix == ".parquet" else _npy_bytes
            self._values.within(self._part(part)).put(write(columns))
        self._progress.within(f"{part:06d}.json").put(json.dumps(note, allow_nan=False).encode())

    def finish(self) -> list[dict[str, Any]]:
        """The notes of all parts, which are done, in their order; the file is made of them.

        Done again where it was interrupted.
        """
        names = [f"{part:06d}.json" for part in range(self.num_parts)]
        notes = [json.loads(text) for text in self._progress.read_all(names)]
        if self._values.exists():
            if self.place.suffix == ".npy":
                self.place.write(self._joined)
            else:
                self._values.become(self.place, last="zarr.json")
        self.withdraw()
        return notes

    def withdraw(self) -> None:
        """Remove what is not finished."""
        self._record.remove()  # first: without it the rest is nothing that one goes on with
        self._progress.remove()

    @property
    def _progress(self) -> Place:
        return self.place.beside(PROGRESS)

    @property
    def _record(self) -> Place:
        return self._progress.within("record.json")

    @property
    def _values(self) -> Place:
        return self._progress.within("values")

    def _part(self, part: int) -> str:
        return f"part-{part:06d}{self.place.suffix}"

    def _check_same(self, known: dict[str, Any], record: dict[str, Any]) -> None:
        differ = [k for k in record if known.get(k) != record[k]]
        if differ:
            was, now = known.get(differ[0]), record[differ[0]]
            raise SettingError(
                f"{self.place.text} was begun with another {differ[0]} ({was}, not {now}): give another file, or "
                "overwrite it (overwrite=True, --overwrite)"
            )

    def _joined(self, path: Path) -> None:
        """All parts of an npy file, one after the other, into one file; one is in memory at a time."""
        with path.open("wb") as stream:
            for part in range(self.num_parts):
                rows = np.load(io.BytesIO(self._values.within(self._part(part)).read()))
                if not part:
                    descr = np.lib.format.dtype_to_descr(rows.dtype)
                    shape = (self.num_rows, *rows.shape[1:])
                    header = {"descr": descr, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(np.ascontiguousarray(rows).tobytes())

    def _make_zarr(self, columns: Columns) -> None:
        if text := [name for name, array in columns.items() if array.dtype.kind not in "biuf"]:
            raise SettingError(
                f"{self.place.text}: zarr holds numbers, and '{text[0]}' is text: write parquet"
            )
        group = self._zarr("w")
        for name, array in columns.items():
            shape, chunks = (self.num_rows, *array.shape[1:]), (self.part_rows, *array.shape[1:])
            group.create_array(name, shape=shape, chunks=chunks, dtype=array.dtype)

    def _write_zarr(self, part: int, columns: Columns) -> None:
        group, (first, stop) = self._zarr("r+"), self.rows(part)
        for name, array in columns.items():
            group[name][first:stop] = array

    def _zarr(self, mode: str) -> Any:
        """The group that comes together."""
        zarr = optional("zarr", "zarr", "pip install zarr", "writing")
        store: Any = self._values.path
        if self.place.fs is not None:
            from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

            store = zarr.storage.FsspecStore(
                AsyncFileSystemWrapper(self.place.fs, asynchronous=True), path=self._values.path
            )
        return zarr.open_group(store, mode=mode)


def _parquet_bytes(columns: Columns) -> bytes:
    stream = io.BytesIO()
    pd.DataFrame(flat_columns(columns)).to_parquet(stream, index=False)
    return stream.getvalue()


def _npy_bytes(columns: Columns) -> bytes:
    stream = io.BytesIO()
    np.save(stream, _only(columns))
    return stream.getvalue()


def flat_columns(columns: Columns) -> dict[str, np.ndarray]:
    """One column for each entry of a row: `z` of shape [rows, 2] becomes `z_0` and `z_1`."""
    found: dict[str, np.ndarray] = {}
    for name, array in columns.items():
        entries = array.reshape(len(array), -1).T
        found |= {name: entries[0]} if array.ndim == 1 else {f"{name}_{i}": e for i, e in enumerate(entries)}
    return found


def _only(columns: Columns) -> np.ndarray:
    """The first of the answers that is no row number or label: what an npy file holds."""
    return next(array for name, array in columns.items() if name not in ("row", "label"))
