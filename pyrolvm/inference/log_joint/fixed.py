"""Deterministic variational inference: the noise is drawn once and fixed, and an optimiser runs to its end.

With standard normals e_1, ..., e_M held, the bound is a function of a Gaussian guide's parameters alone,

    L_M(q) = (1 / M) sum_i log p(x, T(u_i)) + log |T'(u_i)| + entropy of q,      u_i = location + scale e_i,

which L-BFGS maximises until no entry of the gradient exceeds 1e-4 (in nats, for coordinates of about one standard
deviation). Then the draws are doubled, drawn afresh, until the optimum moves by no more than a tenth of a standard
deviation or of a log-sd, and its Monte Carlo error is below a twentieth. The error of a low rank is told by how far
doublings, two at the least, moved the optimum.

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
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyrolvm.inference.log_joint.climbing import Ascent, climb, rows_of
from pyrolvm.inference.log_joint.draws import fixed_normals, least_draws
from pyrolvm.inference.log_joint.families import DIAGONAL, FULL, LOW_RANK, POINT, Gaussian
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.modes import Place

GRADIENT = 1e-4
MOVES = 0.1
ERROR = 0.05
"""Monte Carlo error, in sds or log-sds, that is low enough."""
MOST_DRAWS, MOST_NUMBERS = 4096, 2**18
"""The most draws, and the most numbers in them, unless a full covariance needs more."""
REPLICATES = 8
"""Independent sets of draws that the Monte Carlo error is estimated from."""
MOST_CURVED, DIFFERENCE = 128, 1e-4
"""Parameters up to which errors take the curvature of the bound itself; step of its differences."""
FROM_DOUBLING = 3**-0.5
"""The error of an optimum on 2M draws over its distance from one on M others: sqrt(1/2) / sqrt(1 + 1/2)."""


class FixedBound:
    """L_M as a function of one vector of parameters, around a place.

    Parameters
    ----------
    log_joint : LogJoint
    place : Place
        Whose coordinates the location is in, and a full covariance.
    start : Gaussian
        Of the family's kind: its scales are the unit of the parameters' own.
    """

    def __init__(self, log_joint: LogJoint, place: Place, start: Gaussian) -> None:
        self.log_joint, self.place, self.start = log_joint, place, start
        self.dim = log_joint.dim
        self.rows, self.columns = torch.tril_indices(self.dim, self.dim, -1)

    @property
    def initial(self) -> Tensor:
        """The parameters of the start [size]."""
        parts = [torch.zeros(self.dim, dtype=torch.float64)]
        if self.start.kind != POINT:
            parts.append(torch.zeros(self.dim, dtype=torch.float64))
        if self.start.kind == FULL:
            parts.append(torch.zeros(len(self.rows), dtype=torch.float64))
        if self.start.kind == LOW_RANK:
            assert self.start.factor is not None
            parts.append(self.start.factor.reshape(-1))
        return torch.cat(parts)

    def gaussian(self, parameters: Tensor) -> Gaussian:
        """q at the parameters; differentiable."""
        location = self.place.location + self.place.times(parameters[: self.dim])
        if self.start.kind == POINT:
            return Gaussian(POINT, location)
        log_sd, rest = parameters[self.dim : 2 * self.dim], parameters[2 * self.dim :]
        if self.start.kind == FULL:
            tril = log_sd.exp().diag().index_put((self.rows, self.columns), rest)
            return Gaussian(FULL, location, scale_tril=self._unwhitened(tril))
        assert self.start.sd is not None
        sd = self.start.sd * log_sd.exp()
        if self.start.kind == DIAGONAL:
            return Gaussian(DIAGONAL, location, sd=sd)
        return Gaussian(LOW_RANK, location, sd=sd, factor=rest.reshape(self.dim, -1))

    def _unwhitened(self, tril: Tensor) -> Tensor:
        scale = self.place.scale_tril
        return scale[:, None] * tril if scale.dim() == 1 else scale @ tril

    def __call__(self, parameters: Tensor, normals: Tensor) -> tuple[float, Tensor]:
        """(bound in nats, gradient) at the parameters, on these draws."""
        at = parameters.clone().requires_grad_()
        with torch.enable_grad():
            q = self.gaussian(at)
            u = q.location[None] if q.kind == POINT else q.at(normals)
            values, slopes = self.log_joint.slope(u)
            entropy = _entropy(q)
            (gradient,) = torch.autograd.grad((u * slopes).sum() / len(u) + entropy, at)
        return float(values.mean() + entropy.detach()), gradient

    def products(self, parameters: Tensor, normals: Tensor, vectors: Tensor) -> Tensor:
        """Second derivatives of the bound times rows [rows, size], by differences of gradients."""
        size = 1e-4
        found = []
        for v in vectors:
            unit = size / float(v.norm().clamp_min(1e-300))
            up, down = (self(parameters + sign * unit * v, normals)[1] for sign in (1, -1))
            found.append((up - down) / (2 * unit))
        return torch.stack(found)


def _entropy(q: Gaussian) -> Tensor:
    """Entropy of q in nats; 0 of a point, whose bound is log p(x, z)."""
    if q.kind == POINT:
        return q.location.new_zeros(())
    constant = 0.5 * q.dim * (1 + math.log(2 * math.pi))
    if q.kind == FULL:
        assert q.scale_tril is not None
        return q.scale_tril.diagonal().log().sum() + constant
    assert q.sd is not None
    total = q.sd.log().sum() + constant
    if q.factor is None:
        return total
    eye = torch.eye(q.factor.shape[1], dtype=q.factor.dtype)
    return total + 0.5 * torch.linalg.slogdet(eye + q.factor.T @ q.factor).logabsdet


@dataclass(frozen=True)
class Optimum:
    """The end of a run on fixed draws.

    Attributes
    ----------
    q : Gaussian
    bound : FixedBound
    parameters, normals : tensor
        Where the bound is at its maximum, and its draws.
    elbo : float
        On fresh draws, nats; of a point, log p(x, z).
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
    elbo: float
    gradient: float
    fresh_gradient: float
    moved: float
    monte_carlo_error: float
    errors: Tensor
    log_sd_errors: Tensor
    history: list[dict[str, float]]

    @property
    def converged(self) -> bool:
        """Whether the gradient is flat, and the last doubling moved no more than a tenth of an sd."""
        return self.gradient <= 10 * GRADIENT and self.moved <= MOVES


def maximise(
    log_joint: LogJoint, place: Place, kind: str, rank: int, seed: int, num_draws: int | None = None
) -> Optimum:
    """The family's optimum near a place; `num_draws` fixes their number instead of doubling it."""
    start = Gaussian.around(place.location, place.scale_tril, kind, rank)
    bound = FixedBound(log_joint, place, start)
    began, history, parameters = time.perf_counter(), list[dict[str, float]](), bound.initial
    before, moved = start, math.inf
    M = num_draws or least_draws(start.num_normals, kind in (FULL, LOW_RANK))
    most = max(2 * M, min(MOST_DRAWS, MOST_NUMBERS // log_joint.dim))
    for doubling in range(20):
        normals = _normals(start, M, seed, doubling)
        found = climb(partial(_swapped, bound, normals), parameters, gradient_tolerance=GRADIENT)
        parameters = found.end.point
        history += rows_of(found, M, len(history), began)
        q = _detached(bound.gaussian(parameters))
        last, moved, before = moved, _moved(before, q) if doubling else math.inf, q
        if kind == POINT or num_draws is not None:
            last = moved = 0.0
        told = moved
        if kind == LOW_RANK and last < math.inf:
            # of its log-sds a single move says little: that before it counts, less what twice the draws leave of it
            told = max(moved, last * 0.5**0.5)
        optimum = _judged(bound, parameters, normals, q, found, moved, FROM_DOUBLING * told, history, seed)
        most_error = FROM_DOUBLING * (MOVES if kind == LOW_RANK else moved)
        done = moved <= MOVES and optimum.monte_carlo_error <= max(ERROR, most_error)
        done = done and (kind != LOW_RANK or doubling > 1)
        if done or num_draws is not None or most < 2 * M:
            break
        M *= 2
    return optimum


def _swapped(bound: FixedBound, normals: Tensor, parameters: Tensor) -> tuple[float, Tensor]:
    return bound(parameters, normals)


def _judged(
    bound: FixedBound,
    parameters: Tensor,
    normals: Tensor,
    q: Gaussian,
    found: Ascent,
    moved: float,
    by_moves: float,
    history: list[dict[str, float]],
    seed: int,
) -> Optimum:
    """The optimum with what fresh draws tell of it."""
    fresh = [_normals(q, len(normals), seed, 100 + r) for r in range(1 if q.kind == POINT else REPLICATES)]
    values, gradients = zip(*(bound(parameters, e) for e in fresh), strict=True)
    slopes = torch.stack(gradients)
    nothing = torch.zeros_like(q.location)
    # the bound of a low rank is all but flat along rotations of its factor: its curvature says nothing there
    if q.kind in (DIAGONAL, FULL) and slopes.shape[1] <= MOST_CURVED:
        errors, log_sd_errors = _curved_errors(bound, parameters, normals, slopes)
        relative = max(float((errors / q.scale).max()), float(log_sd_errors.max()))
    else:
        errors, log_sd_errors = _location_errors(bound.place, q, slopes[:, : bound.dim]), nothing
        relative = 0.0 if q.kind == POINT else float((errors / q.scale).max())
        relative = max(relative, by_moves)
    return Optimum(
        q,
        bound,
        parameters,
        normals,
        elbo=sum(values) / len(values),
        gradient=float(found.end.slope.abs().max()),
        fresh_gradient=float(torch.stack(gradients).mean(0).abs().max()),
        moved=moved,
        monte_carlo_error=relative,
        errors=errors,
        log_sd_errors=log_sd_errors,
        history=history,
    )


def _curved_errors(
    bound: FixedBound, parameters: Tensor, normals: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """Standard errors of location and log-sd [dim] from gradients on independent sets of draws [replicates, size].

    The optimum on other draws is off by K^-1 times their gradient here, K being minus the second derivatives.
    """

    def told(parameters: Tensor) -> Tensor:
        q = bound.gaussian(parameters)
        return torch.cat([q.location, q.scale.log()])

    K = _curvature(bound, parameters, normals)
    if not K.isfinite().all():  # a bound without an optimum, where parameters went off
        return K.new_full((bound.dim,), torch.nan), K.new_full((bound.dim,), torch.nan)
    moves = torch.linalg.lstsq(K, slopes.T).solution.T
    spread = (moves @ torch.func.jacrev(told)(parameters).T).square().mean(0).sqrt()
    return spread[: bound.dim], spread[bound.dim :]


def _curvature(bound: FixedBound, parameters: Tensor, normals: Tensor) -> Tensor:
    """Minus the second derivatives of the bound [parameters, parameters], by differences of its gradient."""
    rows = []
    for step in DIFFERENCE * torch.eye(len(parameters), dtype=parameters.dtype):
        rows.append(
            (bound(parameters - step, normals)[1] - bound(parameters + step, normals)[1]) / (2 * DIFFERENCE)
        )
    K = torch.stack(rows)
    return (K + K.T) / 2


def _location_errors(place: Place, q: Gaussian, slopes: Tensor) -> Tensor:
    """Standard errors of the location [dim] from its gradients on independent sets of draws [replicates, dim].

    As `_curved_errors` for many parameters and low ranks (the sandwich formula of DADVI, section 3.3, with sets of
    quasi-random draws in place of single ones): the inverse of the second derivatives is the covariance of a full
    Gaussian at its optimum, else that at the mode, which misses some where the posterior is skewed.
    """
    if q.kind == POINT:
        return torch.zeros_like(q.location)
    if q.kind in (FULL, LOW_RANK) and place.scale_tril.dim() == 2:
        # gradients with respect to v are A' times those with respect to u
        of_u = torch.linalg.solve_triangular(place.scale_tril.T, slopes.T, upper=True).T
        moves = of_u @ q.covariance
    else:
        moves = place.times(slopes)
    return moves.square().mean(0).sqrt()


def _normals(q: Gaussian, num_draws: int, seed: int, index: int) -> Tensor:
    if q.kind == POINT:
        return torch.zeros(1, q.dim, dtype=torch.float64)
    return fixed_normals(num_draws, q.num_normals, seed + 1000 * index)


def _moved(before: Gaussian, after: Gaussian) -> float:
    """The largest change of a coordinate's location in sds, or of its log-sd."""
    if after.kind == POINT:
        return 0.0
    location = (after.location - before.location).abs() / after.scale
    return float(torch.maximum(location, (after.scale / before.scale).log().abs()).max())


def _detached(q: Gaussian) -> Gaussian:
    parts = (q.sd, q.scale_tril, q.factor)
    return Gaussian(q.kind, q.location.detach(), *(None if p is None else p.detach() for p in parts))
