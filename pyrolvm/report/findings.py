"""What a page is made from: a run, its data read again, and its diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm.data import Dataset
from pyrolvm.diagnostics import Diagnosis
from pyrolvm.errors import DataError
from pyrolvm.inference.posterior.evidence import evidence_table
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.report.parts import Part
from pyrolvm.runs import Prepared, Recipe, SavedRun, Source
from pyrolvm.runs.recipe import SAMPLED_ROWS


@dataclass(frozen=True)
class Findings:
    """All that a page is made from.

    Parameters
    ----------
    run : SavedRun
        The run folder.
    data : Prepared or None
        The data as the model sees them; without them, `reason` gives why.
    held_out : DataFrame or None
        log p of each held-out row, if there are any.
    """

    run: SavedRun
    data: Prepared | None
    reason: str
    diagnosis: Diagnosis | None
    held_out: pd.DataFrame | None
    image_shape: tuple[int, ...] | None
    num_samples: int
    seed: int

    @property
    def fitted(self) -> FittedModel:
        """The fit."""
        return self.run.fitted

    @property
    def recipe(self) -> Recipe:
        """The recipe of its data."""
        return self.run.recipe

    @property
    def reports(self) -> dict[str, Any]:
        """Measure -> its report."""
        return {} if self.diagnosis is None else self.diagnosis.reports

    @property
    def train(self) -> Dataset | None:
        """The training rows, if they are at hand with their names and labels."""
        return self.data.train if self.data is not None and isinstance(self.data.train, Dataset) else None

    @property
    def unit(self) -> str:
        """What bounds are in."""
        return "nats per datum" if self.fitted.structure.data_plate else "nats in total"

    def names(self, count: int, site: str = "x") -> list[str]:
        """Names of the `count` entries of a row."""
        columns = list(map(str, self.run.columns))
        unique = len(columns) == count == len(set(columns))
        return columns if unique else [f"{site}[{i}]" for i in range(count)]

    def some(self, most: int) -> Dataset | None:
        """As many training rows, evenly spaced."""
        if self.train is None:
            return None
        last = self.train.num_rows - 1
        return self.train.take(np.unique(np.linspace(0, last, min(most, last + 1)).astype(int)))

    def why_not(self, *names: str) -> list[Part]:
        """Why measures are not on the page."""
        if self.diagnosis is None:
            return [Part("text", f"Not computed: {self.reason}.")]
        refused = self.diagnosis.not_done
        return [Part("text", f"No {name}: {refused[name]}.") for name in names if name in refused]


def find_data(recipe: Recipe, data: Any) -> tuple[Prepared | None, str]:
    """The data of the page, or why there are none: `data`, or for None those of the run if they are still the same.

    A name, path or `Source` is read as the run's data were. Raises `DataError` if it cannot be.
    """
    if data is False:
        return None, "the data were left out"
    if data is None:
        try:
            return recipe.read_again().in_memory(SAMPLED_ROWS), ""
        except DataError as error:
            return None, str(error)
    source = Source(str(data)) if isinstance(data, str | Path) else data
    return Prepared(recipe.read(source) if isinstance(source, Source) else data), ""


def held_out_evidence(
    fitted: FittedModel, data: Prepared | None, diagnosis: Diagnosis | None, max_rows: int, seed: int
) -> pd.DataFrame | None:
    """log p of the held-out rows, by the method of the training rows; None if there are none."""
    if data is None or data.held_out is None or diagnosis is None or diagnosis.evidence is None:
        return None
    rows = np.arange(data.held_out.num_rows)
    if len(rows) > max_rows:
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_rows, replace=False))
    method, draws = ("exact", None) if diagnosis.method == "exact" else ("importance", diagnosis.num_samples)
    return evidence_table(fitted.pair(data.held_out.take(rows)), method, draws, seed=seed)
