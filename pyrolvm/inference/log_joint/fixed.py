"""Deterministic variational inference: the noise is drawn once and fixed, and an optimiser runs to its end.

With standard normals e_1, ..., e_M held, the bound is a function of a Gaussian guide's parameters alone,

    L_M(q) = (1 / M) sum_i log p(x, T(u_i)) + log |T'(u_i)| + entropy of q,      u_i = location + scale e_i,

which L-BFGS maximises until no entry of the gradient exceeds 1e-4 (in nats, for coordinates of about one standard
deviation). Then the draws are doubled, drawn afresh, until the optimum moves by no more than a tenth of a standard
deviation or of a log-sd, and its Monte Carlo error is below a twentieth. A low rank has several optima (`low_rank`):
each is climbed to, and where the bound cannot tell two apart their distance is part of the error.

Whitened coordinates, u = mode + chol(H^-1) v, make this a matter of a few iterations whatever the units; a Gaussian
with a full covariance is the same family there. A mean field is not, so that it keeps the axes of u and has its
location alone whitened.

Giordano, Ingram and Broderick (2024), "Black box variational inference with a deterministic objective: faster, more
accurate, and even more black box", JMLR 25(18). Burroni, Domke and Sheldon (2024), "Sample average approximation for
black-box VI", UAI.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrolvm.inference.log_joint.climbing import Ascent, climb, rows_of
from pyrolvm.inference.log_joint.draws import fixed_normals, least_draws
from pyrolvm.inference.log_joint.families import FULL, LOW_RANK, POINT, Gaussian
from pyrolvm.inference.log_joint.fixed_bound import FixedBound
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.modes import Place
from pyrolvm.inference.log_joint.monte_carlo import curved_errors, location_errors

GRADIENT = 1e-4
MOVES = 0.1
ERROR = 0.05
"""Monte Carlo error, in sds or log-sds, that is low enough."""
MOST_DRAWS, MOST_NUMBERS = 4096, 2**18
"""The most draws, and the most numbers in them, unless a full covariance needs more."""
REPLICATES = 8
"""Independent sets of draws that the Monte Carlo error is estimated from."""
MOST_CURVED = 128
"""Parameters up to which errors take the curvature of the bound itself."""
TIED = 3.0
"""Standard errors of the difference of two optima's bounds within which neither is the better."""
FROM_DOUBLING = 3**-0.5
"""The error of an optimum on 2M draws over its distance from one on M others: sqrt(1/2) / sqrt(1 + 1/2)."""


@dataclass(frozen=True)
class Optimum:
    """The end of a run on fixed draws.

    Attributes
    ----------
    q : Gaussian
    bound : FixedBound
    parameters, normals : tensor
        Where the bound is at its maximum, and its draws.
    values : tensor [replicates]
        Of the bound on sets of fresh draws, nats; of a point, log p(x, z).
    gradient : float
        Largest entry at the end, on the fixed draws.
    fresh_gradient : float
        The same on fresh draws.
    moved : float
        How far the last doubling moved the optimum, in sds or log-sds; 0 of a point.
    monte_carlo_error : float
        The largest over coordinates, of the location in sds or of the log-sd.
    errors : tensor [dim]
        That of each coordinate's location, in its own units.
    log_sd_errors : tensor [dim]
        That of its log-sd; 0 where it is not estimated but by what the last doubling moved.
    history : list of dict
    """

    q: Gaussian
    bound: FixedBound
    parameters: Tensor
    normals: Tensor
    values: Tensor
    gradient: float
    fresh_gradient: float
    moved: float
    monte_carlo_error: float
    errors: Tensor
    log_sd_errors: Tensor
    history: list[dict[str, float]]

    @property
    def elbo(self) -> float:
        """The bound on fresh draws, nats."""
        return float(self.values.mean())

    @property
    def converged(self) -> bool:
        """Whether the gradient is flat, and the last doubling moved no more than a tenth of an sd."""
        return self.gradient <= 10 * GRADIENT and self.moved <= MOVES


def maximise(
    log_joint: LogJoint, place: Place, kind: str, rank: int, seed: int, num_draws: int | None = None
) -> Optimum:
    """The family's optimum near a place; `num_draws` fixes their number instead of doubling it."""
    start, *rivals = Gaussian.all_around(place.location, place.scale_tril, kind, rank)
    climbing = _Climb(FixedBound(log_joint, place, start), seed, [], time.perf_counter())
    parameters, before, moves = climbing.bound.initial, start, [math.inf]
    M = num_draws or least_draws(start.dim, kind in (FULL, LOW_RANK))
    most = max(2 * M, min(MOST_DRAWS, MOST_NUMBERS // log_joint.dim))
    for doubling in range(20):
        found = climbing(parameters, M, doubling)
        parameters = found.end.point
        q = _detached(climbing.bound.gaussian(parameters))
        moves.append(_moved(before, q) if doubling else math.inf)
        before = q
        if kind == POINT or num_draws is not None:
            moves = [0.0]
        last = num_draws is not None or most < 2 * M
        if moves[-1] <= MOVES or last:
            optimum = climbing.judged(found, M, doubling, moves)
            if last or optimum.monte_carlo_error <= max(ERROR, FROM_DOUBLING * moves[-1]):
                break
        M *= 2
    others = []
    for rival in rivals:
        found = climbing(climbing.bound.beside(parameters, rival), M, doubling)
        others.append(climbing.judged(found, M, doubling, moves))
    return _best(optimum, others)


@dataclass(frozen=True)
class _Climb:
    """Climbs of one bound on numbered sets of draws."""

    bound: FixedBound
    seed: int
    history: list[dict[str, float]]
    began: float

    def __call__(self, parameters: Tensor, num_draws: int, index: int) -> Ascent:
        normals = self._normals(num_draws, index)
        found = climb(lambda p: self.bound(p, normals), parameters, gradient_tolerance=GRADIENT)
        self.history.extend(rows_of(found, num_draws, len(self.history), self.began))
        return found

    def _normals(self, num_draws: int, index: int) -> Tensor:
        if self.bound.start.kind == POINT:
            return torch.zeros(1, self.bound.dim, dtype=torch.float64)
        return fixed_normals(num_draws, self.bound.dim, self.seed + 1000 * index)

    def judged(self, found: Ascent, num_draws: int, index: int, moves: list[float]) -> Optimum:
        """The optimum with what fresh draws tell of it."""
        bound, parameters = self.bound, found.end.point
        q, normals = _detached(bound.gaussian(parameters)), self._normals(num_draws, index)
        fresh = [self._normals(num_draws, 100 + r) for r in range(1 if q.kind == POINT else REPLICATES)]
        values, gradients = zip(*(bound(parameters, e) for e in fresh), strict=True)
        slopes = torch.stack(gradients)
        if q.kind != POINT and slopes.shape[1] <= MOST_CURVED:
            errors, log_sd_errors = curved_errors(
                lambda p: bound(p, normals)[1], bound.gaussian, parameters, slopes, bound.turns(parameters)
            )
            by_moves = 0.0
        else:
            errors = location_errors(bound.place, q, slopes[:, : bound.dim])
            log_sd_errors, by_moves = torch.zeros_like(errors), FROM_DOUBLING * moves[-1]
        return Optimum(
            q,
            bound,
            parameters,
            normals,
            values=torch.tensor(values, dtype=torch.float64),
            gradient=float(found.end.slope.abs().max()),
            fresh_gradient=float(slopes.mean(0).abs().max()),
            moved=moves[-1],
            monte_carlo_error=max(_largest(errors, log_sd_errors, q), by_moves),
            errors=errors,
            log_sd_errors=log_sd_errors,
            history=self.history,
        )


def _largest(locations: Tensor, log_sds: Tensor, q: Gaussian) -> float:
    """Of errors in sds and of log-sds."""
    if q.kind == POINT:
        return 0.0
    return float(torch.maximum(locations / q.scale, log_sds).max())


def _best(first: Optimum, others: list[Optimum]) -> Optimum:
    """That of the best bound on fresh draws; how far others are that may be as good counts in its error."""
    best = max([first, *others], key=lambda o: o.elbo)
    errors, log_sd_errors = best.errors, best.log_sd_errors
    for other in [first, *others]:
        short = best.values - other.values
        if other is not best and float(short.mean()) <= TIED * float(short.std()) / len(short) ** 0.5:
            errors = torch.maximum(errors, (best.q.location - other.q.location).abs())
            log_sd_errors = torch.maximum(log_sd_errors, (best.q.scale / other.q.scale).log().abs())
    error = max(best.monte_carlo_error, _largest(errors, log_sd_errors, best.q))
    return replace(best, errors=errors, log_sd_errors=log_sd_errors, monte_carlo_error=error)


def _moved(before: Gaussian, after: Gaussian) -> float:
    """The largest change of a coordinate's location in sds, or of its log-sd."""
    if after.kind == POINT:
        return 0.0
    location = (after.location - before.location).abs() / after.scale
    return float(torch.maximum(location, (after.scale / before.scale).log().abs()).max())


def _detached(q: Gaussian) -> Gaussian:
    parts = (q.sd, q.scale_tril, q.factor)
    return Gaussian(q.kind, q.location.detach(), *(None if p is None else p.detach() for p in parts))
