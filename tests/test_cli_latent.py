"""Labels and latent spaces at the shell."""

import pandas as pd
import pytest
from typer.testing import CliRunner

from pyrolvm.cli import app

RUNNER = CliRunner()
FITTING = ("--latent-dim", "2", "--steps", "20", "--hidden", "8", "--engine", "eager", "-q")


def shell(*words):
    return RUNNER.invoke(app, [str(w) for w in words])


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    table = pd.DataFrame(
        {"a": range(30), "b": [i % 7 for i in range(30)], "kind": ["old", "new", "odd"] * 10}
    )
    table.to_csv(folder / "data.csv", index=False)
    words = ("fit", "conditionalvae", folder / "data.csv", "--labels", "kind", "--likelihood", "gaussian")
    done = shell(*words, "--standardise", *FITTING, "--out", folder / "run")
    assert done.exit_code == 0, done.output
    return folder


def test_labels_reach_the_model_by_their_names(run):
    out = run / "new.csv"
    done = shell("sample", run / "run", "--labels", "odd,new", "--num-samples", 5, "--out", out)
    assert done.exit_code == 0, done.output
    assert list(pd.read_csv(out).columns) == ["a", "b"]
    assert len(pd.read_csv(out)) == 5
    for words, error in (
        (("--labels", "odd,none"), "'none' is none of those of the fit: new, odd, old"),
        ((), "the model takes labels"),
    ):
        refused = shell("sample", run / "run", *words)
        assert refused.exit_code == 2
        assert error in " ".join(refused.output.split())


def test_data_without_labels_are_refused(run):
    refused = shell("encode", run / "run", run / "data.csv", "--columns", "a,b")
    assert refused.exit_code == 2
    assert "has no labels" in " ".join(refused.output.split())
    done = shell("encode", run / "run", run / "data.csv", "--labels", "kind", "--out", run / "codes.csv")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("verb", "words", "lines"),
    [
        ("interpolate", ("--rows", "0,4,8", "--num", 5, "--kind", "spherical"), 10),
        ("traverse", ("--rows", "2", "--dims", "1", "--num", 4), 4),
        ("grid", ("--num", 3), 9),
        ("analogy", ("--rows", "0,1,2"), 4),
        ("shift", ("--label", "odd", "--rows", "0,1", "--amounts", "0,1"), 4),
        ("recondition", ("--conditions", "old,new,odd", "--rows", "0,5"), 6),
    ],
)
def test_every_way_through_the_latent_space(run, verb, words, lines):
    out = run / f"{verb}.csv"
    done = shell(verb, run / "run", run / "data.csv", "--labels", "kind", *words, "--out", out)
    assert done.exit_code == 0, done.output
    found = pd.read_csv(out)
    assert list(found.columns) == ["line", "place", "a", "b"]
    assert len(found) == lines


def test_rows_that_are_not_there_are_refused(run):
    refused = shell("analogy", run / "run", run / "data.csv", "--labels", "kind", "--rows", "0,1,99")
    assert refused.exit_code == 2
    assert "write numbers from 0 to 29" in " ".join(refused.output.split())
