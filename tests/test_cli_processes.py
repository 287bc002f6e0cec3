"""The command as a process: exit codes, stopping and going on, silence where nobody watches."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "pyrolvm"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FIT = "fit ppca iris -l 2 -n {} -b 32 --lr 0.01 --schedule cosine --kl-warmup 0.5 --engine eager -o {}"


def run(words, **options):
    return subprocess.run(
        COMMAND + words.split(), capture_output=True, text=True, env=ENVIRONMENT, check=False, **options
    )


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on_and_ends_at_the_same_bits(tmp_path, stop):
    words = FIT.format(3000, "run")
    process = subprocess.Popen(
        [*COMMAND, *words.split(), "--checkpoint-every", "0.05"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job starts with it ignored, and so would this one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    state = tmp_path / "run" / "checkpoint" / "state.safetensors"
    for _ in range(1200):
        if state.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(stop)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.startswith("stopped at step ")
    assert len(err.strip().splitlines()) == 1
    step = int(load_file(state)["step"])
    assert 0 < step < 3000
    assert f"stopped at step {step};" in err
    repeat = err.partition("to go on: pyrolvm ")[2].strip()
    refused = run("sample run", cwd=tmp_path)
    assert refused.returncode == 2
    assert "is not finished" in refused.stderr
    again = run(repeat, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    whole = run(FIT.format(3000, "whole"), cwd=tmp_path)
    assert whole.returncode == 0
    parts, one = (load_file(tmp_path / n / "parameters.safetensors") for n in ("run", "whole"))
    assert parts.keys() == one.keys()
    for name in one:
        assert torch.equal(parts[name], one[name]), name


def test_without_a_terminal_there_is_no_bar(tmp_path):
    result = run(FIT.format(5, "run"), cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.startswith("model ")
    assert "\x1b" not in result.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["command"].startswith(
        "pyrolvm fit ppca"
    )


def test_an_error_is_one_line_and_two(tmp_path):
    result = run("fit ppca irs -l 2 -o run", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: there is no data set 'irs': did you mean 'iris'")
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_traceback(tmp_path):
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    result = subprocess.run(
        [*COMMAND, "datasets"], stdout=reader.stdin, stderr=subprocess.PIPE, env=ENVIRONMENT, check=False
    )
    reader.stdin.close()
    reader.wait()
    assert b"Traceback" not in result.stderr
