"""The model that CONTRIBUTING shows: it is a file as it stands, its case passes, its own test passes."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import pyrolvm

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.S)


@pytest.fixture(name="example")
def _example(tmp_path, monkeypatch):
    """The example's module, imported from a file."""
    path = tmp_path / "repeated_measures.py"
    path.write_text(BLOCKS[0], "utf-8")
    spec = importlib.util.spec_from_file_location("repeated_measures", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "repeated_measures", module)
    spec.loader.exec_module(module)
    return module


def test_its_own_test_passes(example):
    names = {"torch": torch, "pyrolvm": pyrolvm, "RepeatedMeasures": example.RepeatedMeasures}
    exec(BLOCKS[2], names)
    names["test_the_bound_reaches_the_exact_evidence"]()


def test_its_case_trains_encodes_and_loads(example, tmp_path):
    iris = torch.as_tensor(pyrolvm.data.load_dataset("iris").values, dtype=torch.float32)
    case = eval("{" + BLOCKS[1] + "}", {"RepeatedMeasures": example.RepeatedMeasures, "IRIS": iris})
    build, x = case["RepeatedMeasures"]
    fitted = pyrolvm.fit(build(), x, num_steps=100, batch_size=50, learning_rate=0.02, engine="eager")
    elbo = fitted.history["elbo"]
    assert elbo.tail(20).mean() > elbo.head(20).mean() + 3 * elbo.head(20).std() / 20**0.5
    assert fitted.encode(x).shape == (150,)
    assert fitted.sample(7).shape == (7, 4)
    again = pyrolvm.load(fitted.save(tmp_path / "run"), model=build())
    assert torch.equal(again.encode(x), fitted.encode(x))


def test_it_refuses_bad_data(example):
    with pytest.raises(pyrolvm.DataError, match="data_dim=3"):
        pyrolvm.fit(example.RepeatedMeasures(4), torch.zeros(5, 3), num_steps=1)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/house.md"])
def test_the_files_and_rooms_that_are_named_exist(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text("utf-8"), flags=re.S)
    new = {"pyrolvm/models/repeated_measures.py", "docs/systems/repeated-measures.md"}
    named = set(re.findall(r"`([\w/-]+(?:\.\w+|/))`", text)) - new
    paths = {name for name in named if "/" in name or name.endswith(".py")}
    missing = {
        p for p in paths if not ((ROOT / p).exists() or (ROOT / "pyrolvm" / p).exists() or _in_a_room(p))
    }
    assert not missing


def _in_a_room(name):
    """A bare file name of the room that the line is about, such as `base.py`."""
    return "/" not in name and any((ROOT / "pyrolvm").rglob(name))
