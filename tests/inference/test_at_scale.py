"""Answers of many rows, written as they come: the same numbers as of all at once, whatever was killed or shared out."""

import numpy as np
import pandas as pd
import pytest
import torch

import pyrolvm
from pyrolvm import DataError, SettingError
from pyrolvm.data import Dataset, scan
from pyrolvm.data.far import writing
from pyrolvm.inference.posterior import at_scale
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
    assert np.allclose(found["z_sd_1"], at_scale.deviations(fitted, X)["z"][:, 1])
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
    mean, sd = fitted.encode(X).numpy(), at_scale.deviations(fitted, X)["z"].numpy()
    assert np.abs((found[["z_mean_0", "z_mean_1"]] - mean) / sd * 2000**0.5).to_numpy().max() < 5
    assert np.allclose((found["z_q95_0"] - found["z_q5_0"]) / sd[:, 0], 2 * 1.645, rtol=0.2)
    assert abs(((found["z_q95_0"] - found["z_q5_0"]) / sd[:, 0]).mean() - 2 * 1.645) < 0.02
    three = torch.tensor([[1.0], [2.0], [5.0]])
    assert np.allclose(at_scale._quantiles(three)[:, 0], np.quantile([1.0, 2.0, 5.0], at_scale.QUANTILES))


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
    again = ask(fitted, data, killed, "posterior", num_samples=20)
    assert written == list(range(8))
    pd.testing.assert_frame_equal(pd.read_parquet(killed), pd.read_parquet(whole), check_exact=True)
    assert again.num_rows == 500


def test_a_part_that_was_half_written_is_written_again(fitted, data, tmp_path, monkeypatch):
    """A kill between the values of a part and its note."""
    out = tmp_path / "e.npy"
    note = writing.write_json
    monkeypatch.setattr(
        writing, "write_json", lambda path, value: 1 / 0 if path.name == "000003.json" else note(path, value)
    )
    with pytest.raises(ZeroDivisionError):
        ask(fitted, data, out, "log_evidence", method="exact")
    array = np.load(out, mmap_mode="r+")
    array[200:] = 7.0
    array.flush()
    monkeypatch.setattr(writing, "write_json", note)
    ask(fitted, data, out, "log_evidence", method="exact")
    assert np.allclose(np.load(out), fitted.log_evidence(X, "exact"))


def test_processes_write_parts_of_their_own_and_the_same_numbers(fitted, data, tmp_path, monkeypatch):
    ask(fitted, data, tmp_path / "one.parquet", "diagnose", num_samples=50)
    monkeypatch.setattr(Processes, "barrier", lambda self: None)
    read_by, own = [], data.blocks.read
    for rank in range(3):
        monkeypatch.setattr(at_scale, "here", lambda rank=rank: Processes(rank, 3))
        found = []
        monkeypatch.setattr(data.blocks, "read", lambda b, found=found: found.append(b) or own(b))
        ask(fitted, data, tmp_path / "three.parquet", "diagnose", num_samples=50)
        read_by.append(found[1:] if rank == 0 else found)
    one, three = (pd.read_parquet(tmp_path / f"{n}.parquet") for n in ("one", "three"))
    pd.testing.assert_frame_equal(one, three, check_exact=True)
    assert sum(map(len, read_by)) <= len(data.blocks.blocks) + 3  # only blocks at edges are read by two
    assert all(len(set(found)) == len(found) for found in read_by)


def test_data_in_memory_are_written_too(fitted, tmp_path):
    ask(fitted, Dataset(X), tmp_path / "z.npy")
    assert np.allclose(np.load(tmp_path / "z.npy"), fitted.encode(X), atol=1e-6)


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
