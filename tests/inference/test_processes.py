"""One fit over many processes: two of them by gloo, each with one thread, against one."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import together
import torch

from pyrolvm import PyrolvmError, SettingError
from pyrolvm.inference.training.loop import Training
from pyrolvm.processes import ALONE, Processes, launched
from pyrolvm.signals import Asked

SCRIPT = Path(together.__file__)


def launch(folder, *tasks, count=2, restarts=None, **environment):
    """Run tasks of `together` in `count` processes, which write to `folder`; what they wrote to standard error."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(SCRIPT), str(folder), *tasks]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
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
        return subprocess.run(command, env=environment, capture_output=True, text=True).stderr
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(count)} for r in range(count)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(command, env=environment | address | own, stderr=subprocess.PIPE, text=True)
        for own in ranks
    ]
    return "\n".join(process.communicate()[1] for process in started)


def read(path, words=""):
    assert path.exists(), words
    return torch.load(path, weights_only=False)


QUICK = ("cases", "by_messages", "in_parts", "going_on", "gradients", "registry", "refusals", "resuming")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes make of all quick tasks, in one launch."""
    folder = tmp_path_factory.mktemp("two")
    together.fitted(together.NOISY["VAE"], num_steps=10, engine="eager", checkpoint=folder / "one")
    words = launch(folder, *QUICK)
    return {task: read(folder / task, words) for task in QUICK} | {"folder": folder}


@pytest.fixture(scope="module")
def two(results):
    return results["cases"]


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
    for engine in ("eager", "compiled") if name in together.QUICKLY else ("eager",):
        other = two[name, engine]
        assert apart(one["tensors"], other["tensors"]) < 1e-6
        assert (one["history"]["elbo"] - other["history"]["elbo"]).abs().max() < 1e-6
        assert other["settings"]["num_processes"] == 2
        assert len(set(other["digests"])) == 1  # all processes have the same bits
        assert ("all rows" if name in ("no plate", "own plate, whole") else "share") in other["engine"]
        assert other["engine"].startswith(engine)


def test_held_out_bounds_are_of_all_held_out_rows(two):
    one = together.fitted(together.EXACT["held out"], engine="eager").history
    assert one["validation_elbo"].dropna().to_numpy() == pytest.approx(
        two["held out", "eager"]["history"]["validation_elbo"].dropna().to_numpy(), rel=1e-9
    )


@pytest.mark.parametrize("name", together.NOISY)
def test_noisy_fits_end_where_those_of_one_process_do(two, name):
    """The bound over the last steps, within its noise; all processes have the same bits."""
    ends = []
    for fit in (together.kept(together.fitted(together.NOISY[name], engine="eager")), two[name, "eager"]):
        last = fit["history"]["elbo"].tail(25)
        ends.append((last.mean(), last.sem()))
    (one, error), (other, its_error) = ends
    assert abs(one - other) < 4 * (error**2 + its_error**2) ** 0.5
    assert len(set(two[name, "eager"]["digests"])) == 1


def test_two_runs_have_the_same_bits(two):
    assert two["again"] == two["VAE", "eager"]["digests"][0]


def test_memory_and_messages_carry_the_same(results, two):
    for engine, (digest, words) in zip(("eager", "compiled"), results["by_messages"], strict=True):
        assert digest == two["VAE", engine]["digests"][0]
        assert two["VAE", engine]["engine"] == f"{words} through memory of their machine"


@pytest.mark.parametrize("task", ["hanging", pytest.param("hanging_by_messages", marks=pytest.mark.slow)])
def test_a_process_that_hangs_within_a_step_is_named(tmp_path, task):
    words = launch(tmp_path, task, STEP_PATIENCE="2")
    said = read(tmp_path / task, words)
    assert said.startswith("LostProcessError: process 1 of 2 (pid"), said
    assert "does not answer the others: it is stopped" in said


def test_compiled_steps_draw_what_eager_ones_draw(two):
    assert apart(two["VAE", "eager"]["tensors"], two["VAE", "compiled"]["tensors"]) < 1e-6


def test_gradients_are_clipped_by_the_norm_of_all_shares(two):
    """The optimiser's work is divided in the compiled engine, and not in the eager one."""
    clipped, eager = two["clipped", "compiled"], two["clipped", "eager"]
    assert apart(eager["tensors"], clipped["tensors"]) < 1e-6
    assert (clipped["history"]["elbo"] - eager["history"]["elbo"]).abs().max() < 1e-6


def test_steps_that_no_loop_can_hold_are_compiled_in_parts(results):
    for fit in results["in_parts"].values():
        assert fit["engine"].startswith(
            "compiled engine, in parts between sums over the processes (whole: no such"
        )
        assert len(set(fit["digests"])) == 1
        assert apart(fit["eager"]["tensors"], fit["tensors"]) < 1e-9


def test_a_compiled_run_goes_on_with_the_slots_of_all_shares(results):
    """Between chunks every process has the whole state, of which the first one writes the checkpoint."""
    assert len(set(results["going_on"]["digests"])) == 1
    compiled, eager = results["going_on"]["saved"]
    assert compiled.keys() == eager.keys()
    moments = {name: value for name, value in eager.items() if name.startswith("optimizer/")}
    assert apart(moments, compiled) < 1e-6


def test_running_means_are_of_all_rows(two):
    one = together.kept(together.fitted(together.normed, engine="eager", num_steps=1))["tensors"]
    other = two["a step of batch norm"]["tensors"]
    name = next(name for name in one if name.endswith("running_mean"))
    assert one[name].abs().max() > 0
    assert apart({name: one[name]}, other) < 1e-12


def test_free_bits_are_of_all_rows(two):
    one = together.kept(together.fitted(together.idle, engine="eager"))
    assert apart(one["tensors"], two["free bits"]["tensors"]) < 1e-6
    paid = one["history"]["free_bits"] - one["history"]["log_likelihood"]
    assert paid.min() < -0.601  # more than the three dimensions have free
    assert paid.max() > -0.61  # and in some steps hardly more


@pytest.mark.slow
def test_other_programs_compile(tmp_path):
    words = launch(tmp_path, "compiled")
    found = read(tmp_path / "compiled", words)
    for name, other in found.items():
        assert other["engine"].startswith("compiled")
        one = together.kept(together.fitted(together.EXACT[name], engine="eager"))
        assert apart(one["tensors"], other["tensors"]) < 1e-6


def test_the_mean_gradient_is_that_of_one_process(results):
    one, two = together.gradients(), results["gradients"]
    errors = (one.var(0) / len(one) + two.var(0) / len(two)).sqrt()
    apart = (one.mean(0) - two.mean(0)).abs() / errors.clamp(min=1e-12)
    assert apart.max() < 5
    assert apart.square().mean() < 2
    # local noise is of two streams: as precise as one, which it would not be if both drew the same
    assert 0.5 < (two.var(0).sum() / one.var(0).sum()) < 1.6


def disagreements(one, two):
    """Models whose mean bound differs by more than Monte Carlo error allows, or that failed."""
    for name, (bounds, digests, engine) in two.items():
        if not bounds:
            yield f"{name}: {engine}"
        elif len(set(digests)) != 1:
            yield f"{name}: the processes parted"
        else:
            a, b = np.array(one[name][0]), np.array(bounds)
            error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
            if not abs(a.mean() - b.mean()) < 4 * error + 1e-5 * abs(a.mean()):
                yield f"{name}: {a.mean():.4f} and {b.mean():.4f} ± {error:.4f}, {engine}"


def test_every_registered_model_trains_in_two_processes(results):
    """Steps that hardly move: the mean bound is that of one process, within Monte Carlo error."""
    assert list(disagreements(together.registry(), results["registry"])) == []


@pytest.mark.slow
def test_every_variant_of_a_registered_model_trains_in_two_processes(tmp_path):
    words = launch(tmp_path, "whole_registry")
    two = read(tmp_path / "whole_registry", words)
    assert list(disagreements(together.whole_registry(), two)) == []


def test_what_is_wrong_in_one_process_is_said_in_all(results):
    said = results["refusals"]
    same = {
        "seed": "process 1 has seed=1 where process 0 has 0: start all processes with the same",
        "data": "process 1 has other data than process 0: start all",
        "rows": "process 1 has num_rows=100 where process 0 has 101",
        "model": "process 1 has model: weight_logits='float64 [4]' where process 0 has 'float64 [3]'",
        "steps": "process 1 has num_steps=11 where process 0 has 10",
        "few rows": "a step has 1 rows for 2 processes: give a batch_size of at least 2",
        "one row each": "the MMD compares rows of a batch, and a process has a single row here",
        "Trace_MMD": "Trace_MMD compares all rows of a batch with each other",
    }
    for name, sentence in same.items():
        assert all(words.startswith(sentence) for words in said[name]), said[name]
    own, other = said["bad here"]
    assert own.startswith("GaussianMixture was built for data of shape [rows, 6]")
    assert other == f"process 0 of 2 cannot go on: {own}"
    assert all(words.startswith("the bound is nan at step 2: site 'x'") for words in said["not finite"])
    assert said["apart"] == [1, 1]
    assert said["errors of callbacks"][0] == "RuntimeError: no space"
    assert said["errors of callbacks"][1].endswith("a callback failed in process 0 of 2: no space")


def test_a_run_goes_on_with_every_process_own_noise(results):
    said = results["resuming"]
    whole, parts, stopped = said["digests"]
    assert len({*whole, *parts, *stopped}) == 1
    assert all(words.startswith("stopped at step 8; to go on, call fit again") for words in said["stopped"])
    assert said["loaded"]
    assert any("is of a run of 1 process, which 2 now go on with" in w for w in said["warnings"])
    with pytest.warns(
        UserWarning, match="of a run of 2 processes, which 1 now go on with: from step 20 on the noise"
    ):
        together.fitted(
            together.NOISY["VAE"],
            num_steps=22,
            engine="eager",
            checkpoint=results["folder"] / "whole",
            resume=True,
        )


def test_a_killed_process_is_named_and_the_launcher_goes_on_from_the_checkpoint(tmp_path):
    words = launch(tmp_path, "killed", restarts=2, STEPS="1200", DELAYS="0.1", AFTER_A_CHECKPOINT="yes")
    killed, whole, times = read(tmp_path / "killed", words)
    assert killed == whole
    assert times == 1
    assert "process 1 of 2 (pid" in words
    assert "ended before the fit did" in words


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_the_bits_of_a_run_never_killed(tmp_path):
    delays = " ".join(map(str, np.random.default_rng(0).uniform(0.2, 3.0, 10).round(2)))
    words = launch(tmp_path, "killed", restarts=10, STEPS="3000", DELAYS=delays)
    killed, whole, times = read(tmp_path / "killed", words)
    assert killed == whole
    assert times == words.count("exitcode: -9") == 10


def test_one_process_alone_needs_no_group():
    assert ALONE.is_first
    assert ALONE.broadcast(3) == 3
    assert ALONE.gather(3) == [3]
    assert ALONE.first(lambda: 4) == 4
    assert ALONE.share(7) == slice(0, 7)
    assert ALONE.sum(torch.ones(3)).sum() == 3
    assert together.fitted(together.EXACT["per datum"], num_steps=2).settings["num_processes"] == 1


def test_shares_are_whole_and_even():
    for total, number in ((7, 2), (5, 3), (2, 2), (1000, 7)):
        parts = [range(total)[Processes(rank, number).share(total)] for rank in range(number)]
        assert [i for part in parts for i in part] == list(range(total))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize("name", WHOLE)
def test_a_part_of_the_launchers_environment_that_is_missing_is_named(name):
    others = " and ".join(other for other in WHOLE if other != name)
    with pytest.raises(SettingError, match=f"the environment has {others} but not {name}: start"):
        launched({k: v for k, v in WHOLE.items() if k != name})
    with pytest.raises(SettingError, match="RANK must be a whole number, not 'x'"):
        launched(WHOLE | {"RANK": "x"})


def test_what_nobody_launched_is_one_alone():
    assert launched({}) == (0, 1)
    assert launched({"MASTER_ADDR": "a"}) == (0, 1)
    assert launched({"WORLD_SIZE": "1"}) == (0, 1)
    assert launched(WHOLE) == (1, 2)


class SecondOfTwo(Processes):
    """The second of two processes; `first` is what the first one has to say."""

    first = None

    def gather(self, value):
        return [type(self).first, value]


def test_the_first_process_decides_and_any_may_interrupt():
    class Second(SecondOfTwo):
        first = (17, "enough", True, False, None)

    run = SimpleNamespace(
        processes=Second(1, 2),
        checkpoint=SimpleNamespace(is_due=False),
        stopped_because="",
        _asked=Asked(interrupted=True),
        _size=3,
    )
    assert Training._agree(run, 5, None) is True
    assert (run._size, run.stopped_because, run._asked.interrupted) == (17, "enough", True)
    run._asked.interrupted = False
    Training._agree(run, 5, None)
    assert not run._asked.interrupted
    Second.first = (17, "", False, True, None)
    assert Training._agree(run, 5, None) is False
    assert run._asked.interrupted
    Second.first = (17, "", False, False, "no space")
    with pytest.raises(PyrolvmError, match="a callback failed in process 0 of 2: no space"):
        Training._agree(run, 5, None)


def test_the_mean_by_rows_has_the_value_of_all_and_the_gradient_of_the_own_part():
    class Two(Processes):
        def sum(self, value):
            return value + 0.75 * 10.0  # the other one's part, and its estimate

    x = torch.tensor(4.0, requires_grad=True)
    mean = Two(0, 2, part=0.25).mean(3 * x)
    assert mean.item() == 0.25 * 12 + 0.75 * 10
    assert torch.autograd.grad(mean, x)[0].item() == 3
    assert ALONE.mean(x) is x
