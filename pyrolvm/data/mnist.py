"""MNIST in its usual idx files: from a folder of yours, or downloaded once into the user's cache.

Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document
recognition", Proceedings of the IEEE 86 (1998). 60000 training and 10000 test images of 28 x 28 pixels.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch

from pyrolvm.data.dataset import Dataset
from pyrolvm.data.idx import read_idx
from pyrolvm.errors import DataError, one_of
from pyrolvm.files import cache_folder

_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_TIMEOUT = 30  # seconds without a byte
_ADVICE = (
    "put the four idx files (train-images-idx3-ubyte.gz, ...) into a folder and set the environment variable "
    "PYROLVM_DATA to it"
)


class _File(NamedTuple):
    """One of the four files: its name, its shape, and the SHA-256 of the compressed original."""

    name: str
    shape: tuple[int, ...]
    sha256: str


# The sums of the original archives; the labels' and test images' contents were compared with a second copy
_FILES = {
    ("train", "images"): _File(
        "train-images-idx3-ubyte",
        (60000, 28, 28),
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    ("train", "labels"): _File(
        "train-labels-idx1-ubyte",
        (60000,),
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    ("test", "images"): _File(
        "t10k-images-idx3-ubyte",
        (10000, 28, 28),
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    ("test", "labels"): _File(
        "t10k-labels-idx1-ubyte", (10000,), "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
}


def load_mnist(split: str = "train", scale: bool = True, download: bool = True) -> Dataset:
    """MNIST as rows of 784 pixels, row by row of the image, with the digits as labels.

    Parameters
    ----------
    split : {"train", "test"}
        60000 or 10000 images.
    scale : bool
        Whether pixels are divided by 255, to float32 in [0, 1]; False leaves them as uint8 in 0..255.
    download : bool
        Whether the net may be used.

    Returns
    -------
    Dataset
        Values [60000, 784] or [10000, 784], labels int64.

    Raises
    ------
    DataError
        The files are nowhere and cannot be downloaded, or are damaged.
    SettingError
        Another `split`.

    Notes
    -----
    Files in the folder named by the environment variable `PYROLVM_DATA` (there or in its `mnist` folder),
    compressed or not, are taken as they are if their shapes are right. Otherwise they come from the user's
    cache folder, downloaded once; their SHA-256 sums are checked each time.
    """
    one_of("split", split, ("train", "test"))
    images = _load(_FILES[split, "images"], download).reshape(-1, 784)
    labels = _load(_FILES[split, "labels"], download).astype(np.int64)
    values = np.divide(images, 255, dtype=np.float32) if scale else images
    columns = [f"pixel_{i}_{j}" for i in range(28) for j in range(28)]
    return Dataset(values, columns, labels, "mnist" if split == "train" else "mnist_test")


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


def _folders() -> list[Path]:
    """The user's own folders."""
    folder = os.environ.get("PYROLVM_DATA")
    return [Path(folder).expanduser() / "mnist", Path(folder).expanduser()] if folder else []


def _cache() -> Path:
    return cache_folder() / "mnist"


def _places() -> str:
    return ", ".join(map(str, (*_folders(), _cache())))


def _find(file: _File) -> Path | None:
    """The user's own file, under the name of either of the usual distributions."""
    stems = (file.name, file.name.replace("-idx", ".idx"))
    paths = (f / (stem + end) for f in _folders() for stem in stems for end in (".gz", ""))
    return next((p for p in paths if p.is_file()), None)


def _cached(file: _File) -> Path | None:
    path = _cache() / f"{file.name}.gz"
    return path if path.is_file() and pooch.file_hash(path) == file.sha256 else None


def _download(file: _File) -> Path:
    """Fetch one file from the first mirror that has the original, and keep it in the cache."""
    failures = []
    for mirror in _MIRRORS:
        try:
            downloader = pooch.HTTPDownloader(timeout=_TIMEOUT)
            name = f"{file.name}.gz"
            return Path(pooch.retrieve(mirror + name, file.sha256, name, _cache(), downloader=downloader))
        except (OSError, ValueError) as error:  # no net, or another sum
            failures.append(f"{mirror}: {str(error).rpartition('Caused by ')[2]}")
    found = "; ".join(failures)
    raise DataError(
        f"MNIST's {file.name} is not in {_places()} and cannot be downloaded ({found}): {_ADVICE}"
    )
