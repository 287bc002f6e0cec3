"""Small pictures of one shape each, drawn from known factors of variation, to measure disentanglement.

The design is that of dSprites (L. Matthey, I. Higgins, D. Hassabis, A. Lerchner, "dSprites:
Disentanglement testing Sprites dataset", 2017): a square, an ellipse or a heart, of several scales,
orientations and positions. It is drawn here, at any size, and is not a copy of their images.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from pyrolvm.data.dataset import Dataset
from pyrolvm.data.simulators import check_sizes

SHAPES = ("square", "ellipse", "heart")
_OVERSAMPLING = 2  # each pixel is the mean of 2 x 2 points
_CHUNK = 2**22  # points drawn at a time


def simulate_sprites(
    num_rows: int | None = None,
    size: int = 32,
    num_scales: int = 3,
    num_orientations: int = 8,
    num_positions: int = 8,
    seed: int = 0,
) -> Dataset:
    """White shapes on black with independent factors: shape, scale, orientation, x and y.

    Parameters
    ----------
    num_rows : int, optional
        None gives the whole grid once, in the order of its factors (the last one fastest); a number draws so
        many rows with independent, uniform factors.
    size : int
        Of the images, in pixels.
    num_scales : int
        Sizes of the shapes, evenly from 0.5 to 1.
    num_orientations : int
        Angles, evenly over the full turn. A square looks the same after a quarter of it and an ellipse after
        half, as in dSprites.
    num_positions : int
        Places along each axis; every shape lies wholly inside the image.
    seed : int
        Of the generator.

    Returns
    -------
    Dataset
        Values float32 [rows, size * size] in [0, 1], row by row of the image; factors: the five factors as
        integers from 0; labels: the shape; truth: the values of the factors that those integers count.

    Raises
    ------
    SettingError
        A number is not positive.
    """
    check_sizes(
        size=size, num_scales=num_scales, num_orientations=num_orientations, num_positions=num_positions
    )
    check_sizes(num_rows=1 if num_rows is None else num_rows)
    truth = _factor_values(num_scales, num_orientations, num_positions)
    factors = _factors(num_rows, [len(v) for v in truth.values()], seed)  # [rows, 5]
    columns = [f"pixel_{i}_{j}" for i in range(size) for j in range(size)]
    table = pd.DataFrame(factors, columns=list(truth))
    return Dataset(_draw(factors, truth, size), columns, factors[:, 0], "sprites", table, truth)


def _factor_values(num_scales: int, num_orientations: int, num_positions: int) -> dict[str, np.ndarray]:
    places = np.linspace(-0.45, 0.45, num_positions) if num_positions > 1 else np.zeros(1)
    return {
        "shape": np.array(SHAPES),
        "scale": np.linspace(0.5, 1.0, num_scales) if num_scales > 1 else np.ones(1),
        "orientation": np.arange(num_orientations) * (2 * math.pi / num_orientations),
        "x": places,
        "y": places,
    }


def _factors(num_rows: int | None, sizes: list[int], seed: int) -> np.ndarray:
    if num_rows is None:
        return np.indices(sizes).reshape(len(sizes), -1).T.copy()
    return np.random.default_rng(seed).integers(0, sizes, size=(num_rows, len(sizes)))


def _draw(factors: np.ndarray, truth: dict[str, np.ndarray], size: int) -> np.ndarray:
    """The images [rows, size * size] of the given factors, in chunks of rows."""
    images = np.empty((len(factors), size * size), dtype=np.float32)
    step = max(1, _CHUNK // (size * _OVERSAMPLING) ** 2)
    for first in range(0, len(factors), step):
        chunk = factors[first : first + step]
        scale, angle, x, y = (
            truth[name][chunk[:, k], None, None].astype(np.float32) for k, name in enumerate(truth) if k
        )
        images[first : first + step] = _pixels(_inside(chunk[:, 0], scale, angle, x, y, size), size)
    return images


def _inside(
    shape: np.ndarray, scale: np.ndarray, angle: np.ndarray, x: np.ndarray, y: np.ndarray, size: int
) -> np.ndarray:
    """Whether each point of the fine grid lies in the shape: [rows, fine, fine]."""
    fine = size * _OVERSAMPLING
    axis = (
        np.arange(fine, dtype=np.float32) + 0.5
    ) / fine * 2 - 1  # the image is [-1, 1] x [-1, 1], y upwards
    dx, dy = axis[None, None, :] - x, -axis[None, :, None] - y
    radius = 0.5 * scale
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / radius
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / radius
    square = np.maximum(np.abs(u), np.abs(v)) <= 0.7
    ellipse = u**2 + (2 * v) ** 2 <= 1
    p, q = 1.3 * u, 1.3 * v  # the curve (p^2 + q^2 - 1)^3 = p^2 q^3 reaches 1.3 from its centre
    ring = p**2 + q**2 - 1
    heart = ring * ring * ring <= (p * q) ** 2 * q
    return np.choose(shape[:, None, None], [square, ellipse, heart])


def _pixels(inside: np.ndarray, size: int) -> np.ndarray:
    blocks = inside.reshape(-1, size, _OVERSAMPLING, size, _OVERSAMPLING)
    return blocks.mean(axis=(2, 4), dtype=np.float32).reshape(len(inside), size * size)
