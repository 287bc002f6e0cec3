"""Two processes on data that are read as they are needed: each its share, and together the steps of one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import far_together
import numpy as np
import pandas as pd
import pytest
import torch

import pyrolvm
from pyrolvm.data import scan
from pyrolvm.data.far.windows import WindowPlan
from pyrolvm.data.plan import BatchPlan
from pyrolvm.inference.training import setup as training_setup

X = np.random.default_rng(2).standard_normal((600, 5)) @ np.random.default_rng(3).standard_normal((5, 5)) + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("far")
    for i in range(4):
        frame = pd.DataFrame(X[150 * i : 150 * (i + 1)], columns=list("abcde"))
        frame.to_parquet(path / f"{i}.parquet", row_group_size=50)
    (path / "broken").mkdir()
    wrong = X[:300].copy()
    wrong[-1] = np.nan
    for i in range(2):
        np.save(path / "broken" / f"{i}.npy", wrong[150 * i : 150 * (i + 1)])
    return path


@pytest.fixture(scope="module")
def two(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, far_together.__file__, str(folder), str(folder / "two.pt")]
    ranks = [
        os.environ | address | {"RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"} for r in (0, 1)
    ]
    started = [subprocess.Popen(command, env=e, stderr=subprocess.PIPE, text=True) for e in ranks]
    said = [process.communicate()[1] for process in started]
    assert Path(folder / "two.pt").exists(), "\n".join(said)
    return torch.load(folder / "two.pt", weights_only=False)


class OfBoth(BatchPlan):
    """The rows of a batch of two processes: the windows of each are of its half of the rows."""

    def rows(self, first_step, num_steps):
        half, window = (
            self.batch_size // 2,
            far_together.WINDOW // (self.batch_size // 2) * (self.batch_size // 2),
        )
        plan, found = WindowPlan(300, half, self.seed, [50] * 6, window), []
        for step in range(first_step, first_step + num_steps):
            (k,) = plan.windows(step, 1)
            held = torch.cat([torch.arange(i, j) + 50 * b for b, i, j in plan.contents(k)])
            rows = held[plan.rows(step, 1)[0] - k % 2 * window]
            found.append(torch.cat([rows, rows + 300]))
        return torch.stack(found)


def test_two_processes_take_the_steps_of_one_on_the_batches_of_both(two, monkeypatch):
    monkeypatch.setattr(training_setup, "BatchPlan", OfBoth)
    one = far_together.tensors(far_together.fit(X)[0])
    assert two["settings"]["num_processes"] == 2
    for name, value in one.items():
        assert torch.allclose(two["tensors"][name], value, rtol=1e-9, atol=1e-9)


def test_each_process_reads_the_blocks_of_its_share(two):
    assert [{block[0] for block in read} for read in two["read"]] == [{0, 1}, {2, 3}]
    assert [len(read) for read in two["read"]] == [6, 6]


def test_answers_of_two_processes_are_those_of_one(two, folder, tmp_path):
    fitted = pyrolvm.fit(pyrolvm.PPCA(5, 2), X, num_steps=1, progress=False)
    fitted.program.load(two["vae"])
    data = scan(str(folder / "[0-3].parquet"))
    pyrolvm.write_answers(fitted, data, tmp_path / "a.parquet", "posterior", part_rows=64, progress=False)
    one, both = (pd.read_parquet(p) for p in (tmp_path / "a.parquet", folder / "answers.parquet"))
    pd.testing.assert_frame_equal(one, both, check_exact=True)


def test_what_one_process_cannot_ends_the_others_with_its_sentence(two, folder):
    """The first finds the file there; the second a value that is missing, whose parts the first has not."""
    there, missing = two["refused"]
    assert there[0].startswith("SettingError: ")
    assert "answers.parquet is there already" in there[0]
    assert there[1] == f"PyrolvmError: process 0 of 2 cannot go on: {there[0].removeprefix('SettingError: ')}"
    assert "1.npy: a value is missing at row 149, column 0" in missing[1]
    assert missing[0].startswith("PyrolvmError: process 1 of 2 cannot go on: ")
    assert not (folder / "broken.parquet").exists()
    assert (folder / "broken.parquet.progress").exists()
