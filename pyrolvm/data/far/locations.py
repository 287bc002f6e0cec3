"""The files of a data set: a folder, a pattern, a URL or a list of them, all of one kind."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pyrolvm.errors import DataError, did_you_mean

KINDS = (".parquet", ".npy", ".idx")
"""Kinds of file of which rows can be read without the rest; idx files may also be called `...-ubyte`."""
_WHOLE = (".csv", ".tsv", ".npz", ".h5ad")
_PACKED = (".gz", ".bz2", ".xz", ".zip", ".zst")
_HIDDEN = ("_", ".")
PROGRESS = ".progress"
"""What the names of folders end with in which answers come together."""
_WILD = "*?["


@dataclass(frozen=True)
class Files:
    """Files of one kind in one file system, in their order.

    Parameters
    ----------
    name : str
        What they are called together in messages.
    kind : str
        One of `KINDS`.
    fs : fsspec.AbstractFileSystem
    paths : list of str
        Their paths in it.
    sizes : list of int
        In bytes.
    versions : list of dict
        What their file system said of them: of a file that was written again, something else.
    """

    name: str
    kind: str
    fs: Any
    paths: list[str]
    sizes: list[int]
    versions: list[dict[str, str]]

    @property
    def is_local(self) -> bool:
        """Whether they lie on this machine's disk."""
        return isinstance(self.fs, LocalFileSystem)

    def called(self, index: int) -> str:
        """A file's name in messages: as one would type it."""
        path = self.paths[index]
        return path if self.is_local else self.fs.unstrip_protocol(path)

    def check_unchanged(self, index: int) -> None:
        """Raise `DataError` where a file is another than the one that was found."""
        with reached(self.called(index)):
            now, then = _version(self.fs.info(self.paths[index])), self.versions[index]
        known = [key for key in then if key in now]  # a listing may know other things than a look at the file
        if any(now[key] != then[key] for key in ("size", *known[:1]) if key in known):
            raise DataError(
                f"{self.called(index)} was written again while it was read: rows of both would be mixed; begin again, "
                "with files that stay"
            )


def is_far(source: Any) -> bool:
    """Whether `source` is a folder, a pattern, a URL or several files, rather than one file or a data set's name."""
    if not isinstance(source, str | os.PathLike):
        return isinstance(source, Sequence)
    text = os.fspath(source)
    if "://" in text or "\n" in text:
        return True
    path = Path(text).expanduser()
    return path.is_dir() or (any(c in text for c in _WILD) and not path.exists())


def find_files(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Files:
    """All files of a source: of a folder with those in its folders, sorted by their paths; of a list in its order.

    Raises
    ------
    DataError
        There are none, they cannot be reached, one is empty, or they are of several kinds or of none that is known.
    """
    texts = _texts(source)
    name = texts[0] if len(texts) == 1 else f"{texts[0]} and {len(texts) - 1} more"
    fs, found = None, list[tuple[str, dict[str, Any]]]()
    for text in texts:
        with reached(text):
            own, path = file_system(text)
        if fs is not None and own is not fs:
            raise DataError(f"{text} is in another file system than {texts[0]}: name files of one")
        fs = own
        with reached(text):
            found += _listed(fs, path, text)
    paths = [path for path, _ in found]
    twice = next((p for i, p in enumerate(paths) if p in paths[:i]), None) if len(texts) > 1 else None
    if twice:
        raise DataError(f"{twice} is named twice: name each file once")
    kind, infos = _kind(paths, name), [_asked(fs, path, info) for path, info in found]
    return Files(name, kind, fs, paths, _sizes(infos, paths), [_version(info) for info in infos])


def _texts(source: Any) -> list[str]:
    """Its parts as they were written; several files at a shell come as lines of one text."""
    parts = source.split("\n") if isinstance(source, str) else source
    texts = [os.fspath(p) for p in ([parts] if isinstance(parts, os.PathLike) else parts)]
    if not texts:
        raise DataError("no file is named: name a folder, a pattern such as data/*.parquet, or files")
    return [t if "://" in t else os.path.expanduser(t) for t in texts]


@contextmanager
def reached(text: str) -> Iterator[None]:
    """Whatever a file system raises, as one line that begins with the place."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        needed = getattr(error, "name", None) or "a package of fsspec"
        raise DataError(f"{text} needs {_advice(error, needed)}") from None
    except Exception as error:  # every file system has errors of its own
        found = " ".join(str(error).split()) or type(error).__name__
        if "range requests" in found:
            found = (
                f"its server has whole files only; let it be fetched first, by the name simplecache::{text}"
            )
        raise DataError(f"{text} cannot be read: {found}") from None


def _advice(error: ImportError, needed: str) -> str:
    words = " ".join(str(error).split())
    package = next((w.strip("'\".,") for w in words.split() if w.strip("'\".,") in _PACKAGES), needed)
    return f"the package {package}: type pip install {package}"


_PACKAGES = ("s3fs", "gcsfs", "adlfs", "aiohttp", "huggingface_hub", "paramiko", "requests", "ocifs")


def file_system(text: str) -> tuple[Any, str]:
    """(the file system of a path or URL, its path in it); listings are not kept, files may change."""
    if "://" in text:
        return url_to_fs(text, use_listings_cache=False)
    return fsspec.filesystem("file"), text


def _listed(fs: Any, path: str, text: str) -> list[tuple[str, dict[str, Any]]]:
    """(path, what is known of it) of the files that one part of a source means."""
    wild = any(c in path for c in _WILD) and not fs.exists(path)
    if wild:
        found = {p: i for p, i in fs.glob(path, detail=True).items() if i["type"] == "file"}
        found = {p: i for p, i in found.items() if f"{PROGRESS}/" not in p}
        if not found:
            raise DataError(f"no file matches {text}: {_near(fs, path)}")
    elif fs.isdir(path):
        found = {p: i for p, i in fs.find(path, detail=True).items() if _is_shown(p, path)}
        found = {p: i for p, i in found.items() if _suffix(p)}
        if not found:
            raise DataError(f"{text} holds no file of data: the kinds are {', '.join(KINDS)}")
    elif fs.exists(path):
        found = {path: fs.info(path)}
    else:
        raise DataError(f"there is no {text}: {_near(fs, path)}".rstrip(": "))
    return [(p, found[p]) for p in sorted(found)]


def _is_shown(path: str, folder: str) -> bool:
    """Whether no part of the path under the folder is hidden, as `_SUCCESS` and `.crc` files are, or unfinished."""
    inner = path.rstrip("/").removeprefix(folder.rstrip("/"))
    parts = inner.strip("/").split("/")
    return not any(part.startswith(_HIDDEN) or part.endswith(PROGRESS) for part in parts)


def _near(fs: Any, path: str) -> str:
    """What lies in the same folder, by names like the one that is missing."""
    parent, _, name = path.rstrip("/").rpartition("/")
    parent = parent or ("/" if path.startswith("/") else ".")
    if any(c in parent for c in _WILD) or not fs.isdir(parent):
        return f"its folder {parent} does not exist"
    names = [PurePosixPath(p).name for p in fs.ls(parent, detail=False)]
    hint = did_you_mean(name, names).rstrip()
    return hint or (f"its folder holds {', '.join(sorted(names)[:5]) or 'nothing'}")


def _suffix(path: str) -> str:
    """The kind of a file, or what tells that it is data of another; empty if neither."""
    bare = path.partition("?")[0] if path.startswith("http") else path  # of a signed URL
    name = PurePosixPath(bare).name.lower().replace("-ubyte", ".idx")
    packed = next((s for s in _PACKED if name.endswith(s)), "")
    kind = next((s for s in (*KINDS, *_WHOLE) if name.removesuffix(packed).endswith(s)), "")
    return kind and kind + packed


def _kind(paths: list[str], name: str) -> str:
    kinds = {_suffix(p): p for p in reversed(paths)}
    if len(kinds) > 1:
        found = ", ".join(f"{PurePosixPath(p).name}" for p in list(kinds.values())[::-1][:3])
        raise DataError(
            f"{name} holds files of several kinds ({found}): choose one, such as *{next(iter(kinds))}"
        )
    kind, first = next(iter(kinds.items()))
    if kind not in KINDS:
        what = f"{kind} files cannot be read in parts" if kind else "it is of no known kind"
        raise DataError(f"{first}: {what}; of many files, or elsewhere, the kinds are {', '.join(KINDS)}")
    return kind


def _asked(fs: Any, path: str, info: dict[str, Any]) -> dict[str, Any]:
    """What is known of a file: asked for, where a listing has no more than its name."""
    if info.get("size") is not None:
        return info
    with reached(path):
        return fs.info(path)


def _sizes(found: list[dict[str, Any]], paths: list[str]) -> list[int]:
    empty = next((path for path, info in zip(paths, found, strict=True) if info.get("size") == 0), None)
    if empty:
        raise DataError(f"{empty} is empty")
    return [int(info.get("size") or 0) for info in found]


_VERSION = (
    "ETag",
    "etag",
    "md5Hash",
    "generation",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)


def _version(info: dict[str, Any]) -> dict[str, str]:
    """What changes when a file is written again, the surest first."""
    known = {key: info[key] for key in (*_VERSION, "size") if info.get(key) is not None}
    return {key: str(v.timestamp() if hasattr(v, "timestamp") else v) for key, v in known.items()}
