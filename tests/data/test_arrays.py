"""From what a user holds to tensors: every layout and type, and one clear line for what cannot be used."""

import argparse
import dataclasses
import datetime

import hypothesis.extra.numpy as hnp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pyrolvm.data import Dataset, as_batch
from pyrolvm.errors import DataError

NUMERIC = st.sampled_from(
    ["f2", "f4", "f8", ">f4", ">f8", "i1", "i2", "i4", "i8", ">i2", ">i4", "u1", "u2", "u4", "u8", "?"]
)


@st.composite
def arrays(draw):
    dtype = np.dtype(draw(NUMERIC))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=6))
    array = draw(hnp.arrays(dtype, shape, elements=_elements(dtype)))
    layout = draw(st.sampled_from(["C", "F", "reversed", "strided", "transposed", "read-only"]))
    if layout == "F":
        array = np.asfortranarray(array)
    elif layout == "reversed":
        array = array[::-1]
    elif layout == "strided":
        array = np.repeat(array, 2, axis=-1)[..., ::2]
    elif layout == "transposed":
        array = array.T
    array.flags.writeable = layout != "read-only"
    return array


def _elements(dtype):
    if dtype.kind == "f":
        return st.floats(-1000, 1000, width=16)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return st.integers(int(info.min), min(int(info.max), 2**63 - 1))
    return st.booleans()


@given(arrays())
def test_values_survive_and_floats_take_the_dtype(array):
    (x,) = as_batch(array).args
    assert tuple(x.shape) == array.shape
    assert x.is_contiguous()
    assert np.array_equal(x.numpy(), array)
    assert (x.dtype == torch.float32) == (array.dtype.kind == "f")
    assert x.is_floating_point() == (array.dtype.kind == "f")
    assert (x.dtype == torch.bool) == (array.dtype.kind == "b")


@given(arrays(), st.data())
def test_take_is_numpys_take(array, data):
    rows = data.draw(st.lists(st.integers(0, len(array) - 1), min_size=1, max_size=8))
    taken = as_batch({"x": array}).take(torch.tensor(rows)).kwargs["x"]
    assert np.array_equal(taken.numpy(), array[rows])


@given(arrays())
def test_later_writes_to_the_array_do_not_reach_the_tensor(array):
    array = array.copy()
    before = array.copy()
    (x,) = as_batch(array, torch.float64).args
    array[...] = 1
    assert np.array_equal(x.numpy(), before)


def test_a_tensor_of_the_right_type_is_used_in_place_and_detached():
    x = torch.zeros(3, 2, requires_grad=True)
    (y,) = as_batch(x).args
    assert y.data_ptr() == x.data_ptr()
    assert not y.requires_grad
    assert as_batch(x, torch.float64).args[0].dtype == torch.float64


def test_copy_on_write_maps_are_used_in_place(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 2), np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="c")
    (x,) = as_batch(mapped).args
    assert x.data_ptr() == mapped.ctypes.data
    x[0] = 5
    assert np.load(tmp_path / "x.npy")[0, 0] == 1
    read_only = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert as_batch(read_only).args[0].data_ptr() != read_only.ctypes.data


def test_forms_of_data():
    x, y = np.zeros((3, 2)), np.arange(3)
    assert len(as_batch(x).args) == 1
    assert [t.dtype for t in as_batch((x, y)).args] == [torch.float32, torch.int64]
    assert [t.dtype for t in as_batch([x, y]).args[0]] == [torch.float32, torch.int64]  # one argument
    assert as_batch([[1.0, 2.0], [3.0, 4.0]]).args[0].shape == (2, 2)
    assert as_batch([1, 2, 3]).args[0].shape == (3,)
    named = as_batch({"x": x, "mask": None, "y": y})
    assert list(named.kwargs) == ["x", "mask", "y"]
    assert named.kwargs["mask"] is None
    assert [name for name, _ in named.tensors()] == ["x", "y"]
    assert [name for name, _ in as_batch((x, None, y)).tensors()] == ["args[0]", "args[2]"]
    assert as_batch((None, x)).take(torch.tensor([1])).args[0] is None


def test_batches_without_rows():
    assert as_batch(()).num_rows == 0
    assert as_batch(None).args == (None,)
    assert as_batch(None).num_rows == 0
    assert as_batch((3.0, np.zeros((4, 1)))).num_rows == 4


def test_columns_are_those_of_the_first_table():
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [3, 4]})
    assert as_batch(frame).columns == ["a", "b"]
    assert as_batch((np.zeros(2), frame)).take(torch.tensor([0])).columns == ["a", "b"]
    assert as_batch({"x": Dataset(np.zeros((2, 1)), ["only"])}).columns == ["only"]
    assert as_batch(np.zeros((2, 2))).columns is None


def test_tables_keep_integers_and_mix_types_into_one():
    assert as_batch(pd.DataFrame({"a": [1, 2], "b": [3, 4]})).args[0].dtype == torch.int64
    mixed = as_batch(pd.DataFrame({"a": [True, False], "b": [3, 4], "c": [0.5, 1.5]})).args[0]
    assert mixed.tolist() == [[1.0, 3.0, 0.5], [0.0, 4.0, 1.5]]
    assert as_batch(pd.DataFrame({"a": [True, False], "b": [3, 4]})).args[0].dtype == torch.int64


def test_nullable_types_and_missing_values_become_nan():
    frame = pd.DataFrame({"a": pd.array([1, None], "Int64"), "b": pd.array([True, False], "boolean")})
    x = as_batch(frame).args[0]
    assert x[0].tolist() == [1.0, 1.0]
    assert torch.isnan(x[1, 0])
    assert as_batch(pd.Series(pd.array([1, 2], "Int16"))).args[0].tolist() == [1, 2]


def test_taking_from_parts_of_different_length_names_them():
    batch = as_batch({"x": np.zeros((5, 2)), "mask": np.zeros(4)})
    with pytest.raises(DataError, match="x has 5, mask has 4"):
        batch.take(torch.tensor([0]))
    with pytest.raises(DataError, match="different numbers of rows"):
        batch.check_rows()


def test_settings_pass_as_they_are():
    options = argparse.Namespace(size=3)
    batch = as_batch((np.zeros((5, 2)), 3.0, True, "text", options, {"depth": [2, 3]}, len, None))
    assert batch.args[1:4] == (3.0, True, "text")
    assert batch.args[4] is options
    assert batch.args[5] == {"depth": [2, 3]}
    assert batch.args[6] is len
    taken = batch.take(torch.tensor([0, 1]))
    assert taken.args[0].shape == (2, 2)
    assert taken.args[4] is options
    assert batch.fingerprint() != as_batch((np.zeros((5, 2)), 4.0)).fingerprint()


def test_lists_and_dicts_of_tensors_stay_one_argument():
    x, y = np.zeros((5, 2)), np.arange(5)
    batch = as_batch(({"x": x, "size": 3}, [x, {"y": y}]))
    assert [name for name, _ in batch.tensors()] == ["args[0]['x']", "args[1][0]", "args[1][1]['y']"]
    taken = batch.take(torch.tensor([4, 1]))
    assert taken.args[0]["size"] == 3
    assert taken.args[1][1]["y"].tolist() == [4, 1]


def test_a_list_of_numbers_is_data_if_it_has_an_entry_for_each_row():
    batch = as_batch((np.zeros((3, 2)), [0, 1, 1], [16, 16]))
    assert batch.args[1].tolist() == [0, 1, 1]
    assert batch.args[2] == [16, 16]


def test_packed_sequences_are_rows_that_can_be_taken():
    padded, lengths = torch.arange(12.0).reshape(3, 4), torch.tensor([2, 4, 3])
    packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
    batch = as_batch(packed, torch.float64)
    assert batch.num_rows == 3
    again, long = pad_packed_sequence(batch.take(torch.tensor([2, 0])).args[0], batch_first=True)
    assert again.dtype == torch.float64
    assert again.tolist() == [[8.0, 9.0, 10.0], [0.0, 1.0, 0.0]]
    assert long.tolist() == [3, 2]


def test_what_is_shared_is_not_taken():
    batch = dataclasses.replace(
        as_batch((np.zeros((5, 2)), np.ones((3, 3)), torch.tensor(4))), shared={"args[1]"}
    )
    taken = batch.take(torch.tensor([0]))
    assert [tuple(t.shape) for _, t in taken.tensors()] == [(1, 2), (3, 3), ()]


def test_a_batch_passes_through_with_a_new_dtype():
    batch = as_batch({"x": np.zeros((5, 2)), "n": np.zeros(5, int)})
    again = as_batch(batch, torch.float64)
    assert again.kwargs["x"].dtype == torch.float64
    assert again.kwargs["n"].dtype == torch.int64
    assert batch.to("cpu").num_rows == 5


TEXT = pd.DataFrame({"length": [1.0, 2.0], "species": ["setosa", "virginica"]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            TEXT,
            r"column 'species' holds 'setosa' at row 0 .from 0., not a number: correct it, or choose .*\['length'\]",
        ),
        (pd.DataFrame({"a": ["1", "2", "x3"]}), "column 'a' holds 'x3' at row 2.*no numeric column"),
        (TEXT["species"], "'species' holds 'setosa'"),
        (pd.DataFrame({"t": pd.to_datetime(["2020-01-01"])}), "column 't' holds datetime64"),
        (pd.DataFrame({"c": [1j, 2j]}), "column 'c' holds complex"),
        (pd.DataFrame({"k": pd.Categorical(["u", "v"])}), "column 'k' holds 'u' at row 0"),
        (pd.DataFrame({"o": [[1], [2]]}), "column 'o' holds"),
        (np.array([1, None], dtype=object), r"args\[0\] holds Python objects"),
        (np.array(["a", "b"]), r"args\[0\] holds text"),
        (np.array([1j]), "holds complex"),
        (torch.tensor([1j]), "holds complex"),
        (np.array([datetime.datetime(2020, 1, 1)], "datetime64[D]"), "holds dates"),
        (np.zeros(3, dtype=[("a", "f4"), ("b", "f4")]), "holds named fields"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), r"masked array.*\.filled"),
        (scipy.sparse.csr_matrix(np.eye(3)), r"sparse matrix.*\.toarray"),
        (torch.eye(3).to_sparse(), r"sparse tensor.*\.to_dense"),
        ([[1.0, 2.0], [3.0]], "rows of one length"),
        ({1: np.zeros(3)}, "key 1 is not a name"),
        (np.zeros((0, 3)), r"args\[0\] is empty: its shape is \[0, 3\]"),
        (np.zeros((3, 0)), "is empty"),
        (pd.DataFrame({"a": []}), "is empty"),
        (np.array([1.0, 1e300]), r"1e\+300 at index \[1\], beyond torch.float32: use dtype=float64"),
        (np.array([2**64 - 1], dtype=np.uint64), "18446744073709551615.*beyond"),
    ],
)
def test_refused_in_one_line(data, message):
    with pytest.raises(DataError, match=message) as caught:
        as_batch(data)
    assert "\n" not in str(caught.value)


def test_missing_and_infinite_values_are_the_models_to_judge():
    x = as_batch(np.array([[np.nan, np.inf]])).args[0]
    assert torch.isnan(x[0, 0])
    assert torch.isinf(x[0, 1])
