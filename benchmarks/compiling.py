"""Seconds of compiling: `python -m benchmarks.compiling [NAME ...]`; the machine should be left alone meanwhile.

Each program is compiled twice in a process of its own, the step not being stored: on a machine that has compiled
nothing, and once more, with torch's compiler imported and its headers precompiled, for which it waits in between.
Seconds are those of `fit` for three steps, imports of pyrolvm not counted; those of processors, the C++ compiler's
among them but not those of precompiling the headers in the background, say more of a busy machine.
Results go to `results/compiling.md` and `.json`, in which rows that are not measured again stay.
`python -m benchmarks.compiling --child NAME` prints one row as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import machine

RESULTS = Path(__file__).parent / "results"
FIRST, FEW, SECONDS = 3, 20, 0.5
"""Steps of a run that compiles; steps that time an eager step; seconds of steps that time a compiled one."""
COLUMNS = {
    "operations": "operations",
    "compiled operations": "of which compiled",
    "estimate": "estimate, s",
    "new machine": "on a new machine, s",
    "new machine, processor": "of processors, s",
    "warm": "in a warm process, s",
    "warm, processor": "of processors, s",
    "eager": "eager step, us",
    "compiled": "compiled step, us",
    "auto": "auto compiles from, steps",
    "pays": "pays from, steps",
    "worst": "largest difference of the bounds",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure seconds of compiling.")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_child(options.names[0])))
        return
    from benchmarks.sequences import PROGRAMS

    path = RESULTS / "compiling.json"
    found = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    for name in options.names or PROGRAMS:
        found["rows"][name] = {"about": PROGRAMS[name].__doc__, **_measured(name)}
        found["machine"] = _machine()
        path.write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "compiling.md").write_text(_page(found, list(PROGRAMS)))
        print(name, found["rows"][name], flush=True)


def _machine() -> dict[str, Any]:
    import torch

    return machine.describe(torch.device("cpu"))


def _measured(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        surroundings = os.environ | {
            "PYROLVM_CACHE": f"{folder}/pyrolvm",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch",
        }
        command = [sys.executable, "-m", "benchmarks.compiling", "--child", name]
        done = subprocess.run(command, capture_output=True, text=True, env=surroundings, check=False)
    if done.returncode:
        return {"reason": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def _child(name: str) -> dict[str, Any]:
    """The first compilation is on a new machine; then the same again, its step not stored."""
    from pyrolvm.inference.engine import cache, native

    found: dict[str, Any] = {}
    _timed(name, "new machine", found)
    for thread in threading.enumerate():
        if isinstance(thread, native.Precompilation):
            thread.join()
    for path in cache.folder().glob("*.so"):
        path.unlink()
    found |= _steps(name, _timed(name, "warm", found))
    return found | {"pays": 1e6 * found["warm, processor"] / (found["eager"] - found["compiled"])}


def _timed(name: str, what: str, found: dict[str, Any]) -> Any:
    """Compile; note the seconds, and those of all processors, the compiler's among them. Returns the engine."""
    start, before = time.perf_counter(), sum(os.times()[:4])
    _, engine = _run(name, "compiled", FIRST)
    found[what], found[f"{what}, processor"] = time.perf_counter() - start, sum(os.times()[:4]) - before
    return engine


def _run(name: str, how: str, num_steps: int) -> tuple[Any, Any]:
    """(fitted, the compiled engine or None)."""
    from unittest import mock

    import torch

    import pyrolvm
    from benchmarks.sequences import PROGRAMS
    from pyrolvm.inference.engine import choose

    made = []

    class Seen(choose.CompiledEngine):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    torch.manual_seed(0)  # a model's parameters begin where they did
    given = PROGRAMS[name]()
    with mock.patch.object(choose, "CompiledEngine", Seen):
        fitted = pyrolvm.fit(
            given.model, given.data, engine=how, num_steps=num_steps, progress=False, **given.options
        )
    return fitted, made[0] if made else None


def _steps(name: str, engine: Any) -> dict[str, Any]:
    """What a step takes by either engine, and from how many on compiling is chosen and pays."""
    from pyrolvm.inference.engine import choose, folding, native

    traced, minibatch = engine._traced, engine.problem.minibatch
    estimate = native.seconds_to_compile(traced, minibatch)
    slow = _run(name, "eager", FEW)[0].history
    eager = _per_step(slow)
    few = _per_step(_run(name, "compiled", FEW)[0].history)
    fast = _run(name, "compiled", max(FEW, min(20_000, round(SECONDS / few))))[0].history
    compiled = _per_step(fast)
    return {
        "operations": len(traced.graph.graph.nodes),
        "compiled operations": folding.operations_to_compile(traced, minibatch),
        "estimate": estimate,
        "eager": 1e6 * eager,
        "compiled": 1e6 * compiled,
        "auto": choose.MARGIN * estimate / eager,
        "worst": float((fast["elbo"][:FEW] - slow["elbo"]).abs().max()),
    }


def _per_step(history: Any) -> float:
    """Seconds of a step, of the later half."""
    seconds = history["seconds"].to_numpy()
    half = len(seconds) // 2
    return float(seconds[-1] - seconds[half - 1]) / (len(seconds) - half)


def _page(found: dict[str, Any], names: list[str]) -> str:
    """The table in Markdown."""
    lines = ["# Seconds of compiling", "", __doc__.split("\n\n")[1].replace("\n", " "), "", "## Machine", ""]
    lines += [f"- {key}: {value}" for key, value in found["machine"].items()]
    lines += ["", "## Programs", "", f"| program | {' | '.join(COLUMNS.values())} |"]
    lines += ["| --- |" + " ---: |" * len(COLUMNS)]
    for name in names:
        row = found["rows"].get(name)
        if row is not None:
            cells = [row["reason"]] if "reason" in row else [_cell(row[key]) for key in COLUMNS]
            lines.append(f"| {row['about']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


if __name__ == "__main__":
    main()
