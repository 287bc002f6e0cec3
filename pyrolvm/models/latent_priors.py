"""Priors of local latents: p(z) of a model with a decoder, by name.

A prior is a module; called with the model's q(z | x), which only some of them want, it returns a distribution with
event [latent_dim]::

    prior = make_prior("normal", latent_dim=2, data_dim=64)
    p = prior(model.posterior_dist)               # batch [], event [2]
"""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.errors import SettingError, one_of

Encode = Callable[[Tensor], dist.TorchDistribution]


class LatentPrior(nn.Module):
    """p(z), with whatever parameters it has. A new one defines `forward(encode)`.

    Parameters
    ----------
    latent_dim : int
        Dimensions of z.
    data_dim : int
        Features of x, for priors made of pseudo-data.
    """

    def __init__(self, latent_dim: int, data_dim: int) -> None:
        super().__init__()
        self.latent_dim, self.data_dim = latent_dim, data_dim

    def forward(self, encode: Encode) -> dist.TorchDistribution:
        """p(z) with batch [] and event [latent_dim]; `encode` maps x [rows, data_dim] to q(z | x)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(self, encode)")


class StandardNormal(LatentPrior):
    """p(z) = N(0, I)."""

    loc: Tensor

    def __init__(self, latent_dim: int, data_dim: int) -> None:
        super().__init__(latent_dim, data_dim)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def forward(self, encode: Encode) -> dist.TorchDistribution:
        """Event [latent_dim]."""
        return dist.Normal(self.loc, 1.0).to_event(1)


PRIORS: dict[str, type[LatentPrior]] = {"normal": StandardNormal}
"""By name."""


def make_prior(prior: str | LatentPrior, latent_dim: int, data_dim: int) -> LatentPrior:
    """The prior of this name, or `prior` itself.

    Raises
    ------
    SettingError
        For an unknown name, or an instance of another size.
    """
    if not isinstance(prior, LatentPrior):
        return PRIORS[one_of("prior", prior, PRIORS)](latent_dim, data_dim)
    if prior.latent_dim != latent_dim:
        raise SettingError(
            f"the prior {type(prior).__name__} was built for {prior.latent_dim} dimensions: "
            f"give it latent_dim={latent_dim}"
        )
    return prior
