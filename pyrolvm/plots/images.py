"""Pictures in a grid: each row of an array is one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyrolvm.errors import DataError
from pyrolvm.plots.style import as_array, axes_of

GAP = 1  # pixels between pictures


def plot_samples(
    images: Any, image_shape: Sequence[int], *, columns: int | None = None, ax: Axes | None = None
) -> Figure:
    """Pictures in rows of `columns`, as square a grid as their number allows by default.

    Parameters
    ----------
    images : array_like [count, pixels] or [count, *image_shape]
        One grey scale for all: black is the lowest value of all, white the highest.
    image_shape : sequence of int
        [height, width], [1, height, width] or [3, height, width].
    columns : int, optional
        Pictures in a row.
    ax : Axes, optional
        Axes to draw into.

    Raises
    ------
    DataError
        For shapes that do not agree.
    """
    pictures = as_pictures(images, image_shape, "images")
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    filled = np.full((rows * columns, *pictures.shape[1:]), np.nan)
    filled[: len(pictures)] = pictures
    return _draw(filled.reshape(rows, columns, *pictures.shape[1:]), ax)[0]


def plot_reconstructions(
    x: Any, x_hat: Any, image_shape: Sequence[int], *, count: int = 10, ax: Axes | None = None
) -> Figure:
    """The first pictures above, what the model makes of them below.

    Parameters
    ----------
    x, x_hat : array_like [rows, pixels]
        The data, whose grey scale is used for both, and their reconstructions.
    image_shape : sequence of int
        As in `plot_samples`.
    count : int
        Pictures at most.
    ax : Axes, optional
        Axes to draw into.

    Raises
    ------
    DataError
        For shapes that do not agree.
    """
    data, model = (as_pictures(v, image_shape, n)[:count] for v, n in ((x, "x"), (x_hat, "x_hat")))
    if len(data) != len(model):
        raise DataError(f"x has {len(data)} rows and x_hat {len(model)}: pass the reconstructions of these x")
    finite = data[np.isfinite(data)]
    if len(finite):
        model = model.clip(finite.min(), finite.max())
    figure, panel = _draw(np.stack([data, model]), ax)
    height = data.shape[1]
    panel.set_yticks([height / 2, GAP + 1.5 * height], ["data", "model"], fontsize="small")
    return figure


def plot_traversals(
    images: Any,
    image_shape: Sequence[int],
    *,
    row_label: str = "latent dimension",
    column_label: str = "value",
    ax: Axes | None = None,
) -> Figure:
    """A grid of pictures: along each row one latent moves and the rest stay.

    Parameters
    ----------
    images : array_like [rows, columns, pixels]
    image_shape : sequence of int
        As in `plot_samples`.
    row_label, column_label : str
        Labels of the axes.
    ax : Axes, optional
        Axes to draw into.

    Raises
    ------
    DataError
        For shapes that do not agree.
    """
    grid = as_array(images, "images")
    if grid.ndim < 3:
        raise DataError(f"images have shape {list(grid.shape)}: pass [rows, columns, pixels]")
    pictures = as_pictures(grid.reshape(-1, *grid.shape[2:]), image_shape, "images")
    figure, panel = _draw(pictures.reshape(*grid.shape[:2], *pictures.shape[1:]), ax)
    panel.set_xlabel(column_label, fontsize="small")
    panel.set_ylabel(row_label, fontsize="small")
    return figure


def as_pictures(images: Any, image_shape: Sequence[int], name: str) -> np.ndarray:
    """[count, height, width, 1 or 3] of rows of pixels, channels first as torch has them."""
    shape = tuple(int(n) for n in image_shape)
    shape = (1, *shape) if len(shape) == 2 else shape
    array = as_array(images, name)
    wanted = math.prod(shape)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise DataError(f"image_shape={tuple(image_shape)} must be (height, width), (1 or 3, height, width)")
    if array.ndim < 2 or math.prod(array.shape[1:]) != wanted:
        raise DataError(
            f"{name} has shape {list(array.shape)}, but pictures of image_shape={tuple(image_shape)} are rows of "
            f"{wanted} pixels"
        )
    return array.reshape(-1, *shape).transpose(0, 2, 3, 1).astype(float)


def _draw(grid: np.ndarray, ax: Axes | None) -> tuple[Figure, Axes]:
    """One image of all: [rows, columns, height, width, channels]."""
    rows, columns, height, width = grid.shape[:4]
    inches = min(0.8, 9 / columns, 9 / rows)
    figure, ax = axes_of(ax, max(1.5, inches * columns), max(1.2, inches * rows * height / width))
    finite = grid[np.isfinite(grid)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    ax.imshow(_mosaic((grid - low) / ((high - low) or 1.0)), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return figure, ax


def _mosaic(grid: np.ndarray) -> np.ndarray:
    """[height of all, width of all, 4]: pictures with gaps, transparent there and where a value is missing."""
    rows, columns, height, width = grid.shape[:4]
    out = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 4))
    for r in range(rows):
        for c in range(columns):
            place = np.s_[r * (height + GAP) :, c * (width + GAP) :]
            cell = out[place][:height, :width]
            cell[..., :3] = np.nan_to_num(grid[r, c])
            cell[..., 3] = np.isfinite(grid[r, c]).all(-1)
    return out
