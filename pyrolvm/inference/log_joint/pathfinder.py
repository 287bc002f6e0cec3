"""Pathfinder: normal approximations along quasi-Newton paths, and the best of them.

A path is a run of L-BFGS on the log joint from a random start. At each of its points theta with gradient g, the last
pairs of moves and changes of gradient, S and Z [dim, J], give an estimate of the inverse Hessian,

    Sigma = diag(alpha) + beta gamma beta',     beta = [diag(alpha) Z, S],      N(theta + Sigma g, Sigma),

and the one with the best bound stands for the path. Several paths are weighed together: draws of the mixture of all
paths are resampled by their Pareto-smoothed weights.

Zhang, Carpenter, Gelman and Vehtari (2022), "Pathfinder: parallel quasi-Newton variational inference", JMLR 23(306).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolvm.inference.log_joint.climbing import Ascent, climb
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.modes import RADIUS, Place

PATHS = 8
HISTORY = 6
"""Pairs of an estimate (the paper's J)."""
ELBO_DRAWS = 32
CURVED = 1e-12
"""A pair counts if the move and the change of gradient are this much alike (the paper's epsilon)."""


@dataclass(frozen=True)
class Normal:
    """N(location, Sigma) with Sigma = root (I + Q (L L' - I) Q') root, root = diag(alpha)^(1/2), Q' Q = I.

    Attributes
    ----------
    location, root : tensor [dim]
    Q : tensor [dim, 2 J]
    L : tensor [2 J, 2 J], lower triangular
    elbo : float
        Nats.
    """

    location: Tensor
    root: Tensor
    Q: Tensor
    L: Tensor
    elbo: float = -math.inf

    @property
    def log_scale(self) -> float:
        """Half the log determinant of Sigma."""
        return float(self.root.log().sum() + self.L.diagonal().log().sum())

    def at(self, z: Tensor) -> Tensor:
        """u [..., dim] of standard normals."""
        inside = z @ self.Q
        return self.location + self.root * (z + (inside @ self.L.T - inside) @ self.Q.T)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log-density [...] of u [..., dim]."""
        z = (u - self.location) / self.root
        inside = z @ self.Q
        solved = torch.linalg.solve_triangular(self.L, inside.reshape(-1, len(self.L)).T, upper=False).T
        squares = z.square().sum(-1) - inside.square().sum(-1) + solved.reshape(inside.shape).square().sum(-1)
        return -0.5 * squares - self.log_scale - 0.5 * len(self.location) * math.log(2 * math.pi)

    def place(self, log_joint: LogJoint) -> Place:
        """Coordinates in which this is the standard normal."""
        eye = torch.eye(len(self.location), dtype=self.location.dtype)
        root = (self.at(eye) - self.location).T
        R = torch.linalg.qr(root.T).R
        value = float(log_joint.slope(self.location)[0])
        return Place(self.location, (R * R.diagonal().sign()[:, None]).T, value, False)


def find_paths(log_joint: LogJoint, seed: int, num_paths: int = PATHS) -> list[Normal]:
    """The best normal of each path that found one, best bound first."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(ELBO_DRAWS, log_joint.dim, generator=generator, dtype=torch.float64)
    found = []
    for _ in range(num_paths):
        u = (2 * torch.rand(log_joint.dim, generator=generator, dtype=torch.float64) - 1) * RADIUS
        best = best_along(log_joint, _path(log_joint, u), z)
        if best is not None:
            found.append(best)
    return sorted(found, key=lambda normal: -normal.elbo)


def _path(log_joint: LogJoint, u: Tensor) -> Ascent:
    def function(u: Tensor) -> tuple[float, Tensor]:
        value, slope = log_joint.slope(u)
        return float(value), slope

    return climb(function, u, gradient_tolerance=1e-8, iterations=200, evaluations=600)


def best_along(log_joint: LogJoint, path: Ascent, z: Tensor) -> Normal | None:
    """The normal with the best bound, estimated from z [draws, dim]; None if none has a finite one."""
    best = None
    for normal in normals_along(path):
        u = normal.at(z)
        with torch.no_grad():
            elbo = float((log_joint(u) - normal.log_prob(u)).mean())
        if math.isfinite(elbo) and (best is None or elbo > best.elbo):
            best = Normal(normal.location, normal.root, normal.Q, normal.L, elbo)
    return best


def normals_along(path: Ascent) -> Iterator[Normal]:
    """The normal at each point of a path after the first."""
    alpha = torch.ones_like(path.end.point)
    moves: list[Tensor] = []
    changes: list[Tensor] = []
    for before, after in zip(path.steps, path.steps[1:], strict=False):
        s, z = after.point - before.point, before.slope - after.slope
        if float(s @ z) > CURVED * float(z @ z):
            alpha = _diagonal(alpha, s, z)
            moves, changes = [*moves, s][-HISTORY:], [*changes, z][-HISTORY:]
        if moves and (normal := _normal(after.point, after.slope, alpha, moves, changes)) is not None:
            yield normal


def _diagonal(alpha: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """The diagonal of the inverse Hessian after a further pair (Gilbert and Lemarechal 1989)."""
    a, b, c = (z * alpha * z).sum(), (z * s).sum(), (s / alpha * s).sum()
    return 1 / (a / (b * alpha) + z.square() / b - a * s.square() / (b * c * alpha.square()))


def _normal(
    theta: Tensor, slope: Tensor, alpha: Tensor, moves: list[Tensor], changes: list[Tensor]
) -> Normal | None:
    """The normal at a point (the paper's algorithms 3 and 4); None where the estimate is not positive."""
    S, Z = torch.stack(moves, 1), torch.stack(changes, 1)  # [dim, J]
    products = S.T @ Z
    R = products.triu()
    inverse = torch.linalg.inv(R)
    eta = products.diagonal().diag()
    corner = inverse.T @ (eta + Z.T @ (alpha[:, None] * Z)) @ inverse
    gamma = torch.cat(
        [torch.cat([torch.zeros_like(corner), -inverse], 1), torch.cat([-inverse.T, corner], 1)], 0
    )
    beta = torch.cat([alpha[:, None] * Z, S], 1)
    root = alpha.sqrt()
    Q, T = torch.linalg.qr(beta / root[:, None])
    inner = torch.eye(len(T), dtype=T.dtype) + T @ gamma @ T.T
    L, failed = torch.linalg.cholesky_ex((inner + inner.T) / 2)
    location = theta + alpha * slope + beta @ (gamma @ (beta.T @ slope))
    if failed or not bool(alpha.gt(0).all() and location.isfinite().all()):
        return None
    return Normal(location, root, Q, L)


def mixture_log_prob(normals: list[Normal], u: Tensor) -> Tensor:
    """Log-density [...] of the mixture of all normals in equal parts, at u [..., dim]."""
    return torch.stack([n.log_prob(u) for n in normals]).logsumexp(0) - math.log(len(normals))
