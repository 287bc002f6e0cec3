"""The recipe of a run's data: how they are prepared, and how the same are read again."""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from pyrolvm.data import Dataset, StreamedDataset, Transform
from pyrolvm.data.plan import split_rows
from pyrolvm.errors import DataError, PyrolvmError, SettingError, count
from pyrolvm.runs.source import CHOICES, Source

SAMPLED_ROWS = 20_000
"""Of data that are read as they are needed, the rows that draws and reports are of."""

Data = Dataset | StreamedDataset


@dataclass(frozen=True)
class Prepared:
    """The data as the model sees them, and the record of how they came to be so."""

    train: Any
    held_out: Any = None
    transforms: list[Transform] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    def in_memory(self, most_rows: int) -> Prepared:
        """Itself; of data that are read as they are needed, at most so many rows, evenly spaced."""
        parts = [
            p.sample(most_rows) if isinstance(p, StreamedDataset) else p for p in (self.train, self.held_out)
        ]
        return replace(self, train=parts[0], held_out=parts[1])


@dataclass(frozen=True)
class Preparation:
    """What is done to the data before a fit; transforms are estimated from the training rows alone.

    Parameters
    ----------
    standardise, per_column : bool
        Mean 0 and deviation 1: of each column, or of all values together (`per_column=False`).
    binarise : bool
        0 and 1, by `threshold`; halfway between the extremes if that is None.
    validation : float, optional
        The share of rows to hold out: the same rows as `fit(validation=..., seed=split_seed)` holds out.
    """

    standardise: bool = False
    per_column: bool = True
    binarise: bool = False
    threshold: float | None = None
    validation: float | None = None
    split_seed: int = 0

    def __post_init__(self) -> None:
        if self.threshold is not None and not self.binarise:
            raise SettingError("threshold is of binarise: give both")
        if self.binarise and self.standardise:
            raise SettingError("standardise and binarise exclude each other: choose one")
        count("split_seed", self.split_seed, least=0)

    def apply(
        self,
        source: Source,
        dataset: Any = None,
        as_vectors: bool = True,
        takes_labels: bool = False,
        streamed: bool = False,
        transforms: list[Transform] | None = None,
    ) -> Prepared:
        """Split, then transform; a large file that would be copied for it is read as it is needed, if `streamed`.

        `as_vectors`: make each row, of whatever shape, a vector. `takes_labels`: the labels are data too, and their
        classes are numbered. `transforms`: those of another run, in place of new ones.
        """
        copied = self.standardise or self.binarise or bool(transforms) or self.validation is not None
        dataset = source.read(streamed and copied) if dataset is None else dataset
        classes = classes_of(dataset) if takes_labels else None
        record = {
            "source": source.text,
            "rows": dataset.num_rows,
            "shape": list(dataset.row_shape),
            **{name: getattr(source, name) for name in CHOICES},
            "columns": dataset.columns,
            "options": source.options,
            "sha256": fingerprint(dataset),
            **({"streamed": True} if isinstance(dataset, StreamedDataset) else {}),
            "vectors": as_vectors,
            **({"labelled": True, "classes": classes} if takes_labels else {}),
        }
        dataset = _numbered(dataset, classes)
        dataset = dataset.as_vectors() if as_vectors else dataset
        train, held_out = _split(dataset, self.validation, self.split_seed)
        known, transforms = transforms, list[Transform]()
        if known is not None:
            train, transforms = _transformed(train, known), known
        elif self.standardise:
            train, *transforms = train.standardise(self.per_column)
        elif self.binarise:
            train, *transforms = train.binarise(self.threshold)
        held_out = _transformed(held_out, transforms)
        split = {"share": self.validation, "seed": self.split_seed}
        record["split"] = {"held_out": held_out.num_rows, **split} if held_out else None
        record["transforms"] = [t.to_dict() for t in transforms]
        return Prepared(train, held_out, transforms, record)


class Recipe:
    """The record of a run's data, as `Preparation.apply` made it; empty for a fit saved without one."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.columns: list[str] | None = record.get("columns")
        self.shape: list[int] = record.get("shape") or []

    @property
    def transforms(self) -> list[Transform]:
        """What was done to the values."""
        return [Transform.from_dict(d) for d in self.record.get("transforms", [])]

    def read(self, source: Source, streamed: bool = False) -> Any:
        """Other data, read as those of the run were: its columns, its shape, its transforms.

        Large data are read as they are needed, if `streamed`. Raises `DataError` if columns are missing or rows are of
        another shape.
        """
        dataset = source.like(self.record).read(streamed and bool(self.transforms))
        if isinstance(dataset, StreamedDataset) and not streamed:
            dataset = dataset.load()
        as_vectors = self.record.get("vectors")
        dataset = dataset.as_vectors() if as_vectors else dataset
        found, wanted = list(dataset.row_shape), [math.prod(self.shape)] if as_vectors else self.shape
        if "shape" in self.record and found != wanted:
            raise DataError(
                f"{source.called} has rows of shape {found}, but the run was fitted to rows of shape {wanted}: choose "
                "the same columns (columns=...)"
            )
        dataset = _transformed(self._labelled(dataset), self.transforms)
        named = self.columns and isinstance(dataset, Dataset)
        return replace(dataset, columns=self.columns) if named else dataset

    def _labelled(self, dataset: Any) -> Any:
        """With the labels numbered as for the fit, if it took any; `DataError` if they are not there."""
        if self.record.get("labelled") and not dataset.has_labels:
            raise DataError(
                f"the run was fitted to labelled rows, and {dataset.name} has no labels: name their column, labels=..."
            )
        return _numbered(dataset, self.record.get("classes"))

    def codes(self, labels: list[Any]) -> np.ndarray:
        """The numbers of labels as the run's model knows them; `DataError` for those that it was not fitted to."""
        if not self.record.get("labelled"):
            raise DataError("the run was fitted without labels: leave them out")
        return _codes(np.asarray(labels), self.record.get("classes"))

    def read_again(self) -> Prepared:
        """The run's own data, split and transformed as for the fit.

        Raises `DataError` if the record does not name them, or they are no longer the same.
        """
        record = self.record
        if not {"source", "sha256", "vectors"} <= set(record):
            raise DataError("the run folder does not name the data it was fitted to")
        chosen: Any = {name: record[name] for name in CHOICES if name in record}
        source = Source(record["source"], **chosen, options=record.get("options") or {})
        with warnings.catch_warnings():  # of headers: the fingerprint shows whether they were read as before
            warnings.simplefilter("ignore", UserWarning)
            try:
                dataset = source.read(bool(record.get("streamed")))
            except PyrolvmError as error:
                raise DataError(f"its data cannot be read again ({error})") from None
            if fingerprint(dataset) != record["sha256"]:
                raise DataError(f"the data in {source.called} are not those that the run was fitted to")
            dataset = self._labelled(dataset.as_vectors() if record["vectors"] else dataset)
        split = record.get("split") or {"held_out": 0, "seed": 0}
        share = split.get("share") or split["held_out"] / dataset.num_rows or None
        parts = _split(dataset, share, split["seed"])
        train, held_out = (_transformed(part, self.transforms) for part in parts)
        return Prepared(train, held_out, self.transforms, record)

    def undo(self, values: Any) -> Any:
        """Values [rows, ...], or a dict of them by site, in the units of the data as they were read."""
        if isinstance(values, dict):
            return {name: self.undo(value) for name, value in values.items()}
        array = values.cpu().numpy() if hasattr(values, "cpu") else np.asarray(values)
        for t in reversed(self.transforms):
            if np.broadcast_shapes(array.shape[1:], t.scale.shape) == array.shape[1:]:
                array = t.undo(array)
        return array

    def unit(self, data_dim: int) -> np.ndarray:
        """dx / dt of each entry of a row [data_dim]: what a unit of the transformed data is in those that were read."""
        scales = [t.scale.reshape(-1) for t in self.transforms if t.threshold is None]
        return math.prod(scales, start=np.ones(data_dim))

    def log_scale(self, data_dim: int) -> float:
        """log |dx / dt| of the transforms, nats: log p(x) = log p(t) - log |dx / dt|."""
        return float(np.log(self.unit(data_dim)).sum())


def _split(dataset: Any, share: float | None, seed: int) -> tuple[Any, Any]:
    if share is None:
        return dataset, None
    if isinstance(dataset, StreamedDataset):
        return dataset.split(share, seed, "validation")
    train, held_out = split_rows(dataset.num_rows, share, seed)
    return dataset.take(train.numpy()), dataset.take(held_out.numpy())


def classes_of(dataset: Data) -> list[Any] | None:
    """The different labels in their order, if they are classes: text, or whole numbers. None for covariates."""
    labels = dataset.survey().labels if isinstance(dataset, StreamedDataset) else dataset.labels
    if labels is None:
        raise DataError(f"the model takes labels, and {dataset.name} has none: name their column, labels=...")
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.round(labels)):
        return None
    return np.unique(labels if labels.dtype.kind in "iufb" else labels.astype(str)).tolist()


def _numbered(dataset: Any, classes: list[Any] | None) -> Any:
    """Labels as numbers of their classes, where they have any."""
    if isinstance(dataset, StreamedDataset):
        return dataset if classes is None else replace(dataset, relabel=partial(_codes, classes=classes))
    return dataset if classes is None else replace(dataset, labels=_codes(dataset.labels, classes))


def _codes(labels: Any, classes: list[Any] | None) -> np.ndarray:
    if classes is None:
        return np.asarray(labels, dtype=float)
    text = isinstance(classes[0], str)
    places = {label: i for i, label in enumerate(classes)}
    found = [places.get(str(v) if text else v) for v in np.asarray(labels).tolist()]
    if None in found:
        label = np.asarray(labels).tolist()[found.index(None)]
        raise DataError(f"the label {label!r} is none of those of the fit: {', '.join(map(str, classes))}")
    return np.array(found, dtype=np.int64)


def _transformed(dataset: Any, transforms: list[Transform]) -> Any:
    """The data transformed; None stays None."""
    for transform in transforms if dataset is not None else []:
        dataset = dataset.transformed(transform)
    return dataset


def fingerprint(dataset: Data) -> str:
    """The SHA-256 of the values [rows, ...], whatever kind of file they came from; read some rows at a time.

    Of data that are read as they are needed, that of their files' names and sizes, and of some of what is in them.
    """
    if isinstance(dataset, StreamedDataset):
        return dataset.fingerprint()
    values = dataset.values
    digest, step = hashlib.sha256(), max(1, 2**22 // max(1, values[:1].size))
    for first in range(0, len(values), step):
        digest.update(np.ascontiguousarray(values[first : first + step]).tobytes())
    return digest.hexdigest()
