"""Gaussian guide families and mixtures of them; what a family is and which there are stands in `guides.py`."""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrolvm.errors import count
from pyrolvm.models.flows import UNIT
from pyrolvm.models.mixtures import MixtureOfNormals
from pyrolvm.models.networks import SCALE_FLOOR
from pyrolvm.models.pieces import Piece


class GuideFamily(Piece):
    """q(z | x) from an encoder's output, with whatever parameters it has of its own.

    A new one sets `num_features` and defines `forward(loc, scale, features)`; its arguments broadcast.

    Parameters
    ----------
    latent_dim : int
        Dimensions of z.

    Attributes
    ----------
    num_features : int
        Numbers that it wants of the encoder beside loc and scale.
    gaussian : bool
        Whether it is a family of Gaussians, features and scale being those of its covariance.
    """

    num_features: int = 0
    gaussian: ClassVar[bool] = False

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = count("latent_dim", latent_dim)

    def forward(self, loc: Tensor, scale: Tensor, features: Tensor | None = None) -> dist.TorchDistribution:
        """q(z | x) with event [latent_dim], for loc, scale [..., latent_dim] and features [..., num_features]."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(self, loc, scale, features)")


class Diagonal(GuideFamily):
    """q(z | x) = N(loc, diag(scale^2))."""

    gaussian = True

    def forward(self, loc: Tensor, scale: Tensor, features: Tensor | None = None) -> dist.TorchDistribution:
        """Event [latent_dim]."""
        return dist.Normal(loc, scale).to_event(1)


class FullCovariance(GuideFamily):
    """q(z | x) = N(loc, C C'), C = diag(scale) (I + the features below the diagonal)."""

    gaussian = True
    places: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.num_features = latent_dim * (latent_dim - 1) // 2
        rows, columns = torch.tril_indices(latent_dim, latent_dim, -1)
        places = torch.full((latent_dim, latent_dim), self.num_features)  # of a 0 after the features
        places[rows, columns] = torch.arange(self.num_features)
        places.fill_diagonal_(self.num_features + 1)  # of a 1
        self.register_buffer("places", places.flatten(), persistent=False)

    def scale_tril(self, scale: Tensor, features: Tensor | None) -> Tensor:
        """C [..., latent_dim, latent_dim]."""
        features = scale[..., :0] if features is None or not self.num_features else features
        constants = torch.stack([torch.zeros_like(scale[..., 0]), torch.ones_like(scale[..., 0])], -1)
        batch = torch.broadcast_shapes(features.shape[:-1], constants.shape[:-1])
        entries = torch.cat([features.expand(*batch, -1), constants.expand(*batch, -1)], -1)
        unit = entries.index_select(-1, self.places).unflatten(-1, (self.latent_dim, self.latent_dim))
        return scale.unsqueeze(-1) * unit

    def features_of(self, scale_tril: Tensor) -> Tensor:
        """The features [..., num_features] of C [..., latent_dim, latent_dim], whose diagonal is the scale."""
        rows, columns = torch.tril_indices(self.latent_dim, self.latent_dim, -1, device=scale_tril.device)
        return (scale_tril / scale_tril.diagonal(dim1=-2, dim2=-1).unsqueeze(-1))[..., rows, columns]

    def forward(self, loc: Tensor, scale: Tensor, features: Tensor | None = None) -> dist.TorchDistribution:
        """Event [latent_dim]."""
        return dist.MultivariateNormal(loc, scale_tril=self.scale_tril(scale, features))


class LowRank(GuideFamily):
    """q(z | x) = N(loc, diag(scale) (I + F F') diag(scale)) with F [latent_dim, rank] of the features.

    Parameters
    ----------
    latent_dim : int
    rank : int
        Columns of F.
    """

    gaussian = True

    def __init__(self, latent_dim: int, rank: int = 1) -> None:
        super().__init__(latent_dim)
        self.rank = count("rank", rank)
        self.num_features = latent_dim * rank

    def forward(self, loc: Tensor, scale: Tensor, features: Tensor | None = None) -> dist.TorchDistribution:
        """Event [latent_dim]."""
        assert features is not None
        factor = scale.unsqueeze(-1) * features.unflatten(-1, (self.latent_dim, self.rank))
        return dist.LowRankMultivariateNormal(loc, factor, scale.square())


class MixtureGuide(GuideFamily):
    """q(z | x) = sum_k pi_k N(loc + scale m_k, diag(scale s_k)^2), with pi, m and s of the features.

    Parameters
    ----------
    latent_dim : int
    num_components : int
        K.

    Notes
    -----
    m_k is a learned place plus its features: the places keep the components apart at the start.
    """

    def __init__(self, latent_dim: int, num_components: int = 4) -> None:
        super().__init__(latent_dim)
        self.num_components = count("num_components", num_components)
        self.num_features = num_components * (1 + 2 * latent_dim)
        self.places = nn.Parameter(torch.randn(num_components, latent_dim))

    def forward(self, loc: Tensor, scale: Tensor, features: Tensor | None = None) -> dist.TorchDistribution:
        """Event [latent_dim]."""
        assert features is not None
        shape = (self.num_components, self.latent_dim)
        logits, shifts, raw = features.split([shape[0], shape[0] * shape[1], shape[0] * shape[1]], -1)
        loc, scale = loc.unsqueeze(-2), scale.unsqueeze(-2)
        locs = loc + scale * (self.places + shifts.unflatten(-1, shape))
        return MixtureOfNormals(logits, locs, SCALE_FLOOR + scale * softplus(raw.unflatten(-1, shape) + UNIT))
