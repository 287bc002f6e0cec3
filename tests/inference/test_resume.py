"""Nothing is lost: a run that was stopped goes on to the same bits; files are plain and whole."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
import torch
from programs import LocalNormal
from safetensors.torch import load_file

import pyrolvm
from pyrolvm import PPCA, VAE, RunFolderError
from pyrolvm.files import read_tensors, write_atomically
from pyrolvm.models.guides import FullCovariance

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))

SCRIPT = """
import sys, torch, pyrolvm
torch.manual_seed(0)
x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
torch.manual_seed(0)
vae = pyrolvm.VAE(4, 2, "gaussian", hidden=(8,))
pyrolvm.fit(
    vae, x, num_steps=int(sys.argv[2]), batch_size=16, learning_rate=0.01, optimizer="adamw", clip_norm=5.0,
    schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20), kl_warmup=float(sys.argv[4]),
    checkpoint=sys.argv[1], resume=sys.argv[3] == "resume", progress=False, engine="eager", seed=7,
)
"""


def run(*arguments):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_twenty_steps_equal_ten_and_a_new_process_and_ten(tmp_path):
    """Bit for bit: parameters, optimiser, plan, noise, learning rate, KL weight."""
    run(tmp_path / "whole", 20, "start", 0.5)
    run(tmp_path / "parts", 10, "start", 1.0)  # 10 warm-up steps in both
    run(tmp_path / "parts", 20, "resume", 0.5)
    whole, parts = (load_file(tmp_path / n / "state.safetensors") for n in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name in whole.keys() - {"history"}:
        assert torch.equal(whole[name], parts[name]), name
    assert torch.equal(whole["history"][:, :-1].nan_to_num(), parts["history"][:, :-1].nan_to_num())
    assert int(whole["step"]) == 20


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    program = LocalNormal()
    options = {"guide": program.guide, "checkpoint": tmp_path, "progress": False, "engine": "eager"}
    pyrolvm.fit(program.model, torch.zeros(8), num_steps=3, learning_rate=0.1, **options)
    with pytest.raises(RunFolderError, match=r"learning_rate=0.1, this one has learning_rate=0.2"):
        pyrolvm.fit(program.model, torch.zeros(8), num_steps=6, learning_rate=0.2, resume=True, **options)


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path):
    program = LocalNormal()
    options = {
        "guide": program.guide,
        "num_steps": 3,
        "checkpoint": tmp_path,
        "progress": False,
        "engine": "eager",
    }
    pyrolvm.fit(program.model, torch.zeros(8), **options)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunFolderError, match=r"state.safetensors is damaged"):
        pyrolvm.fit(program.model, torch.zeros(8), resume=True, **options)


def test_resume_without_a_checkpoint_starts(tmp_path):
    program = LocalNormal()
    options = {"guide": program.guide, "num_steps": 3, "progress": False, "engine": "eager"}
    fitted = pyrolvm.fit(program.model, torch.zeros(8), checkpoint=tmp_path / "new", resume=True, **options)
    assert len(fitted.history) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, request, number):
    program = LocalNormal()
    if number == signal.SIGINT:  # a shell's background job starts with it ignored
        before = signal.signal(number, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(number, before))

    def interrupt(report):
        if report.step >= 8:
            os.kill(os.getpid(), number)

    options = {"guide": program.guide, "num_steps": 10_000, "progress": False, "engine": "eager"}
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped at step \d+; to go on, call fit again.*resume=True"
    ):
        pyrolvm.fit(program.model, torch.zeros(8), checkpoint=tmp_path, callbacks=[interrupt], **options)
    assert int(load_file(tmp_path / "state.safetensors")["step"]) >= 8
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_disk():
    """No file of this process can grow beyond 2000 bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_whole_run_that_was_there(tmp_path, small_disk):
    """The parameters fit and the history does not: none of them is replaced."""
    torch.manual_seed(0)
    options = {"progress": False, "engine": "eager"}
    pyrolvm.fit(PPCA(4, 1), X, num_steps=2, **options).save(tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    longer = pyrolvm.fit(PPCA(4, 1), X, num_steps=200, **options)
    small_disk()
    with pytest.raises(
        RunFolderError, match=r"could not be written to .* \(File too large\); what was there is as it"
    ):
        longer.save(tmp_path / "run")
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_a_full_disk_does_not_end_a_run(tmp_path, small_disk):
    options = {"progress": False, "engine": "eager", "checkpoint": tmp_path, "checkpoint_seconds": 0.0}
    pyrolvm.fit(PPCA(4, 1), X, num_steps=2, **options)
    before = (tmp_path / "state.safetensors").read_bytes()
    small_disk()
    with pytest.warns(
        UserWarning, match=r"checkpoint could not be written .*File too large.* the run goes on"
    ):
        fitted = pyrolvm.fit(PPCA(4, 1), X, num_steps=100, **options)
    assert len(fitted.history) == 100
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    fitted = pyrolvm.fit(VAE(4, 2, "gaussian", hidden=(8,)), X, num_steps=5, progress=False, engine="eager")
    return fitted, fitted.save(tmp_path / "run")


def test_a_run_folder_is_plain_and_gives_the_same_answers(saved):
    fitted, path = saved
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "history.csv", "parameters.safetensors"]
    again = pyrolvm.load(path)
    assert torch.equal(again.encode(X), fitted.encode(X))
    assert torch.equal(again.sample(5), fitted.sample(5))
    assert torch.equal(again.log_evidence(X, num_samples=7), fitted.log_evidence(X, num_samples=7))
    pd.testing.assert_frame_equal(again.history, fitted.history)
    assert again.stopped_because == fitted.stopped_because
    record = json.loads((path / "config.json").read_text())
    assert record["model"]["name"] == "VAE"
    assert record["settings"]["num_steps"] == 5


def test_saving_again_replaces_the_files_and_keeps_the_rest(saved):
    fitted, path = saved
    (path / "notes.txt").write_text("mine")
    fitted.save(path)
    assert (path / "notes.txt").read_text() == "mine"


def test_a_users_own_model_is_loaded_with_the_model_at_hand(tmp_path):
    program = LocalNormal()
    fitted = pyrolvm.fit(
        program.model,
        torch.ones(8),
        guide=program.guide,
        num_steps=5,
        learning_rate=0.1,
        progress=False,
        engine="eager",
    )
    path = fitted.save(tmp_path / "run")
    with pytest.raises(
        RunFolderError, match=r"nothing in a run folder is executed.*model=\.\.\., guide=\.\.\."
    ):
        pyrolvm.load(path)
    other = LocalNormal()
    again = pyrolvm.load(path, model=other.model, guide=other.guide)
    assert torch.equal(again.encode(torch.ones(8)), fitted.encode(torch.ones(8)))


def test_a_run_of_another_program_is_refused(saved):
    with pytest.raises(pyrolvm.ProgramError, match="saved parameters are of another program"):
        pyrolvm.load(saved[1], model=VAE(4, 2, "gaussian", hidden=(9,)))


def spoil(path, kind):
    if kind == "no config":
        (path / "config.json").unlink()
    elif kind == "half a config":
        (path / "config.json").write_text('{"format": 1,')
    elif kind == "another version":
        config = json.loads((path / "config.json").read_text()) | {"format": 99}
        (path / "config.json").write_text(json.dumps(config))
    elif kind == "no parameters":
        (path / "parameters.safetensors").unlink()
    elif kind == "half the parameters":
        file = path / "parameters.safetensors"
        file.write_bytes(file.read_bytes()[:200])
    elif kind == "lacks a key":
        config = json.loads((path / "config.json").read_text())
        del config["num_rows"]
        (path / "config.json").write_text(json.dumps(config))
    elif kind == "no history":
        (path / "history.csv").unlink()
    elif kind.startswith("history cut"):
        text = (path / "history.csv").read_text()
        (path / "history.csv").write_text(text[:12] if kind.endswith("head") else text[:-9])


@pytest.mark.parametrize(
    "kind",
    [
        "no config",
        "half a config",
        "another version",
        "no parameters",
        "half the parameters",
        "lacks a key",
        "no history",
        "history cut in its head",
        "history cut in its end",
    ],
)
def test_a_spoiled_run_folder_is_one_clear_line(saved, kind):
    path = saved[1]
    spoil(path, kind)
    with pytest.raises(RunFolderError) as error:
        pyrolvm.load(path)
    assert "\n" not in str(error.value)
    assert (
        "does not exist" in str(error.value)
        or "damaged" in str(error.value)
        or "format 99" in str(error.value)
        or "cannot be read" in str(error.value)
    )


def test_loading_executes_nothing(saved, tmp_path):
    """A pickle in place of the parameters is refused, not run."""
    import pickle

    path = saved[1]

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (path / "parameters.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(RunFolderError, match="damaged"):
        pyrolvm.load(path)
    assert not (tmp_path / "executed").exists()


def test_a_device_that_is_not_there_is_refused(saved):
    with pytest.raises(pyrolvm.SettingError, match="not on this machine"):
        pyrolvm.load(saved[1], device="cuda:7")


def test_a_file_in_the_way_is_refused(saved, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="is a file"):
        saved[0].save(tmp_path / "file")
    with pytest.raises(RunFolderError, match="not a folder"):
        pyrolvm.load(tmp_path / "nowhere")


def test_tensors_of_another_writer_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "t.safetensors")
    with pytest.raises(RunFolderError, match="not written by pyrolvm"):
        read_tensors(tmp_path / "t.safetensors")


def test_ppca_keeps_its_closed_form_through_a_folder(tmp_path):
    ppca = PPCA.closed_form(X.double(), 2, guide="full")
    fitted = pyrolvm.fit(
        ppca, X, num_steps=1, learning_rate=1e-9, dtype=torch.float64, progress=False, engine="eager"
    )
    again = pyrolvm.load(fitted.save(tmp_path / "ppca"))
    assert isinstance(again.model.guide_family, FullCovariance)
    torch.testing.assert_close(again.model.log_marginal(X.double()), ppca.log_marginal(X.double()))
