"""The bound of a Gaussian guide on draws that are held, as a function of one vector of parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrolvm.inference.log_joint.families import DIAGONAL, FULL, LOW_RANK, POINT, Gaussian
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.low_rank import free, own_share
from pyrolvm.inference.log_joint.modes import Place


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
        self.unit = start.location if start.kind == POINT else start.scale
        self.rows, self.columns = torch.tril_indices(self.dim, self.dim, -1)

    @property
    def initial(self) -> Tensor:
        """The parameters of the start [size]."""
        parts = [torch.zeros(self.dim, dtype=torch.float64)]
        if self.start.kind in (DIAGONAL, FULL):
            parts.append(torch.zeros(self.dim, dtype=torch.float64))
        if self.start.kind == FULL:
            parts.append(torch.zeros(len(self.rows), dtype=torch.float64))
        if self.start.kind == LOW_RANK:
            parts += self._of_low_rank(self.start)
        return torch.cat(parts)

    def _of_low_rank(self, q: Gaussian) -> list[Tensor]:
        assert q.sd is not None and q.factor is not None
        shares = q.sd / self.unit
        return [free(shares), (shares[:, None] * q.factor).reshape(-1)]

    def beside(self, parameters: Tensor, q: Gaussian) -> Tensor:
        """The parameters with the covariance of another low rank."""
        return torch.cat([parameters[: self.dim], *self._of_low_rank(q)])

    def turns(self, parameters: Tensor) -> Tensor:
        """Directions [size, rank (rank - 1) / 2], orthonormal, in which the factor turns and q stays as it is."""
        if self.start.kind != LOW_RANK:
            return parameters.new_zeros(len(parameters), 0)
        B = parameters[2 * self.dim :].reshape(self.dim, -1)
        pairs = torch.combinations(torch.arange(B.shape[1]), 2).tolist()
        found = parameters.new_zeros(len(pairs), len(parameters))
        for row, (i, j) in zip(found, pairs, strict=True):
            turned = row[2 * self.dim :].view(B.shape)
            turned[:, i], turned[:, j] = B[:, j], -B[:, i]
        return torch.linalg.qr(found.T).Q

    def gaussian(self, parameters: Tensor) -> Gaussian:
        """q at the parameters; differentiable."""
        location = self.place.location + self.place.times(parameters[: self.dim])
        if self.start.kind == POINT:
            return Gaussian(POINT, location)
        log_sd, rest = parameters[self.dim : 2 * self.dim], parameters[2 * self.dim :]
        if self.start.kind == LOW_RANK:
            shares = own_share(log_sd)
            factor = rest.reshape(self.dim, -1) / shares[:, None]
            return Gaussian(LOW_RANK, location, sd=self.unit * shares, factor=factor)
        if self.start.kind == FULL:
            tril = log_sd.exp().diag().index_put((self.rows, self.columns), rest)
            return Gaussian(FULL, location, scale_tril=self._unwhitened(tril))
        return Gaussian(DIAGONAL, location, sd=self.unit * log_sd.exp())

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
