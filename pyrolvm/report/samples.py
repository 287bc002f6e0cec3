"""New data from the fitted model: pictures, or moments beside those of the data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm import plots
from pyrolvm.errors import PyrolvmError, SettingError
from pyrolvm.report.findings import Findings
from pyrolvm.report.parts import Part, figure, table
from pyrolvm.runs import SavedRun

DRAWS, PICTURES, PAIRS = 1000, 36, 12
PICTURE_SETS = ("digits", "mnist", "sprites")


def samples(found: Findings) -> list[Part]:
    """New data from the model, in the units of the data as they were read."""
    try:
        return _moments(found) if found.image_shape is None else _pictures(found, found.image_shape)
    except (PyrolvmError, RuntimeError, TypeError) as error:  # a pair of the user's own may not generate
        return [Part("text", f"No samples: {' '.join(str(error).split())}.")]


def image_shape(run: SavedRun, given: Any) -> tuple[int, ...] | None:
    """[height, width] or [channels, height, width] of a row that is a picture; None if it is none.

    Raises `SettingError` if the shape given is not that of a row.
    """
    shape = run.row_shape
    if given is not None:
        if not all(isinstance(n, int) and n > 0 for n in given) or math.prod(given) != math.prod(shape):
            raise SettingError(f"image_shape={tuple(given)} does not suit rows of shape {list(shape)}")
        return tuple(given)
    if len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3)):
        return shape
    named = str(run.recipe.record.get("source", "")).replace("-", "_") in PICTURE_SETS
    pixels = bool(run.columns) and all(str(c).lower().startswith("pixel") for c in run.columns)
    side = math.isqrt(shape[0]) if len(shape) == 1 else 0
    return (side, side) if (named or pixels) and shape == (side * side,) else None


def _pictures(found: Findings, shape: tuple[int, ...]) -> list[Part]:
    fitted, undo = found.fitted, found.recipe.undo
    made = undo(fitted.sample(PICTURES, mean=True, seed=found.seed))
    alt = f"{PICTURES} pictures of {' by '.join(map(str, shape))} pixels that the model made."
    title = "Means of p(x | z), z drawn from the prior"
    parts = [figure(plots.plot_samples(made, shape), title, alt)]
    if found.train is None or fitted.structure.per_datum:
        return parts
    few = found.train.take(np.arange(min(PAIRS, found.train.num_rows)))
    x, again = undo(few.values), undo(fitted.reconstruct(few, seed=found.seed))
    alt = f"Above, {len(x)} pictures of the data; below, their reconstructions by the model."
    drawn = plots.plot_reconstructions(x, again, shape, count=PAIRS)
    return [*parts, figure(drawn, "Data, and the mean of p(x | z) at their codes", alt)]


def _moments(found: Findings) -> list[Part]:
    made = found.fitted.sample(DRAWS, seed=found.seed)
    sites = made if isinstance(made, dict) else {found.fitted.structure.observed[0].name: made}
    rows = {site: found.recipe.undo(values).reshape(len(values), -1) for site, values in sites.items()}
    frames = []
    for site, x in rows.items():
        index = (
            found.names(x.shape[1], site) if len(rows) == 1 else [f"{site}[{i}]" for i in range(x.shape[1])]
        )
        frames.append(pd.DataFrame({"mean of samples": x.mean(0), "sd of samples": x.std(0)}, index))
    frame = pd.concat(frames)
    if len(rows) == 1 and found.train is not None:
        x = found.recipe.undo(found.train.values).reshape(found.train.num_rows, -1)
        if x.shape[1] == len(frame):
            frame = frame.assign(**{"mean of data": x.mean(0), "sd of data": x.std(0)})
    return [table(frame, f"{DRAWS:,} samples of the model", "column")]
