"""Priors of local latents: p(z) of a model with a decoder, by name.

A prior is a module; called with the model's q(z | x), which only some of them want, it returns a distribution with
event [latent_dim]::

    prior = make_prior("vamp:50", latent_dim=2, data_dim=64)
    p = prior(model.posterior_dist)               # batch [], event [2]

    normal      N(0, I)
    learned     N(loc, diag(scale^2))
    mixture     sum_k pi_k N(loc_k, diag(scale_k^2))
    vamp        sum_k pi_k q(z | u_k), with pseudo-data u_k [data_dim]
    flow        a standard normal through inverse autoregressive splines

All but the first are learned with the rest by the same bound, in which the best p(z) is the aggregated posterior
(1/N) sum_n q(z | x_n): Tomczak and Welling (2018), "VAE with a VampPrior", section 2.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform

from pyrolvm.errors import count
from pyrolvm.models.flows import Autoregressive, Conditioner, Flow, spline
from pyrolvm.models.missing import filled
from pyrolvm.models.mixtures import Mixture, MixtureOfNormals
from pyrolvm.models.networks import SCALE_FLOOR
from pyrolvm.models.pieces import Piece, make_piece

Encode = Callable[[Tensor], dist.TorchDistribution]
KMEANS_ROWS = 5000


class LatentPrior(Piece):
    """p(z), with whatever parameters it has. A new one defines `forward(encode)`.

    Parameters
    ----------
    latent_dim : int
        Dimensions of z.
    data_dim : int
        Features of x, for priors made of pseudo-data.
    """

    sizes = ("latent_dim", "data_dim")

    def __init__(self, latent_dim: int, data_dim: int) -> None:
        super().__init__()
        self.latent_dim, self.data_dim = count("latent_dim", latent_dim), count("data_dim", data_dim)

    def forward(self, encode: Encode) -> dist.TorchDistribution:
        """p(z) with batch [] and event [latent_dim]; `encode` maps x [rows, data_dim] to q(z | x)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(self, encode)")

    def initialise_from(self, x: Tensor, seed: int = 0) -> None:
        """Start from the data x [rows, data_dim]; by default nothing is done."""


class StandardNormal(LatentPrior):
    """p(z) = N(0, I)."""

    loc: Tensor

    def __init__(self, latent_dim: int, data_dim: int) -> None:
        super().__init__(latent_dim, data_dim)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def forward(self, encode: Encode) -> dist.TorchDistribution:
        """Event [latent_dim]."""
        return dist.Normal(self.loc, 1.0).to_event(1)


class LearnedNormal(LatentPrior):
    """p(z) = N(loc, diag(scale^2)), both learned."""

    def __init__(self, latent_dim: int, data_dim: int) -> None:
        super().__init__(latent_dim, data_dim)
        self.loc, self.log_scale = (nn.Parameter(torch.zeros(latent_dim)) for _ in range(2))

    def forward(self, encode: Encode) -> dist.TorchDistribution:
        """Event [latent_dim]."""
        return dist.Normal(self.loc, SCALE_FLOOR + self.log_scale.exp()).to_event(1)


class MixturePrior(LatentPrior):
    """p(z) = sum_k pi_k N(loc_k, diag(scale_k^2)), all learned.

    Parameters
    ----------
    latent_dim, data_dim : int
    num_components : int
        K.
    """

    def __init__(self, latent_dim: int, data_dim: int, num_components: int = 10) -> None:
        super().__init__(latent_dim, data_dim)
        self.num_components = count("num_components", num_components)
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.locs = nn.Parameter(torch.randn(num_components, latent_dim))
        self.log_scales = nn.Parameter(torch.zeros(num_components, latent_dim))

    def forward(self, encode: Encode) -> dist.TorchDistribution:
        """Event [latent_dim]."""
        return MixtureOfNormals(self.logits, self.locs, SCALE_FLOOR + self.log_scales.exp())


class VampPrior(LatentPrior):
    """p(z) = sum_k pi_k q(z | u_k): the guide at learned pseudo-data u [K, data_dim] ("pseudo-inputs").

    Parameters
    ----------
    latent_dim, data_dim : int
    num_components : int
        K.

    Notes
    -----
    `initialise_from` puts the pseudo-data at k-means centres of the data, each with the mean of all data counted in
    once, so that none is a row of the data. The weights are learned too (equal in the paper).
    """

    def __init__(self, latent_dim: int, data_dim: int, num_components: int = 50) -> None:
        super().__init__(latent_dim, data_dim)
        self.num_components = count("num_components", num_components)
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.pseudo_data = nn.Parameter(torch.randn(num_components, data_dim))

    def forward(self, encode: Encode) -> dist.TorchDistribution:
        """Event [latent_dim]."""
        return Mixture(self.logits, encode(self.pseudo_data))

    @torch.no_grad()
    def initialise_from(self, x: Tensor, seed: int = 0) -> None:
        """Pseudo-data at k-means centres of at most 5000 rows of x [rows, data_dim]; missing entries count as means."""
        generator = torch.Generator().manual_seed(seed)
        x = x[torch.randperm(len(x), generator=generator)[:KMEANS_ROWS].to(x.device)]
        x = filled(x)
        labels = _clusters(x, self.num_components, seed)
        members = nn.functional.one_hot(labels, self.num_components).to(x)  # [rows, K]
        centres = (members.T @ x + x.mean(0)) / (members.sum(0) + 1).unsqueeze(-1)
        self.pseudo_data.copy_(centres)


def _clusters(x: Tensor, num_components: int, seed: int) -> Tensor:
    """A cluster for each row, [rows]; a row is one of its own where there are too few."""
    if len(x) <= num_components:
        return torch.arange(len(x), device=x.device)
    from sklearn.cluster import KMeans  # a second to import

    labels = KMeans(num_components, n_init=1, random_state=seed).fit_predict(x.double().cpu().numpy())
    return torch.as_tensor(labels, dtype=torch.int64, device=x.device)


class FlowPrior(LatentPrior):
    """z = loc + scale f^-1(u), u ~ N(0, I), with f autoregressive rational-quadratic splines.

    The density takes one pass of its networks, a draw one for each dimension.

    Parameters
    ----------
    latent_dim, data_dim : int
    num_flows : int
        Maps, each with a network of its own; every second one counts the dimensions from the last.
    num_bins : int
        Pieces of a spline on [-4, 4], in units of loc and scale; outside it is the identity.
    hidden : int
        Units of a network's hidden layer.
    """

    def __init__(
        self, latent_dim: int, data_dim: int, num_flows: int = 2, num_bins: int = 8, hidden: int = 32
    ) -> None:
        super().__init__(latent_dim, data_dim)
        self.num_flows, self.num_bins = count("num_flows", num_flows), count("num_bins", num_bins, 2)
        self.hidden = count("hidden", hidden, latent_dim)
        self.loc, self.log_scale = (nn.Parameter(torch.zeros(latent_dim)) for _ in range(2))
        self.nets = nn.ModuleList(
            Conditioner(latent_dim, 0, 3 * num_bins - 1, hidden, reverse=bool(t % 2))
            for t in range(num_flows)
        )

    def forward(self, encode: Encode) -> dist.TorchDistribution:
        """Event [latent_dim]."""
        last = AffineTransform(self.loc, SCALE_FLOOR + self.log_scale.exp(), event_dim=1, cache_size=1)
        base = dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)
        return Flow(base, [*(Autoregressive(net, None, spline).inv for net in self.nets), last])


PRIORS: dict[str, type[LatentPrior]] = {
    "normal": StandardNormal,
    "learned": LearnedNormal,
    "mixture": MixturePrior,
    "vamp": VampPrior,
    "flow": FlowPrior,
}
"""By name."""
LatentPrior.known = PRIORS


def make_prior(prior: str | LatentPrior, latent_dim: int, data_dim: int) -> LatentPrior:
    """The prior of this name, with its settings ("mixture:20", "vamp:50"), or `prior` itself.

    Raises
    ------
    SettingError
        For an unknown name or setting, or an instance of another size.
    """
    return make_piece("prior", prior, PRIORS, latent_dim=latent_dim, data_dim=data_dim)
