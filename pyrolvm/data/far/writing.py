"""Answers of many rows, written part by part: a folder of parquet files, one npy file, or a zarr group.

What is done is noted beside them, in a folder `OUT.progress`, one note a part, after its values are on disk. A process
that is killed leaves whole parts, and goes on after them when it is started again; several processes write parts of
their own. When all parts are there the notes are removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm.data.far.parquet import INSTALL
from pyrolvm.data.table_files import optional
from pyrolvm.errors import SettingError
from pyrolvm.files import read_json, write_atomically, write_json

SUFFIXES = (".parquet", ".npy", ".zarr")
Columns = Mapping[str, np.ndarray]


def check_answer_file(out: Path) -> None:
    """Raise `SettingError` or `DataError` for a file that cannot be written, before anything is computed."""
    if out.suffix.lower() not in SUFFIXES:
        raise SettingError(
            f"{out}: many rows are written as they come, to one of {', '.join(SUFFIXES)}: change the suffix"
        )
    if not out.absolute().parent.is_dir():
        raise SettingError(f"{out}: there is no folder {out.absolute().parent}")
    if out.suffix.lower() == ".parquet":
        optional("pyarrow.parquet", "parquet", INSTALL, "writing")
    if out.suffix.lower() == ".zarr":
        optional("zarr", "zarr", "pip install zarr", "writing")


@dataclass(frozen=True)
class AnswerFile:
    """A file, or folder, of answers, and the notes of which parts of it are done.

    Parameters
    ----------
    path : Path
        Its suffix gives the kind.
    num_rows : int
        Of the whole answer.
    part_rows : int
        Of every part but the last.
    """

    path: Path
    num_rows: int
    part_rows: int

    @property
    def notes(self) -> Path:
        """The folder of notes."""
        return self.path.with_name(f"{self.path.name}.progress")

    @property
    def num_parts(self) -> int:
        """How many parts there are."""
        return -(-self.num_rows // self.part_rows)

    def rows(self, part: int) -> tuple[int, int]:
        """The first row of a part, and the first after it."""
        return part * self.part_rows, min((part + 1) * self.part_rows, self.num_rows)

    def begin(self, record: dict[str, Any], overwrite: bool) -> None:
        """Begin the file, or go on with one that was begun for the same `record` (JSON-able).

        Raises
        ------
        SettingError
            The file is there and finished, or was begun for something else.
        """
        record = json.loads(json.dumps({**record, "num_rows": self.num_rows, "part_rows": self.part_rows}))
        if overwrite:
            self._remove()
        if (self.notes / "record.json").is_file():
            known = read_json(self.notes / "record.json")
            differ = [k for k in record if known.get(k) != record[k]]
            if differ:
                was, now = known.get(differ[0]), record[differ[0]]
                raise SettingError(
                    f"{self.path} was begun with another {differ[0]} ({was}, not {now}): give another file, or "
                    "overwrite it (overwrite=True, --overwrite)"
                )
            return
        if self.path.exists():
            raise SettingError(
                f"{self.path} is there already: give another file, or overwrite it (overwrite=True, --overwrite)"
            )
        self.notes.mkdir(exist_ok=True)
        write_json(self.notes / "record.json", record)

    def is_done(self, part: int) -> bool:
        """Whether a part was written."""
        return self._note(part).is_file()

    def write(self, part: int, columns: Columns, note: dict[str, Any]) -> None:
        """Write the values of a part, then its note (JSON-able)."""
        kind = self.path.suffix.lower()
        if kind == ".parquet":
            self._write_parquet(part, columns)
        elif kind == ".npy":
            self._write_npy(part, columns)
        else:
            self._write_zarr(part, columns)
        write_json(self._note(part), note)

    def make_room(self, columns: Columns) -> None:
        """Make the arrays that parts are written into, of the kinds of `columns` of some rows; once, by one process."""
        kind = self.path.suffix.lower()
        if kind == ".parquet":
            self.path.mkdir(exist_ok=True)
        elif kind == ".npy" and not self.path.exists():
            array = _only(columns)
            shape = (self.num_rows, *array.shape[1:])
            write_atomically(self.path, lambda p: _blank_npy(p, array.dtype, shape))
        elif kind == ".zarr" and not self.path.exists():
            self._make_zarr(columns)

    def taken(self) -> Iterator[dict[str, Any]]:
        """The notes of all parts that are done, in their order."""
        return (read_json(self._note(part)) for part in range(self.num_parts) if self.is_done(part))

    @property
    def is_complete(self) -> bool:
        """Whether all parts are done."""
        return all(self.is_done(part) for part in range(self.num_parts))

    def finish(self) -> None:
        """Remove the notes of a file that is complete."""
        shutil.rmtree(self.notes, ignore_errors=True)

    def _note(self, part: int) -> Path:
        return self.notes / f"{part:06d}.json"

    def _remove(self) -> None:
        shutil.rmtree(self.notes, ignore_errors=True)
        if self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)

    def _write_parquet(self, part: int, columns: Columns) -> None:
        frame = pd.DataFrame(flat_columns(columns))
        write_atomically(self.path / f"part-{part:06d}.parquet", lambda p: frame.to_parquet(p, index=False))

    def _write_npy(self, part: int, columns: Columns) -> None:
        first, stop = self.rows(part)
        array = np.load(self.path, mmap_mode="r+")
        array[first:stop] = _only(columns)
        array.flush()

    def _make_zarr(self, columns: Columns) -> None:
        zarr = optional("zarr", "zarr", "pip install zarr", "writing")
        if text := [name for name, array in columns.items() if array.dtype.kind not in "biuf"]:
            raise SettingError(f"{self.path}: zarr holds numbers, and '{text[0]}' is text: write parquet")
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        group = zarr.open_group(str(temporary), mode="w")
        for name, array in columns.items():
            shape, chunks = (self.num_rows, *array.shape[1:]), (self.part_rows, *array.shape[1:])
            group.create_array(name, shape=shape, chunks=chunks, dtype=array.dtype)
        temporary.rename(self.path)

    def _write_zarr(self, part: int, columns: Columns) -> None:
        zarr = optional("zarr", "zarr", "pip install zarr", "writing")
        group, (first, stop) = zarr.open_group(str(self.path), mode="r+"), self.rows(part)
        for name, array in columns.items():
            group[name][first:stop] = array


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


def _blank_npy(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """A file of zeros that takes no room yet."""
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(
            stream, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        )
        stream.truncate(stream.tell() + int(np.prod(shape)) * dtype.itemsize)
