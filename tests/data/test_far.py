"""Data in many files, here or elsewhere: what is read is what was written, and each byte once."""

import os
import sys
from dataclasses import replace

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pyrolvm import DataError, SettingError
from pyrolvm.data import Dataset, Transform, read, scan
from pyrolvm.data import survey as surveying
from pyrolvm.data.far import blocks
from pyrolvm.data.far.holdout import Holdout
from pyrolvm.data.far.locations import find_files
from pyrolvm.data.far.places import Place
from pyrolvm.data.plan import RUN, split_rows
from pyrolvm.data.survey import survey

X = (np.random.default_rng(0).standard_normal((1000, 4)) * [1, 10, 0.1, 3] + [0, 50, 2, -7]).astype(
    np.float32
)
NAMES = list("abcd")


@pytest.fixture
def folder(tmp_path):
    """Five parquet files of 200 rows in row groups of 60."""
    for i in range(5):
        frame = pd.DataFrame(X[200 * i : 200 * (i + 1)], columns=NAMES)
        frame.to_parquet(tmp_path / f"part-{i}.parquet", row_group_size=60)
    return tmp_path


@pytest.fixture
def memory():
    """A file system that is no disk's, with npy files."""
    fs = fsspec.filesystem("memory")
    for i in range(5):
        with fs.open(f"/far/{i}.npy", "wb") as stream:
            np.save(stream, X[200 * i : 200 * (i + 1)])
    yield fs
    fs.rm("/far", recursive=True)


def put(fs, path, frame):
    with fs.open(path, "wb") as stream:
        frame.to_parquet(stream)


def test_a_folder_a_pattern_and_a_list_are_the_same_rows(folder):
    files = sorted(folder.glob("*.parquet"))
    for source in (folder, str(folder / "part-*.parquet"), files, "\n".join(map(str, files))):
        data = scan(source)
        assert np.array_equal(data.load().values, X)
        assert data.columns == NAMES
        assert (data.num_rows, data.row_shape, data.num_bytes) == (1000, (4,), X.nbytes)


def test_hidden_files_and_answers_that_come_together_are_no_data(folder):
    for name in (
        "_metadata.parquet",
        ".part.parquet",
        "_temporary/x.parquet",
        "z.parquet.progress/values/x.parquet",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no data")
    assert np.array_equal(scan(folder).load().values, X)


def test_files_elsewhere_are_read_as_those_here(memory, folder):
    assert np.array_equal(scan("memory://far").load().values, X)
    assert np.array_equal(scan("memory://far/*.npy", columns=["2", "0"]).load().values, X[:, [2, 0]])
    put(memory, "/far/deep/x.parquet", pd.read_parquet(folder / "part-0.parquet"))
    assert np.array_equal(scan("memory://far/deep").load().values, X[:200])


def test_columns_are_taken_in_the_order_given_and_labels_apart(tmp_path):
    frame = pd.DataFrame(X, columns=NAMES).assign(kind=np.arange(1000) % 3, word=["x", "y"] * 500)
    frame.to_parquet(tmp_path / "x.parquet", row_group_size=300)
    data = scan(tmp_path, columns=["c", "a"], labels="word")
    loaded = data.load()
    assert np.array_equal(loaded.values, X[:, [2, 0]])
    assert loaded.labels.tolist() == frame["word"].tolist()
    assert data.survey().labels.tolist() == ["x", "y"]
    both = scan(tmp_path, columns=["a", "kind"], labels="kind").load()
    assert np.array_equal(both.values[:, 1], both.labels)
    assert scan(tmp_path, columns=["a", "kind"]).load().values.dtype == np.result_type(np.float32, np.int64)


def test_only_the_chosen_columns_are_asked_for(folder, monkeypatch):
    data = scan(folder, columns=["b"])
    asked = []
    fragment = type(data.blocks._fragments[0])
    table = fragment.to_table
    monkeypatch.setattr(data.blocks, "_fragments", [Watched(f, asked) for f in data.blocks._fragments])
    assert np.array_equal(data.load().values, X[:, [1]])
    assert set(asked) == {("b",)}
    assert table is fragment.to_table


class Watched:
    def __init__(self, fragment, asked):
        self.fragment, self.asked = fragment, asked

    def subset(self, **which):
        return Watched(self.fragment.subset(**which), self.asked)

    def to_table(self, columns):
        self.asked.append(tuple(columns))
        return self.fragment.to_table(columns=columns)


def test_idx_files_are_images_and_vectors_where_asked(tmp_path):
    images = np.arange(7 * 2 * 3, dtype=">i2").reshape(7, 2, 3)
    for i, part in enumerate(np.split(images, [4])):
        head = bytes([0, 0, 0x0B, 3]) + np.array(part.shape, ">u4").tobytes()
        (tmp_path / f"{i}.idx").write_bytes(head + part.tobytes())
    data = scan(tmp_path)
    assert data.row_shape == (2, 3)
    assert np.array_equal(data.load().values, images)
    assert np.array_equal(data.as_vectors().load().values, images.reshape(7, 6))
    assert data.load().values.dtype.isnative


def test_a_folder_read_is_in_memory(folder):
    data = read(str(folder), columns=["a", "d"])
    assert isinstance(data, Dataset)
    assert np.array_equal(data.values, X[:, [0, 3]])
    with pytest.raises(DataError, match="key= is for single files"):
        read(folder, key="x")


def test_one_pass_finds_what_numpy_finds_of_the_whole(folder):
    x = X.astype(np.float64)
    x[3, 1] = np.nan
    labels = np.arange(1000) // 100
    found = survey([(x[:100], labels[:100]), (x[100:101], labels[100:101]), (x[101:], labels[101:])])
    assert np.array_equal(found.labels, np.arange(10))
    assert np.allclose(found.mean, np.nanmean(x, 0), rtol=1e-13)
    assert np.allclose(np.sqrt(found.squares / found.number), np.nanstd(x, 0), rtol=1e-12)
    assert np.array_equal(found.number, (~np.isnan(x)).sum(0))
    assert np.array_equal(found.low, np.nanmin(x, 0))
    whole = found.overall()
    assert np.allclose(
        [whole.mean[0], (whole.squares / whole.number)[0]], [np.nanmean(x), np.nanvar(x)], rtol=1e-12
    )


@pytest.mark.parametrize("per_column", [True, False])
def test_standardising_as_it_is_read_is_standardising_in_memory(folder, per_column):
    streamed, transform = scan(folder).standardise(per_column)
    whole, wanted = Dataset(X).standardise(per_column)
    assert np.allclose(transform.scale, wanted.scale, rtol=1e-12)
    assert np.allclose(streamed.load().values, whole.values, rtol=1e-6, atol=1e-6)
    assert isinstance(Transform.from_dict(transform.to_dict()), Transform)


def test_binarising_as_it_is_read_is_binarising_in_memory(memory):
    streamed, _ = scan("memory://far").binarise(0.5)
    assert np.array_equal(streamed.load().values, Dataset(X).binarise(0.5)[0].values)


def test_held_out_rows_are_the_same_as_in_memory_and_each_is_in_one_part(folder):
    train, held_out = scan(folder).split(0.1, seed=3)
    rows = split_rows(1000, 0.1, 3)
    assert np.array_equal(train.load().values, X[rows[0].numpy()])
    assert np.array_equal(held_out.load().values, X[rows[1].numpy()])
    with pytest.raises(SettingError, match="split already"):
        train.split()


def test_any_stretch_of_a_long_split_is_the_same_and_has_its_share():
    held = Holdout(3 * RUN + 17, 0.1, seed=5)
    whole = held.mask(0, held.num_rows)
    assert whole.sum() == round(0.1 * held.num_rows)
    parts = split_rows(held.num_rows, 0.1, 5)  # of as many rows in memory
    assert np.array_equal(np.flatnonzero(whole), parts[1])
    assert np.array_equal(np.flatnonzero(~whole), parts[0])
    assert np.array_equal(
        Holdout(held.num_rows, 0.1, seed=5).mask(RUN - 3, 2 * RUN + 9), whole[RUN - 3 : 2 * RUN + 9]
    )
    assert np.array_equal(held.mask(2 * RUN + 5, 3 * RUN + 9), whole[2 * RUN + 5 : 3 * RUN + 9])
    assert abs(whole[:RUN].mean() - 0.1) < 1e-4
    assert (whole != Holdout(held.num_rows, 0.1, seed=6).mask(0, held.num_rows)).any()


@pytest.mark.parametrize("num_processes", [1, 3, 7])
def test_the_shares_of_processes_are_all_rows_once(folder, num_processes):
    train, _ = scan(folder).split(0.1, seed=3)
    shares = [train.share(r, num_processes) for r in range(num_processes)]
    assert np.array_equal(np.concatenate([s.load().values for s in shares]), train.load().values)
    assert max(s.num_rows for s in shares) - min(s.num_rows for s in shares) <= 1


def test_a_pass_reads_each_block_once_and_a_share_only_its_own(folder, monkeypatch):
    data, read_blocks = scan(folder), []
    own = data.blocks.read
    monkeypatch.setattr(data.blocks, "read", lambda block: read_blocks.append(block) or own(block))
    reader = data.reader()
    for first in range(0, 1000, 37):  # parts that cut blocks
        reader.rows(first, min(first + 37, 1000))
    assert read_blocks == data.blocks.blocks
    read_blocks.clear()
    data.share(1, 2).load()
    assert {b.file for b in read_blocks} == {2, 3, 4}
    assert len(read_blocks) == 11  # three of file 2, from its row 100 on, and four of the others each


def test_evenly_spaced_rows_are_a_sample(folder):
    assert np.array_equal(scan(folder).sample(3).values, X[[0, 499, 999]])
    assert np.array_equal(scan(folder).sample(5000).values, X)


def test_the_fingerprint_tells_data_and_what_is_done_to_them_apart(folder):
    data = scan(folder)
    same = scan(str(folder / "*.parquet"))
    others = [scan(folder, columns=["a"]), data.standardise()[0], data.split()[0], data.split()[1]]
    assert data.fingerprint() == same.fingerprint()
    pd.DataFrame(X[::-1][:200], columns=NAMES).to_parquet(folder / "part-4.parquet", row_group_size=60)
    others.append(scan(folder))
    assert len({data.fingerprint(), *(o.fingerprint() for o in others)}) == 6


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of seven rows of `X`."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 7 * X[:1].nbytes)


def test_arrays_of_many_blocks_are_read_in_their_order_and_their_rows_counted(memory, small_blocks):
    data = scan("memory://far")
    assert len(data.blocks.blocks) == 5 * 29
    assert [b.num_rows for b in data.blocks.blocks[27:30]] == [7, 4, 7]
    assert np.array_equal(data.load().values, X)
    assert np.array_equal(data.reader().rows(195, 210).values, X[195:210])
    wrong = X[:200].copy()
    wrong[150, 2] = np.nan
    with memory.open("/far/9.npy", "wb") as stream:
        np.save(stream, wrong)
    with pytest.raises(DataError, match=r"9.npy: a value is missing at row 150, column 2"):
        scan("memory://far").load()


def test_files_of_very_different_sizes_of_one_row_and_of_none(tmp_path):
    for kind in ("npy", "parquet"):
        folder = tmp_path / kind
        folder.mkdir()
        for i, part in enumerate((X[:1], X[:0], X[1:990], X[990:])):
            if kind == "npy":
                np.save(folder / f"{i}.npy", part)
            else:
                pd.DataFrame(part, columns=NAMES).to_parquet(folder / f"{i}.parquet")
        assert np.array_equal(scan(folder).load().values, X)
    with pytest.raises(DataError, match="too few rows of data: 1, and at least 2"):
        scan(tmp_path / "npy" / "0.npy")


def test_columns_in_another_order_in_a_file_and_names_with_dots(folder):
    frames = [pd.read_parquet(p).rename(columns={"b": "b.length"}) for p in sorted(folder.glob("*.parquet"))]
    for i, frame in enumerate(frames):
        frame[frame.columns[:: 1 if i != 2 else -1]].to_parquet(folder / f"part-{i}.parquet")
    assert np.array_equal(scan(folder).load().values, X)
    assert np.array_equal(scan(folder, columns=["b.length", "a"]).load().values, X[:, [1, 0]])


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_file_that_is_written_again_is_noticed_before_its_rows_are_mixed(tmp_path, kind):
    def write(i, x):
        if kind == "npy":
            np.save(tmp_path / f"{i}.npy", x)
        else:
            pd.DataFrame(x, columns=NAMES).to_parquet(tmp_path / f"{i}.parquet")
        os.utime(tmp_path / f"{i}.{kind}", ns=(0, write.time))
        write.time += 1_000_000_000

    write.time = 10**18
    for change in (X[100:200] + 1, X[100:150]):  # of the same size, and shorter
        write(0, X[:100])
        write(1, X[100:200])
        data = scan(tmp_path)
        assert data.survey().mean.shape == (4,)
        write(1, change)
        with pytest.raises(DataError, match=rf"1.{kind} was written again while it was read") as caught:
            data.load()
        assert "\n" not in str(caught.value)
        assert scan(tmp_path).num_rows == 100 + len(change)


def test_a_file_elsewhere_that_is_written_again_is_noticed(memory):
    data = scan("memory://far")
    memory.pipe("/far/3.npy", memory.cat("/far/2.npy"))
    with pytest.raises(DataError, match=r"/far/3.npy was written again"):
        data.load()


def test_what_lies_far_inside_a_file_is_in_the_fingerprint(tmp_path):
    found = []
    for row in (None, 0, 40_000, 99_999):
        x = np.zeros((100_000, 3), np.float32)
        x[row if row is None else slice(row, row + (1 if row != 40_000 else 9_000))] += row is not None
        np.save(tmp_path / "x.npy", x)
        found.append(scan(tmp_path).fingerprint())
    assert len(set(found)) == 4


def test_transforms_follow_each_other(folder):
    half, shift = (
        Transform("standardise", np.asarray(o), np.asarray(s)) for o, s in ((0.0, 2.0), (1.0, 1.0))
    )
    found = scan(folder).transformed(half).transformed(shift).load().values
    assert np.allclose(found, X / 2 - 1, rtol=1e-6)


def test_means_and_deviations_of_single_precision_are_taken_in_double(tmp_path, monkeypatch):
    """Numbers of mean 10^4 and deviation 1: in single precision their squares have no digit of it left."""
    x = (np.random.default_rng(1).standard_normal((5000, 2)) + 1e4).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr(surveying, "_CHUNK", 300)
    for found in (scan(tmp_path).survey(), Dataset(x).survey()):
        assert np.allclose(found.mean, x.astype(float).mean(0), rtol=1e-13)
        assert np.allclose(np.sqrt(found.squares / found.number), x.astype(float).std(0), rtol=1e-9)
        assert np.array_equal(found.number, [5000, 5000])
        assert np.array_equal(found.low, x.min(0))
        assert np.array_equal(found.high, x.max(0))
    half = (x - 1e4).astype(np.float16)
    np.save(tmp_path / "x.npy", half)
    values = scan(tmp_path).standardise()[0].load().values
    assert values.dtype == np.float32
    assert np.allclose(values.astype(float).std(0), 1, rtol=1e-5)


def test_missing_values_are_left_out_of_means_and_stay_missing(tmp_path):
    x = X[:, :2].copy()
    x[::3, 0] = np.nan
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", x[500 * i : 500 * (i + 1)])
    data, both = scan(tmp_path, allow_missing=True), Dataset(x)
    for prepare in (Dataset.standardise, Dataset.binarise):
        found = getattr(data, prepare.__name__)()[0].load().values
        assert np.allclose(found, prepare(both)[0].values, rtol=1e-6, atol=1e-6, equal_nan=True)
        assert np.array_equal(np.isnan(found), np.isnan(x))
    constant = np.stack([np.full(100, 0.1, np.float32), X[:100, 0]], 1)
    np.save(tmp_path / "0.npy", constant)
    np.save(tmp_path / "1.npy", constant)
    with pytest.raises(DataError, match="column 0 is constant"):
        scan(tmp_path).standardise()


def test_runs_of_a_split_are_drawn_apart():
    held = Holdout(2 * RUN + 2, 0.5, seed=5)
    whole = held.mask(0, held.num_rows)
    assert abs((whole[:RUN] == whole[RUN : 2 * RUN]).mean() - 0.5) < 4 * 0.5 / RUN**0.5


def test_missing_values_that_no_footer_counts_are_refused_when_they_are_read(tmp_path):
    table = pa.table({"a": pa.array([1.0, 2.0, 3.0, None]), "b": [1.0, 2.0, 3.0, 4.0]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2, write_statistics=False)
    data = scan(tmp_path)
    with pytest.raises(DataError, match="1 values of column 'a' are missing in its row group 1"):
        data.load()
    numbers = pa.table({"a": pa.array([*range(7), float("nan")], pa.float64(), from_pandas=False)})
    pq.write_table(numbers, tmp_path / "y.parquet", row_group_size=2)
    with pytest.raises(DataError, match=r"y.parquet: a value is missing at row 7, column 'a'"):
        scan(tmp_path / "y.parquet").load()
    found = scan(tmp_path / "x.parquet", allow_missing=True).load().values
    assert np.array_equal(found, [[1, 1], [2, 2], [3, 3], [np.nan, 4]], equal_nan=True)


# ---------------------------------------------------------------------- refused, in one line


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("memory://nowhere/*.npy", "no file matches memory://nowhere/.*its folder /nowhere does not exist"),
        ("memory://far/6.npy", "there is no memory://far/6.npy: did you mean '.*.npy'"),
        ("s3://bucket/x.parquet", "s3://bucket/x.parquet needs the package s3fs: type pip install s3fs"),
        ("no://bucket/x.parquet", "no://bucket/x.parquet cannot be read: Protocol not known: no"),
        ("/nowhere/*.parquet", "no file matches /nowhere/"),
        ([], "no file is named"),
    ],
)
def test_places_without_files_are_refused(memory, monkeypatch, source, words):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=words) as caught:
        scan(source)
    assert "\n" not in str(caught.value)


def test_a_place_that_does_not_answer_is_refused(monkeypatch, memory):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(type(memory), "glob", refuse)
    with pytest.raises(DataError, match=r"^memory://far/\*.npy cannot be read: no route to host$"):
        scan("memory://far/*.npy")


def test_files_of_several_kinds_or_of_none_are_refused(folder, memory):
    np.save(folder / "x.npy", X)
    with pytest.raises(DataError, match=r"files of several kinds \(part-0.parquet, x.npy\): choose one"):
        scan(folder)
    with pytest.raises(DataError, match="several kinds"):
        scan([folder / "part-0.parquet", folder / "x.npy"])
    (folder / "deep").mkdir()
    with pytest.raises(DataError, match=r"holds no file of data: the kinds are .parquet, .npy, .idx"):
        scan(folder / "deep")
    (folder / "deep" / "x.csv").write_text("a\n1\n2\n")
    with pytest.raises(DataError, match=r".csv files cannot be read in parts; of many files"):
        scan(folder / "deep")
    with pytest.raises(DataError, match="named twice"):
        scan([folder / "x.npy", folder / "x.npy"])
    (folder / "deep" / "x.csv").unlink()
    (folder / "deep" / "empty.npy").touch()
    with pytest.raises(DataError, match=r"empty.npy is empty"):
        scan(folder / "deep")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda f: f.rename(columns={"b": "e"}),
            "part-3.parquet has no column 'b', which .*part-0.parquet has",
        ),
        (
            lambda f: f.assign(e=1),
            "part-3.parquet has a column 'e', which .*part-0.parquet has not: choose columns",
        ),
        (
            lambda f: f.astype({"c": float}),
            "the column 'c' is double in .*part-3.parquet and float in .*part-0",
        ),
        (lambda f: f.assign(c="x"), "the column 'c' is (large_)?string in .*part-3.parquet and float in"),
        (lambda f: f.mask(f > 50), "part-3.parquet: .* values of column 'b' are missing in its row group 0"),
    ],
)
def test_a_file_that_is_not_like_the_others_is_refused(folder, change, words):
    path = folder / "part-3.parquet"
    change(pd.read_parquet(path)).to_parquet(path)
    with pytest.raises(DataError, match=words) as caught:
        scan(folder)
    assert "\n" not in str(caught.value)


def test_other_columns_do_not_matter_where_columns_are_chosen(folder):
    path = folder / "part-3.parquet"
    pd.read_parquet(path).assign(e="x").to_parquet(path)
    assert np.array_equal(scan(folder, columns=["a"]).load().values, X[:, :1])


def test_arrays_that_are_not_alike_are_refused(memory):
    for name, array, words in (
        ("shape", X[:, :3], "/far/9.npy has rows of shape .3., and .*/far/0.npy .4.: all files"),
        ("type", X.astype(np.float64), "/far/9.npy has values of type float64, and .*float32"),
        ("order", np.asfortranarray(X), "stored by columns"),
        ("object", np.array(["x"]), "holds text"),
    ):
        with memory.open("/far/9.npy", "wb") as stream:
            np.save(stream, array)
        with pytest.raises(DataError, match=words):
            scan("memory://far")
        assert name


def test_damaged_files_are_named(folder, memory):
    whole = (folder / "part-1.parquet").read_bytes()
    (folder / "part-1.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"part-1.parquet is damaged, truncated or not parquet"):
        scan(folder)
    memory.pipe("/far/1.npy", memory.cat("/far/1.npy")[:1000])
    with pytest.raises(DataError, match=r"/far/1.npy is truncated: its header announces \[200, 4\] values"):
        scan("memory://far")
    memory.pipe("/far/1.npy", b"no numpy at all")
    with pytest.raises(DataError, match=r"/far/1.npy is damaged or not a numpy file"):
        scan("memory://far")


def test_a_file_of_unknown_size_that_ends_early_is_named_when_it_is_read(memory):
    """As of a web server that does not say how long a file is."""
    memory.pipe("/far/1.npy", memory.cat("/far/1.npy")[:1000])
    files = replace(find_files("memory://far/0.npy"), paths=["/far/1.npy"], sizes=[0])
    data = blocks.ArrayBlocks(files)
    with pytest.raises(DataError, match=r"/far/1.npy is truncated: its header announces 200 rows"):
        data.read(data.blocks[0])


def test_missing_values_are_refused_with_file_and_row_or_kept(tmp_path):
    x = X[:300].copy()
    x[250, 2] = np.nan
    for i, part in enumerate(np.split(x, 3)):
        np.save(tmp_path / f"{i}.npy", part)
    with pytest.raises(DataError, match=r"2.npy: a value is missing at row 50, column 2"):
        scan(tmp_path).load()
    assert np.array_equal(scan(tmp_path, allow_missing=True).load().values, x, equal_nan=True)
    x[250, 2] = np.inf
    np.save(tmp_path / "2.npy", x[200:])
    with pytest.raises(DataError, match=r"2.npy: the value at row 50, column 2 .* is inf"):
        scan(tmp_path, allow_missing=True).load()


def test_missing_whole_numbers_are_nan_where_they_are_allowed(tmp_path):
    pd.DataFrame({"a": pd.array([1, None, 3], "Int64"), "b": [True, False, True]}).to_parquet(
        tmp_path / "x.parquet"
    )
    with pytest.raises(DataError, match="1 values of column 'a' are missing"):
        scan(tmp_path)
    found = scan(tmp_path, allow_missing=True).load().values
    assert np.array_equal(found, [[1, 1], [np.nan, 0], [3, 1]], equal_nan=True)


def test_without_pyarrow_one_sentence_says_what_to_install(folder, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        DataError, match=r"reading parquet needs pyarrow: type pip install 'pyrolvm\[files\]'"
    ):
        scan(folder)


def test_text_is_refused_with_the_columns_that_are_numbers(tmp_path):
    pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"column 'b' holds .*string, not numbers: .*--columns a"):
        scan(tmp_path)
    assert scan(tmp_path, columns=["a"]).num_rows == 2


def test_a_place_behind_a_cache_of_files_is_not_this_machines_disk(tmp_path):
    assert Place.of(f"filecache::memory://{tmp_path}/codes.parquet").fs is not None
    assert Place.of(f"file://{tmp_path}/codes.parquet").fs is None
