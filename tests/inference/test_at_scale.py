"""Answers of many rows, written as they come: the same numbers as of all at once, whatever was killed or shared out."""

import io
import tempfile

import fsspec
import numpy as np
import pandas as pd
import pytest
import torch

import pyrolvm
from pyrolvm import DataError, SettingError
from pyrolvm.data import Dataset, scan
from pyrolvm.data.far import places, writing
from pyrolvm.inference.posterior import at_scale, questions
from pyrolvm.inference.posterior.evidence import evidence_table
from pyrolvm.processes import Processes

X = np.random.default_rng(0).standard_normal((500, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    options = {"num_steps": 50, "learning_rate": 0.05, "progress": False}
    return pyrolvm.fit(pyrolvm.PPCA(4, 2), X, **options)


@pytest.fixture
def data(tmp_path):
    for i in range(5):
        frame = pd.DataFrame(X[100 * i : 100 * (i + 1)], columns=list("abcd")).assign(kind=i)
        frame.to_parquet(tmp_path / f"{i}.parquet", row_group_size=30)
    return scan(str(tmp_path / "*.parquet"), columns=list("abcd"), labels="kind")


def ask(fitted, data, out, question="encode", **options):
    return pyrolvm.write_answers(fitted, data, out, question, part_rows=64, progress=False, **options)


def test_codes_in_parts_are_the_codes_of_all(fitted, data, tmp_path):
    answers = ask(fitted, data, tmp_path / "z.parquet")
    found = pd.read_parquet(tmp_path / "z.parquet")
    assert list(found) == ["row", "label", "z_0", "z_1", "z_sd_0", "z_sd_1"]
    assert np.array_equal(found["row"], np.arange(500))
    assert np.array_equal(found["label"], np.repeat(range(5), 100))
    assert np.allclose(found[["z_0", "z_1"]], fitted.encode(X), atol=1e-6)
    assert np.allclose(found["z_sd_1"], questions.deviations(fitted, X)["z"][:, 1])
    assert answers.num_rows == 500
    assert sorted(p.name for p in tmp_path.glob("z.parquet*")) == ["z.parquet"]


def test_exact_evidence_and_its_table_are_those_of_all(fitted, data, tmp_path):
    answers = ask(fitted, data, tmp_path / "e.npy", "log_evidence", method="exact")
    exact = fitted.log_evidence(X, "exact").double().numpy()
    assert np.allclose(np.load(tmp_path / "e.npy"), exact)
    line = answers.table.loc["log_evidence"]
    wanted = [exact.mean(), exact.std(ddof=1), exact.min(), exact.max(), 0]
    assert np.allclose(line[["mean", "sd", "min", "max", "missing"]].astype(float), wanted, rtol=1e-12)
    assert answers.num_untrusted is None


def test_posterior_summaries_are_those_of_the_gaussian_guide(fitted, data, tmp_path):
    """q(z | x) is Gaussian: its quantiles at 5 and 95% lie 1.645 deviations apart from the mean."""
    ask(fitted, data, tmp_path / "p.parquet", "posterior", num_samples=2000)
    found = pd.read_parquet(tmp_path / "p.parquet")
    mean, sd = fitted.encode(X).numpy(), questions.deviations(fitted, X)["z"].numpy()
    assert np.abs((found[["z_mean_0", "z_mean_1"]] - mean) / sd * 2000**0.5).to_numpy().max() < 5
    assert np.allclose((found["z_q95_0"] - found["z_q5_0"]) / sd[:, 0], 2 * 1.645, rtol=0.2)
    assert abs(((found["z_q95_0"] - found["z_q5_0"]) / sd[:, 0]).mean() - 2 * 1.645) < 0.02
    three = torch.tensor([[1.0], [2.0], [5.0]])
    assert np.allclose(questions._quantiles(three)[:, 0], np.quantile([1.0, 2.0, 5.0], questions.QUANTILES))


def test_diagnoses_are_k_hats_of_every_row(fitted, data, tmp_path):
    answers = ask(fitted, data, tmp_path / "d.parquet", "diagnose", num_samples=200)
    found = pd.read_parquet(tmp_path / "d.parquet")
    table = evidence_table(fitted.pair(X), num_samples=200, progress=False)
    exact = fitted.log_evidence(X, "exact").numpy()
    assert answers.num_untrusted == (found["k_hat"] > at_scale.khat_threshold(200)).sum()
    assert abs(found["k_hat"].mean() - table["k_hat"].mean()) < 0.05
    assert abs((found["log_evidence"] - exact).mean()) < 0.01


def test_what_is_killed_goes_on_to_the_same_bits(fitted, data, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole.parquet", tmp_path / "killed.parquet"
    ask(fitted, data, whole, "posterior", num_samples=20)
    own, written = writing.AnswerFile.write, []

    def write(self, part, *args):
        if part == 4:
            raise KeyboardInterrupt
        written.append(part)
        own(self, part, *args)

    monkeypatch.setattr(writing.AnswerFile, "write", write)
    with pytest.raises(KeyboardInterrupt):
        ask(fitted, data, killed, "posterior", num_samples=20)
    monkeypatch.setattr(
        writing.AnswerFile, "write", lambda self, part, *a: written.append(part) or own(self, part, *a)
    )
    (tmp_path / "killed.parquet.progress/values/.part-000004.parquet.x").write_bytes(b"half")
    again = ask(fitted, data, killed, "posterior", num_samples=20)
    assert written == list(range(8))
    assert [p.name for p in sorted(killed.iterdir())] == [f"part-{i:06d}.parquet" for i in range(8)]
    pd.testing.assert_frame_equal(pd.read_parquet(killed), pd.read_parquet(whole), check_exact=True)
    assert again.num_rows == 500


def interrupted(monkeypatch, name, number, then):
    """Have the `number`th call of a method of `Place` end in an error, after or before its work."""
    own, calls = getattr(places.Place, name), []

    def once(self, *args, **options):
        calls.append(self.text)
        if len(calls) == number:
            if then:
                own(self, *args, **options)
            raise ZeroDivisionError
        return own(self, *args, **options)

    monkeypatch.setattr(places.Place, name, once)


@pytest.fixture
def elsewhere():
    yield "memory://answers"
    fs = fsspec.filesystem("memory")
    if fs.exists("/answers"):
        fs.rm("/answers", recursive=True)


def read_back(out):
    """Row numbers, if the file has them, and values of an answer, wherever it is."""
    fs = fsspec.filesystem("memory" if "://" in str(out) else "file")
    path = str(out).removeprefix("memory:/")
    if path.endswith(".npy"):
        return None, np.load(io.BytesIO(fs.cat_file(path)))
    if path.endswith(".zarr"):
        zarr = pytest.importorskip("zarr")
        with tempfile.TemporaryDirectory() as folder:
            fs.get(path, f"{folder}/x.zarr", recursive=True)
            group = zarr.open_group(f"{folder}/x.zarr", mode="r")
            return group["row"][:], group["log_evidence"][:]
    files = [p for p in sorted(fs.find(path)) if p.endswith(".parquet")]
    frame = pd.concat([pd.read_parquet(io.BytesIO(fs.cat_file(p))) for p in files])
    return frame["row"].to_numpy(), frame["log_evidence"].to_numpy()


WAYS = [("put", 6, True), ("put", 8, False), ("become", 1, True), ("write", 1, True), ("remove", 3, False)]
"""Interrupted between values and note, before a note, behind the file, and before the folder of progress is removed."""


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize(
    ("kind", "name", "number", "then"),
    [
        (kind, *way)
        for kind in ("parquet", "npy", "zarr")
        for way in WAYS
        if way[0] != ("become" if kind == "npy" else "write")
    ],
)
def test_whatever_is_interrupted_is_not_there_or_whole_and_goes_on(
    fitted, data, tmp_path, elsewhere, monkeypatch, kind, here, name, number, then
):
    if kind == "zarr":
        pytest.importorskip("zarr")
    out = tmp_path / f"e.{kind}" if here else f"{elsewhere}/e.{kind}"
    place, exact = places.Place.of(out), fitted.log_evidence(X, "exact").numpy()
    with monkeypatch.context() as patch:
        interrupted(patch, name, number, then)  # the first two calls of `remove` are those of the beginning
        with pytest.raises(ZeroDivisionError):
            ask(fitted, data, out, "log_evidence", method="exact")
    assert place.exists() == (name in ("become", "write", "remove"))
    assert place.beside(".progress").exists()
    if kind == "parquet" and here and not place.exists():
        for source in (tmp_path, str(tmp_path / "**/*.parquet")):  # nor are its parts data
            assert scan(source, columns=list("abcd")).num_rows == 500
    if place.exists():
        assert np.allclose(read_back(out)[1], exact)
    else:
        with pytest.raises(SettingError, match="begun with another question"):
            ask(fitted, data, out)
    again = ask(fitted, data, out, "log_evidence", method="exact")
    rows, values = read_back(out)
    assert np.allclose(values, exact)
    assert rows is None or np.array_equal(rows, np.arange(500))
    assert again.num_rows == 500
    assert str(again.path) == str(out)
    assert not place.beside(".progress").exists()
    with pytest.raises(SettingError, match=f"e.{kind} is there already"):
        ask(fitted, data, out, "log_evidence", method="exact")
    assert ask(fitted, data, out, "log_evidence", method="exact", overwrite=True).table.loc[
        "log_evidence", "mean"
    ] == pytest.approx(exact.mean())


def test_what_three_processes_began_another_number_of_them_ends_with_the_same_bits(
    fitted, data, tmp_path, monkeypatch
):
    ask(fitted, data, tmp_path / "one.parquet", "diagnose", num_samples=50)
    read_by, own, written = [], data.blocks.read, []
    write = writing.AnswerFile.write
    monkeypatch.setattr(
        writing.AnswerFile, "write", lambda self, part, *a: written.append(part) or write(self, part, *a)
    )
    with monkeypatch.context() as patch:
        patch.setattr(Processes, "gather", lambda self, value: [value])
        patch.setattr(Processes, "broadcast", lambda self, value: value or [])
        patch.setattr(writing.AnswerFile, "finish", lambda self: [])  # the fourth process is lost
        for rank in range(3):
            patch.setattr(at_scale, "here", lambda rank=rank: Processes(rank, 4))
            found = []
            patch.setattr(data.blocks, "read", lambda b, found=found: found.append(b) or own(b))
            ask(fitted, data, tmp_path / "three.parquet", "diagnose", num_samples=50)
            read_by.append(found[1:] if rank == 0 else found)
    assert written == [0, 1, 2, 3, 4, 5]
    ask(fitted, data, tmp_path / "three.parquet", "diagnose", num_samples=50)
    assert written == list(range(8))
    one, three = (pd.read_parquet(tmp_path / f"{n}.parquet") for n in ("one", "three"))
    pd.testing.assert_frame_equal(one, three, check_exact=True)
    assert sum(map(len, read_by)) <= len(data.blocks.blocks) + 3  # only blocks at edges are read by two
    assert all(len(set(found)) == len(found) for found in read_by)


def test_data_in_memory_are_written_too(fitted, tmp_path):
    assert ask(fitted, Dataset(X), f"{tmp_path}/z.npy/").path == tmp_path / "z.npy"
    assert np.allclose(np.load(tmp_path / "z.npy"), fitted.encode(X), atol=1e-6)


def test_rows_in_memory_keep_their_labels_and_parts_have_noise_of_their_own(fitted, tmp_path):
    """Two parts of the same rows: their labels differ, and so do their draws."""
    twice = Dataset(np.concatenate([X[:64]] * 2), labels=np.arange(128))
    ask(fitted, twice, tmp_path / "p.parquet", "posterior", num_samples=5)
    found = pd.read_parquet(tmp_path / "p.parquet")
    assert np.array_equal(found["label"], np.arange(128))
    first, second = (found.iloc[i : i + 64].reset_index(drop=True) for i in (0, 64))
    assert (first["z_mean_0"] != second["z_mean_0"]).all()


def test_a_deviation_of_draws_is_unbiased_and_a_mode_has_its_share():
    draws = torch.tensor([[1.0], [2.0], [6.0]])
    found = dict(questions._summary("z", draws, False))
    assert float(found["z_mean"]) == 3.0
    assert float(found["z_sd"]) == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert [float(found[f"z_q{q}"]) for q in (5, 50, 95)] == pytest.approx([1.1, 2.0, 5.6])
    draws = torch.tensor([[0, 2], [1, 2], [1, 0], [1, 2]])
    found = dict(questions._summary("k", draws, True))
    assert found["k_mode"].tolist() == [1, 2]
    assert found["k_share"].tolist() == [0.75, 0.75]


def test_what_is_missing_is_counted_and_left_out_of_the_table():
    values = np.array([1.0, np.nan, 3.0, np.inf, 8.0, 4.0], np.float32)
    notes = [
        at_scale._note({"a": part, "row": np.arange(len(part))}, None) for part in np.split(values, [1, 2, 4])
    ]
    table = at_scale._answers("x", 6, notes).table
    assert list(table.index) == ["a"]
    there = np.array([1, 3, 8, 4])
    assert table.loc["a"].tolist() == pytest.approx([there.mean(), there.std(ddof=1), 1, 8, 2])


def test_another_process_that_asks_something_else_is_refused(fitted, data, tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, value | {"seed": 1}])
    with pytest.raises(SettingError, match=r"process 1 asks with another seed \(1, not 0\)"):
        ask(fitted, data, tmp_path / "z.npy")
    assert not list(tmp_path.glob("z*"))


def test_discrete_latents_have_probabilities(tmp_path):
    torch.manual_seed(0)
    mixture = pyrolvm.GaussianMixture(4, 3)
    fitted = pyrolvm.fit(mixture, X, num_steps=20, progress=False, batch_size=100, learning_rate=0.01)
    ask(fitted, X, tmp_path / "z.parquet")
    found = pd.read_parquet(tmp_path / "z.parquet").drop(columns="row")
    assert found.shape == (500, 3)
    assert np.allclose(found.to_numpy().sum(1), 1, atol=1e-5)


def test_zarr_is_written_where_it_is_installed(fitted, data, tmp_path):
    zarr = pytest.importorskip("zarr")
    ask(fitted, data, tmp_path / "z.zarr")
    group = zarr.open_group(str(tmp_path / "z.zarr"), mode="r")
    assert np.allclose(group["z"][:], fitted.encode(X), atol=1e-6)
    assert np.array_equal(group["row"][:], np.arange(500))


@pytest.mark.parametrize(
    ("out", "question", "options", "words"),
    [
        ("z.csv", "encode", {}, "written as they come, to one of .parquet, .npy, .zarr"),
        ("no/z.npy", "encode", {}, "there is no folder"),
        ("z.npy", "decode", {}, "question='decode' is not known: choose from encode, log_evidence"),
        ("z.npy", "log_evidence", {"method": "guess"}, "method='guess' is not known"),
        ("z.npy", "encode", {"part_rows": 0}, "part_rows must be"),
    ],
)
def test_what_cannot_be_written_is_refused_before_it_is_asked(
    fitted, data, tmp_path, out, question, options, words
):
    options = {"part_rows": 10, "progress": False} | options
    with pytest.raises(SettingError, match=words):
        pyrolvm.write_answers(fitted, data, tmp_path / out, question, **options)


def test_without_zarr_one_sentence_says_what_to_install(fitted, data, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zarr", None)
    with pytest.raises(DataError, match=r"^writing zarr needs zarr: type pip install zarr$"):
        ask(fitted, data, tmp_path / "z.zarr")


def test_another_question_does_not_go_on_in_the_same_file(fitted, data, tmp_path, monkeypatch):
    out = tmp_path / "z.parquet"
    with monkeypatch.context() as context:
        context.setattr(writing.AnswerFile, "write", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(fitted, data, out)
    for changed, words in (
        ({"question": "posterior"}, "begun with another question"),
        ({"seed": 1}, "begun with another seed"),
        ({"data": data.standardise()[0]}, "begun with another data"),
    ):
        with pytest.raises(SettingError, match=words):
            ask(fitted, **{"data": data, "out": out} | changed)
    ask(fitted, data, out)
    with pytest.raises(SettingError, match="is there already: give another file, or overwrite it"):
        ask(fitted, data, out)
    assert ask(fitted, data, out, overwrite=True).num_rows == 500


def test_elsewhere_the_file_that_makes_a_folder_whole_is_copied_last(monkeypatch):
    part, whole = places.Place.of("memory://copied/part"), places.Place.of("memory://copied/whole")
    for name in ("zarr.json", "a/0", "z/0"):
        part.within(name).put(b"1")
    copied = []
    monkeypatch.setattr(part.fs, "cp_file", lambda path, target: copied.append(target))
    part.become(whole, last="zarr.json")
    assert [path.removeprefix(whole.path) for path in copied] == ["/a/0", "/z/0", "/zarr.json"]
