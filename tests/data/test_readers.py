"""Reading files: every kind, and one clear line for everything that can be wrong with one."""

import gzip

import numpy as np
import pandas as pd
import pytest

from pyrolvm.data import as_batch, load_dataset, read
from pyrolvm.errors import DataError

X = np.array([[1.0, 2.0], [3.5, 4.0], [5.0, 6.0]])
FRAME = pd.DataFrame({"width": [1.0, 3.5, 5.0], "count": [2, 4, 6], "kind": ["a", "b", "a"]})


def idx_bytes(array, code):
    big = array.astype(array.dtype.newbyteorder(">"))
    return bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes() + big.tobytes()


@pytest.fixture
def folder(tmp_path):
    FRAME.drop(columns="kind").to_csv(tmp_path / "x.csv", index=False)
    FRAME.drop(columns="kind").to_csv(tmp_path / "x.csv.gz", index=False)
    FRAME.drop(columns="kind").to_csv(tmp_path / "x.tsv", index=False, sep="\t")
    FRAME.drop(columns="kind").to_csv(tmp_path / "X.CSV", index=False)
    np.save(tmp_path / "x.npy", X)
    np.savez(tmp_path / "x.npz", x=X)
    np.savez_compressed(tmp_path / "two.npz", train=X, test=X + 1)
    raw = idx_bytes(X.astype(np.float32), 0x0D)
    (tmp_path / "x.idx").write_bytes(raw)
    (tmp_path / "x-idx2-ubyte").write_bytes(raw)
    (tmp_path / "x.idx.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "x-idx2-ubyte.gz").write_bytes(gzip.compress(raw))
    FRAME.to_csv(tmp_path / "kinds.csv", index=False)
    return tmp_path


KINDS = ["x.csv", "x.csv.gz", "x.tsv", "X.CSV", "x.npy", "x.npz", "x.idx", "x-idx2-ubyte", "x.idx.gz"]


@pytest.mark.parametrize("name", [*KINDS, "x-idx2-ubyte.gz"])
def test_every_kind_holds_the_same(folder, name):
    data = read(folder / name)
    assert np.array_equal(data.values, X)
    assert data.values.dtype.isnative
    assert data.name == str(folder / name)
    assert data.columns == (["width", "count"] if "sv" in name.lower() else None)


CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


@pytest.mark.parametrize("dtype", CODES)
def test_every_type_of_idx(tmp_path, dtype):
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    (tmp_path / "x.idx").write_bytes(idx_bytes(array, CODES[dtype]))
    for mmap in (False, True):
        found = read(tmp_path / "x.idx", mmap=mmap).values
        assert np.array_equal(found, array)
        assert as_batch(found).args[0].shape == (2, 3, 4)
    assert found.dtype.newbyteorder("=") == array.dtype


@pytest.mark.parametrize("name", ["x.npy", "x.idx"])
def test_mapping_leaves_the_file_alone(folder, name):
    before = (folder / name).read_bytes()
    data = read(folder / name, mmap=True)
    assert isinstance(data.values, np.memmap)
    assert np.array_equal(data.values, X)
    data.values[0] = 9
    assert (folder / name).read_bytes() == before


def test_names_of_data_sets(monkeypatch, tmp_path):
    assert np.array_equal(read("iris").values, load_dataset("iris").values)
    assert read("iris", columns=["petal width (cm)"]).values.shape == (150, 1)
    assert read("breast-cancer").num_rows == 569
    monkeypatch.chdir(tmp_path)
    FRAME.to_csv("iris.csv", index=False)
    assert read("iris.csv", ["width"]).num_rows == 3


def test_columns_and_labels_of_a_table(folder):
    data = read(folder / "kinds.csv", labels="kind")
    assert data.columns == ["width", "count"]
    assert data.labels.tolist() == ["a", "b", "a"]
    assert read(folder / "kinds.csv", columns=["count", "width"]).values[1].tolist() == [4, 3.5]
    assert read(folder / "kinds.csv", columns=["width"], labels="count").labels.tolist() == [2, 4, 6]
    assert read(folder / "kinds.csv", columns=["count"]).values.dtype == np.int64
    assert read(folder / "x.npy", columns=["1"]).values[:, 0].tolist() == [2, 4, 6]


def test_a_key_chooses_among_arrays(folder):
    assert read(folder / "two.npz", key="test").values[0, 0] == 2


def test_missing_values_can_be_kept(folder):
    (folder / "gaps.csv").write_text("a,b\n1,2\n,4\n")
    assert np.isnan(read(folder / "gaps.csv", allow_missing=True).values[1, 0])


def test_a_file_without_header_is_read_as_data_and_says_so(folder):
    (folder / "bare.csv").write_text("1.5,2\n3,4\n5,6\n")
    with pytest.warns(UserWarning, match="bare.csv has no header.*type header=False") as caught:
        data = read(folder / "bare.csv")
    assert caught[0].filename == __file__
    assert data.values[0].tolist() == [1.5, 2]
    assert data.columns == ["column_0", "column_1"]
    assert read(folder / "bare.csv", header=False).num_rows == 3
    assert read(folder / "bare.csv", header=True).columns == ["1.5", "2"]


def test_the_numbers_pandas_gives_to_unnamed_columns_are_names(folder):
    pd.DataFrame(np.ones((4, 3))).to_csv(folder / "ones.csv", index=False)
    assert read(folder / "ones.csv").columns == ["0", "1", "2"]


def test_row_numbers_without_a_name_are_left_out_and_it_says_so(folder):
    FRAME[["width", "count"]].to_csv(folder / "index.csv")
    with pytest.warns(UserWarning, match="first column has no name and counts the rows"):
        data = read(folder / "index.csv")
    assert data.columns == ["width", "count"]
    assert read(folder / "index.csv", ["width"]).columns == ["width"]


@pytest.mark.parametrize(
    "text", ["a,b\r\n1,2\r\n3,4\r\n", "\ufeffa,b\n1,2\n3,4", '"a","b"\n"1","2"\n"3","4"\n\n']
)
def test_dialects(tmp_path, text):
    (tmp_path / "x.csv").write_text(text, encoding="utf-8", newline="")
    data = read(tmp_path / "x.csv")
    assert data.columns == ["a", "b"]
    assert data.values.tolist() == [[1, 2], [3, 4]]


BAD_TABLES = {
    "empty": (b"", "is empty"),
    "blank": (b"\n\n", "is empty"),
    "header only": (b"a,b\n", "too few rows of data: 0"),
    "one row": (b"a,b\n1,2\n", "too few rows of data: 1"),
    "text column": (
        b"a,kind\n1,x\n2,y\n",
        r"'kind' holds 'x' at row 0.*columns=\['a'\].*--columns a\)",
    ),
    "one bad cell": (b"a,b\n1,2\n3,n/k\n", "column 'b' holds 'n/k' at row 1 .from 0., not a number"),
    "decimal comma": (b'a,b\n1,"2,5"\n3,4\n', "column 'b' holds '2,5' at row 0"),
    "missing": (b"a,b\n1,2\n3,\n", "missing at row 1, column 'b'.*allow_missing=True"),
    "infinite": (b"a,b\n1,2\n3,inf\n", "row 1, column 'b' .*is inf"),
    "ragged, long row": (b"a,b\n1,2\n3,4,5\n", "differ in length.*line 3, saw 3"),
    "ragged, all long": (b"a,b\n1,2,3\n3,4,5\n", "rows are longer than its header"),
    "ragged, short row": (b"a,b\n1,2\n3\n", "missing at row 1, column 'b'"),
    "semicolons": (b"a;b\n1;2\n3;4\n", "separated by semicolons"),
    "tabs": (b"a\tb\n1\t2\n3\t4\n", "separated by tabs"),
    "open quote": (b'a,b\n"1,2\n3,4\n', "damaged or truncated"),
    "not utf-8": (b"a,b\xff\xfe\n1,2\n3,4\n", "not text in UTF-8"),
    "a name twice": (b"a,b,a\n1,2,3\n4,5,6\n", "has two columns called 'a': rename one of them"),
    "binary": (bytes(range(256)) * 3, "x.csv"),
}


def refused(message, *args, **options):
    with pytest.raises(DataError, match=message) as caught:
        read(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables(tmp_path, case):
    raw, message = BAD_TABLES[case]
    (tmp_path / "x.csv").write_bytes(raw)
    assert str(tmp_path / "x.csv") in refused(message, tmp_path / "x.csv")


BAD_ARRAYS = {
    "number": (np.array(3.0), "single number"),
    "text": (np.array(["a", "b"]), "holds text"),
    "complex": (np.array([1j, 2j]), "complex"),
    "fields": (np.zeros(3, [("a", "f4")]), "named fields"),
    "one row": (np.zeros((1, 3)), "too few rows of data: 1"),
    "no rows": (np.zeros((0, 3)), "too few rows of data: 0"),
    "no columns": (np.zeros((3, 0)), "no columns of data"),
    "missing": (np.array([[1.0, 2.0], [3.0, np.nan]]), "missing at row 1, column 1"),
    "missing in an image": (
        np.where(np.arange(8) == 7, np.nan, 1).reshape(2, 2, 2),
        r"row 1, index \(1, 1\)",
    ),
    "missing in a vector": (np.array([1.0, np.nan]), "missing at row 1 "),
    "infinite": (np.array([[1.0], [-np.inf]]), "is -inf"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_bad_arrays(tmp_path, case, suffix):
    array, message = BAD_ARRAYS[case]
    path = tmp_path / f"x.{suffix}"
    (np.save if suffix == "npy" else np.savez)(path, array)
    assert str(path) in refused(message, path)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_pickles_are_never_loaded(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    (np.save if suffix == "npy" else np.savez)(path, np.array([{"a": 1}, None], dtype=object))
    refused("Python objects .pickles., which are never loaded", path)


def test_a_pickle_called_npy(tmp_path):
    pd.to_pickle(X, tmp_path / "x.npy")
    refused("Python objects .pickles., which are never loaded", tmp_path / "x.npy")


def test_what_is_no_numpy_file_is_not_called_a_pickle(tmp_path):
    (tmp_path / "x.npy").write_bytes(b"any other bytes" * 20)
    refused("is not a numpy file: it does not begin as one", tmp_path / "x.npy")


@pytest.mark.parametrize("name", ["x.csv.gz", "x.npy", "x.npz", "two.npz", "x.idx", "x.idx.gz"])
@pytest.mark.parametrize("part", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("mmap", [False, True])
def test_truncated_files(folder, name, part, mmap):
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[: int(part * len(raw))])
    mmap = mmap and name in ("x.npy", "x.idx")
    message = refused(
        "damaged|truncated|not an idx", folder / name, mmap=mmap, key="test" if "two" in name else None
    )
    assert str(folder / name) in message


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.idx", "x.idx.gz", "x.csv.gz", "x.parquet"])
def test_files_that_are_something_else(folder, name):
    (folder / name).write_bytes(b"<html><body>404 not found</body></html>" * 10)
    refused("damaged|not an idx|not a numpy file|never loaded", folder / name)


def test_an_idx_file_that_announces_more_than_could_be(tmp_path):
    header = bytes([0, 0, 0x0E, 4]) + np.array([2**32 - 1] * 4, ">u4").tobytes()
    for name, raw in (("x.idx", header + b"\0" * 64), ("x.idx.gz", gzip.compress(header + b"\0" * 64))):
        (tmp_path / name).write_bytes(raw)
        refused("truncated: its header announces", tmp_path / name)


def test_an_idx_file_with_bytes_to_spare(tmp_path):
    (tmp_path / "x.idx").write_bytes(idx_bytes(np.zeros((2, 2), "u1"), 8) + b"\0")
    refused("damaged: its header announces 4 bytes of values, it holds more", tmp_path / "x.idx")
    refused("damaged", tmp_path / "x.idx", mmap=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kinds.csv", {}, r"column 'kind' holds 'a' at row 0.*columns=\['width', 'count'\]"),
        ("kinds.csv", {"columns": ["kind"]}, "column 'kind' holds 'a' at row 0"),
        ("kinds.csv", {"columns": ["widht"]}, "has no column 'widht': did you mean 'width'"),
        ("kinds.csv", {"columns": ["zzz"]}, "it has 'width', 'count', 'kind'"),
        ("kinds.csv", {"columns": ["width", "width"]}, "column 'width' is chosen twice"),
        ("x.npy", {"columns": ["1", "1"]}, "column '1' is chosen twice"),
        ("kinds.csv", {"columns": []}, "no columns were chosen"),
        ("kinds.csv", {"columns": "width"}, r"is one string: type a list, columns=\['width'\]"),
        ("kinds.csv", {"labels": "kinds"}, "has no column 'kinds': did you mean 'kind'"),
        ("x.npy", {"columns": ["7"]}, "has no column '7'"),
        ("x.npy", {"columns": "7"}, "is one string"),
        ("x.npy", {"labels": "y"}, "labels= is for"),
        ("x.npy", {"key": "y"}, "key= is for .npz"),
        ("x.npz", {"mmap": True}, "mmap= is for .npy, .idx"),
        ("x.idx.gz", {"mmap": True}, "compressed and cannot be memory-mapped: unpack it"),
        ("x.npy", {"header": True}, "header= is for"),
        ("two.npz", {}, r"holds 2 arrays: type key= and one of \['train', 'test'\]"),
        ("two.npz", {"key": "trian"}, "has no array 'trian': did you mean 'train'"),
        ("xx.csv", {}, "there is no file .*xx.csv: did you mean .*x.csv"),
        ("none/x.csv", {}, "its folder .*none does not exist"),
        (".", {}, "holds no file of data|files of several kinds"),
    ],
)
def test_bad_requests(folder, name, options, message):
    refused(message, folder / name, **options)


def test_unknown_suffixes_and_names(folder, monkeypatch):
    (folder / "x.xlsx").write_bytes(b"PK")
    refused("x.xlsx is of no known kind: the suffixes are .csv, .tsv", folder / "x.xlsx")
    monkeypatch.chdir(folder)
    refused("no data set 'digit': did you mean 'digits'.*nor is there a file of that name", "digit")
    refused("there is no file y.csv", "y.csv")
