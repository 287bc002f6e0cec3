"""One fit over many processes: two of them by gloo, each with one thread, against one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import together
import torch

SCRIPT = Path(together.__file__)


def launch(task, file, *more, count=2, restarts=None, **environment):
    """Run a task of `together` in `count` processes; what each wrote to standard error."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(SCRIPT), task, str(file), *map(str, more)]
    if restarts is not None:
        options = [
            "--nproc-per-node",
            str(count),
            "--max-restarts",
            str(restarts),
            "--monitor-interval",
            "0.1",
        ]
        command[1:1] = ["-m", "torch.distributed.run", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [done.stderr]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(count)} for r in range(count)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(command, env=environment | address | own, stderr=subprocess.PIPE, text=True)
        for own in ranks
    ]
    return [process.communicate()[1] for process in started]


def read(path, words):
    assert path.exists(), "\n".join(words)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Every case of `together` in two processes."""
    file = tmp_path_factory.mktemp("cases") / "two.pt"
    words = launch("cases", file)
    assert file.exists(), "\n".join(words)
    return torch.load(file, weights_only=False)


def apart(one, two):
    """The largest difference of any tensor, relative to the tensor's largest entry."""
    return max(
        float((one[k].double() - two[k].double()).abs().max() / one[k].double().abs().max().clamp(min=1e-3))
        for k in one
    )


@pytest.mark.parametrize("name", together.EXACT)
def test_two_processes_take_the_steps_of_one(two, name):
    """200 steps; only rounding differs, the noise of global latents being the first process's."""
    one = together.kept(together.fitted(together.EXACT[name], engine="eager"))
    for engine in ("eager", "compiled") if name in together.COMPILED else ("eager",):
        other = two[name, engine]
        assert apart(one["tensors"], other["tensors"]) < 1e-6
        assert (one["history"]["elbo"] - other["history"]["elbo"]).abs().max() < 1e-6
        assert other["settings"]["num_processes"] == 2
        assert len(set(other["digests"])) == 1  # all processes have the same bits
        assert ("all rows" if name == "no plate" else "share") in other["engine"]
        assert other["engine"].startswith(engine)


def test_held_out_bounds_are_of_all_held_out_rows(two):
    one = together.fitted(together.EXACT["held out"], engine="eager").history
    assert one["validation_elbo"].dropna().to_numpy() == pytest.approx(
        two["held out", "eager"]["history"]["validation_elbo"].dropna().to_numpy(), rel=1e-9
    )
