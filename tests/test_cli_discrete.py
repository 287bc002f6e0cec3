"""Discrete latents from the shell: the most probable values, the prior of codes, estimators by name."""

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import pyrolvm
from pyrolvm.cli import app
from pyrolvm.data import load_dataset

CHAIN = """
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from pyrolvm import LatentVariableModel

MOVE = torch.tensor([[0.9, 0.1], [0.2, 0.8]])


class Chain(LatentVariableModel):
    def __init__(self):
        super().__init__()
        self.means = torch.nn.Parameter(torch.tensor([-1.0, 1.0]))

    def model(self, x):
        with self.data_plate(x):
            k = None
            for t in pyro.markov(range(x.shape[1])):
                probs = torch.ones(2) / 2 if k is None else MOVE[k]
                k = pyro.sample(f"k_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Normal(self.means[k], 1.0), obs=x[:, t])

    def guide(self, x):
        pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pyrolvm_(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def done(*words):
    result = pyrolvm_(*words)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words):
    result = pyrolvm_(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_the_most_probable_component_of_each_row():
    done(
        "fit", "gmm", "faithful", "--num-components", 2, "--standardise", "--num-steps", 30, "-o", "run", "-q"
    )
    done("most-probable", "run", "faithful", "--out", "clusters.csv")
    table = pd.read_csv("clusters.csv")
    assert list(table.columns) == ["row", "z"]
    fitted = pyrolvm.load("run")
    x, *_ = load_dataset("faithful").standardise(True)
    assert np.array_equal(table["z"], fitted.encode(x).argmax(-1))


def test_the_path_of_a_chain_of_ones_own():
    with open("chain.py", "w") as file:
        file.write(CHAIN)
    x = np.random.default_rng(0).normal(size=(12, 4)).cumsum(1).astype("float32")
    pd.DataFrame(x, columns=list("abcd")).to_csv("x.csv", index=False)
    done("fit", "chain.py:Chain", "x.csv", "--num-steps", 20, "--out", "run", "-q")
    done("most-probable", "run", "x.csv", "--model", "chain.py:Chain", "--out", "paths.csv")
    table = pd.read_csv("paths.csv")
    assert list(table.columns) == ["row", "k_0", "k_1", "k_2", "k_3"]
    assert set(np.unique(table.iloc[:, 1:])) == {0, 1}


def test_a_model_that_sums_nothing_out_says_so():
    done("fit", "ppca", "iris", "--latent-dim", 1, "--num-steps", 3, "--out", "run", "-q")
    assert "sums out no latents" in refused("most-probable", "run", "iris")


@pytest.mark.parametrize("objective", ["nvil", "relax"])
def test_estimators_with_networks_by_name(objective):
    words = ["--binarise", "--latent-dim", 3, "--objective", objective, "--num-steps", 3, "--engine", "eager"]
    done("fit", "BernoulliVAE", "digits", *words, "--out", "run", "-q")
    loaded = pyrolvm.load("run")
    assert any(name.startswith("objective.") for name in loaded.program.tensors())
    done("encode", "run", "digits", "--out", "codes.csv")


@pytest.mark.parametrize("model", ["vqvae", "probabilisticvqvae"])
def test_codes_first_and_then_their_prior(model):
    sizes = ["--num-codes", 2, "--codebook-size", 4, "--code-dim", 2, "--hidden", 8]
    fitting = ["--num-steps", 5, "--batch-size", 300, "--engine", "eager", "-q"]
    done(
        "fit", model, "digits", "--binarise", "--likelihood", "bernoulli", *sizes, *fitting, "--out", "codes"
    )
    words = ["fit", model, "digits", "--codes-of", "codes", "--prior", "pixelcnn:2,channels=8", *fitting]
    done(*words, "--out", "prior")
    first, second = pyrolvm.load("codes"), pyrolvm.load("prior")
    assert second.model.hold
    for name, value in first.model.state_dict().items():
        assert name.startswith("code_prior") or torch.equal(second.model.state_dict()[name], value), name
    done("sample", "prior", "--num-samples", 4, "--out", "new.csv")
    assert pd.read_csv("new.csv").shape == (4, 64)
    done(*words, "--out", "prior", "--overwrite", "--validation", 0.1)
    assert "leave it out" in refused(*words, "--hidden", 9, "--out", "other")
    assert "leave binarise out" in refused(*words, "--binarise", "--out", "other")
    assert "e.g. prior=pixelcnn" in refused("fit", model, "digits", "--codes-of", "codes", "--out", "other")


def test_codes_of_another_model_are_refused():
    done("fit", "ppca", "iris", "--latent-dim", 1, "--num-steps", 3, "--out", "run", "-q")
    found = refused("fit", "vqvae", "iris", "--codes-of", "run", "--prior", "pixelcnn", "--out", "other")
    assert "is a run of PPCA" in found
