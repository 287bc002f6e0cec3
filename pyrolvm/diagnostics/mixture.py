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

from pyrolvm.inference.program.pair import BUDGET, Pair, Values, inverse_needed
from pyrolvm.inference.program.structure import rows_dim, sample_sites
from pyrolvm.progress import watched


@dataclass(frozen=True)
class MixtureDraws:
    """Draws of all local latents, one per datum and repetition.

    Attributes
    ----------
    values : dict
        Guide site -> [draws, plates with one row..., event...].
    log_guide, log_prior : tensor [draws]
        log q(z | x) of the row that each was drawn for, and log p(z); nats.
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


def _as_draws(pair: Pair, site: Any, limit: int) -> Tensor:
    """A site's value with the rows moved among the draws: [limit * rows, plates with one row..., event...]."""
    depth = pair.structure.max_plate_nesting + 1 + len(site["fn"].event_shape)
    value = site["value"].reshape((1,) * (depth - site["value"].dim()) + tuple(site["value"].shape))
    rows = _row_dim(pair, site)
    return _for_all_rows(pair, value[:limit], rows).movedim(rows, 1).flatten(0, 1).unsqueeze(rows)


def _row_dim(pair: Pair, site: Any) -> int:
    """The dimension of the rows of a local site, counted from that of the draws."""
    rows = rows_dim(site, pair.structure.data_plate)
    assert rows is not None  # see `local_sites`
    return pair.structure.max_plate_nesting + 1 + rows


def _for_all_rows(pair: Pair, value: Tensor, position: int) -> Tensor:
    """A value of one row, or of all already, given to all rows of `pair`, which stand at `position`."""
    return value.expand(*value.shape[:position], pair.num_rows, *value.shape[position + 1 :])


def log_mixture(
    pairs: list[Pair], drawn: list[MixtureDraws], given: Values, *, progress: bool = False
) -> Tensor:
    """log (1/N) sum_n q(z | x_n) at every draw: [draws], float64, in nats; `pairs` hold the N rows."""
    found = [d.log_guide.new_full((len(d.log_guide),), -math.inf) for d in drawn]
    for pair in watched(pairs, "aggregated posterior", len(pairs), enabled=progress):
        densities = _Densities(pair, given)
        found = [torch.logaddexp(f, densities(d)) for f, d in zip(found, drawn, strict=True)]
    return torch.cat(found) - math.log(sum(p.num_rows for p in pairs))


class _Densities:
    """log sum_m q(z | x_m) over the rows of one pair."""

    def __init__(self, pair: Pair, given: Values) -> None:
        self.pair, self.given = pair, given
        local = [s for s in sample_sites(pair.guide(given=given)) if pair.is_local(s)]
        self.rows = {s["name"]: _row_dim(pair, s) for s in local}
        # one site in one plate: its distribution does not depend on other draws, and the guide runs once
        alone = len(local) == 1 and pair.structure.max_plate_nesting == 1
        self.fn: Any = local[0]["fn"] if alone else None
        width = max(sum(math.prod(s["fn"].event_shape) for s in local), 1)
        self.size = max(1, BUDGET // (pair.num_rows * width)) if alone or pair.vectorized else 1

    def __call__(self, draws: MixtureDraws) -> Tensor:
        return torch.cat([self._log_prob(v).logsumexp(1) for v in draws.split(self.size)])

    def _log_prob(self, values: Values) -> Tensor:
        """log q(z | x_m): [draws, rows]."""
        if self.fn is not None:
            ((name, value),) = values.items()
            with inverse_needed(name):
                return self.fn.log_prob(value).double()
        rows = {name: _for_all_rows(self.pair, value, self.rows[name]) for name, value in values.items()}
        count: int | None = len(next(iter(rows.values())))
        if not self.pair.vectorized:
            rows, count = {name: value.squeeze(0) for name, value in rows.items()}, None
        return self.pair.log_prob(self.pair.guide(count, given={**self.given, **rows}), self.pair.is_local)
