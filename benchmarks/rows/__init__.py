"""The rows of the table, in its order."""

from __future__ import annotations

import functools
from fnmatch import fnmatch

from benchmarks.rows import factors, image_systems, mixture, ppca, radon, schools, small_systems, vae
from benchmarks.rows.base import Case, Row

PARTS = (ppca, mixture, factors, schools, radon, vae, image_systems, small_systems)


@functools.cache
def all_rows() -> dict[str, Row]:
    """Name -> row."""
    found = (row for part in PARTS for row in part.rows())
    return {row.name: row for row in found}


def chosen(patterns: list[str] | None) -> list[Row]:
    """The rows whose names match any of the shell patterns; all without patterns.

    Raises `SystemExit` for a pattern that matches nothing.
    """
    rows = all_rows()
    for pattern in patterns or ():
        if not any(fnmatch(name, pattern) for name in rows):
            raise SystemExit(f"no row is called {pattern!r}; there are: {', '.join(rows)}")
    return [r for n, r in rows.items() if not patterns or any(fnmatch(n, p) for p in patterns)]


SWEEPS = {
    "rows of the data (PPCA, 64 columns, all rows at each step)": (
        ppca.by_num_rows,
        (64, 256, 1024, 4096, 16384),
    ),
    "columns of the data (PPCA, batch 256)": (ppca.by_data_dim, (16, 64, 256, 1024)),
    "particles (PPCA, IWAE, batch 256)": (ppca.iwae, (1, 2, 5, 10, 20, 50)),
}
"""Title -> (value -> row, values): cost against one size."""

CUDA_SWEEPS = {
    "rows of the batch (VAE 784-400-20)": (vae.by_batch, (256, 1024, 4096, 16384, 65536)),
}

__all__ = ["CUDA_SWEEPS", "SWEEPS", "Case", "Row", "all_rows", "chosen"]
