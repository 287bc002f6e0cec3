"""Training from a file larger than is held in memory: `python -m benchmarks.large_data --rows 10000000`.

Writes N rows of 64 float32 features to a temporary npy file, maps it, fits PPCA in minibatches and reports the
process's own memory (VmRSS less what is mapped from files) before and after.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

import pyrolvm
from pyrolvm.data import read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "large_data.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "rows.npy"
        _write(path, options.rows)
        before, start = _memory(), time.perf_counter()
        data = read(str(path), mmap=True)
        fitted = pyrolvm.fit(
            pyrolvm.PPCA(64, 8),
            data,
            batch_size=256,
            num_steps=options.steps,
            learning_rate=0.01,
            engine="compiled",
        )
        record = {
            "rows": options.rows,
            "file_megabytes": path.stat().st_size / 2**20,
            "steps": options.steps,
            "seconds": time.perf_counter() - start,
            "own_memory_before_megabytes": before,
            "own_memory_after_megabytes": _memory(),
            "elbo": fitted.elbo,
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(options.out.read_text())


def _write(path: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, 64))
    loadings = rng.standard_normal((8, 64), dtype=np.float32)
    for first in range(0, rows, 100_000):
        size = min(100_000, rows - first)
        z = rng.standard_normal((size, 8), dtype=np.float32)
        file[first : first + size] = z @ loadings + 0.5 * rng.standard_normal((size, 64), dtype=np.float32)
    file.flush()


def _memory() -> float:
    """Anonymous resident memory of this process, MiB: without pages mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
