"""Atomic files: written beside their place, synced to disk, then renamed. Tensors and JSON only, no pickle."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from pyrolvm.errors import RunFolderError

FORMAT = 2


Writer = Callable[[Path], Any]


def cache_folder() -> Path:
    """`PYROLVM_CACHE`, or `pyrolvm` in the user's cache folder. For files that can be made or fetched again."""
    return Path(os.environ.get("PYROLVM_CACHE") or platformdirs.user_cache_path("pyrolvm", appauthor=False))


def write_atomically(path: Path, write: Writer) -> None:
    """Call `write(temporary)`, then rename the temporary file to `path`; if writing fails, `path` is unchanged."""
    write_together({path: write})


def write_together(files: dict[Path, Writer]) -> None:
    """Write all files beside their places, and rename them only when all are complete.

    If the disk fills up, all the old files remain.

    Parameters
    ----------
    files : dict
        Path -> function that writes the path it is called with.

    Raises
    ------
    OSError
        A file cannot be written; the error names it.
    """
    staged: dict[Path, Path] = {}
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            staged[path] = _empty_beside(path)
            _write_through(staged[path], write, path)
        for path, temporary in staged.items():
            os.replace(temporary, path)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def _empty_beside(path: Path) -> Path:
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise _named(error, path) from None
    os.close(handle)
    return Path(name)


def _write_through(temporary: Path, write: Writer, path: Path) -> None:
    """Write and sync to disk, with the permissions of a new file."""
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
    except OSError as error:
        raise _named(error, path) from None


def _named(error: OSError, path: Path) -> OSError:
    """The same error for `path`, not the temporary file; HDF5 has the system's error number in its text only."""
    hidden = re.search(r"errno = (\d+)", str(error))
    number = error.errno or (int(hidden[1]) if hidden else None)
    text = os.strerror(number) if number else " ".join(str(error).split())
    return OSError(number or errno.EIO, text, str(path))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json_writer(value))


def json_writer(value: Any) -> Writer:
    """A function that writes `value` as indented JSON."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    return lambda p: p.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON. Raises `RunFolderError` if the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path} does not exist: is {path.parent} the folder of a run?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is damaged: {error}; restore it from a copy or fit again") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write CPU tensors and a JSON-able record as one safetensors file, atomically."""
    write_atomically(path, tensor_writer(tensors, metadata))


def tensor_writer(tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> Writer:
    """A function that writes CPU tensors and a JSON-able record as one safetensors file."""
    record = {"pyrolvm": json.dumps({"format": FORMAT, **(metadata or {})}, allow_nan=False)}
    own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    data = save(own, metadata=record)
    return lambda p: p.write_bytes(data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write_tensors`.

    Returns
    -------
    tuple of dict
        The tensors by name, on the CPU, and the record.

    Raises
    ------
    RunFolderError
        The file is missing, damaged, or was not written by `write_tensors` in this format.
    """
    if not path.is_file():
        raise RunFolderError(f"{path} does not exist: is {path.parent} the folder of a run?")
    try:
        tensors = load_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("pyrolvm", "null"))
    except (safetensors.SafetensorError, json.JSONDecodeError, OSError) as error:
        raise RunFolderError(f"{path} is damaged: {error}; restore it from a copy or fit again") from None
    if record is None:
        raise RunFolderError(f"{path} was not written by pyrolvm")
    if record["format"] != FORMAT:
        raise RunFolderError(
            f"{path} has format {record['format']}, this version reads format {FORMAT}: "
            "use the version of pyrolvm that wrote it"
        )
    return tensors, record
