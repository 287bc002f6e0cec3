"""The sets known by name: shapes, published sums and what the names say."""

import numpy as np
import pytest

from pyrolvm.data import DATASETS, embedded, load_dataset
from pyrolvm.errors import DataError, SettingError

HERE = [name for name in DATASETS if name != "mnist"]


@pytest.mark.parametrize("name", HERE)
def test_what_is_loaded_is_what_the_list_says(name):
    info, data = DATASETS[name], load_dataset(name)
    assert data.values.shape == (info.num_rows, info.num_columns)
    assert data.name == info.name == name
    assert len(data.columns) == info.num_columns
    assert np.isfinite(data.values).all()
    assert "\n" not in info.description + info.source


def test_the_list_and_the_loaders_have_the_same_names():
    assert list(DATASETS) == list(embedded._LOADERS)


@pytest.mark.parametrize("name", HERE)
def test_loading_twice_gives_the_same_in_memory_of_its_own(name):
    first = load_dataset(name)
    before = first.values.copy()
    first.values[...] = 0
    assert np.array_equal(load_dataset(name).values, before)


def test_faithful():
    data = load_dataset("faithful")
    assert data.columns == ["eruptions", "waiting"]
    # R: colMeans(faithful) is 3.487783 70.897059
    assert data.values.mean(0) == pytest.approx([3.487783, 70.897059], abs=1e-6)
    assert data.values[0].tolist() == [3.6, 79]


def test_galaxies_have_the_value_of_postman_and_others_not_the_misprint():
    data = load_dataset("galaxies", scale=False)
    velocity = data.values[:, 0]
    assert velocity[77] == 26960
    assert velocity[[0, 81]].tolist() == [9172, 34279]
    assert (np.diff(velocity) > 0).all()
    # R: mean(MASS::galaxies) is 20828.17, with the misprint 26690
    assert velocity.mean() - 270 / 82 == pytest.approx(20828.17, abs=0.005)
    assert load_dataset("galaxies").values[0, 0] == 9.172


def test_iris_and_digits():
    iris = load_dataset("iris")
    assert iris.columns[0] == "sepal length (cm)"
    assert np.bincount(iris.labels).tolist() == [50, 50, 50]
    digits = load_dataset("digits")
    assert (digits.values.min(), digits.values.max()) == (0, 1)
    raw = load_dataset("digits", scale=False).values
    assert raw.max() == 16
    assert np.array_equal(raw, digits.values * 16)


def test_options_reach_the_loader_and_hyphens_count_as_underscores():
    assert load_dataset("simulated-mixture", num_rows=7).values.shape == (7, 2)
    assert load_dataset("breast-cancer").num_rows == 569


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "digit",
            {},
            DataError,
            "no data set 'digit': did you mean 'digits'.*the data sets are digits, iris",
        ),
        ("qqq", {}, DataError, "no data set 'qqq': the data sets are"),
        ("iris", {"split": "test"}, SettingError, "'iris' has no option 'split': it has none"),
        ("digits", {"rows": 3}, SettingError, "it has scale"),
        ("simulated_ppca", {"num_rows": 0}, SettingError, "num_rows must be a positive whole number"),
    ],
)
def test_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        load_dataset(name, **options)
