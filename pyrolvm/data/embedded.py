"""The data sets that are known by name: `datasets.csv` lists them, with where each comes from."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm.data.dataset import Dataset
from pyrolvm.data.mnist import load_mnist
from pyrolvm.data.simulators import simulate_factor_analysis, simulate_mixture, simulate_ppca
from pyrolvm.data.sprites import simulate_sprites
from pyrolvm.errors import DataError, SettingError, did_you_mean


@dataclass(frozen=True)
class DatasetInfo:
    """One line of the list of data sets.

    Parameters
    ----------
    name : str
        Its name for `load_dataset` and in the shell.
    description : str
        In one line.
    num_rows, num_columns : int
        Its size by default.
    source : str
        Who published it.
    load : callable
        The function that makes it.
    """

    name: str
    description: str
    num_rows: int
    num_columns: int
    source: str
    load: Callable[..., Dataset]


def load_dataset(name: str, **options: Any) -> Dataset:
    """A data set by its name in `DATASETS`.

    Parameters
    ----------
    name : str
        E.g. `"digits"`; hyphens count as underscores.
    **options
        Arguments of its own loader, e.g. `split="test"` for mnist, `num_rows=500, seed=1` for a simulated one.

    Raises
    ------
    DataError
        There is no such name; the message lists similar names, and all.
    SettingError
        The data set has no such option.
    """
    name = name.replace("-", "_")
    if name not in DATASETS:
        raise DataError(unknown_name(name))
    load = DATASETS[name].load
    known = list(inspect.signature(load).parameters)
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise SettingError(f"data set {name!r} has no option {option!r}: {has}")
    return load(**options)


def unknown_name(name: str) -> str:
    """The message for a `name` that no data set has."""
    return f"there is no data set {name!r}: {did_you_mean(name, DATASETS)}the data sets are {', '.join(DATASETS)}"


def _sklearn(name: str) -> Dataset:
    """One of scikit-learn's own; imported here because scikit-learn is slow to import."""
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    return Dataset(bunch.data, [str(c) for c in bunch.feature_names], bunch.target, name)


def _own(name: str) -> Dataset:
    with files("pyrolvm.data").joinpath(f"{name}.csv").open("rb") as stream:
        frame = pd.read_csv(stream, dtype=np.float64)
    return Dataset(frame.to_numpy(), [str(c) for c in frame.columns], None, name)


def _divided(load: Callable[[str], Dataset], name: str, unit: float, scale: bool = True) -> Dataset:
    """Values in the unit that the literature uses; `scale=False` leaves them as published."""
    dataset = load(name)
    return replace(dataset, values=dataset.values / unit) if scale else dataset


# The 78th galaxy has 26960 km/s, as in Postman, Huchra and Geller (1986); R's MASS has 26690, a known misprint
_LOADERS: dict[str, Callable[..., Dataset]] = {
    "digits": partial(_divided, _sklearn, "digits", 16),
    "iris": partial(_sklearn, "iris"),
    "wine": partial(_sklearn, "wine"),
    "breast_cancer": partial(_sklearn, "breast_cancer"),
    "faithful": partial(_own, "faithful"),
    "galaxies": partial(_divided, _own, "galaxies", 1000),
    "mnist": load_mnist,
    "simulated_ppca": simulate_ppca,
    "simulated_factor_analysis": simulate_factor_analysis,
    "simulated_mixture": simulate_mixture,
    "sprites": simulate_sprites,
}


def _listed() -> dict[str, DatasetInfo]:
    text = files("pyrolvm.data").joinpath("datasets.csv").read_text(encoding="utf-8")
    lines = csv.reader(text.splitlines()[1:])
    return {
        name: DatasetInfo(name, description, int(rows), int(columns), source, _LOADERS[name])
        for name, rows, columns, description, source in lines
    }


DATASETS: dict[str, DatasetInfo] = _listed()
"""Every data set that has a name."""
