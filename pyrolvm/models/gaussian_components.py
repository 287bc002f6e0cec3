"""What mixtures of Gaussians share: components in the units of the data, and which of them hold the data."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from pyrolvm.errors import count, one_of
from pyrolvm.models.base import LatentVariableModel, check_columns, check_finite
from pyrolvm.models.starts import as_columns, moments

Covariance = Literal["full", "diagonal", "spherical"]


class GaussianComponents(LatentVariableModel):
    """A mixture of K Gaussians over data [batch, D] (or [batch] if D is 1), with parameters in units of the data."""

    location: Tensor  # m [data_dim], the data's mean
    unit: Tensor  # s [data_dim], the data's standard deviation
    raw_means: Tensor  # [num_components, data_dim], (mean_k - m) / s

    def __init__(self, data_dim: int, num_components: int, covariance: Covariance) -> None:
        super().__init__()
        self.data_dim = count("data_dim", data_dim)
        self.num_components = count("num_components", num_components)
        self.covariance = one_of("covariance", covariance, get_args(Covariance))
        self.register_buffer("location", torch.zeros(self.data_dim))
        self.register_buffer("unit", torch.ones(self.data_dim))

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Of the roots of all covariances: Cholesky factors [K, D, D], or deviations [K, D] or [K, 1]."""
        D, K = self.data_dim, self.num_components
        return {"full": (K, D, D), "diagonal": (K, D), "spherical": (K, 1)}[self.covariance]

    @property
    def means(self) -> Tensor:
        """Component means [num_components, data_dim]."""
        return self.location + self.unit * self.raw_means

    @property
    def scale(self) -> Tensor:
        """The root of each covariance: Cholesky factors [K, D, D], or deviations [K, D] or [K, 1]."""
        raise NotImplementedError

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factors [num_components, data_dim, data_dim], whatever the covariance type."""
        if self.covariance == "full":
            return self.scale
        return torch.diag_embed(self.scale.expand(self.num_components, self.data_dim))

    def responsibilities(self, x: Tensor) -> Tensor:
        """p(z = k | x) [batch, num_components]."""
        raise NotImplementedError

    def counts(self, x: Tensor) -> Tensor:
        """Data that each component holds, by their responsibilities: [num_components]."""
        return torch.stack([self.responsibilities(part).sum(0) for part in x.split(2**16)]).sum(0)

    def take_units(self, x: Tensor) -> Tensor:
        """Take the units from x [rows, data_dim], a spherical mixture one for all columns; x as floats."""
        x = as_columns(self.check_data(x), self.data_dim).to(self.unit)
        location, unit = moments(x)
        self.location.copy_(location)
        self.unit.copy_(unit.square().mean().sqrt() if self.covariance == "spherical" else unit)
        return x

    def check_data(self, x: Tensor) -> Tensor:
        """`x` as floats; raises `DataError` unless they are [rows, data_dim] and finite."""
        rows = as_columns(x, self.data_dim)
        check_columns(rows, self.data_dim, type(self).__name__)
        check_finite(rows)
        return self.as_floats(x)
