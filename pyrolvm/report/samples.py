"""What the fitted model makes: pictures, or moments beside those of the data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm import plots
from pyrolvm.data import Dataset
from pyrolvm.errors import PyrolvmError
from pyrolvm.report.figures import figure
from pyrolvm.report.findings import Findings
from pyrolvm.report.parts import Part, table
from pyrolvm.shell.inputs import undone

DRAWS, PICTURES, PAIRS = 1000, 36, 12
PICTURE_SETS = ("digits", "mnist", "sprites")


def samples(found: Findings) -> list[Part]:
    """New data from the model, in the units of the data as they were read."""
    try:
        shape = _image_shape(found)
        return _moments(found) if shape is None else _pictures(found, shape)
    except (PyrolvmError, RuntimeError, TypeError) as error:  # a pair of the user's own may not generate
        return [Part("text", f"No samples: {' '.join(str(error).split())}.")]


def _image_shape(found: Findings) -> tuple[int, ...] | None:
    """[height, width] or [channels, height, width] of a row that is a picture; None if it is none."""
    if found.image_shape is not None:
        return found.image_shape
    shape = tuple(
        found.record.get("shape") or next((t.shape[1:] for _, t in found.fitted.example.tensors()), ())
    )
    if len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3)):
        return shape
    columns = found.record.get("columns") or found.fitted.columns or []
    named = str(found.record.get("source", "")).replace("-", "_") in PICTURE_SETS
    pixels = bool(columns) and all(str(c).lower().startswith("pixel") for c in columns)
    side = math.isqrt(shape[0]) if len(shape) == 1 else 0
    return (side, side) if (named or pixels) and len(shape) == 1 and side * side == shape[0] else None


def _pictures(found: Findings, shape: tuple[int, ...]) -> list[Part]:
    made = _as_read(found, found.fitted.sample(PICTURES, mean=True, seed=found.seed))
    size = " by ".join(map(str, shape))
    alt = f"{PICTURES} pictures of {size} pixels that the model made."
    draw = lambda: plots.plot_samples(made, shape)  # noqa: E731
    return [figure(draw, "Means of p(x | z), z drawn from the prior", alt), *_pairs(found, shape)]


def _pairs(found: Findings, shape: tuple[int, ...]) -> list[Part]:
    if not isinstance(found.given.train, Dataset):
        return []
    few = found.given.train.take(np.arange(min(PAIRS, found.given.train.num_rows)))
    if found.fitted.structure.per_datum:
        return []
    x, again = _as_read(found, few.values), _as_read(found, found.fitted.reconstruct(few, seed=found.seed))
    alt = f"Above, {len(x)} pictures of the data; below, their reconstructions by the model."
    draw = lambda: plots.plot_reconstructions(x, again, shape, count=PAIRS)  # noqa: E731
    return [figure(draw, "Data, and the mean of p(x | z) at their codes", alt)]


def _as_read(found: Findings, values: Any) -> np.ndarray:
    """One site's values [rows, ...] in the units of the data."""
    array = values.cpu().numpy() if hasattr(values, "cpu") else np.asarray(values)
    return undone(array, found.transforms)


def _moments(found: Findings) -> list[Part]:
    made = found.fitted.sample(DRAWS, seed=found.seed)
    sites = made if isinstance(made, dict) else {found.fitted.structure.observed[0].name: made}
    columns = [_site_moments(found, name, value, len(sites) == 1) for name, value in sites.items()]
    return [table(pd.concat(columns), f"{DRAWS:,} samples of the model", "column")]


def _site_moments(found: Findings, name: str, values: Any, only: bool) -> pd.DataFrame:
    rows = _as_read(found, values).reshape(len(values), -1)
    names = found.record.get("columns") or found.fitted.columns or []
    index = names if len(names) == rows.shape[1] and only else [f"{name}[{i}]" for i in range(rows.shape[1])]
    columns = {"mean of samples": rows.mean(0), "sd of samples": rows.std(0)}
    data = found.given.train
    if only and isinstance(data, Dataset):
        x = _as_read(found, data.values).reshape(data.num_rows, -1)
        if x.shape[1] == rows.shape[1]:
            columns |= {"mean of data": x.mean(0), "sd of data": x.std(0)}
    return pd.DataFrame(columns, index=index)
