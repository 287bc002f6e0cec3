"""The shell on data in many files: fits, questions and reports as of one file in memory."""

import json
import sys

import fsspec
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import pyrolvm
from pyrolvm.cli import app
from pyrolvm.runs import Preparation, Recipe, Source, source

X = (np.random.default_rng(0).standard_normal((600, 4)) * [1, 3, 1, 2] + 5).astype(np.float32)
COMMON = ["--latent-dim", "2", "--num-steps", "30", "--lr", "0.01", "--engine", "eager", "-q"]


def shell(*words, code=0):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(source, "MAPPED_BYTES", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("far")
    for i in range(3):
        frame = pd.DataFrame(X[200 * i : 200 * (i + 1)], columns=list("abcd"))
        frame.to_parquet(path / f"{i}.parquet", row_group_size=50)
    return path


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "MAPPED_BYTES", 1)
        files = sorted(folder.glob("*.parquet"))
        shell("fit", "ppca", *files, *COMMON, "-b", 50, "--standardise", "--validation", 0.1, "--out", out)
    return out


def test_a_fit_to_many_files_is_of_their_rows_but_those_held_out(run, folder):
    config = json.loads((run / "config.json").read_text())
    record = config["run"]["data"]
    assert (record["rows"], record["split"]["held_out"], record["streamed"]) == (600, 60, True)
    assert all(str(p) in config["run"]["command"] for p in folder.glob("*.parquet"))
    train = pyrolvm.data.Dataset(X).split(0.1)[0].values.astype(float)
    assert np.allclose(record["transforms"][0]["offset"], train.mean(0), rtol=1e-10)
    history = pd.read_csv(run / "history.csv")
    assert history["validation_elbo"].notna().any()


def test_its_data_are_read_again_and_others_are_known_to_be_others(run, folder, tmp_path):
    record = json.loads((run / "config.json").read_text())["run"]["data"]
    again = Recipe(record).read_again()
    assert (again.train.num_rows, again.held_out.num_rows) == (540, 60)
    assert np.abs(again.train.load().values.mean(0)).max() < 1e-5
    assert again.in_memory(100).train.values.shape == (100, 4)
    with pytest.raises(pyrolvm.DataError, match="are not those that the run was fitted to"):
        Recipe(record | {"source": str(folder / "[01].parquet")}).read_again()


@pytest.mark.parametrize("command", ["encode", "posterior", "evidence"])
def test_answers_about_many_files_are_those_about_one(run, folder, tmp_path, command, monkeypatch):
    shell(command, run, folder, "--out", tmp_path / "many.parquet")
    monkeypatch.setattr(source, "MAPPED_BYTES", 2**28)
    shell(command, run, str(folder / "*.parquet"), "--out", tmp_path / "one.csv")
    many, one = pd.read_parquet(tmp_path / "many.parquet"), pd.read_csv(tmp_path / "one.csv")
    shared = [c for c in one if c in many and c != "acceptance"]
    assert len(shared) >= 5
    if command == "encode":
        assert np.allclose(many[shared], one[shared], rtol=1e-5, atol=1e-6)
    else:  # other draws
        assert np.allclose(many[shared].mean(), one[shared].mean(), rtol=0.05, atol=0.1)


def test_a_run_of_named_columns_is_asked_about_arrays_of_as_many(run, folder, tmp_path):
    np.save(tmp_path / "0.npy", X[:400])
    np.save(tmp_path / "1.npy", X[400:])
    shell("encode", run, str(tmp_path / "[01].npy"), "--out", tmp_path / "z.npy")
    shell("encode", run, folder, "--out", tmp_path / "again.npy")
    assert np.array_equal(np.load(tmp_path / "z.npy"), np.load(tmp_path / "again.npy"))


def test_evidence_of_many_rows_is_noted_in_the_run(run, folder, tmp_path):
    result = shell("evidence", run, folder, "--method", "exact", "--out", tmp_path / "e.npy")
    values = np.load(tmp_path / "e.npy")
    noted = json.loads((run / "evidence.json").read_text())[-1]
    assert values.shape == (600,)
    assert noted["rows"] == 600
    assert noted["mean"] == pytest.approx(values.mean())
    assert noted["standard_error"] == pytest.approx(values.std(ddof=1) / 600**0.5)
    assert "600 rows" in result.output


def test_a_diagnosis_is_of_a_sample_and_k_hats_of_every_row(run, folder, tmp_path):
    result = shell("diagnose", run, folder, "--num-samples", 50, "--out", tmp_path / "k.parquet")
    assert len(pd.read_parquet(tmp_path / "k.parquet")) == 600
    assert "of the 600 rows, 600 evenly spaced ones are looked at" in " ".join(result.output.split())


def test_a_report_is_written(run):
    shell("report", run)
    assert "0.parquet" in (run / "report.html").read_text()


def test_files_elsewhere(run, folder, tmp_path):
    fs = fsspec.filesystem("memory")
    for path in folder.glob("*.parquet"):
        fs.pipe(f"/cli/{path.name}", path.read_bytes())
    shell("encode", run, "memory://cli/*.parquet", "--out", tmp_path / "z.npy")
    assert np.load(tmp_path / "z.npy").shape == (600, 2)
    shell("encode", run, folder, "--out", "memory://cli/z.npy")
    assert np.array_equal(np.load(fs.open("/cli/z.npy")), np.load(tmp_path / "z.npy"))
    shell("diagnose", run, folder, "--num-samples", 50, "--out", "memory://cli/k.parquet")
    assert fs.ls("/cli/k.parquet", detail=False) == ["/cli/k.parquet/part-000000.parquet"]
    fs.rm("/cli", recursive=True)


def test_a_large_file_is_standardised_without_a_copy(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", X)
    source = Source(str(tmp_path / "x.npy"))
    whole = Preparation(standardise=True, validation=0.1).apply(source)
    streamed = Preparation(standardise=True, validation=0.1).apply(source, streamed=True)
    assert isinstance(streamed.train, pyrolvm.data.StreamedDataset)
    assert np.allclose(streamed.train.load().values, whole.train.values, atol=1e-6)
    assert np.allclose(streamed.held_out.load().values, whole.held_out.values, atol=1e-6)
    assert not isinstance(Preparation().apply(source, streamed=True).train, pyrolvm.data.StreamedDataset)


@pytest.mark.parametrize(
    "prepared",
    [
        {"standardise": True},
        {"standardise": True, "per_column": False, "validation": 0.25, "split_seed": 7},
        {"binarise": True},
        {"binarise": True, "threshold": 5.0, "validation": 0.1},
        {"validation": 0.3},
    ],
)
@pytest.mark.parametrize("chosen", [{}, {"columns": ["c", "a"]}, {"labels": "d", "columns": ["b", "d"]}])
def test_what_is_prepared_as_it_is_read_is_what_is_prepared_in_memory(folder, monkeypatch, prepared, chosen):
    found = []
    for most in (1, 2**40):
        monkeypatch.setattr(source, "MAPPED_BYTES", most)
        found.append(Preparation(**prepared).apply(Source(str(folder), **chosen), streamed=True))
    streamed, whole = found
    assert isinstance(streamed.train, pyrolvm.data.StreamedDataset)
    assert isinstance(whole.train, pyrolvm.data.Dataset)
    for own, other in zip(streamed.transforms, whole.transforms, strict=True):
        assert np.allclose(own.scale, other.scale, rtol=1e-12)
        assert np.allclose(own.offset, other.offset, rtol=1e-12)
    for own, other in ((streamed.train, whole.train), (streamed.held_out, whole.held_out)):
        if other is not None:
            assert np.allclose(own.load().values, other.values, rtol=1e-6, atol=1e-6)
            assert own.columns == other.columns
            assert chosen.get("labels") is None or np.array_equal(own.load().labels, other.labels)
    differ = {k for k in whole.record if streamed.record[k] != whole.record[k]}
    assert differ <= {"sha256", "transforms"}


def test_labels_are_numbered_as_they_are_read(tmp_path):
    words = np.array(["u", "w", "v"] * 200)
    pd.DataFrame(X, columns=list("abcd")).assign(kind=words).to_parquet(
        tmp_path / "x.parquet", row_group_size=70
    )
    found = Preparation(validation=0.1).apply(Source(str(tmp_path), labels="kind"), takes_labels=True)
    assert found.record["classes"] == ["u", "v", "w"]
    rows = pyrolvm.data.Dataset(X, labels=np.array([0, 2, 1] * 200)).split(0.1)
    assert np.array_equal(found.train.load().labels, rows[0].labels)
    assert np.array_equal(found.held_out.load().labels, rows[1].labels)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["encode", "RUN", "FOLDER"], "give --out FILE.parquet, FILE.npy or FILE.zarr"),
        (["encode", "RUN", "FOLDER", "--out", "z.csv"], "written as they come, to one of .parquet"),
        (["encode", "RUN", "FOLDER", "--out", "memory://z.csv"], "to URLs answers are written as .parquet"),
        (["encode", "RUN", "FOLDER", "--out", "s3://b/z.npy"], "s3://b/z.npy needs the package s3fs"),
        (["most-probable", "RUN", "FOLDER", "--out", "s3://b/z.npy"], "name a file here"),
        (["encode", "RUN", "PACKED", "--out", "z.npy"], ".npy.gz files cannot be read in parts"),
        (["encode", "RUN", "FOLDER", "--refine", "--out", "z.npy"], "--refine is for rows in memory"),
        (["encode", "RUN", "memory://none/*.parquet", "--out", "z.npy"], "no file matches memory://none"),
        (["encode", "RUN", "s3://none/x.parquet", "--out", "z.npy"], "type pip install s3fs"),
        (["fit", "ppca", "FOLDER", "-l", "2", "--out", "new"], "give batch_size"),
        (["fit", "ppca", "FOLDER", "-l", "2", "--header", "--out", "new"], "header= is for single files"),
    ],
)
def test_what_cannot_be_is_one_line(run, folder, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    (tmp_path / "x.npy.gz").write_bytes(b"packed")
    known = {"RUN": run, "FOLDER": folder, "PACKED": str(tmp_path / "*.gz")}
    result = shell(*(known.get(w, w) for w in words), code=2)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert said in lines[0]
