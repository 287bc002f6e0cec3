"""The data sets that are known by name, and where each comes from."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm.data.mnist import load_mnist
from pyrolvm.data.simulators import simulate_factor_analysis, simulate_mixture, simulate_ppca
from pyrolvm.data.sprites import simulate_sprites
from pyrolvm.data.table import Dataset
from pyrolvm.errors import DataError, SettingError


@dataclass(frozen=True)
class DatasetInfo:
    """One line of the list of data sets.

    Args:
        name: what `load_dataset` and the shell call it.
        description: in one line.
        num_rows: by default.
        num_columns: by default.
        source: who published it.
        load: the function that makes it.
    """

    name: str
    description: str
    num_rows: int
    num_columns: int
    source: str
    load: Callable[..., Dataset]


def load_dataset(name: str, **options: Any) -> Dataset:
    """A data set by its name in `DATASETS`.

    Args:
        name: e.g. `"digits"`; hyphens count as underscores.
        options: of its own loader, e.g. `split="test"` for mnist, `num_rows=500, seed=1` for a simulated one.

    Raises:
        DataError: there is no such name; the message has those that are near, and all.
        SettingError: the data set has no such option.
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
    """The sentence that says that no data set is called `name`."""
    near = difflib.get_close_matches(name, DATASETS, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"there is no data set {name!r}: {hint}the data sets are {', '.join(DATASETS)}"


def _digits(scale: bool = True) -> Dataset:
    """Rows of 64 pixels, in [0, 1] (divided by 16) unless `scale=False` leaves 0..16."""
    dataset = _sklearn("digits")
    values = (dataset.values / (16 if scale else 1)).astype(np.float32)
    return Dataset(values, dataset.columns, dataset.labels, "digits")


def _sklearn(name: str) -> Dataset:
    """One of scikit-learn's own; imported here because scikit-learn is slow to import."""
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    return Dataset(bunch.data, [str(c) for c in bunch.feature_names], bunch.target, name)


def _iris() -> Dataset:
    return _sklearn("iris")


def _wine() -> Dataset:
    return _sklearn("wine")


def _breast_cancer() -> Dataset:
    return _sklearn("breast_cancer")


def _own(name: str) -> Dataset:
    with files("pyrolvm.data").joinpath(f"{name}.csv").open("rb") as stream:
        frame = pd.read_csv(stream, dtype=np.float64)
    return Dataset(frame.to_numpy(), [str(c) for c in frame.columns], None, name)


def _faithful() -> Dataset:
    return _own("faithful")


def _galaxies(scale: bool = True) -> Dataset:
    """Velocities in 1000 km/s, as the mixture literature has them; `scale=False` leaves km/s.

    The 78th value is 26960, as in Postman, Huchra and Geller (1986); R's MASS has 26690, a known misprint.
    """
    dataset = _own("galaxies")
    return Dataset(dataset.values / (1000 if scale else 1), dataset.columns, None, "galaxies")


_INFOS = (
    DatasetInfo(
        "digits",
        "handwritten digits of 8 x 8 pixels in [0, 1], with their class",
        1797,
        64,
        "E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998); scikit-learn",
        _digits,
    ),
    DatasetInfo(
        "iris",
        "lengths and widths of sepals and petals in cm, with the species",
        150,
        4,
        "R. A. Fisher, Annals of Eugenics 7 (1936); scikit-learn",
        _iris,
    ),
    DatasetInfo(
        "wine",
        "chemical analysis of Italian wines, with the cultivar",
        178,
        13,
        "S. Aeberhard, M. Forina, Wine, UCI (1991); scikit-learn",
        _wine,
    ),
    DatasetInfo(
        "breast_cancer",
        "shape of cell nuclei, with the diagnosis (0 malignant, 1 benign)",
        569,
        30,
        "W. Wolberg and others, Breast Cancer Wisconsin (Diagnostic), UCI (1993); scikit-learn",
        _breast_cancer,
    ),
    DatasetInfo(
        "faithful",
        "Old Faithful: duration of an eruption and waiting time to the next, in minutes",
        272,
        2,
        "A. Azzalini, A. W. Bowman, Applied Statistics 39 (1990); R's datasets::faithful",
        _faithful,
    ),
    DatasetInfo(
        "galaxies",
        "velocities of galaxies of the Corona Borealis region in 1000 km/s",
        82,
        1,
        "K. Roeder, JASA 85 (1990), 617-624; M. Postman, J. P. Huchra, M. J. Geller, AJ 92 (1986), 1238-1247",
        _galaxies,
    ),
    DatasetInfo(
        "mnist",
        "handwritten digits of 28 x 28 pixels in [0, 1] (files in $PYROLVM_DATA, or downloaded)",
        60000,
        784,
        "Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Proceedings of the IEEE 86 (1998)",
        load_mnist,
    ),
    DatasetInfo(
        "simulated_ppca",
        "drawn from probabilistic PCA with known loadings",
        1000,
        10,
        "pyrolvm.data.simulate_ppca",
        simulate_ppca,
    ),
    DatasetInfo(
        "simulated_factor_analysis",
        "drawn from factor analysis with known loadings and noise scales",
        1000,
        10,
        "pyrolvm.data.simulate_factor_analysis",
        simulate_factor_analysis,
    ),
    DatasetInfo(
        "simulated_mixture",
        "drawn from a mixture of three normals with known parameters",
        1000,
        2,
        "pyrolvm.data.simulate_mixture",
        simulate_mixture,
    ),
    DatasetInfo(
        "sprites",
        "images of 32 x 32 pixels with known shape, scale, orientation and position",
        4608,
        1024,
        "pyrolvm.data.simulate_sprites, after the design of dSprites",
        simulate_sprites,
    ),
)

DATASETS: dict[str, DatasetInfo] = {info.name: info for info in _INFOS}
"""Every data set that has a name."""
