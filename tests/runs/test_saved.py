"""Run folders read back: damaged ones in one clear error, those of Python like those of the shell."""

import json

import numpy as np
import pytest
import torch

import pyrolvm
from pyrolvm import PPCA, VAE, RunFolderError
from pyrolvm.runs import Source, open_run

FIT = {"num_steps": 3, "progress": False, "engine": "eager"}


@pytest.fixture
def run(tmp_path):
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    pyrolvm.fit(PPCA(3, 1), x, **FIT).save(tmp_path / "run")
    return tmp_path / "run"


def damage(run, change):
    file = run / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


DAMAGES = {
    "a size of the wrong type": lambda c: c["model"]["arguments"].update(latent_dim="x"),
    "an unknown argument": lambda c: c["model"]["arguments"].update(depth=3),
    "a size that no machine holds": lambda c: c["model"]["arguments"].update(latent_dim=10**9),
    "a negative size": lambda c: c["model"]["arguments"].update(latent_dim=-1),
    "arguments that are no dict": lambda c: c["model"].update(arguments=[1]),
    "a model that is no record": lambda c: c.update(model="PPCA"),
    "rows that are no number": lambda c: c.update(num_rows="many"),
    "settings that are no dict": lambda c: c.update(settings=[]),
    "columns that are no list": lambda c: c.update(columns="abc"),
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_record_is_one_error_before_anything_is_built(run, change):
    damage(run, change)
    with pytest.raises(RunFolderError, match=r"config\.json"):
        open_run(run)


def test_a_damaged_size_is_refused_without_building(run, monkeypatch):
    damage(run, DAMAGES["a size that no machine holds"])
    monkeypatch.setattr("pyrolvm.inference.program.program.Program.__init__", lambda *_: pytest.fail("built"))
    with pytest.raises(RunFolderError, match=r"config\.json"):
        open_run(run)


def test_sizes_in_lists_are_looked_at_too(tmp_path):
    x = (torch.rand(20, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    pyrolvm.fit(VAE(4, 1, hidden=(3,)), x, **FIT).save(tmp_path)
    open_run(tmp_path)
    damage(tmp_path, lambda c: c["model"]["arguments"].update(hidden=[10**10]))
    with pytest.raises(RunFolderError, match=r"config\.json"):
        open_run(tmp_path)


def test_a_fit_saved_from_python_reads_data_by_its_columns(tmp_path):
    import pandas as pd

    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 2)), columns=["a", "b"])
    fitted = pyrolvm.fit(PPCA(2, 1), frame, **FIT)
    fitted.save(tmp_path / "run")
    frame.assign(c=1.0)[["c", "b", "a"]].to_csv(tmp_path / "x.csv", index=False)
    saved = open_run(tmp_path / "run")
    read = saved.recipe.read(Source(str(tmp_path / "x.csv")))
    assert read.columns == ["a", "b"]
    assert np.allclose(read.values, frame.to_numpy())
