"""What is known of a run, its data read again among it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm.data import Dataset, Transform
from pyrolvm.diagnostics.guide_quality import Diagnosis
from pyrolvm.errors import PyrolvmError
from pyrolvm.inference.posterior.evidence import evidence_table
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.shell.inputs import Source, fingerprint, read_like, transformed, transforms_of, vectors


@dataclass(frozen=True)
class Given:
    """The data of a page as the model sees them; without them, `reason` says why."""

    train: Any = None
    held_out: Dataset | None = None
    reason: str = ""


@dataclass(frozen=True)
class Findings:
    """All that a page is made from.

    config: of the run folder. held_out: log p of each held-out row, if there are any.
    """

    path: Path
    fitted: FittedModel
    config: dict[str, Any]
    given: Given
    diagnosis: Diagnosis | None
    held_out: pd.DataFrame | None
    image_shape: tuple[int, ...] | None
    seed: int

    @property
    def record(self) -> dict[str, Any]:
        """What the run folder says of its data."""
        return data_record(self.config)

    @property
    def transforms(self) -> list[Transform]:
        """What was done to the data before the fit."""
        return transforms_of(self.record)

    @property
    def unit(self) -> str:
        """What bounds are in."""
        return "nats per datum" if self.fitted.structure.data_plate else "nats in total"

    @property
    def command(self) -> str | None:
        """The command that the shell recorded."""
        run = self.config.get("run")
        return run.get("command") if isinstance(run, dict) else None


def data_record(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the data; empty if it says nothing."""
    run = config.get("run")
    record = run.get("data") if isinstance(run, dict) else None
    return record if isinstance(record, dict) else {}


def given_data(record: dict[str, Any], data: Any) -> Given:
    """The data of the page: `data`, or for None those of the run if they are still the same.

    A name or path is read as the run's data were. Raises `DataError` if it cannot be.
    """
    if data is False:
        return Given(reason="the data were left out")
    if data is None:
        return _recorded(record)
    return Given(read_like(record, Source(str(data))) if isinstance(data, str | Path) else data)


def _recorded(record: dict[str, Any]) -> Given:
    """The run's own data, read again."""
    if not {"source", "sha256", "vectors"} <= set(record):
        return Given(reason="the run folder does not say which data it was fitted to")
    names = {n: record.get(n) for n in ("columns", "labels", "key", "header")}
    source = Source(record["source"], **names, options=record.get("options") or {})
    try:
        with warnings.catch_warnings():  # of headers: the digest says whether they were read as before
            warnings.simplefilter("ignore", UserWarning)
            dataset = source.read()
    except PyrolvmError as error:
        return Given(reason=f"its data cannot be read again ({error})")
    if fingerprint(dataset.values) != record["sha256"]:
        return Given(reason=f"the data in {source.text} are not those that the run was fitted to")
    return _prepared(dataset, record)


def _prepared(dataset: Dataset, record: dict[str, Any]) -> Given:
    """Split and transformed as for the fit."""
    dataset = vectors(dataset) if record["vectors"] else dataset
    parts: tuple[Dataset, ...] = (dataset,)
    if split := record.get("split"):
        parts = dataset.split(split["held_out"] / dataset.num_rows, split["seed"])
    done = [transformed(part, transforms_of(record)) for part in parts]
    return Given(done[0], done[1] if len(done) > 1 else None)


def held_out_evidence(
    fitted: FittedModel, held_out: Dataset | None, diagnosis: Diagnosis | None, max_rows: int, seed: int
) -> pd.DataFrame | None:
    """log p of the held-out rows, had as that of the training rows was; None if there are none."""
    if held_out is None or diagnosis is None or diagnosis.evidence is None:
        return None
    rows = np.arange(held_out.num_rows)
    if len(rows) > max_rows:
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_rows, replace=False))
    method, count = ("exact", None) if diagnosis.method == "exact" else ("importance", diagnosis.num_samples)
    return evidence_table(fitted, held_out.take(rows), method, count, seed=seed)
