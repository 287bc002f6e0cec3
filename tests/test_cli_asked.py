"""What is asked of a run at the shell beside the usual: refined codes, pictures of the latent space, refusals."""

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import pyrolvm
from pyrolvm.cli import app
from pyrolvm.data import load_dataset

RUNNER = CliRunner()
X = load_dataset("iris").values[:40]


def shell(*words):
    return RUNNER.invoke(app, [str(w) for w in words])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A VAE of forty irises, without labels, and a VAE of digits, each hardly fitted."""
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "x.npy", X)
    fitting = ("--latent-dim", 2, "--steps", 5, "--hidden", 8, "--engine", "eager", "-q", "--out")
    for data, words, out in (
        (folder / "x.npy", ["--likelihood", "gaussian"], "iris"),
        ("digits", ["--binarise"], "digits"),
    ):
        done = shell("fit", "vae", data, *words, *fitting, folder / out)
        assert done.exit_code == 0, done.output
    return folder


def test_refined_codes_come_with_what_each_row_gained(runs):
    done = shell("encode", runs / "iris", runs / "x.npy", "--refine", "--out", runs / "codes.csv")
    assert done.exit_code == 0, done.output
    table = pd.read_csv(runs / "codes.csv")
    refined = pyrolvm.load(runs / "iris").refine(X, progress=False)
    assert np.allclose(
        table[["elbo_start", "elbo", "gap"]], refined.table[["elbo_start", "elbo", "gap"]], atol=1e-3
    )
    assert np.allclose(table[["z_0", "z_1"]], refined.encode(X).numpy(), atol=1e-4)
    assert table["gap"].mean() > 0
    assert " ".join(refined.sentence.split()[:5]) in " ".join(done.output.split())


def test_an_npy_of_codes_has_the_means_alone(runs):
    done = shell("encode", runs / "iris", runs / "x.npy", "--out", runs / "codes.npy")
    assert done.exit_code == 0, done.output
    codes = pyrolvm.load(runs / "iris").encode(X)
    assert np.allclose(np.load(runs / "codes.npy"), codes.numpy(), atol=1e-6)


def test_pictures_of_a_latent_space_are_one_picture(runs):
    done = shell("grid", runs / "digits", "digits", "--num", 4, "--out", runs / "plane.png")
    assert done.exit_code == 0, done.output
    height, width, _ = matplotlib.image.imread(runs / "plane.png").shape
    assert abs(height - width) < 0.1 * height  # four by four squares


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("posterior RUNS/iris RUNS/x.npy --out RUNS/draws.npy", "there are several arrays"),
        ("encode RUNS/iris RUNS/x.npy --out RUNS/folder.csv", "folder.csv is a folder: name a file"),
        ("encode RUNS/iris RUNS/x.npy --out RUNS/none/codes.csv", "there is no folder"),
        ("shift RUNS/iris RUNS/x.npy --label odd", "has no labels: name their column"),
        ("traverse RUNS/iris RUNS/x.npy --rows 40", "write numbers from 0 to 39"),
        ("grid RUNS/iris RUNS/x.npy --image-shape 2,2", "--image-shape is of pictures"),
        ("sample RUNS/iris --image-shape 3,3 --out RUNS/rows.png", "does not suit rows of 4 values"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(runs, words, error):
    (runs / "folder.csv").mkdir(exist_ok=True)
    refused = shell(*words.replace("RUNS", str(runs)).split())
    assert refused.exit_code == 2
    assert error in " ".join(refused.output.split())
    assert refused.output.count("\n") == 1
