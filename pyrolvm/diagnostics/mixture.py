"""The aggregated posterior q(z) = (1/N) sum_n q(z | x_n), at draws of its own.

The datum that a draw came from stays in the mixture: with the empirical distribution of x the mixture is
exactly q(z), and log q(z | x_n) - log q(z) never exceeds log N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.diagnostics.pair import Pair, Values
from pyrolvm.inference.program.draws import BUDGET
from pyrolvm.inference.program.structure import sample_sites
from pyrolvm.progress import watched


@dataclass(frozen=True)
class MixtureDraws:
    """Draws of all local latents, one per datum and repetition.

    values: guide site -> [draws, plates with one row..., event...]; log_guide, log_prior: [draws], nats.
    """

    values: Values
    log_guide: Tensor
    log_prior: Tensor

    def __len__(self) -> int:
        return next(iter(self.values.values())).shape[0]

    @classmethod
    def of(cls, pair: Pair, model: Trace, guide: Trace, limit: int) -> MixtureDraws:
        """The first `limit` draws of every row of a pair of traces."""
        sites = [s for s in sample_sites(guide) if pair.is_local(s)]
        log_guide = pair.log_prob(guide, pair.is_local)[:limit]  # [draws, rows]
        log_prior = pair.log_prob(model, lambda s: pair.is_local(s) and not s["is_observed"])[:limit]
        values = {s["name"]: _as_draws(pair, s, limit) for s in sites}
        return cls(values, log_guide.flatten(), log_prior.expand_as(log_guide).flatten())

    def split(self, size: int) -> list[Values]:
        """The values in parts of `size` draws."""
        parts = {name: value.split(size) for name, value in self.values.items()}
        return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _as_draws(pair: Pair, site: dict[str, Any], limit: int) -> Tensor:
    """A site's value with the rows moved among the draws: [limit * rows, plates with one row..., event...]."""
    event_dims, plate = len(site["fn"].event_shape), pair.structure.data_plate
    assert plate is not None
    depth = pair.nesting + 1 + event_dims
    value = site["value"].reshape((1,) * (depth - site["value"].dim()) + tuple(site["value"].shape))
    position = pair.nesting + 1 + plate.dim
    rows = pair.batch.num_rows
    if value.shape[position] != rows:
        value = value.expand(*value.shape[:position], rows, *value.shape[position + 1 :])
    value = value[:limit].movedim(position, 1).flatten(0, 1)
    return value.unsqueeze(position)


def log_mixture(
    pairs: list[Pair], drawn: list[MixtureDraws], given: Values, *, progress: bool = False
) -> Tensor:
    """log (1/N) sum_n q(z | x_n) at every draw: [draws], float64, in nats; `pairs` hold the N rows."""
    found = [d.log_guide.new_full((len(d.log_guide),), -math.inf) for d in drawn]
    pieces = ((pair, index) for pair in pairs for index in range(len(drawn)))
    last, densities = None, None
    for pair, index in watched(pieces, "aggregated posterior", len(pairs) * len(drawn), enabled=progress):
        if pair is not last:
            last, densities = pair, _Densities(pair, given)
        assert densities is not None
        found[index] = torch.logaddexp(found[index], densities(drawn[index]))
    return torch.cat(found) - math.log(sum(p.batch.num_rows for p in pairs))


class _Densities:
    """log sum_m q(z | x_m) over the rows of one pair."""

    def __init__(self, pair: Pair, given: Values) -> None:
        self.pair, self.given = pair, given
        guide = pair.guide_at(given, 1)
        local = [s for s in sample_sites(guide) if pair.is_local(s)]
        # one site in one plate: its distribution does not depend on other draws, and the guide runs once
        self.fn: Any = local[0]["fn"] if len(local) == 1 and pair.nesting == 1 else None
        self.name = local[0]["name"]
        width = max(sum(max(1, math.prod(s["fn"].event_shape)) for s in local), 1)
        self.size = max(1, BUDGET // (pair.batch.num_rows * width))
        if self.fn is None and not pair.fitted.vectorized:
            self.size = 1

    def __call__(self, draws: MixtureDraws) -> Tensor:
        return torch.cat([self._log_prob(v).logsumexp(1) for v in draws.split(self.size)])

    def _log_prob(self, values: Values) -> Tensor:
        """log q(z | x_m): [draws, rows]."""
        if self.fn is not None:
            return self.fn.log_prob(values[self.name]).double()
        count = next(iter(values.values())).shape[0]
        rows = {name: self._for_all_rows(value) for name, value in values.items()}
        if count == 1:
            rows = {name: value.squeeze(0) for name, value in rows.items()}
        return self.pair.log_prob(self.pair.guide_at({**self.given, **rows}, count), self.pair.is_local)

    def _for_all_rows(self, value: Tensor) -> Tensor:
        plate = self.pair.structure.data_plate
        assert plate is not None
        position = self.pair.nesting + 1 + plate.dim
        return value.expand(*value.shape[:position], self.pair.batch.num_rows, *value.shape[position + 1 :])
