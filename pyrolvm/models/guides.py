"""Guide families: q(z | x) of a local latent from what an encoder returns, for every model with an encoder.

An encoder maps x [..., data_dim] to (loc, scale), each [..., latent_dim], and for a family that wants more of the data
also to features [..., num_features]. A family makes of them a distribution with event [latent_dim]::

    family = make_guide("diagonal", latent_dim=2)
    encoder = MLPEncoder(64, 2, num_features=family.num_features)
    q = family(*encoder(x))                       # batch [...], event [2]
"""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn

from pyrolvm.errors import SettingError, one_of


class GuideFamily(nn.Module):
    """q(z | x) from an encoder's output, with whatever parameters it has of its own.

    A new one sets `num_features` and defines `forward(loc, scale, features)`.

    Parameters
    ----------
    latent_dim : int
        Dimensions of z.

    Attributes
    ----------
    num_features : int
        Numbers that it wants of the encoder beside loc and scale.
    """

    num_features: int = 0

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def forward(self, loc: Tensor, scale: Tensor, features: Tensor | None = None) -> dist.TorchDistribution:
        """q(z | x) with event [latent_dim], for loc, scale [..., latent_dim] and features [..., num_features]."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(self, loc, scale, features)")


class Diagonal(GuideFamily):
    """q(z | x) = N(loc, diag(scale^2))."""

    def forward(self, loc: Tensor, scale: Tensor, features: Tensor | None = None) -> dist.TorchDistribution:
        """Event [latent_dim]."""
        return dist.Normal(loc, scale).to_event(1)


GUIDES: dict[str, type[GuideFamily]] = {"diagonal": Diagonal}
"""By name."""


def make_guide(guide: str | GuideFamily, latent_dim: int) -> GuideFamily:
    """The family of this name, or `guide` itself.

    Raises
    ------
    SettingError
        For an unknown name, or an instance of another size.
    """
    if not isinstance(guide, GuideFamily):
        return GUIDES[one_of("guide", guide, GUIDES)](latent_dim)
    if guide.latent_dim != latent_dim:
        raise SettingError(
            f"the guide {type(guide).__name__} was built for {guide.latent_dim} dimensions: "
            f"give it latent_dim={latent_dim}"
        )
    return guide
