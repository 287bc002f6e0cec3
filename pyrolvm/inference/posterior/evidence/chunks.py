"""Chunks of an estimate: some rows and draws at a time, within a memory budget."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pyro.poutine.trace_struct import Trace

from pyrolvm.inference.program.pair import Pair, Values
from pyrolvm.inference.program.structure import Site

BUDGET = 2**20
"""Numbers that one evaluation of (draw x datum x feature) may hold: few MB, near the processor's cache."""

ACCELERATED = 64
"""How many times that on a GPU, where launches cost more than numbers."""


def joint_draws(
    pair: Pair, num_draws: int, given: Values | None = None
) -> Iterator[tuple[Trace, Trace, int]]:
    """(model trace, guide trace, number of draws) in parts that add up to `num_draws`, within the memory budget."""
    size = pair.at_once(num_draws)
    for first in range(0, num_draws, size):
        count = min(size, num_draws - first)
        yield *pair.draw(count if pair.vectorized else None, given), count


def evidence_chunks(pair: Pair, num_samples: int) -> Iterator[tuple[Pair, int]]:
    """Yield (the pair on some rows, draws at once) until all rows are done."""
    rows, at_once = chunk_sizes(pair, len(pair.batch.indices), num_samples)
    if not pair.vectorized and not pair.can_repeat:
        at_once = 1
    for part in pair.split(rows):
        yield part, at_once


def chunk_sizes(pair: Pair, num_rows: int, num_samples: int) -> tuple[int, int]:
    """(rows, draws) of one evaluation of `num_rows` rows like the pair's, within the budget.

    Few rows and many draws, because the guide's network runs once per row for all its draws. Global latents are
    drawn once per draw, not per row: with them, enough rows to match their size. Programs that run on no other
    number of rows get all rows.
    """
    structure, device = pair.structure, pair.device
    budget = BUDGET * (1 if device.type == "cpu" else ACCELERATED)
    size = structure.data_plate.size if structure.data_plate else 1
    per_row = max(1, pair.width + sum(map(_numel, structure.local_latents)) // size)
    per_draw = sum(map(_numel, structure.global_latents))
    rows = min(num_rows, max(1, budget // (per_row * num_samples), min(per_draw, budget) // per_row))
    if not structure.chunkable:
        rows = num_rows
    return rows, max(1, min(num_samples, budget // (rows * per_row + per_draw)))


def _numel(site: Site) -> int:
    return math.prod(site.batch_shape) * math.prod(site.event_shape)
