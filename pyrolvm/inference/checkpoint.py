"""Files that survive being killed: written beside, synced, then renamed; tensors and JSON, nothing else."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from pyrolvm.errors import RunFolderError

FORMAT = 1


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write(temporary)` and put the file in place of `path` in one step, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file is a `RunFolderError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path} does not exist: is {path.parent} the folder of a run?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is damaged: {error}; restore it from a copy or fit again") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write CPU tensors and a JSON-able record as one safetensors file, atomically."""
    record = {"pyrolvm": json.dumps({"format": FORMAT, **(metadata or {})}, allow_nan=False)}
    own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    data = save(own, metadata=record)
    write_atomically(path, lambda p: p.write_bytes(data))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote. Raises `RunFolderError` for anything else."""
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
