"""MNIST in its usual idx files: from a folder of yours, or downloaded once into the user's cache.

Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document
recognition", Proceedings of the IEEE 86 (1998). 60000 training and 10000 test images of 28 x 28 pixels.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np

from pyrolvm.data.idx import read_idx
from pyrolvm.data.table import Dataset
from pyrolvm.errors import DataError, SettingError

_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_TIMEOUT = 30  # seconds without a byte


@dataclass(frozen=True)
class _File:
    """One of the four files: its name, its rows, and the size and SHA-256 of the compressed original."""

    name: str
    shape: tuple[int, ...]
    size: int
    sha256: str


# The sums of the original archives; the labels' and test images' contents were compared with a second copy
_FILES = {
    ("train", "images"): _File(
        "train-images-idx3-ubyte",
        (60000, 28, 28),
        9912422,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    ("train", "labels"): _File(
        "train-labels-idx1-ubyte",
        (60000,),
        28881,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    ("test", "images"): _File(
        "t10k-images-idx3-ubyte",
        (10000, 28, 28),
        1648877,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    ("test", "labels"): _File(
        "t10k-labels-idx1-ubyte",
        (10000,),
        4542,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
}


def load_mnist(split: str = "train", scale: bool = True, download: bool = True) -> Dataset:
    """MNIST as rows of 784 pixels, row by row of the image, with the digits as labels.

    The files are looked for in the folder named by the environment variable `PYROLVM_DATA` (there or in
    its `mnist` folder), compressed or not, and taken as they are if their shapes are right. Otherwise they
    come from the user's cache, after a download whose sizes and SHA-256 sums are checked.

    Args:
        split: `"train"` [60000, 784] or `"test"` [10000, 784].
        scale: pixels as float32 in [0, 1] (divided by 255); False leaves them as uint8 in 0..255.
        download: whether the net may be used.

    Raises:
        DataError: the files are nowhere and cannot be downloaded, or are damaged.
        SettingError: `split` is another word.
    """
    if split not in ("train", "test"):
        raise SettingError(f"mnist has no split {split!r}: type split='train' or split='test'")
    images = _load(_FILES[split, "images"], download).reshape(-1, 784)
    labels = _load(_FILES[split, "labels"], download).astype(np.int64)
    values = np.divide(images, 255, dtype=np.float32) if scale else images
    columns = [f"pixel_{i}_{j}" for i in range(28) for j in range(28)]
    return Dataset(values, columns, labels, "mnist" if split == "train" else "mnist_test")


def cache_folder() -> Path:
    """Where downloads are kept: the platform's cache folder for this user."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pyrolvm"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "pyrolvm" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyrolvm"


def _load(file: _File, download: bool) -> np.ndarray:
    path = _find(file) or _cached(file) or (_download(file) if download else None)
    if path is None:
        raise DataError(f"MNIST's {file.name} was not found in {_places()}: {_ADVICE}")
    array = read_idx(path)
    if array.shape != file.shape or array.dtype != np.uint8:
        raise DataError(
            f"{path} is not MNIST's {file.name}: it holds {array.dtype} {list(array.shape)}, "
            f"not uint8 {list(file.shape)}"
        )
    return array


_ADVICE = (
    "put the four idx files (train-images-idx3-ubyte.gz, ...) into a folder and set the environment variable "
    "PYROLVM_DATA to it"
)


def _folders() -> list[Path]:
    folder = os.environ.get("PYROLVM_DATA")
    return [Path(folder).expanduser() / "mnist", Path(folder).expanduser()] if folder else []


def _places() -> str:
    return ", ".join(str(p) for p in (*_folders(), cache_folder() / "mnist"))


def _find(file: _File) -> Path | None:
    """The user's own file, under the name of either of the usual distributions."""
    stems = (file.name, file.name.replace("-idx", ".idx"))
    paths = (f / (stem + end) for f in _folders() for stem in stems for end in (".gz", ""))
    return next((p for p in paths if p.is_file()), None)


def _cached(file: _File) -> Path | None:
    path = cache_folder() / "mnist" / f"{file.name}.gz"
    return path if path.is_file() and _is_original(path.read_bytes(), file) else None


def _is_original(raw: bytes, file: _File) -> bool:
    return len(raw) == file.size and hashlib.sha256(raw).hexdigest() == file.sha256


def _download(file: _File) -> Path:
    """Fetch one file from the first mirror that has the original, and keep it in the cache."""
    failures = []
    for mirror in _MIRRORS:
        try:
            with urllib.request.urlopen(f"{mirror}{file.name}.gz", timeout=_TIMEOUT) as response:
                raw = response.read(file.size + 1)
        except (OSError, HTTPException) as error:
            failures.append(f"{mirror}: {error}")
            continue
        if _is_original(raw, file):
            return _keep(raw, cache_folder() / "mnist" / f"{file.name}.gz")
        failures.append(f"{mirror}: size or SHA-256 differ from the original")
    found = "; ".join(failures)
    raise DataError(
        f"MNIST's {file.name} is not in {_places()} and cannot be downloaded ({found}): {_ADVICE}"
    )


def _keep(raw: bytes, path: Path) -> Path:
    """Write a file so that no other process ever sees a part of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
            partial.write(raw)
        os.replace(partial.name, path)
    except OSError as error:
        raise DataError(f"the download cannot be kept in {path.parent} ({error}): {_ADVICE}") from None
    return path
