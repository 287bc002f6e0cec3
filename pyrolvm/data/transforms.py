"""Reversible transforms of the values of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyrolvm.errors import DataError


@dataclass(frozen=True, eq=False, repr=False)
class Transform:
    """A map of the values that can be undone and written as JSON.

    Parameters
    ----------
    kind : {"standardise", "binarise"}
        How it was made.
    offset, scale : ndarray
        Scalars, or one number per entry of a row; scales are positive.
    threshold : float, optional
        Of an indicator.

    Notes
    -----
    Without a threshold it is affine, `(x - offset) / scale`, and `undo` is its exact inverse. With one it is
    the indicator `x > threshold`; `undo` then places 0 and 1 (and probabilities between) at the lowest and
    highest value of the data: the scale a picture is drawn on, not the original values.
    """

    kind: str
    offset: np.ndarray
    scale: np.ndarray
    threshold: float | None = None

    def __repr__(self) -> str:
        each = f", {self.scale.size} entries" if self.scale.ndim else ""
        cut = "" if self.threshold is None else f", threshold={self.threshold:g}"
        return f"Transform({self.kind}{each}{cut})"

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Transformed values of the shape of `x` [rows, ...]: float32, or float64 where `x` needs it. NaN stays NaN."""
        dtype = np.result_type(x.dtype, np.float32)
        if self.threshold is not None:
            indicator = (x > self.threshold).astype(dtype)
            return np.where(np.isnan(x), dtype.type(np.nan), indicator) if x.dtype.kind == "f" else indicator
        return ((x - self.offset) / self.scale).astype(dtype)

    def undo(self, x: np.ndarray) -> np.ndarray:
        """The values that `apply` maps to `x` [rows, ...], of its shape and at least float32."""
        return (x * self.scale + self.offset).astype(np.result_type(x.dtype, np.float32))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, from which `from_dict` makes the same transform again."""
        d = {"kind": self.kind, "offset": self.offset.tolist(), "scale": self.scale.tolist()}
        return d if self.threshold is None else {**d, "threshold": self.threshold}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Transform:
        """The transform that `to_dict` wrote.

        Raises
        ------
        DataError
            An entry is missing or not a finite number, or a scale is not positive.
        """
        try:
            offset, scale = (np.asarray(d[k], np.float64) for k in ("offset", "scale"))
            threshold = None if d.get("threshold") is None else float(d["threshold"])
            transform = cls(str(d["kind"]), offset, scale, threshold)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a transform (kind, offset, scale are needed): {error!r}") from None
        if not (np.isfinite(offset).all() and np.isfinite(threshold or 0) and (scale > 0).all()):
            raise DataError("not a transform: its numbers must be finite and its scale positive")
        return transform
