"""Data in many files and larger than is held in memory: `python -m benchmarks.far_data --rows 20000000`.

Writes N rows of 64 float32 columns to 40 parquet files of row groups of 50,000 rows. Then, each in a process of its
own, standardises by one pass, fits PPCA for one pass, reads the share of one of two processes, and writes the codes of
all rows. What is measured of each: seconds, the process's own memory (VmRSS less what is mapped from files) at its
highest, sampled every 50 ms, and the bytes of values that were read beside those that there are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NUM_COLUMNS, FILES, GROUP_ROWS = 64, 40, 50_000
BATCH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000_000, 20_000_000])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "far_data.json")
    options = parser.parse_args()
    table = [line for rows in options.rows for line in _measured(rows, options.folder)]
    options.out.write_text(json.dumps(table, indent=2) + "\n")
    print(options.out.read_text())


def _measured(rows: int, where: Path | None) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=where) as folder:
        _apart(write, folder, rows)
        sizes = [p.stat().st_size for p in Path(folder).glob("*.parquet")]
        tasks = (
            ("standardise", standardise),
            ("fit", fit),
            ("fit, one of 2 processes", share),
            ("encode", encode),
        )
        found = []
        for name, task in tasks:
            line = {"task": name, "rows": rows, "files_megabytes": sum(sizes) / 2**20} | _apart(task, folder)
            print(json.dumps(line), flush=True)
            found.append(line)
        return found


def _apart(task: Callable[..., Any], *arguments: Any) -> Any:
    """What a task returns in a process of its own, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(task, arguments)


def write(folder: str, rows: int) -> None:
    """Rows of PPCA with 8 latents, at different places and scales."""
    import pyarrow as pa
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    loadings = rng.standard_normal((8, NUM_COLUMNS), dtype=np.float32)
    names = [f"x{i:02d}" for i in range(NUM_COLUMNS)]
    schema = pa.schema([(name, pa.float32()) for name in names])
    for number, size in enumerate(np.diff(np.linspace(0, rows, FILES + 1).astype(int))):
        with parquet.ParquetWriter(
            f"{folder}/part-{number:02d}.parquet", schema, compression="none", use_dictionary=False
        ) as file:
            for first in range(0, size, GROUP_ROWS):
                shape = (min(GROUP_ROWS, size - first), 8)
                x = rng.standard_normal(shape, dtype=np.float32) @ loadings + 3
                x += 0.5 * rng.standard_normal(x.shape, dtype=np.float32)
                file.write_table(pa.table([pa.array(c) for c in np.ascontiguousarray(x.T)], schema=schema))


class Watch:
    """Seconds, the highest memory, and the bytes of values read, of what is done inside."""

    def __init__(self, data: Any) -> None:
        self.read, own = 0, data.blocks.read
        self.total = data.num_bytes

        def read(block: Any) -> Any:
            values, labels = own(block)
            self.read += values.nbytes
            return values, labels

        data.blocks.read = read
        self.before = self.highest = _memory()
        self.start, self._done = time.perf_counter(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.highest = max(self.highest, _memory())

    def record(self, **more: Any) -> dict[str, Any]:
        self._done.set()
        return {
            "seconds": time.perf_counter() - self.start,
            "own_memory_before_megabytes": self.before,
            "own_memory_highest_megabytes": self.highest,
            "values_megabytes": self.total / 2**20,
            "read_of_values": self.read / self.total,
        } | more


def _scanned(folder: str) -> Any:
    import pyrolvm
    from pyrolvm.data import scan

    assert pyrolvm.fit is not None  # what importing takes is no part of the measurement
    return scan(f"{folder}/*.parquet")


def standardise(folder: str) -> dict[str, Any]:
    data = _scanned(folder)
    watch = Watch(data)
    _, transform = data.standardise()
    return watch.record(largest_offset=float(np.abs(transform.offset).max()))


def fit(folder: str) -> dict[str, Any]:
    import pyrolvm

    data = _scanned(folder)
    watch = Watch(data)
    model = pyrolvm.PPCA(NUM_COLUMNS, 8)
    options: Any = {"num_epochs": 1, "batch_size": BATCH, "learning_rate": 0.002, "engine": "compiled"}
    fitted = pyrolvm.fit(model, data, **options)
    record = watch.record(steps=len(fitted.history), elbo=fitted.elbo)
    fitted.save(f"{folder}/run")
    return record


def share(folder: str) -> dict[str, Any]:
    """The rows that the second of two processes takes in one pass, without the steps."""
    import torch

    import pyrolvm
    from pyrolvm.inference.program.program import Program
    from pyrolvm.inference.training.streaming import stream
    from pyrolvm.processes import Processes

    data = _scanned(folder)
    watch = Watch(data)
    program = Program(pyrolvm.PPCA(NUM_COLUMNS, 8), None, device=torch.device("cpu"), dtype=torch.float32)
    plan = stream(program, data, BATCH, 0, Processes(1, 2)).plan
    step, steps = 0, plan.num_steps(1)
    while step < steps:
        size = plan.most_steps(step, steps - step)
        plan.rows(step, size)
        step += size
    return watch.record(steps=steps)


def encode(folder: str) -> dict[str, Any]:
    import pyrolvm

    fitted, data = pyrolvm.load(f"{folder}/run"), _scanned(folder)
    watch = Watch(data)
    answers = pyrolvm.write_answers(fitted, data, f"{folder}/codes.npy", progress=False)
    return watch.record(answers=answers.num_rows)


def _memory() -> float:
    """Anonymous resident memory of this process, MiB: without pages mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
