"""How many rows and draws of a fit a file for ArviZ takes, so that it is written in a minute and can be opened."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from pyrolvm.diagnostics.collect import numbers_per_draw
from pyrolvm.diagnostics.guide_quality import looked_at
from pyrolvm.diagnostics.inference_data import GROUPS
from pyrolvm.diagnostics.measures import Measure, noise
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.pair import Pair

NUMBERS = 2**28
"""Numbers in a file: a gibibyte in single precision."""
OPERATIONS = 1e12
"""Operations of matrix products and convolutions for all draws of the prior: about a minute of one core."""


class Extent(NamedTuple):
    """What a file takes of a fit; all of it if `sentence` is empty.

    Attributes
    ----------
    rows : list of int or None
        Numbers of the rows; None for all.
    num_samples, prior_samples : int
        Draws of the guide and of the prior.
    sentence : str
        What was left out, and why.
    """

    rows: list[int] | None
    num_samples: int
    prior_samples: int
    sentence: str


def affordable(
    fitted: FittedModel, pair: Pair, num_samples: int = 500, max_rows: int = 2000, seed: int = 0
) -> Extent:
    """All rows and `num_samples` draws of each, or as much of them as `NUMBERS` and `OPERATIONS` allow.

    The rows are then those that `diagnose` looks at one by one with the same `max_rows` and `seed`.
    """
    part, rows, structure = pair, None, fitted.structure
    if numbers_per_draw(structure, pair.num_rows, GROUPS) * num_samples > NUMBERS:
        part, chosen = looked_at(pair, max_rows, seed)
        rows = chosen.tolist() if part.num_rows < pair.num_rows else None
    draws = max(1, min(num_samples, NUMBERS // numbers_per_draw(structure, part.num_rows, GROUPS)))
    operations = _operations(part, seed) * part.num_rows
    prior = draws if operations * draws <= OPERATIONS else max(1, int(OPERATIONS / operations))
    return Extent(rows, draws, prior, _sentence(part, pair, num_samples, draws, prior))


@torch.no_grad()
def _operations(pair: Pair, seed: int) -> float:
    """What a draw of one row from the model costs, by a run on a few rows."""
    few = next(pair.split(8))
    with noise(pair, seed, Measure.EXPORT), FlopCounterMode(display=False) as counter:
        few.model()
    return counter.get_total_flops() / max(1, few.num_rows)


def _sentence(part: Pair, pair: Pair, wanted: int, draws: int, prior: int) -> str:
    found = []
    if part.num_rows < pair.num_rows:
        found.append(f"{part.num_rows:,} of {pair.num_rows:,} rows, drawn at random")
    if draws < wanted:
        found.append(
            f"{draws} draws rather than {wanted}, to keep the file below {4 * NUMBERS / 2**30:.0f} GiB"
        )
    if prior < draws:
        found.append(f"{prior} draws of the prior rather than {draws}, which would take minutes")
    return "; ".join(found)
