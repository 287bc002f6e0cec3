"""DATA on the command line: read, chosen, transformed; and the record of it that a run folder keeps."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pyrolvm.data import DATASETS, Dataset, Transform, load_dataset, read
from pyrolvm.errors import DataError, SettingError

TEXT = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
NAMED_COLUMNS = (*TEXT, ".parquet", ".h5ad")
KEYED = (".npz", ".h5ad")
MAPPABLE = (".npy", ".idx", "-ubyte", ".parquet")
MAPPED_BYTES = 2**28
"""Files from this size on are mapped where their kind allows it, and never in memory as a whole."""


@dataclass(frozen=True)
class Source:
    """Which data: DATA and the options that choose among them."""

    text: str
    columns: list[str] | None = None
    labels: str | None = None
    key: str | None = None
    header: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def read(self) -> Dataset:
        """The data set; all errors are `DataError` or `SettingError`."""
        if self.is_named:
            dataset = load_dataset(self.text, **self.options)
            return dataset if self.columns is None else dataset.select(self.columns)
        if self.options:
            raise SettingError(f"--data-option is for a data set of the list, not for the file {self.text}")
        options: dict[str, Any] = {"labels": self.labels, "key": self.key, "header": self.header}
        return read(self.text, self.columns, mmap=self._is_large(), **options)

    @property
    def is_named(self) -> bool:
        """Whether it is a data set of the list."""
        return self.text.replace("-", "_") in DATASETS

    def ends_in(self, suffixes: tuple[str, ...]) -> bool:
        """Whether it is a file of one of these kinds."""
        return not self.is_named and self.text.lower().endswith(suffixes)

    def _is_large(self) -> bool:
        path = Path(self.text).expanduser()
        return self.ends_in(MAPPABLE) and path.is_file() and path.stat().st_size >= MAPPED_BYTES

    def like(self, record: dict[str, Any]) -> Source:
        """With the columns, key and header of the data recorded, where nothing else is said."""
        columns = record.get("columns")
        _check_order(self.columns, columns)
        if self.columns is None and (self.is_named or self.ends_in(NAMED_COLUMNS)):
            self = replace(self, columns=columns)
        if self.key is None and self.ends_in(KEYED):
            self = replace(self, key=record.get("key"))
        if self.header is None and self.ends_in(TEXT):
            self = replace(self, header=record.get("header"))
        return self


def _check_order(chosen: list[str] | None, recorded: list[str] | None) -> None:
    """The same names in another order would put the values of one column in the place of another's."""
    if chosen and recorded and chosen != recorded and sorted(chosen) == sorted(recorded):
        raise DataError(
            f"--columns {','.join(chosen)} are the run's columns in another order than its {','.join(recorded)}: "
            "leave --columns out, they are taken by name"
        )


@dataclass(frozen=True)
class Prepared:
    """The data as the model sees them, and how they came to be so."""

    train: Dataset
    held_out: Dataset | None
    transforms: list[Transform]
    record: dict[str, Any]


@dataclass(frozen=True)
class Preparation:
    """What is done to the data before the fit; transforms are estimated from the training rows alone."""

    standardise: bool = False
    overall: bool = False
    binarise: bool = False
    threshold: float | None = None
    validation: float | None = None
    split_seed: int = 0

    def __post_init__(self) -> None:
        if self.threshold is not None and not self.binarise:
            raise SettingError("--threshold is of --binarise: say both")
        if self.binarise and (self.standardise or self.overall):
            raise SettingError("--standardise and --binarise exclude each other: choose one")

    def apply(self, dataset: Dataset, source: Source, as_vectors: bool) -> Prepared:
        """Split, then transform. `as_vectors`: make each row, of whatever shape, a vector."""
        record = {
            "source": source.text,
            "rows": dataset.num_rows,
            "shape": list(dataset.values.shape[1:]),
            "columns": dataset.columns,
            "labels": source.labels,
            "key": source.key,
            "header": source.header,
            "options": source.options,
            "sha256": fingerprint(dataset.values),
            "vectors": as_vectors,
        }
        dataset = vectors(dataset) if as_vectors else dataset
        train, held_out = self._split(dataset)
        train, transforms = self._transform(train)
        held_out = None if held_out is None else transformed(held_out, transforms)
        split = {"held_out": held_out.num_rows, "seed": self.split_seed} if held_out else None
        record |= {"split": split, "transforms": [t.to_dict() for t in transforms]}
        return Prepared(train, held_out, transforms, record)

    def _split(self, dataset: Dataset) -> tuple[Dataset, Dataset | None]:
        if self.validation is None:
            return dataset, None
        if not 0 < self.validation < 1:
            raise SettingError(
                f"--validation is the share of rows to hold out, e.g. 0.1, not {self.validation}"
            )
        return dataset.split(self.validation, self.split_seed)

    def _transform(self, train: Dataset) -> tuple[Dataset, list[Transform]]:
        if self.standardise or self.overall:
            train, transform = train.standardise(per_column=not self.overall)
            return train, [transform]
        if self.binarise:
            train, transform = train.binarise(self.threshold)
            return train, [transform]
        return train, []


def vectors(dataset: Dataset) -> Dataset:
    """The same rows as vectors: images flattened, single numbers as one column."""
    if dataset.values.ndim == 2:
        return dataset
    return replace(dataset, values=dataset.values.reshape(dataset.num_rows, -1))


def transformed(dataset: Dataset, transforms: list[Transform]) -> Dataset:
    """The data set with the transforms applied to its values."""
    for transform in transforms:
        dataset = replace(dataset, values=transform.apply(dataset.values))
    return dataset


def undone(values: np.ndarray, transforms: list[Transform]) -> np.ndarray:
    """Values [rows, ...] in the units of the data as they were read."""
    for transform in reversed(transforms):
        if np.broadcast_shapes(values.shape[1:], transform.scale.shape) == values.shape[1:]:
            values = transform.undo(values)
    return values


def log_scale(transforms: list[Transform], data_dim: int) -> float:
    """log |dx / dt| of the transforms: what turns log p(t) into log p(x), nats to subtract."""
    affine = [t for t in transforms if t.threshold is None]
    return float(sum(np.log(np.broadcast_to(t.scale, (data_dim,))).sum() for t in affine))


def transforms_of(record: dict[str, Any]) -> list[Transform]:
    """The transforms that a run folder recorded."""
    return [Transform.from_dict(d) for d in record.get("transforms", [])]


def read_like(record: dict[str, Any], source: Source) -> Dataset:
    """DATA read as the data of a run were: its columns, its shape, its transforms.

    Raises `DataError` if the columns are missing or the width differs.
    """
    dataset = source.like(record).read()
    if record:
        dataset = vectors(dataset) if record["vectors"] else dataset
        _check_width(dataset, record, source.text)
        dataset = transformed(dataset, transforms_of(record))
        dataset = replace(dataset, columns=record.get("columns"))
    return dataset


def _check_width(dataset: Dataset, record: dict[str, Any], text: str) -> None:
    found = list(dataset.values.shape[1:])
    wanted = [int(np.prod(record["shape"], dtype=int))] if record["vectors"] else record["shape"]
    if found != wanted:
        raise DataError(
            f"{text} has rows of shape {found}, but the run was fitted to rows of shape {wanted}: choose the same "
            "columns by --columns"
        )


def fingerprint(values: np.ndarray) -> str:
    """The SHA-256 of the values [rows, ...], whatever kind of file they came from; read some rows at a time."""
    digest, step = hashlib.sha256(), max(1, 2**22 // max(1, values[:1].size))
    for first in range(0, len(values), step):
        digest.update(np.ascontiguousarray(values[first : first + step]).tobytes())
    return digest.hexdigest()


def listed(text: str | None) -> list[str] | None:
    """`a,b` as a list."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def label_path(text: str) -> str:
    """The name of DATA for tables: without its folders."""
    return Path(text).name
