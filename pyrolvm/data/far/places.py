"""Where answers are written: a path here or a URL that fsspec opens, in whose files all of the bytes are or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pyrolvm.data.far.locations import file_system, reached
from pyrolvm.errors import PyrolvmError, SettingError
from pyrolvm.files import write_atomically


@dataclass(frozen=True)
class Place:
    """A file or a folder, which need not be there yet.

    Parameters
    ----------
    text : str
        As one would type it.
    fs : fsspec.AbstractFileSystem or None
        Where it lies; None on this machine's disk.
    path : str
        Its path there.
    """

    text: str
    fs: Any
    path: str

    @classmethod
    def of(cls, out: str | os.PathLike[str]) -> Place:
        """The place of a path or URL. Raises `DataError` where nothing opens such a URL."""
        text = os.fspath(out)
        if "://" not in text:
            path = str(Path(text).expanduser())
            return cls(path, None, path)
        with reached(text):
            fs, path = file_system(text)
        return cls(text.rstrip("/"), None if isinstance(fs, LocalFileSystem) else fs, path.rstrip("/"))

    @property
    def name(self) -> Path | str:
        """A path, or the URL."""
        return Path(self.path) if self.fs is None else self.text

    @property
    def suffix(self) -> str:
        """What its name ends with, in small letters."""
        return PurePosixPath(self.path).suffix.lower()

    def beside(self, ending: str) -> Place:
        """The place whose name has `ending` more."""
        return Place(f"{self.text}{ending}", self.fs, f"{self.path}{ending}")

    def within(self, name: str) -> Place:
        """The place of this name in this folder."""
        return self.beside(f"/{name}")

    def exists(self) -> bool:
        """Whether a file or folder is there."""
        with _written(self):
            return Path(self.path).exists() if self.fs is None else bool(self.fs.exists(self.path))

    def names(self) -> list[str]:
        """What its folder holds, sorted; of one that is not there nothing."""
        with _written(self):
            if self.fs is None:
                return sorted(p.name for p in Path(self.path).iterdir()) if Path(self.path).is_dir() else []
            try:
                return sorted(PurePosixPath(p).name for p in self.fs.ls(self.path, detail=False))
            except FileNotFoundError:
                return []

    def read(self) -> bytes:
        """The bytes of the file."""
        with _written(self):
            return Path(self.path).read_bytes() if self.fs is None else self.fs.cat_file(self.path)

    def read_all(self, names: Iterable[str]) -> list[bytes]:
        """The bytes of files of this folder; elsewhere fetched together."""
        if self.fs is None:
            return [self.within(name).read() for name in names]
        paths = [f"{self.path}/{name}" for name in names]
        with _written(self):
            found = self.fs.cat(paths) if paths else {}
            return [found[path] for path in paths]

    def put(self, data: bytes) -> None:
        """Write the file: all of it, or nothing."""
        if self.fs is None:
            write_atomically(Path(self.path), lambda p: p.write_bytes(data))
            return
        with _written(self):  # a store of objects has an object when all of it has come
            folder = self.fs._parent(self.path)
            if not self.fs.exists(folder):
                # a store may have no folders; what is wrong with others the next line says. No bucket is made
                with suppress(Exception):
                    self.fs.mkdir(folder, create_parents=False)
            self.fs.pipe_file(self.path, data)

    def write(self, write: Callable[[Path], Any]) -> None:
        """Write the file by `write(temporary)`: all of it, or nothing; elsewhere it is made here first."""
        if self.fs is None:
            write_atomically(Path(self.path), write)
            return
        with tempfile.TemporaryDirectory() as folder, _written(self):
            write(Path(folder) / "whole")
            self.fs.put_file(str(Path(folder) / "whole"), self.path)

    def become(self, other: Place, last: str) -> None:
        """Be the folder `other`: renamed here; elsewhere copied file by file, the one called `last` at the end."""
        if self.fs is None:
            Path(self.path).rename(other.path)
            return
        with _written(other):
            for path in sorted(self.fs.find(self.path), key=lambda p: p == f"{self.path}/{last}"):
                target = other.path + path.removeprefix(self.path)
                self.fs.makedirs(self.fs._parent(target), exist_ok=True)
                self.fs.cp_file(path, target)

    def remove(self) -> None:
        """Remove the file, or the folder with all that it holds; nothing where it is not there."""
        with _written(self):
            if self.fs is not None:
                if self.fs.exists(self.path):
                    self.fs.rm(self.path, recursive=True)
            elif Path(self.path).is_dir():
                shutil.rmtree(self.path)
            else:
                Path(self.path).unlink(missing_ok=True)


@contextmanager
def _written(place: Place) -> Iterator[None]:
    """Whatever a file system elsewhere raises, as one line that begins with the place."""
    try:
        yield
    except PyrolvmError:
        raise
    except Exception as error:
        if place.fs is None:
            raise
        found = " ".join(str(error).split()) or type(error).__name__
        raise SettingError(f"{place.text} cannot be written: {found}") from None
