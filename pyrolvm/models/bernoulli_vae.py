"""The Bernoulli-latent variational autoencoder: a sigmoid belief network and its recognition network.

Generative story, for each of N rows of bits, with L layers of latent bits:

    z_L ~ Bernoulli(logits = prior)                         learned, [latent_dim]
    z_l | z_{l+1} ~ Bernoulli(logits = net_l(2 z_{l+1} - 1))        l = L - 1, ..., 1
    x | z_1 ~ Bernoulli(logits = decoder(2 z_1 - 1))                [data_dim]

    q(z | x) = q(z_1 | x) prod_l q(z_{l+1} | z_l),          each Bernoulli with logits from a network

The latents are discrete, so that no gradient goes through a draw: this is the program on which estimators of the
gradient are compared (Mnih and Gregor 2014; Tucker et al. 2017; Grathwohl et al. 2018). The networks are linear, or
have two tanh layers (`nonlinear`). Bits enter them as -1 and 1; data enter the guide centred by their mean.

A. Mnih and K. Gregor, "Neural variational inference and learning in belief networks", ICML 2014.
W. Grathwohl et al., "Backpropagation through the void", ICLR 2018, appendix, for these settings.
"""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.errors import DataError, count
from pyrolvm.models.base import LatentVariableModel, check_columns, check_finite
from pyrolvm.models.likelihoods import check_binary
from pyrolvm.models.networks import MLP

MOST_BITS = 14
"""The most latent bits that `log_marginal` sums out."""


class BernoulliVAE(LatentVariableModel):
    """A belief network of one or more layers of latent bits over data of zeros and ones.

    Parameters
    ----------
    data_dim : int
        Columns of the data.
    latent_dim : int
        Bits of each layer.
    num_layers : int
        Layers of latent bits: sites "z" if one, else "z1" (next to the data), "z2", ...
    nonlinear : bool
        Two tanh layers of `hidden` units in each network; otherwise networks are linear.
    hidden : int
        Units of these layers.

    Raises
    ------
    SettingError
        For a size that is no positive whole number.
    """

    data_mean: Tensor

    def __init__(
        self,
        data_dim: int,
        latent_dim: int = 200,
        num_layers: int = 1,
        nonlinear: bool = False,
        hidden: int = 200,
    ) -> None:
        super().__init__()
        self.data_dim, self.latent_dim = count("data_dim", data_dim), count("latent_dim", latent_dim)
        self.num_layers, self.nonlinear = count("num_layers", num_layers), bool(nonlinear)
        layers = (count("hidden", hidden),) * 2 if nonlinear else ()
        sizes = [self.data_dim] + [self.latent_dim] * self.num_layers  # from the data up

        def net(before: int, after: int) -> MLP:
            return MLP(before, after, layers, "tanh")

        self.prior_logits = nn.Parameter(torch.zeros(self.latent_dim))
        self.encoders = nn.ModuleList(net(a, b) for a, b in itertools.pairwise(sizes))
        self.decoders = nn.ModuleList(net(b, a) for a, b in itertools.pairwise(sizes))
        self.register_buffer("data_mean", torch.full((self.data_dim,), 0.5))

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the latent sites, from the data up."""
        return ("z",) if self.num_layers == 1 else tuple(f"z{i}" for i in range(1, self.num_layers + 1))

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(x, z); `x`: [batch, data_dim] or None to generate. Returns x."""
        with self.data_plate(x):
            logits = self.prior_logits  # [latent_dim]
            for name, decoder in zip(reversed(self.sites), reversed(self.decoders), strict=True):
                z = pyro.sample(name, dist.Bernoulli(logits=logits).to_event(1))  # [batch, latent_dim]
                logits = decoder(2 * z - 1)
            return pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor | None = None) -> Tensor:
        """q(z | x); `x`: [batch, data_dim]. Returns the top layer [batch, latent_dim]."""
        if x is None:
            raise DataError(f"q(z | x) needs data: call guide(x) with x of shape [batch, {self.data_dim}]")
        below = 2 * (x - self.data_mean)  # [batch, data_dim]
        with self.data_plate(x):
            for name, encoder in zip(self.sites, self.encoders, strict=True):
                z = pyro.sample(
                    name, dist.Bernoulli(logits=encoder(below)).to_event(1)
                )  # [batch, latent_dim]
                below = 2 * z - 1
        return z

    def objective(self) -> str:
        """Two mirrored draws: of the unbiased estimators the best bound for its cost (see the docs page)."""
        return "disarm"

    def decode(self, z: Tensor) -> Tensor:
        """Probabilities [..., data_dim] for bits, or their probabilities, z [..., latent_dim] of the first layer."""
        return self.decoders[0](2 * z - 1).sigmoid()

    def initialise_from(self, x: Tensor, seed: int = 0) -> None:
        """Centre by the mean of x [rows, data_dim]; without latents the decoder gives that mean."""
        mean = x.mean(0)
        last: nn.Linear = self.decoders[0].layers[-1]  # type: ignore[assignment, index]
        self.data_mean.copy_(mean)
        last.bias.copy_(mean.clamp(1e-3, 1 - 1e-3).logit())
        self.fresh = False

    def log_marginal(self, x: Tensor) -> Tensor | None:
        """log p(x) [batch] in nats for x [batch, data_dim], all bits summed out; None if there are too many."""
        if self.num_layers > 1 or self.latent_dim > MOST_BITS:
            return None
        bits = torch.cartesian_prod(*[x.new_tensor([0.0, 1.0])] * self.latent_dim).reshape(
            -1, self.latent_dim
        )
        prior = dist.Bernoulli(logits=self.prior_logits).to_event(1).log_prob(bits)  # [2^latent_dim]
        seen = dist.Bernoulli(logits=self.decoders[0](2 * bits - 1)).to_event(1)
        return torch.stack([(prior + seen.log_prob(row)).logsumexp(0) for row in x])

    def check_data(self, x: Tensor) -> Tensor:
        """`x` as floats; raises `DataError` unless [rows, data_dim] of zeros and ones."""
        check_columns(x, self.data_dim, type(self).__name__)
        check_finite(x)
        check_binary(x)
        return self.as_floats(x)
