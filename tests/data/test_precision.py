"""What floating-point types cannot hold is named before it is trained on."""

import warnings

import numpy as np
import pytest
import torch

from pyrolvm.data import load_dataset
from pyrolvm.data.precision import as_dtype, check_precision
from pyrolvm.errors import SettingError

Z = np.random.default_rng(0).normal(size=(200, 2))
OFFSET = np.array([0, 1e8])


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            Z + OFFSET,
            r"^the data: values too near to each other for float32 in column 'b' \(values up to 1e\+08",
        ),
        (Z * [1, 1e15], r"a scale that training does not reach in column 'b' \(.*standard deviation .*e\+1"),
        (Z * [1e-9, 1], "a scale that training does not reach in column 'a'"),
        (np.rint(Z * [1, 1e9]), "whole numbers that float32 rounds in column 'b'.*or fit in float64"),
        (np.arange(400).reshape(200, 2) + 2**25, "whole numbers that float32 rounds in column 'a', 'b'"),
        (np.where(Z > 1, np.nan, Z) + OFFSET, "values too near to each other for float32 in column 'b'"),
    ],
)
def test_a_column_that_float32_cannot_hold_is_named(x, message, make):
    with pytest.warns(UserWarning, match=message) as caught:
        check_precision(make(x), ["a", "b"])
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_columns_without_names_and_images_are_numbered():
    with pytest.warns(UserWarning, match=r"in column 1 \("):
        check_precision(Z + OFFSET)
    with pytest.warns(UserWarning, match=r"in column 0, 1, 2, 3, 4, 5 and 6 more \("):
        check_precision(1e8 + np.random.default_rng(0).normal(size=(50, 3, 4)))


def test_a_wider_type_holds_more():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_precision(Z + OFFSET, dtype=torch.float64)
        check_precision(np.arange(400).reshape(200, 2) + 2**25, dtype=torch.float64)


@pytest.mark.parametrize(
    "name", ["iris", "wine", "breast_cancer", "digits", "galaxies", "faithful", "sprites"]
)
def test_ordinary_data_pass(name):
    check_precision(load_dataset(name).values)


@pytest.mark.parametrize(
    "x",
    [
        np.full((3, 2), 1e9),
        np.full((3, 2), np.nan),
        np.zeros((0, 2)),
        np.arange(5) * 1000,
        np.ones(4, bool),
        2000 + np.arange(30) % 20,
        np.append(np.arange(1000.0), 2**24),  # the last whole number that float32 holds with all below it
    ],
)
def test_constants_missing_values_years_and_counts_pass(x):
    check_precision(x)


def test_the_first_whole_number_that_is_rounded_is_named():
    with pytest.warns(UserWarning, match="whole numbers that float32 rounds"):
        check_precision(np.append(np.arange(1000.0), 2**24 + 1))


def test_large_data_are_sampled():
    x = np.lib.stride_tricks.as_strided(Z, (10**9, 2), (0, 8))
    check_precision(x)


def test_types_by_name():
    assert as_dtype("float64") is as_dtype("torch.float64") is as_dtype(torch.float64) is torch.float64
    for other in ("load", "int64", torch.int64, "float16"):
        with pytest.raises(SettingError, match=r"dtype='.*' is not known: choose from float32, float64"):
            as_dtype(other)
