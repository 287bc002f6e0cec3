"""Pyro's Gaussian AutoGuides as Gaussians of the vector u: read from their parameters, and written into them.

AutoDelta, AutoLaplaceApproximation    a point
AutoNormal, AutoDiagonalNormal         u = location + sd e
AutoMultivariateNormal                 u = location + scale_tril e
AutoLowRankMultivariateNormal          u = location + sd (e + factor f)             e: [dim], f: [rank], standard normal

Here a draw of a low rank is location + chol(covariance) e: the same normal from fewer numbers, and the same draws
whichever way its factor is turned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from pyro.infer import autoguide
from torch import Tensor
from torch.distributions import transform_to

from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.low_rank import nearest
from pyrolvm.inference.program.program import Program

POINT, DIAGONAL, FULL, LOW_RANK = "point", "diagonal", "full", "low_rank"
KINDS: dict[type, str] = {
    autoguide.AutoDelta: POINT,
    autoguide.AutoLaplaceApproximation: POINT,
    autoguide.AutoNormal: DIAGONAL,
    autoguide.AutoDiagonalNormal: DIAGONAL,
    autoguide.AutoMultivariateNormal: FULL,
    autoguide.AutoLowRankMultivariateNormal: LOW_RANK,
}


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution of u, by `kind`; symbols as in the file's docstring.

    Attributes
    ----------
    location : tensor [dim]
    sd : tensor [dim], optional
    scale_tril : tensor [dim, dim], optional
    factor : tensor [dim, rank], optional
    """

    kind: str
    location: Tensor
    sd: Tensor | None = None
    scale_tril: Tensor | None = None
    factor: Tensor | None = None

    @property
    def dim(self) -> int:
        """Coordinates of u."""
        return len(self.location)

    @property
    def covariance(self) -> Tensor:
        """Of u: [dim, dim]."""
        if self.kind == FULL:
            assert self.scale_tril is not None
            return self.scale_tril @ self.scale_tril.T
        assert self.sd is not None
        if self.factor is None:
            return self.sd.square().diag()
        one = torch.eye(self.dim, dtype=self.sd.dtype)
        return self.sd[:, None] * (one + self.factor @ self.factor.T) * self.sd

    @property
    def scale(self) -> Tensor:
        """Standard deviation of each coordinate: [dim]."""
        if self.kind == FULL:
            assert self.scale_tril is not None
            return self.scale_tril.norm(dim=1)
        assert self.sd is not None
        return self.sd if self.factor is None else self.sd * (1 + self.factor.square().sum(1)).sqrt()

    def _root(self) -> Tensor:
        """The triangle with root root' = covariance."""
        if self.kind == FULL:
            assert self.scale_tril is not None
            return self.scale_tril
        return torch.linalg.cholesky(self.covariance)

    def at(self, normals: Tensor) -> Tensor:
        """u [..., dim] of standard normals [..., dim]."""
        if self.kind == DIAGONAL:
            return self.location + normals * self.scale
        return self.location + normals @ self._root().T

    def log_prob(self, u: Tensor) -> Tensor:
        """log q(u) of u [..., dim]: [...]."""
        if self.kind == DIAGONAL:
            return torch.distributions.Normal(self.location, self.scale).log_prob(u).sum(-1)
        tril = self._root()
        z = torch.linalg.solve_triangular(tril, (u - self.location).reshape(-1, self.dim).T, upper=False)
        z = z.T.reshape(u.shape)
        return (
            -0.5 * z.square().sum(-1) - tril.diagonal().log().sum() - 0.5 * self.dim * math.log(2 * math.pi)
        )

    @classmethod
    def around(cls, location: Tensor, scale_tril: Tensor, kind: str, rank: int = 0) -> Gaussian:
        """That of the kind nearest to N(location, scale_tril scale_tril').

        `scale_tril` is [dim, dim], or [dim] of a diagonal one.
        A mean field takes the conditional scales, 1 / sqrt(diag H), as it will at its optimum.
        """
        return cls.all_around(location, scale_tril, kind, rank)[0]

    @classmethod
    def all_around(cls, location: Tensor, scale_tril: Tensor, kind: str, rank: int = 0) -> list[Gaussian]:
        """As `around`; of a low rank every optimum of the KL divergence, the nearest first."""
        full = scale_tril.dim() == 2
        if kind == POINT:
            return [cls(POINT, location)]
        if kind == FULL:
            return [cls(FULL, location, scale_tril=scale_tril if full else scale_tril.diag())]
        if kind == DIAGONAL:
            return [cls(DIAGONAL, location, sd=conditional(scale_tril))]
        found = nearest(scale_tril if full else scale_tril.diag(), rank)
        return [cls(LOW_RANK, location, sd=sd, factor=factor) for sd, factor in found]


def conditional(scale_tril: Tensor) -> Tensor:
    """The sd of each coordinate given the others, 1 / sqrt(diag H), H^-1 = scale_tril scale_tril': [dim]."""
    if scale_tril.dim() == 1:
        return scale_tril
    eye = torch.eye(len(scale_tril), dtype=scale_tril.dtype)
    inverse = torch.linalg.solve_triangular(scale_tril, eye, upper=False)
    return inverse.square().sum(0).rsqrt()


class Family:
    """The Gaussian guide of a program, as `kind`, `read` and `write`.

    Parameters
    ----------
    program : Program
    log_joint : LogJoint
        Whose u the Gaussian is of.
    """

    def __init__(self, program: Program, log_joint: LogJoint) -> None:
        self.guide: Any = guide_of(program)
        self.kind = KINDS[type(self.guide)]
        self.sites = {s.name: s for s in log_joint.sites}
        names = [name for name, _ in self.guide.prototype_trace.iter_stochastic_nodes()]
        self.names = [name for name in names if name in self.sites]
        # entry of the guide's vector -> entry of u
        self.order = torch.cat([torch.arange(self.sites[n].start, self.sites[n].stop) for n in self.names])
        self.by_site = isinstance(self.guide, autoguide.AutoNormal | autoguide.AutoDelta)

    @property
    def rank(self) -> int:
        """Columns of the low-rank factor."""
        return int(self.guide.rank) if self.kind == LOW_RANK else 0

    @torch.no_grad()
    def read(self) -> Gaussian:
        """The guide as it is, in float64."""
        if self.by_site:
            return self._read_sites()
        location = self._unordered(self.guide.loc)
        if self.kind == POINT:
            return Gaussian(POINT, location)
        sd = self._unordered(self.guide.scale)
        if self.kind == DIAGONAL:
            return Gaussian(DIAGONAL, location, sd=sd)
        if self.kind == LOW_RANK:
            return Gaussian(LOW_RANK, location, sd=sd, factor=self._unordered(self.guide.cov_factor))
        tril = self.guide.scale.double()[:, None] * self.guide.scale_tril.double()
        root = self._unordered(tril)
        R = torch.linalg.qr(root.T).R
        return Gaussian(FULL, location, scale_tril=(R * R.diagonal().sign()[:, None]).T)

    @torch.no_grad()
    def write(self, q: Gaussian) -> None:
        """Set the guide's parameters, in place."""
        if self.by_site:
            self._write_sites(q)
            return
        _assign(self.guide, "loc", q.location[self.order])
        if self.kind in (DIAGONAL, LOW_RANK):
            assert q.sd is not None
            _assign(self.guide, "scale", q.sd[self.order])
        if self.kind == LOW_RANK:
            assert q.factor is not None
            _assign(self.guide, "cov_factor", q.factor[self.order])
        if self.kind == FULL:
            assert q.scale_tril is not None
            R = torch.linalg.qr(q.scale_tril[self.order].T).R
            tril = (R * R.diagonal().sign()[:, None]).T
            _assign(self.guide, "scale", tril.diagonal())
            _assign(self.guide, "scale_tril", tril / tril.diagonal()[:, None])

    def _unordered(self, value: Tensor) -> Tensor:
        found = torch.empty_like(value, dtype=torch.float64)
        found[self.order] = value.double()
        return found

    def _read_sites(self) -> Gaussian:
        location, sd = (
            torch.empty(len(self.order), dtype=torch.float64),
            torch.empty(len(self.order), dtype=torch.float64),
        )
        for site, part in self._parts():
            if self.kind == POINT:
                value = attrgetter(site.name)(self.guide).double()
                location[part] = site.transform.inv(value).reshape(-1)
            else:
                location[part] = attrgetter(site.name)(self.guide.locs).double().reshape(-1)
                sd[part] = attrgetter(site.name)(self.guide.scales).double().reshape(-1)
        return Gaussian(POINT, location) if self.kind == POINT else Gaussian(DIAGONAL, location, sd=sd)

    def _write_sites(self, q: Gaussian) -> None:
        for site, part in self._parts():
            if self.kind == POINT:
                _assign(self.guide, site.name, site.transform(q.location[part].reshape(site.shape)))
            else:
                assert q.sd is not None
                _assign(self.guide.locs, site.name, q.location[part].reshape(site.shape))
                _assign(self.guide.scales, site.name, q.sd[part].reshape(site.shape))

    def _parts(self) -> Iterator[tuple[Any, slice]]:
        for name in self.names:
            yield self.sites[name], slice(self.sites[name].start, self.sites[name].stop)


def guide_of(program: Program) -> Any:
    """The guide as it was passed, without what the package wraps around it."""
    return program._functions[1]


def _assign(module: Any, name: str, value: Tensor) -> None:
    """Set a parameter of a PyroModule at its constrained value, the leaf staying the same tensor."""
    *path, last = name.split(".")
    owner = attrgetter(".".join(path))(module) if path else module
    if last in owner._pyro_params:
        constraint = owner._pyro_params[last][0]
        leaf = owner._parameters[f"{last}_unconstrained"]
        value = transform_to(constraint).inv(value)
    else:
        leaf = owner._parameters[last]
    leaf.data.copy_(value.reshape(leaf.shape))
