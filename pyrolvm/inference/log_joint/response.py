"""Linear response: the covariances that a mean field leaves out, from how its optimum answers a tilt of the log joint.

With parameters eta = (location m, log sds) at the maximum of the bound L on fixed draws, adding t' u to the log joint
moves the location by

    d m / d t = (d m / d eta) (-d^2 L / d eta^2)^-1 (d m / d eta)',

and in the posterior the same derivative is the covariance of u. It is right where the mean field's means are, and
blows up where they are not (a skewed log-scale): it is kept only if the bound with it is higher than without.

Giordano, Broderick and Jordan (2018), "Covariances, robustness, and variational Bayes", JMLR 19(51).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolvm.errors import DivergenceError
from pyrolvm.inference.log_joint.draws import fixed_normals, least_draws
from pyrolvm.inference.log_joint.families import FULL, Gaussian
from pyrolvm.inference.log_joint.fixed import Optimum

DENSE = 300
"""The most parameters whose second derivatives are formed as a matrix; beyond, columns by conjugate gradients."""
RESIDUAL, PRODUCTS = 1e-6, 200
FRESH = 50
"""The index of the draws that the two bounds are compared on."""


@dataclass(frozen=True)
class Response:
    """A covariance by linear response.

    Attributes
    ----------
    q : Gaussian
        With the mean field's location and this covariance of u.
    gain : float
        Nats by which it raises the bound.
    """

    q: Gaussian
    gain: float

    @property
    def kept(self) -> bool:
        """Whether the bound rises."""
        return self.gain > 0


def respond(optimum: Optimum, seed: int = 0) -> Response:
    """The linear response of a mean field at its optimum.

    Raises
    ------
    DivergenceError
        The second derivatives are not negative there: it is no maximum.
    """
    bound, dim = optimum.bound, optimum.bound.dim
    size = len(optimum.parameters)
    solve = _by_matrix if size <= DENSE else _by_conjugate_gradients
    columns = solve(optimum, torch.eye(dim, size, dtype=torch.float64))[
        :, :dim
    ]  # the location's block of the inverse
    response = (columns + columns.T) / 2
    scale = bound.place.scale_tril
    root, failed = torch.linalg.cholesky_ex(response)
    if failed:
        raise DivergenceError("linear response gives no covariance: the bound has no maximum at this guide")
    tril = scale[:, None] * root if scale.dim() == 1 else scale @ root
    q = Gaussian(FULL, optimum.q.location, scale_tril=tril)
    return Response(q, _elbo(optimum, q, seed) - _elbo(optimum, optimum.q, seed))


def _by_matrix(optimum: Optimum, rows: Tensor) -> Tensor:
    eye = torch.eye(len(optimum.parameters), dtype=torch.float64)
    H = -optimum.bound.products(optimum.parameters, optimum.normals, eye)
    return torch.linalg.solve((H + H.T) / 2, rows.T).T


def _by_conjugate_gradients(optimum: Optimum, rows: Tensor) -> Tensor:
    """Each row times the inverse of the negative second derivatives."""
    return torch.stack([_conjugate_gradients(optimum, row) for row in rows])


def _conjugate_gradients(optimum: Optimum, b: Tensor) -> Tensor:
    x, left, along = torch.zeros_like(b), b, b
    for _ in range(PRODUCTS):
        product = -optimum.bound.products(optimum.parameters, optimum.normals, along[None])[0]
        step = left.square().sum() / (along @ product)
        x = x + step * along
        after = left - step * product
        if after.norm() < RESIDUAL * b.norm():
            break
        left, along = after, after + after.square().sum() / left.square().sum() * along
    return x


def _elbo(optimum: Optimum, q: Gaussian, seed: int) -> float:
    """The bound of q in nats, on draws that are the same for every q."""
    M = max(1024, least_draws(q.dim, True))
    u = q.at(fixed_normals(M, q.dim, seed + 1000 * FRESH))
    with torch.no_grad():
        return float((optimum.bound.log_joint(u) - q.log_prob(u)).mean())
