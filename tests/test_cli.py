"""The shell does what it says: every command on real data, in this process."""

import hashlib
import json
import shlex

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import pyrolvm
from pyrolvm.cli import app
from pyrolvm.data import load_dataset
from pyrolvm.runs import Recipe

RUNNER = CliRunner()

OWN = """
import pyro, pyro.distributions as dist, torch
from pyrolvm import LatentVariableModel, data_plate

class Line(LatentVariableModel):
    def __init__(self, data_dim, slope=1.0):
        super().__init__()
        self.loadings = torch.nn.Parameter(torch.full((data_dim,), slope))
        self.coefficients = torch.nn.Parameter(torch.zeros(data_dim))

    def model(self, x=None):
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * self.loadings, 1.0).to_event(1), obs=x)

    def guide(self, x=None):
        with self.data_plate(x):
            pyro.sample("z", dist.Normal(x @ self.coefficients, 1.0))

ready = Line(2)

def mean(x):
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with data_plate(x):
        pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=x)
"""


def pyrolvm_(*words):
    """Run the command; the result has its exit code, standard output and standard error."""
    return RUNNER.invoke(app, [str(w) for w in words])


def done(*words):
    result = pyrolvm_(*words)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def iris(tmp_path_factory):
    """A run of PPCA on standardised iris."""
    run = tmp_path_factory.mktemp("runs") / "iris"
    done("fit", "ppca", "iris", "-l", 2, "-n", 400, "--lr", 0.05, "--standardise", "-o", run, "-q")
    return run


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run of a VAE on binarised digits."""
    run = tmp_path_factory.mktemp("runs") / "digits"
    words = shlex.split(
        "fit vae digits -l 2 --binarise --hidden 32 -b 256 -n 60 --lr 0.01 --validation 0.1 --engine eager"
    )
    done(*words, "-o", run)
    return run


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file of the user's own pairs, in the present folder."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_equals_the_same_call_from_python(tmp_path):
    done(
        "fit",
        "ppca",
        "iris",
        "-l",
        2,
        "-n",
        30,
        "--lr",
        0.05,
        "-b",
        32,
        "--engine",
        "eager",
        "-o",
        tmp_path / "run",
    )
    from pyrolvm.inference.program.noise import seeded
    from pyrolvm.seeds import Purpose, derived_seed

    with seeded(derived_seed(0, Purpose.START), torch.device("cpu")):
        model = pyrolvm.PPCA(4, 2)
    options = {"num_steps": 30, "learning_rate": 0.05, "batch_size": 32, "engine": "eager", "progress": False}
    fitted = pyrolvm.fit(model, load_dataset("iris"), **options)
    shell = pyrolvm.load(tmp_path / "run")
    for name, tensor in fitted.program.tensors().items():
        assert torch.equal(tensor, shell.program.tensors()[name]), name


def test_the_folder_is_plain_and_the_command_in_it_repeats_the_run(iris, tmp_path):
    names = {p.name for p in iris.iterdir()}
    assert {"config.json", "parameters.safetensors", "history.csv", "checkpoint", "elbo.png"} <= names
    record = json.loads((iris / "config.json").read_text())["run"]
    assert record["data"]["rows"] == 150
    assert [t["kind"] for t in record["data"]["transforms"]] == ["standardise"]
    words = shlex.split(record["command"])
    assert words[0] == "pyrolvm"
    words[words.index(str(iris))] = str(tmp_path / "again")
    done(*words[1:])
    first, again = (load_file(p / "parameters.safetensors") for p in (iris, tmp_path / "again"))
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_what_is_printed_is_computed(digits, iris, tmp_path):
    out = done("fit", "ppca", "iris", "-l", 1, "-n", 20, "--validation", "0.2", "-o", tmp_path / "run")
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert f"{history['elbo'].tail(100).mean():.4f}" in out
    assert f"{history['validation_elbo'].dropna().iloc[-1]:.4f}" in out
    assert "120 rows and 30 held out" in out
    assert "all 20 steps done" in out


def test_quiet_says_nothing(tmp_path):
    result = pyrolvm_("fit", "ppca", "iris", "-l", 1, "-n", 5, "-q", "-o", tmp_path / "run")
    assert result.output == ""


def test_samples_come_in_the_units_of_the_data(iris, tmp_path):
    done("sample", iris, "-s", 2000, "-o", tmp_path / "new.csv")
    new, x = pd.read_csv(tmp_path / "new.csv"), load_dataset("iris")
    assert list(new.columns) == x.columns
    # PPCA's mean and its variances along the axes are those of the data, up to 2000 draws and 400 steps
    assert np.allclose(new.mean(), x.values.mean(0), atol=0.15)
    assert np.allclose(new.std(), x.values.std(0), rtol=0.3)


def test_samples_are_printed_as_csv_without_a_file(iris):
    assert len(done("sample", iris, "-s", 3).strip().splitlines()) == 4


@pytest.mark.parametrize("suffix", ["npy", "npz", "tsv"])
def test_samples_in_each_kind_of_file_are_the_same(iris, tmp_path, suffix):
    out = tmp_path / f"new.{suffix}"
    done("sample", iris, "-s", 5, "-o", out)
    done("sample", iris, "-s", 5, "-o", tmp_path / "new.csv")
    if suffix == "npz":
        with np.load(out) as file:
            values = file["values"]
    else:
        values = np.load(out) if suffix == "npy" else pd.read_csv(out, sep="\t").to_numpy()
    assert np.allclose(values, pd.read_csv(tmp_path / "new.csv"), rtol=1e-5)


def test_pictures(digits, tmp_path):
    done("sample", digits, "--mean", "-o", tmp_path / "new.png")
    done("reconstruct", digits, "digits", "--image-shape", "4,16", "-o", tmp_path / "again.png")
    for name in ("new.png", "again.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_binarised_data_come_back_on_their_own_scale(digits, tmp_path):
    done("reconstruct", digits, "digits", "-o", tmp_path / "x.npy")
    values = np.load(tmp_path / "x.npy")
    assert values.shape == (1797, 64)
    assert values.min() >= 0
    assert values.max() <= 1


def test_encode_writes_the_guides_means_beside_the_labels(iris, tmp_path):
    done("encode", iris, "iris", "-o", tmp_path / "codes.csv")
    codes = pd.read_csv(tmp_path / "codes.csv")
    x, _ = load_dataset("iris").standardise()
    expected = pyrolvm.load(iris).encode(x).numpy()
    assert list(codes.columns) == ["row", "label", "z_0", "z_1", "z_sd_0", "z_sd_1"]
    assert list(codes["row"]) == list(range(150))
    draws = pyrolvm.load(iris).posterior(x, 4000)["z"]
    assert np.allclose(codes[["z_sd_0", "z_sd_1"]], draws.std(0), rtol=0.06)  # five standard errors of an sd
    assert np.allclose(codes[["z_0", "z_1"]], expected, atol=1e-5)
    assert (codes["label"] == x.labels).all()


def test_encode_of_a_mixture_gives_probabilities(tmp_path):
    done("fit", "gmm", "faithful", "-k", 2, "-n", 20, "-o", tmp_path / "run", "-q")
    done("encode", tmp_path / "run", "faithful", "-o", tmp_path / "codes.npy")
    codes = np.load(tmp_path / "codes.npy")
    assert codes.shape == (272, 2)
    assert np.allclose(codes.sum(1), 1, atol=1e-5)


def test_a_mixture_starts_from_the_data_unless_told_not_to(tmp_path):
    common = ["fit", "gmm", "faithful", "-k", 2, "-n", 1, "-q"]
    done(*common, "-o", tmp_path / "kmeans")
    done(*common, "--no-initialise", "-o", tmp_path / "random")
    kmeans, random = (pd.read_csv(tmp_path / n / "history.csv")["elbo"][0] for n in ("kmeans", "random"))
    assert kmeans > -4.5
    assert random < kmeans - 10


def test_evidence_agrees_with_the_closed_form_and_is_noted(iris, tmp_path):
    done("evidence", iris, "iris", "--method", "exact", "-o", tmp_path / "exact.csv")
    out = done("evidence", iris, "iris", "-s", 500, "-o", tmp_path / "importance.csv")
    exact, importance = (pd.read_csv(tmp_path / f"{n}.csv")["log_evidence"] for n in ("exact", "importance"))
    assert np.allclose(exact, importance, atol=0.2)
    assert f"{importance.mean():.4f}" in out
    x, transform = load_dataset("iris").standardise()
    assert np.allclose(
        exact, pyrolvm.load(iris).model.log_marginal(torch.tensor(x.values).float()).detach(), atol=1e-4
    )
    assert f"{exact.mean() - np.log(transform.scale).sum():.4f}" in done(
        "evidence", iris, "iris", "--method", "exact"
    )
    kept = json.loads((iris / "evidence.json").read_text())
    assert [e["method"] for e in kept] == ["importance", "exact"]


def test_compare_puts_the_best_first(tmp_path):
    for steps in (5, 200):
        done("fit", "ppca", "iris", "-l", 2, "-n", steps, "--lr", 0.05, "-o", tmp_path / f"run{steps}", "-q")
    out = done("compare", tmp_path / "run5", tmp_path / "run200")
    assert out.index("run200") < out.index("run5 ")
    assert "sorted by ELBO" in out
    for steps in (5, 200):
        done("evidence", tmp_path / f"run{steps}", "iris", "--method", "exact")
    assert "sorted by evidence; evidence of iris by exact" in done(
        "compare", tmp_path / "run5", tmp_path / "run200"
    )


def test_compare_says_when_bounds_do_not_compare(iris, digits):
    assert "different data" in done("compare", iris, digits)


def test_diagnose_says_how_good_the_guide_is(iris):
    out = done("diagnose", iris, "iris", "-s", 100)
    assert out.startswith("On 150 data")  # the verdict comes first
    assert "z[0, 0]" not in out  # 300 rows of it are in summary.csv
    assert "k-hat" in out
    assert (iris / "inference_data.nc").exists()
    assert len(pd.read_csv(iris / "summary.csv")) == 300
    assert len(pd.read_csv(iris / "k_hat.csv")) == 150


def test_a_quick_diagnosis_is_the_draws_alone(digits):
    out = done("diagnose", digits, "digits", "-s", 2, "--quick")
    assert "k-hat" not in out
    assert not (digits / "k_hat.csv").exists()


def test_the_report_is_one_page(iris):
    done("report", iris, "-s", 25)
    assert "<html" in (iris / "report.html").read_text()


def test_restarts_keep_the_best(tmp_path):
    words = shlex.split("fit gmm galaxies -k 4 -n 60 --lr 0.05 --no-initialise --restarts 3")
    out = done(*words, "-o", tmp_path / "run")
    table = pd.read_csv(tmp_path / "run" / "restarts.csv")
    assert sorted(table["seed"]) == [0, 1, 2]
    assert table["bound"].is_monotonic_decreasing
    assert "restarts, best first" in out
    best = pd.read_csv(tmp_path / "run" / "history.csv")["elbo"].tail(6).mean()
    assert best == pytest.approx(table["bound"][0])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("PPCA", "PPCA"),
        ("ppca", "PPCA"),
        ("GMM", "GaussianMixture"),
        ("gaussian-mixture", "GaussianMixture"),
        ("bfa", "BayesianFactorAnalysis"),
        ("power-vae", "PowerVAE"),
        ("beta_vae", "PowerVAE"),
    ],
)
def test_models_have_short_names(text, name):
    from pyrolvm.runs.named import registry_name

    assert registry_name(text) == name


def test_a_data_set_in_the_place_of_the_model_is_told_its_place():
    from pyrolvm.runs.named import registry_name

    with pytest.raises(
        pyrolvm.SettingError, match=r"no model 'iris': it is a data set, which comes after the model"
    ):
        registry_name("iris")


def test_options_of_the_model(tmp_path):
    words = shlex.split(
        "fit power-vae iris -l 2 --eta 0.5 --likelihood gaussian --hidden 8,4 --set activation=tanh"
    )
    done(*words, "--set", "noise_scale=0.5", "-n", 3, "-o", tmp_path / "run", "-q")
    arguments = json.loads((tmp_path / "run" / "config.json").read_text())["model"]["arguments"]
    assert arguments == {
        "data_dim": 4,
        "latent_dim": 2,
        "likelihood": "gaussian",
        "hidden": [8, 4],
        "eta": 0.5,
        "activation": "tanh",
        "noise_scale": 0.5,
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2), ("0.5", 0.5), ("true", True), ("None", None), ("a", "a"), ("1,8,8", [1, 8, 8]), ("[3]", [3])],
)
def test_values_of_set(text, value):
    from pyrolvm.shell.values import read_setting

    assert read_setting(f"name={text}") == ("name", value)


@pytest.mark.parametrize(
    "words",
    [
        "--objective renyi --particles 5 --alpha 0.5",
        "--objective meanfield",
        "--objective trace --particles 3",
        "--objective iwae --num-particles 5 --gradient dreg --alpha 0.5",
    ],
)
def test_objectives(tmp_path, words):
    done("fit", "ppca", "iris", "-l", 1, "-n", 3, *words.split(), "-o", tmp_path / "run", "-q")


@pytest.mark.parametrize("words", ["--schedule cosine", "--schedule exponential"])
def test_schedules_end_low(tmp_path, words):
    done("fit", "ppca", "iris", "-l", 1, "-n", 50, "--lr", 0.1, *words.split(), "-o", tmp_path / "run", "-q")
    rates = pd.read_csv(tmp_path / "run" / "history.csv")["learning_rate"]
    assert rates[0] == pytest.approx(0.1)
    assert rates.iloc[-1] < 0.002


def test_epochs_are_passes_over_the_training_rows(tmp_path):
    done(
        "fit",
        "ppca",
        "iris",
        "-l",
        1,
        "--epochs",
        2,
        "-b",
        30,
        "--validation",
        0.2,
        "-o",
        tmp_path / "run",
        "-q",
    )
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 2 * 120 / 30


def test_the_held_out_rows_do_not_shape_the_transform(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 2))
    np.save(tmp_path / "x.npy", x)
    words = shlex.split("-l 1 -n 2 --standardise --validation 0.25 --split-seed 3 -q")
    done("fit", "ppca", tmp_path / "x.npy", *words, "-o", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())["run"]["data"]
    from pyrolvm.data.plan import split_rows

    train, _ = split_rows(20, 0.25, 3)
    assert np.allclose(record["transforms"][0]["offset"], x[train.numpy()].mean(0))


def test_columns_of_a_table_are_remembered(tmp_path):
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 3)), columns=["a", "b", "c"])
    table["kind"] = ["x", "y", "z"] * 10
    table.to_csv(tmp_path / "t.csv", index=False)
    done(
        "fit", "ppca", tmp_path / "t.csv", "--columns", "c,a", "-l", 1, "-n", 2, "-o", tmp_path / "run", "-q"
    )
    done("encode", tmp_path / "run", tmp_path / "t.csv", "--labels", "kind", "-o", tmp_path / "codes.csv")
    codes = pd.read_csv(tmp_path / "codes.csv")
    assert list(codes["label"][:3]) == ["x", "y", "z"]
    assert list(pd.read_csv(tmp_path / "codes.csv").columns) == ["row", "label", "z_0", "z_sd_0"]
    assert done("sample", tmp_path / "run", "-s", 1).splitlines()[0] == "c,a"


def test_columns_in_another_order_are_found_by_name_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 2)), columns=["height", "weight"])
    frame.to_csv("x.csv", index=False)
    frame[["weight", "height"]].to_csv("turned.csv", index=False)
    done("fit", "ppca", "x.csv", "-l", 1, "-n", 2, "-q", "-o", "run")
    assert done("encode", "run", "turned.csv") == done("encode", "run", "x.csv")
    result = pyrolvm_("encode", "run", "turned.csv", "--columns", "weight,height")
    assert result.exit_code == 2
    assert result.stderr.strip() == (
        "error: columns=weight,height are the run's columns in another order than its height,weight: "
        "leave columns out, they are taken by name"
    )
    done("encode", "run", "x.csv", "--columns", "height,weight")


def test_a_file_is_read_again_as_it_was(tmp_path, monkeypatch):
    """Names that are numbers are names again, without being told so, in `encode` and in the report."""
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).normal(size=(20, 2))
    pd.DataFrame(values, columns=["1990", "2000"]).to_csv("years.csv", index=False)
    done("fit", "ppca", "years.csv", "--header", "-l", 1, "-n", 2, "-q", "-o", "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())["run"]["data"]
    assert (record["header"], record["columns"]) == (True, ["1990", "2000"])
    assert len(done("encode", "run", "years.csv").splitlines()) == 21
    assert Recipe(record).read_again().train.values.shape == (20, 2)


def test_a_large_file_is_mapped_and_gives_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32))
    fit = ("fit", "bfa", "x.npy", "-l", 1, "-n", 3, "-b", 8, "-q", "--engine", "eager", "-o")
    done(*fit, "small")
    monkeypatch.setattr("pyrolvm.runs.source.MAPPED_BYTES", 1)
    from pyrolvm.runs import Source
    from pyrolvm.runs.recipe import fingerprint

    dataset = Source("x.npy").read()
    assert isinstance(dataset.values, np.memmap)
    assert fingerprint(dataset) == hashlib.sha256(np.load("x.npy").tobytes()).hexdigest()
    done(*fit, "mapped")
    small, mapped = (load_file(tmp_path / n / "parameters.safetensors") for n in ("small", "mapped"))
    assert all(torch.equal(small[k], mapped[k]) for k in small)
    monkeypatch.setattr("pyrolvm.inference.training.setup.START_ROWS", 10)
    done(*fit, "started")  # from ten of the fifty rows


def test_images_are_flattened_and_drawn_in_their_shape(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (20, 3, 5)).astype(np.uint8))
    words = ["-l", 1, "-n", 2, "--standardise-overall", "-o", tmp_path / "run", "-q"]
    done("fit", "ppca", tmp_path / "x.npy", *words)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["arguments"]["data_dim"] == 15
    done("sample", tmp_path / "run", "-o", tmp_path / "new.png")
    done("encode", tmp_path / "run", tmp_path / "x.npy", "-o", tmp_path / "codes.npy")
    assert np.load(tmp_path / "codes.npy").shape == (20, 1)


def test_a_pair_of_ones_own(own):
    """A class is built with data_dim and options; the run folder never executes it by itself."""
    done("fit", "own.py:Line", "faithful", "--standardise", "--set", "slope=0.5", "-n", 5, "-o", "run", "-q")
    for command in ("sample", "report"):
        refused = pyrolvm_(command, "run")
        assert refused.exit_code == 2
        assert "--model own.py:Line" in refused.stderr
    out = done("sample", "run", "--model", "own.py:Line", "-s", 2)
    assert out.splitlines()[0] == "eruptions,waiting"
    assert json.loads((own / "run" / "config.json").read_text())["model"]["arguments"] == {
        "data_dim": 2,
        "slope": 0.5,
    }


def test_instances_and_functions_of_ones_own(own):
    done("fit", "own.py:ready", "faithful", "-n", 3, "-o", "a", "-q")
    done("encode", "a", "faithful", "--model", "own.py:ready")
    done("fit", "own.py:mean", "faithful", "--guide", "AutoNormal", "-n", 3, "-o", "b", "-q")
    assert len(done("sample", "b", "--model", "own.py:mean", "-s", 4).splitlines()) == 5
    done("fit", "own.py", "faithful", "-n", 3, "-o", "c", "-q")  # its only class


def test_lists(tmp_path):
    models, sets = done("models"), done("datasets")
    for name in pyrolvm.models.REGISTRY:
        assert name in models
    assert 'covariance="full"' in models
    assert "faithful" in sets
    assert "Azzalini" in sets


def test_version_and_help():
    assert done("--version").strip() == f"pyrolvm {pyrolvm.__version__}"
    assert "--help" in done("--help")
    for command in ("fit", "sample", "encode", "reconstruct", "evidence", "diagnose", "report", "compare"):
        assert f"pyrolvm {command} " in done(command, "--help")


def test_a_run_that_still_rises_says_so(tmp_path):
    short = done("fit", "ppca", "iris", "-l", 1, "-n", 200, "--engine", "eager", "-o", tmp_path / "a")
    assert "not yet: over the last third of 200 steps" in short
    long = done("fit", "gmm", "faithful", "-k", 1, "-n", 200, "--engine", "eager", "-o", tmp_path / "b")
    assert "not yet" not in long


def test_a_run_without_steps_ends_by_itself_and_says_so(tmp_path):
    out = done("fit", "gmm", "faithful", "-k", 1, "--engine", "eager", "-o", tmp_path / "run")
    assert "stopped" in out
    assert "\nconverged: " in out
    assert pyrolvm.load(tmp_path / "run").convergence.converged is True
    word = shlex.split("fit ppca iris -l 1 --schedule cosine -o")
    assert "give num_steps or num_epochs" in pyrolvm_(*word, tmp_path / "other").stderr


def test_an_existing_run_is_replaced_only_on_demand(tmp_path):
    words = ["fit", "ppca", "iris", "-l", 1, "-n", 3, "-q", "-o", tmp_path / "run"]
    done(*words)
    done("evidence", tmp_path / "run", "iris", "--method", "exact")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert pyrolvm_(*words).exit_code == 2
    done(*words, "--overwrite", "--seed", 1)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert "notes.txt" in names
    assert "evidence.json" not in names  # it was of the run that is gone


def test_a_full_disk_leaves_the_run_that_was_to_be_replaced(tmp_path, monkeypatch):
    words = ["fit", "ppca", "iris", "-l", 1, "-n", 3, "-q", "--engine", "eager", "-o", tmp_path / "run"]
    done(*words)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("pyrolvm.files.os.fsync", full)
    result = pyrolvm_(*words, "--overwrite", "--seed", 1)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith("run.json: No space left on device")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_results_of_a_run_that_is_being_replaced_are_said_to_be_so(tmp_path):
    words = ["fit", "ppca", "iris", "-l", 1, "-q", "--engine", "eager", "-o", tmp_path / "run"]
    done(*words, "-n", 3)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrolvm.shell.fitting._save", stopped)
        assert pyrolvm_(*words, "-n", 4, "--overwrite").exit_code == 130
    sampled = pyrolvm_("sample", tmp_path / "run", "-s", 1)
    assert sampled.exit_code == 0
    assert "warning: these are results of the earlier run" in sampled.stderr
    done(*words, "-n", 4, "--resume")
    assert pyrolvm_("sample", tmp_path / "run", "-s", 1).stderr == ""


def test_a_finished_run_can_be_gone_on_with(tmp_path):
    words = ["fit", "ppca", "iris", "-l", 1, "--engine", "eager", "-q"]
    done(*words, "-n", 10, "-o", tmp_path / "parts")
    done(*words, "-n", 25, "-o", tmp_path / "parts", "--resume")
    done(*words, "-n", 25, "-o", tmp_path / "whole")
    parts, whole = (load_file(tmp_path / n / "parameters.safetensors") for n in ("parts", "whole"))
    assert all(torch.equal(parts[k], whole[k]) for k in whole)
    assert len(pd.read_csv(tmp_path / "parts" / "history.csv")) == 25


def test_a_run_that_went_back_to_its_start_is_written(own):
    """Its first chunk diverges, so that there is no history to draw."""
    np.save(own / "x.npy", np.full((9, 2), 1e15))
    fit = ("fit", "own.py:Line", "x.npy", "--optimizer", "sgd", "--lr", 1e9, "-n", 5, "--engine", "eager")
    out = done(*fit, "--on-nan", "rollback", "-o", "run")
    assert "went back to step 0" in out
    assert done("compare", "run").startswith("run ")


def test_diverging_runs_fail_with_one_line_and_keep_the_state(tmp_path):
    words = [
        "fit",
        "ppca",
        "iris",
        "-l",
        2,
        "-n",
        200,
        "--lr",
        1e6,
        "--optimizer",
        "sgd",
        "-o",
        tmp_path / "run",
    ]
    result = pyrolvm_(*words)
    assert result.exit_code == 1
    assert "clip_norm" in result.stderr
    assert (tmp_path / "run" / "checkpoint" / "state.safetensors").exists()
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_objective_by_name_is_the_one_that_fit_takes(tmp_path):
    """An ELBO that the program would have by itself leaves `fit` its optimiser: on fixed draws, here."""
    (tmp_path / "mine.py").write_text(OWN)
    np.save(tmp_path / "x.npy", load_dataset("iris").values[:, :2])
    words = f"fit {tmp_path}/mine.py:mean {tmp_path}/x.npy --guide AutoNormal -q".split()
    engines = []
    for name, more in (("plain", []), ("named", ["--objective", "trace"])):
        done(*words, *more, "-o", tmp_path / name)
        engines.append(json.loads((tmp_path / name / "config.json").read_text())["engine"])
    assert engines[0] == engines[1]


def test_the_advice_of_messages_can_be_typed(tmp_path):
    """`dtype=torch.float64`, `batch_size=None`, `per_column=False`, the class of an objective."""
    words = "fit ppca iris -l 1 -n 3 --dtype torch.float64 --batch-size None --standardise --no-per-column -q"
    done(*words.split(), "--objective", "TraceMeanField_ELBO", "-o", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["dtype"], config["settings"]["batch_size"]) == ("float64", None)
    assert config["settings"]["objective"] == "TraceMeanField_ELBO"
    assert np.ndim(config["run"]["data"]["transforms"][0]["scale"]) == 0
    (tmp_path / "x.csv").write_text("a,b\n1,2\n3,\n5,6\n")
    result = pyrolvm_("fit", "ppca", tmp_path / "x.csv", "-l", 1, "--allow-missing", "-o", tmp_path / "nan")
    assert result.exit_code == 2
    assert "nan" in result.stderr  # the model refuses, not the command line


def test_an_option_of_the_constructor_is_an_option_of_the_shell(own):
    done("fit", "own.py:Line", "faithful", "--slope", "0.5", "-n", 3, "-q", "-o", "a")
    done("fit", "own.py:Line", "faithful", "--slope=0.5", "-n", 3, "-q", "-o", "b")
    for name in "ab":
        arguments = json.loads((own / name / "config.json").read_text())["model"]["arguments"]
        assert arguments == {"data_dim": 2, "slope": 0.5}
    assert "--slope 0.5" in json.loads((own / "a" / "config.json").read_text())["run"]["command"]
    done("fit", "ppca", "iris", "-l", 1, "--guide", "full", "-n", 3, "-q", "-o", "c")
    assert json.loads((own / "c" / "config.json").read_text())["model"]["arguments"]["guide"] == "full"


def test_a_fit_ends_with_the_next_command(tmp_path):
    out = done("fit", "ppca", "iris", "-l", 1, "-n", 60, "--lr", 0.05, "-o", tmp_path / "run")
    [line] = [line for line in out.splitlines() if line.startswith("next")]
    command = line.removeprefix("next").split()
    assert command[:2] == ["pyrolvm", "report"]
    assert "report.html" in done(*command[1:], "-s", 25)


def test_a_full_disk_and_a_stop_leave_nothing_and_say_so(tmp_path, monkeypatch):
    """No checkpoint could be written: the run is not there to be resumed, and no message says that it is."""
    from pyrolvm.runs import RunFolder

    def full(path, *_, **__):
        raise OSError(28, "No space left on device", str(path))

    begin = RunFolder.__call__

    def stop_later(self, report):
        begin(self, report)
        if report.step >= 40:
            raise KeyboardInterrupt

    monkeypatch.setattr("pyrolvm.inference.training.checkpoint.write_tensors", full)
    monkeypatch.setattr(RunFolder, "__call__", stop_later)
    words = ["fit", "ppca", "iris", "-l", 1, "-n", 5000, "--engine", "eager", "-q", "-o", tmp_path / "run"]
    result = pyrolvm_(*words)
    assert result.exit_code == 130
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("stopped at step ")
    assert last.endswith("no checkpoint could be written, so nothing was kept: repeat the command")
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_before_its_first_checkpoint_is_not_said_to_be_resumable(tmp_path):
    from pyrolvm.runs import RunFolder

    RunFolder(tmp_path / "run", {}, "pyrolvm fit ppca iris --out run").begin()
    result = pyrolvm_("encode", tmp_path / "run", "iris")
    assert result.exit_code == 2
    assert "ended before its first checkpoint" in result.stderr
    assert "--out run --overwrite" in result.stderr


def test_a_polite_kill_ends_in_a_line_wherever_it_comes(tmp_path, monkeypatch):
    """Also before training begins: while a step is traced or compiled."""
    import os
    import signal

    monkeypatch.setattr("pyrolvm.shell.fitting.fit", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    result = pyrolvm_("fit", "ppca", "iris", "-l", 1, "-o", tmp_path / "run")
    assert (result.exit_code, result.stderr.strip()) == (130, "stopped")
    assert list(tmp_path.iterdir()) == []


def test_samples_of_two_columns_are_drawn_as_points(tmp_path):
    done("fit", "ppca", "faithful", "-l", 1, "-n", 3, "-q", "--engine", "eager", "-o", tmp_path / "run")
    done("sample", tmp_path / "run", "-s", 50, "-o", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_script_and_shell_give_the_same_mixture(tmp_path):
    """The same start from the data, the same rows held out, the same numbers, however the script built its model."""
    words = shlex.split("fit gmm faithful -k 2 -n 30 --lr 0.02 --validation 0.1 --engine eager --seed 3 -q")
    done(*words, "-o", tmp_path / "run")
    torch.manual_seed(99)
    options = {"num_steps": 30, "learning_rate": 0.02, "validation": 0.1, "engine": "eager", "seed": 3}
    fitted = pyrolvm.fit(pyrolvm.GaussianMixture(2, 2), load_dataset("faithful"), progress=False, **options)
    shell = pyrolvm.load(tmp_path / "run")
    assert shell.held_out_elbo == pytest.approx(fitted.held_out_elbo, abs=1e-6)
    assert torch.allclose(shell.model.means, fitted.model.means)
