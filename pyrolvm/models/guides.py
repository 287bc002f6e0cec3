"""Guide families: q(z | x) of a local latent from what an encoder returns, for every model with an encoder.

An encoder maps x [..., data_dim] to (loc, scale), each [..., latent_dim], and for a family that wants more of the data
also to features h [..., num_features]. A family makes of them a distribution with event [latent_dim]::

    family = make_guide("iaf:4", latent_dim=2)
    encoder = MLPEncoder(64, 2, num_features=family.num_features)
    q = family(*encoder(x))                       # batch [...], event [2]

All are in units of loc and scale: with u of the family's own shape, z = loc + scale u. The draws of all have a
gradient, and the density of any value can be computed.

    diagonal    u ~ N(0, I)                                            also "mean_field"
    full        u ~ N(0, L L'), L of unit diagonal, its rest h
    low_rank    u ~ N(0, I + F F'), F = h of `rank` columns
    mixture     u ~ sum_k pi_k N(m_k, diag(s_k^2)), all of h
    planar      a standard normal through `num_flows` planar maps, their parameters h
    iaf         ... through `num_flows` inverse autoregressive affine maps, their networks read h
    spline      ... through `num_flows` inverse autoregressive splines, their networks read h
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.models.base import register
from pyrolvm.models.flow_guides import InverseAutoregressive as InverseAutoregressive
from pyrolvm.models.flow_guides import PlanarFlow as PlanarFlow
from pyrolvm.models.flow_guides import SplineFlow as SplineFlow
from pyrolvm.models.guide_families import Diagonal as Diagonal
from pyrolvm.models.guide_families import FullCovariance as FullCovariance
from pyrolvm.models.guide_families import GuideFamily as GuideFamily
from pyrolvm.models.guide_families import LowRank as LowRank
from pyrolvm.models.guide_families import MixtureGuide as MixtureGuide
from pyrolvm.models.pieces import make_piece
from pyrolvm.plates import current_rows

GUIDES: dict[str, type[GuideFamily]] = {
    "diagonal": Diagonal,
    "mean_field": Diagonal,
    "full": FullCovariance,
    "low_rank": LowRank,
    "mixture": MixtureGuide,
    "planar": PlanarFlow,
    "iaf": InverseAutoregressive,
    "spline": SplineFlow,
}
"""By name."""
GuideFamily.known = GUIDES


def make_guide(guide: str | GuideFamily, latent_dim: int) -> GuideFamily:
    """The family of this name, with its settings ("iaf:4", "iaf:num_flows=4,hidden=64"), or `guide` itself.

    Raises
    ------
    SettingError
        For an unknown name or setting, or an instance of another size.
    """
    return make_piece("guide", guide, GUIDES, latent_dim=latent_dim)


class ConstantFeatures(nn.Module):
    """Features [num_features] that are the same for all data."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        # a low-rank factor of zeros would have no gradient
        self.value = nn.Parameter(0.1 * torch.randn(num_features)) if num_features else torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """[num_features]."""
        return self.value


def linear_features(family: GuideFamily, data_dim: int) -> nn.Module:
    """From x [..., data_dim] to the features of `family`, for models whose guide is linear in x.

    The covariance of a linear model's posterior is the same for all data, and so are a Gaussian family's features.
    """
    if family.gaussian:
        return ConstantFeatures(family.num_features)
    return nn.Linear(data_dim, family.num_features)


def set_covariance(family: GuideFamily, features: nn.Module, scale_tril: Tensor) -> None:
    """Give constant features those of a Cholesky factor; nothing is done where the family is not of full covariance."""
    if isinstance(family, FullCovariance) and isinstance(features, ConstantFeatures):
        features.value.data.copy_(family.features_of(scale_tril))


class GlobalGuide(nn.Module):
    """q(z) of one real latent outside the data plate, of any family; loc, scale and features are its parameters.

    Parameters
    ----------
    site : str
        Its name in the model, where it has event [latent_dim].
    latent_dim : int
    guide : str or GuideFamily
        As of `make_guide`.

    Examples
    --------
    `pyrolvm.fit(model, x, guide=GlobalGuide("z", 2, "iaf:4"))`
    """

    def __init__(self, site: str, latent_dim: int, guide: str | GuideFamily = "full") -> None:
        super().__init__()
        self.site, self.family = site, make_guide(guide, latent_dim)
        self.loc, self.log_scale = (nn.Parameter(torch.zeros(latent_dim)) for _ in range(2))
        self.features = ConstantFeatures(self.family.num_features)

    def distribution(self) -> dist.TorchDistribution:
        """q(z), batch [], event [latent_dim]."""
        return self.family(self.loc, self.log_scale.exp(), self.features.value)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw z, whatever the model's arguments are."""
        if current_rows() is None:
            register(self)
        return pyro.sample(self.site, self.distribution())
