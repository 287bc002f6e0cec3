"""Data sets: selecting, splitting, and transforms that can be undone."""

import json

import hypothesis.extra.numpy as hnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyrolvm.data import Dataset, Transform
from pyrolvm.data.plan import split_rows
from pyrolvm.errors import DataError, SettingError

TABLE = Dataset(
    np.arange(12.0).reshape(4, 3),
    ["length", "width", "height"],
    np.array(["a", "b", "a", "b"]),
    "boxes",
    pd.DataFrame({"z": [0, 1, 2, 3]}),
    {"scale": 1.0},
)

tables = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64]),
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=2, max_side=4),
    elements=st.integers(-50, 50),
    unique=True,
)


@given(tables, st.booleans())
def test_standardising_gives_mean_zero_and_deviation_one_and_can_be_undone(x, per_column):
    standard, transform = Dataset(x).standardise(per_column)
    axis = 0 if per_column else None
    assert np.allclose(standard.values.mean(axis), 0, atol=1e-5)
    assert np.allclose(standard.values.std(axis), 1, atol=1e-5)
    assert standard.values.dtype == np.result_type(x.dtype, np.float32)
    assert np.allclose(transform.undo(standard.values), x, atol=1e-3)
    again = Transform.from_dict(json.loads(json.dumps(transform.to_dict())))
    assert np.array_equal(again.apply(x), standard.values)


@given(tables)
def test_binarising_gives_zeros_and_ones_placed_at_the_ends_when_undone(x):
    binary, transform = Dataset(x).binarise()
    assert set(np.unique(binary.values)) == {0, 1}
    assert set(np.unique(transform.undo(binary.values))) == {x.min(), x.max()}
    again = Transform.from_dict(json.loads(json.dumps(transform.to_dict())))
    assert np.array_equal(again.apply(x), binary.values)


def test_binarising_at_a_threshold():
    binary, transform = Dataset(np.array([0.0, 0.2, 0.3, 1.0])).binarise(0.25)
    assert binary.values.tolist() == [0, 0, 1, 1]
    assert transform.threshold == 0.25


def test_counts_are_binarised_at_their_lowest_and_gaps_stay():
    binary, _ = Dataset(np.array([np.nan, 0.0, 1.0, 7.0])).binarise(0.0)
    assert np.array_equal(binary.values, [np.nan, 0.0, 1.0, 1.0], equal_nan=True)
    whole, _ = Dataset(np.array([0, 1, 7])).binarise(0)
    assert whole.values.tolist() == [0, 1, 1]


def test_missing_values_are_left_out_of_mean_and_deviation():
    standard, transform = Dataset(np.array([[1.0], [np.nan], [3.0]])).standardise()
    assert transform.offset == 2
    assert np.isnan(standard.values[1, 0])


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_a_split_is_disjoint_complete_and_repeatable(num_rows, fraction, seed):
    data = Dataset(np.arange(num_rows), labels=np.arange(num_rows))
    if not 0 < round(fraction * num_rows) < num_rows:
        return
    train, held_out = data.split(fraction, seed)
    assert sorted([*train.values, *held_out.values]) == list(range(num_rows))
    assert held_out.num_rows == round(fraction * num_rows)
    assert np.array_equal(train.labels, train.values)
    assert np.array_equal(data.split(fraction, seed)[1].values, held_out.values)
    assert (np.diff(train.values) > 0).all()


def test_a_split_is_that_of_fit():
    train, held_out = Dataset(np.arange(50)).split(0.3, 7)
    assert [train.values.tolist(), held_out.values.tolist()] == [r.tolist() for r in split_rows(50, 0.3, 7)]


def test_seeds_split_differently():
    data = Dataset(np.arange(100))
    assert not np.array_equal(data.split(0.5, 0)[0].values, data.split(0.5, 1)[0].values)


def test_taking_rows_takes_labels_and_factors_with_them():
    part = TABLE.take(np.array([2, 0]))
    assert part.values[:, 0].tolist() == [6, 0]
    assert part.labels.tolist() == ["a", "a"]
    assert part.factors["z"].tolist() == [2, 0]
    assert part.factors.index.tolist() == [0, 1]
    assert TABLE.take(np.array([True, False, False, True])).factors["z"].tolist() == [0, 3]
    assert part.truth == TABLE.truth


def test_selecting_columns_in_the_order_given():
    part = TABLE.select(["height", "length"])
    assert part.columns == ["height", "length"]
    assert part.values[1].tolist() == [5, 3]
    unnamed = Dataset(np.arange(6).reshape(2, 3)).select(["2", 0])
    assert unnamed.values.tolist() == [[2, 0], [5, 3]]
    assert unnamed.columns is None


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: TABLE.select(["lenght"]), "boxes has no column 'lenght': did you mean 'length'"),
        (lambda: TABLE.select(["xyz"]), "it has 'length', 'width', 'height'"),
        (lambda: TABLE.select([]), "no columns were chosen"),
        (lambda: Dataset(np.zeros((2, 2, 2))).select([0]), r"no columns to choose: its shape is \[2, 2, 2\]"),
        (lambda: TABLE.select(["width", "height", "width"]), "boxes: column 'width' is chosen twice"),
        (lambda: TABLE.select("width"), r"is one string: type a list, columns=\['width'\]"),
        (lambda: Dataset(np.zeros((3, 2)), ["a", "a"]), "data has two columns called 'a': rename one"),
        (
            lambda: Dataset(np.full((5, 2), 0.1), ["a", "b"]).standardise(),
            r"column 'a' is constant \(2 such of 2\)",
        ),
        (lambda: Dataset(np.full((5, 2), np.nan)).standardise(), "column 0 is constant"),
        (lambda: Dataset(np.ones(4)).binarise(), "cannot be binarised"),
        (lambda: Dataset(np.array([np.nan, 1.0])).binarise(), "cannot be binarised"),
        (lambda: Dataset(np.array(3.0)), "single number"),
        (lambda: Dataset(np.array(["a"])), "text"),
        (lambda: Dataset(np.zeros((3, 2)), ["a"]), "1 column names"),
        (lambda: Dataset(np.zeros((3, 2)), labels=np.zeros(2)), "3 rows but 2 labels"),
        (lambda: Transform.from_dict({"kind": "standardise"}), "not a transform"),
        (lambda: Transform.from_dict({"kind": "s", "offset": "x", "scale": 1}), "not a transform"),
        (lambda: Transform.from_dict({"kind": "s", "offset": 0, "scale": 0}), "scale positive"),
        (lambda: Transform.from_dict({"kind": "s", "offset": float("nan"), "scale": 1}), "finite"),
    ],
)
def test_refused_in_one_line(act, message):
    with pytest.raises(DataError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: TABLE.split(0), "fraction=0 of 4 rows leaves 0 to hold out"),
        (lambda: TABLE.split(0.1), "fraction=0.1 of 4 rows leaves 0 to hold out: give a share"),
        (lambda: TABLE.split(1.5), "fraction=1.5"),
        (lambda: TABLE.split(float("nan")), "fraction=nan"),
        (lambda: TABLE.split(0.99), "leaves 0 to train on"),
        (
            lambda: TABLE.binarise(float("nan")),
            "threshold=nan divides no values: choose one from 0 to below 11",
        ),
        (lambda: TABLE.binarise(11), "threshold=11 divides no values"),
    ],
)
def test_settings_refused_in_one_line(act, message):
    with pytest.raises(SettingError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_images_with_constant_pixels_are_standardised_as_a_whole():
    x = np.zeros((3, 4))
    x[:, 1] = [1, 2, 3]
    standard, transform = Dataset(x).standardise(per_column=False)
    assert standard.values.mean() == pytest.approx(0)
    assert transform.offset.shape == ()


def test_rows_of_any_shape_as_vectors():
    assert Dataset(np.zeros(5)).as_vectors().values.shape == (5, 1)
    assert Dataset(np.zeros((5, 3, 4))).as_vectors().values.shape == (5, 12)
    assert TABLE.as_vectors() is TABLE
    with pytest.warns(
        UserWarning, match=r"data has rows of shape \[2, 3, 4\]: each is flattened.* of 24"
    ) as caught:
        assert Dataset(np.zeros((5, 2, 3, 4))).as_vectors().values.shape == (5, 24)
    assert caught[0].filename == __file__


def test_the_repr_is_a_few_lines():
    assert repr(TABLE) == (
        "Dataset 'boxes': 4 rows of 3 values, float64\n"
        "  columns: 'length', 'width', 'height'\n"
        "  labels: 'a', 'b'\n"
        "  factors: 'z'\n"
        "  truth: 'scale'"
    )
    images = Dataset(np.zeros((9, 8, 8), np.float32), labels=np.arange(9))
    assert repr(images) == (
        "Dataset 'data': 9 rows of 8 x 8 values, float32\n  labels: 0, 1, 2, 3, 4, 5 and 3 more"
    )
    wide = Dataset(np.eye(100), [f"x{i}" for i in range(100)])
    assert "'x5' and 94 more" in repr(wide)
    assert repr(wide.standardise()[1]) == "Transform(standardise, 100 entries)"
    assert repr(wide.binarise()[1]) == "Transform(binarise, threshold=0.5)"
