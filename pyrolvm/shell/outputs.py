"""What is written: arrays as csv, tsv, npy or npz, rows like the data also as a png."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm.errors import SettingError
from pyrolvm.files import write_atomically

ARRAYS = (".csv", ".tsv", ".npy", ".npz")
PARTS = (".parquet", ".zarr")
"""Written part by part, and gone on with where they are begun already."""
MAX_IMAGES = 400
_URL = re.compile(r"[a-z0-9+:]{2,}:/", re.I)
"""Also of a URL that a path was made of."""


def checked_out(out: str | Path | None, suffixes: tuple[str, ...] = ARRAYS) -> tuple[Path | None, str | None]:
    """(a file here, a URL), one of them None. Raises `SettingError` where it cannot be written, before anything is."""
    if out is None:
        return None, None
    if not _URL.match(str(out)):
        _check_file(Path(out), suffixes)
        return Path(out), None
    if ".parquet" not in suffixes:
        raise SettingError(
            f"--out {out}: only encode, posterior, evidence and diagnose write to URLs: name a file here"
        )
    if not str(out).lower().endswith((*PARTS, ".npy")):
        raise SettingError(
            f"--out {out}: to URLs answers are written as .parquet, .npy or .zarr: change the suffix"
        )
    return None, str(out)


def _check_file(out: Path, suffixes: tuple[str, ...]) -> None:
    """Raise `SettingError` for a file that cannot be written."""
    if out.suffix.lower() not in suffixes:
        raise SettingError(f"--out {out}: the suffix gives the kind of file, one of {', '.join(suffixes)}")
    if out.is_dir() and out.suffix.lower() not in PARTS:
        raise SettingError(f"--out {out} is a folder: name a file")
    if not out.parent.is_dir():
        raise SettingError(f"--out {out}: there is no folder {out.parent}")


def check_image_shape(shape: Sequence[int] | None, out: Path | None) -> tuple[int, int] | None:
    """HEIGHT,WIDTH of a png. Raises `SettingError`."""
    if shape is None:
        return None
    if out is None or out.suffix.lower() != ".png":
        raise SettingError("--image-shape is of pictures: give it with --out FILE.png, or leave it out")
    if len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise SettingError(f"--image-shape {','.join(map(str, shape))}: write it as HEIGHT,WIDTH, e.g. 28,28")
    return shape[0], shape[1]


def write_values(
    values: Any, out: Path | None, names: list[str] | None = None, beside: dict[str, Any] | None = None
) -> None:
    """Write tensors [rows, ...], one or a dict by site, to a file; csv to standard output without one.

    Parameters
    ----------
    names : list of str, optional
        Of the entries of a row.
    beside : dict, optional
        Columns [rows] that identify a row (its number, its label), written before the values in a table.
    """
    sites = values if isinstance(values, dict) else {"": values}
    arrays = {k: v.cpu().numpy() if hasattr(v, "cpu") else np.asarray(v) for k, v in sites.items()}
    beside = beside or {}
    suffix = ".csv" if out is None else out.suffix.lower()
    if suffix in (".csv", ".tsv"):
        frame = pd.DataFrame(beside | _columns(arrays, names))
        if out is None:
            frame.to_csv(sys.stdout, index=False, float_format="%.7g")
            return
        write: Any = partial(frame.to_csv, index=False, sep="," if suffix == ".csv" else "\t")
    elif suffix == ".npz":
        named: Any = {k or "values": v for k, v in arrays.items()} | {f"{k}s": v for k, v in beside.items()}
        write = partial(_save, np.savez, **named)
    elif len(arrays) > 1:
        raise SettingError(f"there are several arrays ({', '.join(arrays)}), too many for .npy: use .npz")
    else:
        write = partial(_save, np.save, arr=next(iter(arrays.values())))
    assert out is not None
    write_atomically(out, write)


def _save(save: Callable[..., None], path: Path, **arrays: Any) -> None:
    """To an open file, because numpy adds a suffix to the names of others."""
    with path.open("wb") as file:
        save(file, **arrays)


def _columns(arrays: dict[str, np.ndarray], names: list[str] | None) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for site, array in arrays.items():
        entries = array.reshape(len(array), -1).T
        own = names if names and len(names) == len(entries) else None
        columns |= zip(own or [f"{site or 'column'}_{i}" for i in range(len(entries))], entries, strict=True)
    return columns


def write_png(
    values: np.ndarray,
    out: Path,
    image_shape: tuple[int, ...] | None,
    names: list[str] | None = None,
    columns: int | None = None,
) -> None:
    """A grid of images, `columns` in a line, or the points of data of one or two columns called `names`."""
    from pyrolvm.plots import plot_latents, plot_samples

    flat = values.reshape(len(values), -1)
    if image_shape is None and flat.shape[1] <= 2:
        figure = plot_latents(flat, name="x")
        if names and len(names) == 2:
            figure.axes[0].set(xlabel=names[0], ylabel=names[1])
    else:
        shape = image_shape or _square(flat.shape[1])
        if math.prod(shape) != flat.shape[1]:
            raise SettingError(
                f"--image-shape {','.join(map(str, shape))} does not suit rows of {flat.shape[1]} values"
            )
        figure = plot_samples(flat[:MAX_IMAGES], shape, columns=columns)
    write_atomically(out, lambda p: figure.savefig(p, format="png", dpi=150, bbox_inches="tight"))


def _square(width: int) -> tuple[int, int]:
    side = math.isqrt(width)
    if side * side != width:
        raise SettingError(
            f"rows of {width} values are no square images: give --image-shape HEIGHT,WIDTH or use .csv"
        )
    return side, side
