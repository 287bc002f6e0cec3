"""Coordinates of mean 0 and variance 1 for data of any location, scale and units, with densities in the data's own.

    y    = (x - loc) / scale                      data_dim standardised columns
    code = y                                      or, of fewer dimensions,
    code = (basis' y) / spread                    the first latent_dim principal coordinates of y; then
    y    = basis (spread * code) + rest * noise   with N(0, 1) noise in all directions that basis leaves out

A density of x counts the volume that the map takes away, so that its nats are those of the data as they are.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.errors import one_of
from pyrolvm.models.networks import SCALE_FLOOR
from pyrolvm.models.starts import moments

SCALINGS = ("column", "whole", "none")


class Coordinates(nn.Module):
    """The map between x [..., data_dim] and code [..., latent_dim], the identity until it is fitted.

    Parameters
    ----------
    data_dim, latent_dim : int
        Sizes of x and code.
    scaling : {"column", "whole", "none"}
        Whether each column is divided by its standard deviation, all by one number, or the data stay as they are.
    code_scale : float
        Standard deviation of the code in `law`.

    Raises
    ------
    SettingError
        For an unknown scaling.
    """

    loc: Tensor
    scale: Tensor
    basis: Tensor
    spread: Tensor
    tril: Tensor

    def __init__(self, data_dim: int, latent_dim: int, scaling: str, code_scale: float) -> None:
        super().__init__()
        self.scaling, self.code_scale = one_of("scaling", scaling, SCALINGS), code_scale
        self.reduces = latent_dim < data_dim
        self.register_buffer("loc", torch.zeros(data_dim))
        self.register_buffer("scale", torch.ones(data_dim))
        if self.reduces:
            self.register_buffer("basis", torch.eye(data_dim, latent_dim))
            self.register_buffer("spread", torch.ones(latent_dim))
            self.register_buffer("tril", torch.eye(data_dim))
            self._set_tril(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """The code [..., latent_dim] of x [..., data_dim]."""
        y = (x - self.loc) / self.scale
        return (y @ self.basis) / self.spread if self.reduces else y

    def decode(self, code: Tensor) -> Tensor:
        """x [..., data_dim] of a code [..., latent_dim]."""
        y = (code * self.spread) @ self.basis.T if self.reduces else code
        return self.loc + self.scale * y

    def law(self, code: Tensor) -> dist.TorchDistribution:
        """p(x) for N(code, code_scale^2 I) in the code, batch [...] and event [data_dim]."""
        if self.reduces:
            return dist.MultivariateNormal(self.decode(code), scale_tril=self.tril)
        return dist.Normal(self.decode(code), self.code_scale * self.scale).to_event(1)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the map from data x [rows, data_dim]."""
        loc, scale = moments(x)
        if self.scaling == "whole":
            total = x.std(0, correction=0).square().mean().sqrt()
            scale = torch.where(total > 0, total, 1.0).expand_as(scale)
        if self.scaling != "none":
            self.loc.copy_(loc)
            self.scale.copy_(scale)
        if self.reduces:
            self._fit_basis((x - self.loc) / self.scale)

    def _fit_basis(self, y: Tensor) -> None:
        """Principal directions, the spread along them, and what is left on average along each other one."""
        self.loc += self.scale * y.mean(0)  # 0 but for scaling="none"
        covariance = torch.cov(y.T, correction=0).reshape(y.shape[1], y.shape[1])
        values, vectors = torch.linalg.eigh(covariance)  # ascending
        latent_dim = len(self.spread)
        self.basis.copy_(vectors[:, -latent_dim:].flip(-1))
        spread = values[-latent_dim:].flip(-1).clamp(min=0).sqrt()
        largest = torch.where(spread[0] > 0, spread[0], 1.0)
        self.spread.copy_(torch.where(spread > SCALE_FLOOR * largest, spread, largest))
        rest = values[:-latent_dim].mean().clamp(min=0).sqrt()
        self._set_tril(max(rest.item(), SCALE_FLOOR * largest.item()))

    def _set_tril(self, rest: float) -> None:
        """The Cholesky factor of the covariance of x given the code's mean."""
        basis, spread, scale = self.basis.double(), self.spread.double(), self.scale.double()
        inside = (basis * (self.code_scale * spread).square()) @ basis.T
        identity = torch.eye(len(scale), dtype=torch.float64, device=scale.device)
        covariance = inside + rest**2 * (identity - basis @ basis.T)
        self.tril.copy_(scale.unsqueeze(-1) * torch.linalg.cholesky(covariance))
