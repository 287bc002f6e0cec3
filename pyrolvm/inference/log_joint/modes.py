"""Modes of the log joint: L-BFGS from several places, then damped Newton steps, which also say whether it is a mode.

    step = H^-1 g,     decrement = g' H^-1 g / 2,      H = -(second derivatives), scaled to a unit diagonal

A point is a mode if the decrement, the nats that the quadratic model still promises, is below 1e-6, and H is positive
there. The mode and chol(H^-1) make coordinates in which the posterior is about a standard normal, whatever its units
(`Place`).

Where the latents are too many for H as a matrix, Newton's steps are taken by conjugate gradients (scipy's trust-ncg)
and the coordinates have a diagonal scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from pyrolvm.inference.log_joint.climbing import climb
from pyrolvm.inference.log_joint.function import LogJoint

STARTS = 4
RADIUS = 2.0
"""Starts are uniform in [-2, 2], as Stan's are."""
NEWTON_STEPS = 20
FLOOR = 1e-10
"""Least size of an eigenvalue of the scaled Hessian that Newton's steps divide by."""
DECREMENT, POSITIVE = 1e-6, 1e-9
SAME = 0.1
"""Standard deviations within which two modes are one."""
WITHIN = 15.0
"""Nats of Laplace's evidence that a mode may lie below the best one and still count."""
KEPT = 3
DENSE = 600
"""The most coordinates for which the Hessian is formed."""


@dataclass(frozen=True)
class Place:
    """Coordinates v around a point: u = location + scale_tril v.

    Attributes
    ----------
    location : tensor [dim]
    scale_tril : tensor [dim, dim], or [dim] for a diagonal one
    log_joint : float
        At the location, nats.
    is_mode : bool
    """

    location: Tensor
    scale_tril: Tensor
    log_joint: float
    is_mode: bool

    @property
    def sd(self) -> Tensor:
        """Standard deviation of each coordinate [dim] if v is standard normal."""
        return self.scale_tril if self.scale_tril.dim() == 1 else self.scale_tril.norm(dim=1)

    @property
    def log_scale(self) -> float:
        """log |scale_tril|."""
        diagonal = self.scale_tril if self.scale_tril.dim() == 1 else self.scale_tril.diagonal()
        return float(diagonal.log().sum())

    @property
    def log_evidence(self) -> float:
        """Laplace's estimate of log p(x), nats."""
        return self.log_joint + self.log_scale + 0.5 * len(self.location) * math.log(2 * math.pi)

    def times(self, v: Tensor) -> Tensor:
        """scale_tril v of v [..., dim]."""
        return v * self.scale_tril if self.scale_tril.dim() == 1 else v @ self.scale_tril.T


def find_modes(log_joint: LogJoint, seed: int) -> list[Place]:
    """The distinct modes reached from four starts, best first, at most three; empty if none is one."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Place] = []
    for _ in range(STARTS):
        u = (2 * torch.rand(log_joint.dim, generator=generator, dtype=torch.float64) - 1) * RADIUS
        place = mode_from(log_joint, u)
        if place is not None and not any(_same(place, other) for other in found):
            found.append(place)
    found.sort(key=lambda place: -place.log_evidence)
    return [p for p in found if p.log_evidence > found[0].log_evidence - WITHIN][:KEPT]


def mode_from(log_joint: LogJoint, u: Tensor) -> Place | None:
    """The mode uphill of u [dim], with coordinates; None if there is none or it was not reached."""

    def function(u: Tensor) -> tuple[float, Tensor]:
        value, slope = log_joint.slope(u)
        return float(value), slope

    end = climb(function, u, gradient_tolerance=1e-6).end
    if not math.isfinite(end.value):
        return None
    return (_newton if log_joint.dim <= DENSE else _newton_by_products)(log_joint, end.point)


def _newton(log_joint: LogJoint, u: Tensor) -> Place | None:
    value, slope = log_joint.slope(u)
    for _ in range(NEWTON_STEPS):
        H = -log_joint.hessian(u)
        if not bool(H.isfinite().all()):
            return None
        unit, eigenvalues, vectors = _scaled(H)
        step = unit * (vectors @ ((vectors.T @ (unit * slope)) / eigenvalues.abs().clamp_min(FLOOR)))
        decrement = float(slope @ step) / 2
        if decrement < DECREMENT:
            break
        moved = _damped(log_joint, u, float(value), slope, step)
        if moved is None:
            break
        u = moved
        value, slope = log_joint.slope(u)
    if decrement >= DECREMENT or float(eigenvalues.min()) <= POSITIVE:
        return None
    return Place(u, _tril(unit, eigenvalues, vectors), float(value), True)


def _scaled(H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(unit, eigenvalues, vectors) of unit H unit, whose diagonal is 1: columns of any scale are alike."""
    diagonal = H.diagonal().abs()
    unit = diagonal.clamp_min(torch.finfo(H.dtype).tiny * 1e20).rsqrt()
    eigenvalues, vectors = torch.linalg.eigh(unit[:, None] * H * unit)
    return unit, eigenvalues, vectors


def _tril(unit: Tensor, eigenvalues: Tensor, vectors: Tensor) -> Tensor:
    """chol(H^-1)."""
    root = vectors / eigenvalues.sqrt()
    return unit[:, None] * _lower(root)


def _lower(root: Tensor) -> Tensor:
    """The lower triangular L with L L' = root root', by QR, which keeps digits that the product would lose."""
    R = torch.linalg.qr(root.T).R
    return (R * R.diagonal().sign()[:, None]).T


def _damped(log_joint: LogJoint, u: Tensor, value: float, slope: Tensor, step: Tensor) -> Tensor | None:
    """The first of u + step, u + step / 2, ... that rises by a share of what its slope promises."""
    shares = 0.5 ** torch.arange(30, dtype=torch.float64)
    rise = 1e-4 * float(slope @ step)
    for part in shares.split(6):
        points = u + part[:, None] * step
        with torch.no_grad():
            values = log_joint(points)
        better = (values - value >= part * rise).nonzero()
        if len(better):
            return points[int(better[0])]
    return None


def _newton_by_products(log_joint: LogJoint, u: Tensor) -> Place | None:
    """The mode and a diagonal scale where H is too large: Newton's steps by conjugate gradients."""
    found = minimize(
        lambda x: tuple(-np.asarray(t) for t in log_joint.slope(torch.from_numpy(x))),
        u.numpy(),
        jac=True,
        hessp=lambda x, v: -log_joint.products(torch.from_numpy(x), torch.from_numpy(v)[None])[0].numpy(),
        method="trust-ncg",
        options={"gtol": 1e-5, "maxiter": 100},
    )
    u = torch.from_numpy(found.x)
    diagonal = -_diagonal(log_joint, u)
    value, slope = log_joint.slope(u)
    if not bool((diagonal > 0).all()) or float((slope**2 / diagonal).sum()) / 2 > DECREMENT * log_joint.dim:
        return None
    return Place(u, diagonal.rsqrt(), float(value), True)


def _diagonal(log_joint: LogJoint, u: Tensor) -> Tensor:
    parts = []
    for numbers in torch.arange(log_joint.dim).split(64):
        rows = torch.zeros(len(numbers), log_joint.dim, dtype=u.dtype)
        rows[torch.arange(len(numbers)), numbers] = 1.0
        parts.append(log_joint.products(u, rows).gather(1, numbers[:, None])[:, 0])
    return torch.cat(parts)


def _same(place: Place, other: Place) -> bool:
    """Within a tenth of a standard deviation along every coordinate."""
    return bool(((place.location - other.location).abs() < SAME * other.sd).all())
