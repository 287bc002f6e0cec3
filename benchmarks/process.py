"""Time to the first steps and peak memory, each contender in a process of its own, twice.

The first process finds empty caches (of compiled steps, ours and torch's), the second what the first left.
Also the child: `python -m benchmarks.process ROW CONTENDER DEVICE` prints its numbers as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FIRST_STEPS = 2  # our compiled engine takes the first step eagerly by design
MORE_STEPS = 64
TIMEOUT = 900


def measure_processes(row: str, contender: str, device: str) -> dict[str, Any]:
    """The numbers of the first and of the second process, or the reason why there are none."""
    with tempfile.TemporaryDirectory() as caches:
        surroundings = os.environ | {
            "PYROLVM_CACHE": f"{caches}/pyrolvm",
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "TRITON_CACHE_DIR": f"{caches}/triton",
        }
        first = _child(row, contender, device, surroundings)
        second = first if "reason" in first else _child(row, contender, device, surroundings)
    return {"row": row, "contender": contender, "first": first, "second": second}


def _child(row: str, contender: str, device: str, surroundings: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.process", row, contender, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=surroundings, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"reason": f"took more than {TIMEOUT} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"reason": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(lines[-1])


def _main(row: str, contender: str, device_name: str) -> dict[str, Any]:
    begin = time.perf_counter()
    import torch

    from benchmarks.contenders import CONTENDERS, UnavailableError, synchronise
    from benchmarks.rows import Case, all_rows

    device = torch.device(device_name)
    case = Case(all_rows()[row], device, chunk=FIRST_STEPS)
    imported, before = time.perf_counter(), peak_megabytes()
    try:
        runner = CONTENDERS[contender](case)
        runner.run(0, FIRST_STEPS)
        synchronise(device)
        stepped = time.perf_counter()
        runner.run(FIRST_STEPS, MORE_STEPS)
    except UnavailableError as reason:
        return {"reason": str(reason)}
    found = {
        "seconds": stepped - imported,
        "seconds with imports": stepped - begin,
        "peak MB": peak_megabytes(),
        "MB after imports": before,
    }
    if device.type == "cuda":
        found["peak MB on the device"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found


def peak_megabytes() -> float:
    """The largest resident size that this program has had; nan where the system does not tell."""
    try:  # Linux' getrusage counts what the parent held when it started this process
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 2**10
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    print(json.dumps(_main(*sys.argv[1:4])))
