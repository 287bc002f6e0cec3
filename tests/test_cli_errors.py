"""Every bad input at the shell: one line on standard error, exit code 2, nothing written."""

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from pyrolvm.cli import app

RUNNER = CliRunner()


def shell(words):
    """Run the command line; the result has its exit code, standard output and standard error."""
    return RUNNER.invoke(app, shlex.split(words))


PPCA = "fit ppca {} -l 1 -n 2 -o out"

BAD_OWN = {
    "broken.py": "x = 1\ny = undefined\n",
    "syntax.py": "def f(:\n",
    "own.py": "class NoGuide:\n    def model(self, x):\n        pass\n\ndef f(x):\n    pass\n",
    "refuses.py": """
import torch

class Net(torch.nn.Module):
    def __init__(self, data_dim, size):
        super().__init__()
        self.w = torch.zeros(size, -1)

    def model(self, x):
        pass

    def guide(self, x):
        pass
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files of all sorts, a good run and bad ones."""
    place = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    good = pd.DataFrame(rng.normal(size=(20, 3)), columns=["height", "weight", "age"])
    good.to_csv(place / "good.csv", index=False)
    good.assign(kind="a").to_csv(place / "text.csv", index=False)
    good.assign(height=good["height"].where(good.index != 4)).to_csv(place / "nan.csv", index=False)
    good.assign(age=1.0).to_csv(place / "constant.csv", index=False)
    good.head(1).to_csv(place / "one.csv", index=False)
    (place / "empty.csv").touch()
    (place / "x.doc").write_text("x")
    np.savez(place / "two.npz", a=good.to_numpy(), b=good.to_numpy())
    np.save(place / "wide.npy", rng.normal(size=(5, 7)))
    for name, text in BAD_OWN.items():
        (place / name).write_text(text)
    before = Path.cwd()
    os.chdir(place)
    try:
        make_runs(place)
    finally:
        os.chdir(before)
    return place


def make_runs(place):
    assert shell("fit ppca good.csv -l 1 -n 2 -q -o run").exit_code == 0
    for name in ("future", "damaged", "truncated", "bare"):
        assert shell(f"fit ppca good.csv -l 1 -n 2 -q -o {name}").exit_code == 0
    config = place / "future" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"format": 99}))
    (place / "damaged" / "config.json").write_text("{")
    parameters = place / "truncated" / "parameters.safetensors"
    parameters.write_bytes(parameters.read_bytes()[:50])
    (place / "others").mkdir()
    (place / "others" / "thesis.tex").write_text("mine")
    for name, size in (("typed", "x"), ("endless", 10**9)):
        assert shell(f"fit ppca good.csv -l 1 -n 2 -q -o {name}").exit_code == 0
        config = place / name / "config.json"
        record = json.loads(config.read_text())
        record["model"]["arguments"]["latent_dim"] = size
        config.write_text(json.dumps(record))
    (place / "bare" / "config.json").unlink()
    (place / "bare" / "checkpoint" / "run.json").unlink()


CASES = {
    # MODEL
    "unknown model": ("fit gmx iris -o out", "did you mean GaussianMixture"),
    "no option of this model": ("fit ppca iris -k 3 -o out", "PPCA has no option --num-components: "),
    "near option": ("fit ppca iris --set latent_dimm=3 -o out", "did you mean --latent-dim?"),
    "needed option": ("fit ppca iris -o out", "PPCA needs --latent-dim: e.g. --latent-dim 2"),
    "set without sign": ("fit ppca iris -l 2 --set guide -o out", "write it as name=value"),
    "set of data_dim": ("fit ppca iris -l 2 --set data_dim=3 -o out", "taken from the data"),
    "given twice": ("fit ppca iris -l 2 --set latent_dim=3 -o out", "latent_dim is given twice"),
    "value of a choice": ("fit ppca iris -l 2 --set guide=ful -o out", "guide='ful' is not known"),
    "value of the wrong type": (
        "fit ppca iris --set latent_dim=two -o out",
        "latent_dim must be a positive whole number, not 'two'",
    ),
    "more factors than columns": ("fit bfa iris -l 9 -o out", "latent_dim=9 must lie between 1"),
    "neither eta nor beta": ("fit powervae iris -l 2 -o out", "say exactly one of eta"),
    "guide of a suite's model": ("fit gmm iris -k 2 --guide full -o out", "brings its own guide"),
    "no such file of a model": ("fit none.py:A good.csv -o out", "there is no file none.py"),
    "file that fails": ("fit broken.py:A good.csv -o out", "broken.py failed at line 2: NameError"),
    "file that is no Python": ("fit syntax.py:A good.csv -o out", "syntax.py failed at line 1: SyntaxError"),
    "no such name in the file": ("fit own.py:NoGuid good.csv -o out", "it defines NoGuide, f"),
    "class without guide": ("fit own.py:NoGuide good.csv -o out", "must define model(self, x) and guide"),
    "function without guide": ("fit own.py:f good.csv -o out", "add guide=NAME"),
    "several names to choose from": ("fit own.py good.csv -o out", "it defines NoGuide, f"),
    "class that refuses": (
        "fit refuses.py:Net good.csv --set size=2 -o out",
        "Net cannot be built with data_dim=3, size=2: RuntimeError",
    ),
    # DATA
    "no such data set": ("fit ppca irs -l 2 -o out", "did you mean 'iris'"),
    "no such file": (PPCA.format("god.csv"), "did you mean good.csv"),
    "empty file": (PPCA.format("empty.csv"), "is empty"),
    "unknown suffix": (PPCA.format("x.doc"), "no known kind"),
    "text": (PPCA.format("text.csv"), "column 'kind' holds 'a'"),
    "missing value": (PPCA.format("nan.csv"), "missing at row 4, column 'height'"),
    "no such column": (PPCA.format("good.csv") + " --columns hight", "did you mean"),
    "no such label": (PPCA.format("good.csv") + " --labels kind", "has no column 'kind'"),
    "too few rows": (PPCA.format("one.csv"), "too few rows"),
    "constant column": (PPCA.format("constant.csv") + " --standardise", "'age' is constant"),
    "overall for constants": (PPCA.format("constant.csv") + " --standardise", "per_column=False"),
    "npz without key": (PPCA.format("two.npz"), "key="),
    "no such key": (PPCA.format("two.npz") + " --key c", "has no array 'c'"),
    "outside the support": ("fit vae good.csv -l 1 -o out", "x > "),
    "option of a data set": (PPCA.format("iris") + " --data-option rows=3", "has no option 'rows'"),
    "option of a file": (PPCA.format("good.csv") + " --data-option rows=3", "not for the file"),
    "more components than rows": ("fit gmm good.csv -k 30 -o out", "num_components=20 or fewer"),
    "threshold alone": (PPCA.format("good.csv") + " --threshold 1", "give both"),
    "two transforms": (PPCA.format("good.csv") + " --standardise --binarise", "exclude each other"),
    # training
    "steps and epochs": (PPCA.format("iris") + " --epochs 3", "not both"),
    "no steps": ("fit ppca iris -l 1 -n 0 -o out", "num_steps must be a positive whole number"),
    "unknown device": (PPCA.format("iris") + " --device tpu", "is not known"),
    "absent device": (PPCA.format("iris") + " --device cuda:7", "not on this machine: use device='cpu'"),
    "unknown optimiser": (PPCA.format("iris") + " --optimizer adm", "choose from adam, adamw"),
    "unknown engine": (PPCA.format("iris") + " --engine fast", "engine='fast' is not known"),
    "unknown objective": (PPCA.format("iris") + " --objective elbo", "objective='elbo' is not known"),
    "unknown schedule": (PPCA.format("iris") + " --schedule step", "schedule='step' is not known"),
    "unknown dtype": (PPCA.format("iris") + " --dtype float16", "dtype='float16' is not known"),
    "unknown on-nan": (PPCA.format("iris") + " --on-nan stop", "on_nan='stop' is not known"),
    "particles of nothing": (PPCA.format("iris") + " --particles 3", "num_particles is of an objective"),
    "alpha of nothing": (PPCA.format("iris") + " --alpha 3", "alpha is of objective=renyi"),
    "gradient of renyi": (
        PPCA.format("iris") + " --objective renyi --gradient dreg",
        "gradient is of objective=iwae",
    ),
    "unknown gradient": (PPCA.format("iris") + " --objective iwae --gradient path", "standard, stl, dreg"),
    "alpha one": (PPCA.format("iris") + " --objective renyi --alpha 1", "objective=trace"),
    "one particle of renyi": (PPCA.format("iris") + " --objective renyi --particles 1", "at least 2"),
    "large batch": (PPCA.format("iris") + " -b 1000", "batch_size="),
    "negative rate": (PPCA.format("iris") + " --lr -1", "learning_rate must be positive"),
    "all held out": (PPCA.format("iris") + " --validation 1", "give a share between 0 and 1"),
    "warm-up": (PPCA.format("iris") + " --kl-warmup 2", "between 0 and 1"),
    "threshold that is no number": (
        PPCA.format("good.csv") + " --binarise --threshold nan",
        "threshold=nan must be of type float",
    ),
    "weight that is no number": ("fit powervae good.csv -l 1 --beta inf -o out", "beta=inf must be of type"),
    "time that runs backwards": (
        PPCA.format("iris") + " --checkpoint-every -1",
        "checkpoint_seconds must not be negative",
    ),
    "seed below zero": (PPCA.format("iris") + " --split-seed -1", "split_seed must be a whole number"),
    "column named twice": (PPCA.format("good.csv") + " --columns age,age", "column 'age' is chosen twice"),
    # the command line itself
    "options before MODEL": ("fit --depth 3 ppca iris -o out", "give MODEL and DATA first"),
    "three arguments": ("fit ppca iris faithful -o out", "unexpected argument faithful"),
    "near option of fit": (PPCA.format("iris") + " --bach-size 3", "did you mean --batch-size?"),
    "unknown command": ("fti ppca iris", "fti"),
    "unknown flag": (PPCA.format("iris") + " --latent 2", "--latent"),
    "missing argument": ("fit ppca", "DATA"),
    "missing out": ("fit ppca iris -l 1", "--out"),
    "number wanted": ("fit ppca iris -l two -o out", "latent_dim=two must be of type int"),
    # RUN
    "folder of other files": (
        "fit ppca iris -l 1 -n 2 -o others --overwrite",
        "holds other files (thesis.tex)",
    ),
    "resume of nothing": (PPCA.format("iris") + " --resume", "holds no run to resume"),
    "record of the wrong type": (
        "sample typed",
        "config.json names arguments that PPCA cannot be built with",
    ),
    "record of an endless size": (
        "sample endless",
        "config.json names arguments that PPCA cannot be built with",
    ),
    "picture shape of a table": ("sample run -o x.csv --image-shape 1,3", "--image-shape is of pictures"),
    "picture shape of other rows": ("report run --image-shape 2,2", "image_shape=(2, 2) does not suit"),
    "run there already": ("fit ppca good.csv -l 1 -n 2 -o run", "--resume continues it, --overwrite"),
    "resume of another": ("fit ppca good.csv -l 2 -n 2 -o run --resume", "this command has"),
    "resume of other settings": (
        "fit ppca good.csv -l 1 -n 2 -o run --resume --lr 1",
        "learning_rate=0.001",
    ),
    "resume without checkpoint": (
        "fit ppca good.csv -l 1 -n 2 -o bare --resume",
        "no checkpoint to resume",
    ),
    "resume and overwrite": ("fit ppca good.csv -l 1 -o run --resume --overwrite", "choose one"),
    "folder that is a file": ("fit ppca iris -l 1 -n 2 -o good.csv", "good.csv is a file"),
    "folder in a file": ("fit ppca iris -l 1 -n 2 -o good.csv/out", "cannot be written to"),
    "device of a run": ("sample run --device cuda:7", "not on this machine: use device='cpu'"),
    "report of nothing": ("report none", "none is not a folder"),
    "missing run": ("sample none", "none is not a folder"),
    "no run": ("sample .", "is . the folder of a run?"),
    "run of a later version": ("sample future", "is a run of format 99"),
    "damaged run": ("sample damaged", "is damaged"),
    "truncated run": ("sample truncated", "is damaged"),
    "data of another width": (
        "encode run wide.npy",
        "rows of shape [7], but the run was fitted to rows of shape [3]",
    ),
    "data without the columns": ("encode run iris", "has no column 'height'"),
    "unknown method": ("evidence run good.csv --method guess", "is not known"),
    "no exact evidence": ("evidence run good.csv -s 10 --method iwae --particles 3", "multiple"),
    "suffix of out": ("sample run -o x.pdf", "the suffix gives the kind of file"),
    "picture of no image": ("sample run -o x.png", "--image-shape"),
    "wrong image shape": ("sample run -o x.png --image-shape 2,2", "does not suit rows of 3"),
    "no image shape": ("sample run -o x.png --image-shape 3", "HEIGHT,WIDTH"),
    "folder of out": ("sample run -o none/x.csv", "there is no folder none"),
    "compare with nothing": ("compare run none", "none is not a folder"),
    "compare with a truncated one": ("compare run truncated", "is damaged"),
}


@pytest.mark.parametrize(("words", "said"), CASES.values(), ids=CASES.keys())
def test_one_clear_line(place, monkeypatch, words, said):
    monkeypatch.chdir(place)
    before = sorted(str(p) for p in place.rglob("*"))
    result = shell(words)
    assert result.exit_code == 2, (result.output, result.exception)
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    after = sorted(str(p) for p in place.rglob("*") if "__pycache__" not in str(p))
    assert after == [p for p in before if "__pycache__" not in p], "something was written"


def test_a_failed_overwrite_leaves_the_old_run(place, monkeypatch):
    monkeypatch.chdir(place)
    before = {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()}
    result = shell("fit vae good.csv -l 1 -o run --overwrite")
    assert result.exit_code == 2
    assert {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()} == before


def test_a_stop_before_training_leaves_the_old_run(place, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(place)
    monkeypatch.setattr("pyrolvm.shell.fitting.fit", stopped)
    before = {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()}
    result = shell("fit ppca good.csv -l 2 -n 2 -o run --overwrite")
    assert (result.exit_code, result.stderr.strip()) == (130, "stopped")
    assert {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()} == before


def test_a_warning_is_one_line(place, monkeypatch):
    monkeypatch.chdir(place)
    np.savetxt("bare.csv", np.random.default_rng(0).normal(size=(9, 2)), delimiter=",")
    result = shell("fit ppca bare.csv -l 1 -n 2 -o warned -q")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: bare.csv has no header")
    assert len(result.stderr.strip().splitlines()) == 1
    assert "header=False" in result.stderr
