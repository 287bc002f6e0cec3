"""Files of any shape, type and layout at the shell: done, or one clear line; no traceback, nothing half written."""

import gzip
import shutil
import struct
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from typer.testing import CliRunner

from pyrolvm.cli import app

RUNNER = CliRunner()
# the examples are small as they are, and to make a failing one smaller would take minutes
EXAMPLES = settings(max_examples=40, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
TYPES = ["?", "u1", "i2", ">i4", "<i8", "u8", "f2", "<f4", ">f4", "f8", ">f8", "c8", "M8[s]", "U3", "S2"]
IDX = {"u1": 0x08, "i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}
FITS = ["fit ppca {} -l 1", "fit gmm {} -k 2", "fit bfa {} -l 1", "fit vae {} -l 1 --binarise --hidden 4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on three columns."""
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(12, 3)))
    result = shell(f"fit ppca {folder}/x.npy -l 1 -n 1 -q --engine eager -o {folder}/run")
    assert result.exit_code == 0, result.output
    return folder / "run"


def shell(words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the door prints them
        return RUNNER.invoke(app, words.split())


def held_to_the_promise(words, out):
    """Exit code 0 and everything written, or 2 with one line and nothing at all."""
    result = shell(f"{words} -o {out}")
    assert result.exit_code in (0, 1, 2), (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    said = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    if result.exit_code == 0:
        assert said == []
        assert out.exists()
    else:
        assert len(said) == 1, result.stderr
        assert said[0].startswith("error: ")
    if result.exit_code == 2:
        assert not out.exists()
    return result.exit_code


def try_file(write, name, run, fit):
    """Write a file, fit to it, and encode it with a run of other data."""
    folder = Path(tempfile.mkdtemp())
    try:
        write(folder / name)
        code = held_to_the_promise(f"{fit.format(folder / name)} -n 1 -q --engine eager", folder / "out")
        if code == 0:
            assert (folder / "out" / "config.json").exists()
        held_to_the_promise(f"encode {run} {folder / name}", folder / "codes.csv")
        assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    finally:
        shutil.rmtree(folder)


def arrays(types=TYPES, dims=4):
    """Arrays of few entries, also empty ones and single numbers, in either order of memory."""
    shapes = hnp.array_shapes(min_dims=0, max_dims=dims, min_side=0, max_side=7)
    made = st.sampled_from(types).flatmap(lambda t: hnp.arrays(np.dtype(t), shapes))
    return st.tuples(made, st.booleans()).map(lambda pair: np.asfortranarray(pair[0]) if pair[1] else pair[0])


@EXAMPLES
@given(array=arrays(), fit=st.sampled_from(FITS))
def test_npy(run, array, fit):
    try_file(lambda path: np.save(path, array), "x.npy", run, fit)


@EXAMPLES
@given(
    parts=st.dictionaries(st.sampled_from(["a", "b"]), arrays(dims=2), max_size=2), fit=st.sampled_from(FITS)
)
def test_npz(run, parts, fit):
    try_file(lambda path: np.savez(path, **parts), "x.npz", run, fit)


@EXAMPLES
@given(
    value=st.sampled_from([[1, "a"], [None, 2.0], [[1], [2, 3]], [{}, {}]]),
    suffix=st.sampled_from(["npy", "npz"]),
)
def test_python_objects(run, value, suffix):
    array = np.empty(len(value), dtype=object)
    array[:] = value
    save = np.save if suffix == "npy" else np.savez
    folder = Path(tempfile.mkdtemp())
    save(folder / f"x.{suffix}", array, **({"allow_pickle": True} if suffix == "npy" else {}))
    result = shell(f"fit ppca {folder}/x.{suffix} -l 1 -n 1 -o {folder}/out")
    assert result.exit_code == 2
    assert "never loaded" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    shutil.rmtree(folder)


@EXAMPLES
@given(array=arrays(list(IDX), 3), fit=st.sampled_from(FITS), cut=st.integers(0, 6), packed=st.booleans())
def test_idx(run, array, fit, cut, packed):
    """Also of the wrong length, by up to six bytes."""
    header = struct.pack(">BBBB", 0, 0, IDX[array.dtype.str.lstrip("|<=")], array.ndim)
    raw = header + b"".join(struct.pack(">I", n) for n in array.shape) + array.tobytes("C")
    raw = raw[: len(raw) - cut]
    name = "x.idx.gz" if packed else "x.idx"
    try_file(lambda path: path.write_bytes(gzip.compress(raw) if packed else raw), name, run, fit)


CELLS = st.one_of(
    st.floats(width=32).map(str),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(
        ["", "nan", "NA", "inf", "True", "a", "1e400", " 1", "1,5", '"1"', "0x1f", "1_000", "\u00bd"]
    ),
)
NUMBERS = st.one_of(st.integers(-99, 99).map(str), st.floats(-1e6, 1e6).map(str))


@st.composite
def tables(draw):
    """Text of rows and columns, mostly numbers, now and then of another kind or of unequal length."""
    columns, rows = draw(st.integers(1, 4)), draw(st.integers(0, 8))
    cells = draw(st.sampled_from([NUMBERS, NUMBERS, CELLS]))
    names = draw(st.lists(st.sampled_from(["a", "b", "c", "d", "", "1", "2", "a b"]), max_size=4))
    lines = [names] if names and draw(st.booleans()) else []
    lines += [draw(st.lists(cells, min_size=columns, max_size=columns)) for _ in range(rows)]
    if draw(st.integers(0, 4)) == 0 and lines:
        lines[-1] = lines[-1] + ["3"]
    separator, ending = (
        draw(st.sampled_from([",", ",", ";", "\t", " "])),
        draw(st.sampled_from(["\n", "\r\n", ""])),
    )
    return (
        draw(st.sampled_from(["", "", "\ufeff"])) + (ending or "\n").join(map(separator.join, lines)) + ending
    )


@settings(EXAMPLES, max_examples=60)
@given(
    text=tables(),
    coding=st.sampled_from(["utf-8", "utf-8", "latin-1", "utf-16"]),
    name=st.sampled_from(["x.csv", "x.tsv", "x.csv.gz"]),
    options=st.sampled_from(
        ["", "", " --header", " --no-header", " --standardise", " --columns a", " --labels a"]
    ),
)
def test_csv(run, text, coding, name, options):
    raw = text.encode(coding, errors="replace")
    raw = gzip.compress(raw) if name.endswith("gz") else raw
    try_file(lambda path: path.write_bytes(raw), name, run, FITS[0] + options)


@EXAMPLES
@given(array=arrays(["?", "i4", "f4", "f8", "U3"], 2), integers=st.booleans())
def test_parquet(run, array, integers):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame(np.atleast_2d(array))
    frame.columns = [f"c{i}" for i in range(frame.shape[1])]
    if integers and frame.shape[1]:
        frame = frame.assign(c0=pd.array([None, *range(len(frame))][: len(frame)], dtype="Int64"))
    try_file(lambda path: frame.to_parquet(path, row_group_size=3), "x.parquet", run, FITS[0])
