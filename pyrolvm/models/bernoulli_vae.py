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

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.errors import DataError, count
from pyrolvm.models.base import LatentVariableModel, check_columns, check_finite
from pyrolvm.models.likelihoods import Likelihood, make_likelihood
from pyrolvm.models.make import start_decoder
from pyrolvm.models.networks import MLP
from pyrolvm.models.units import Bits, make_units


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
        units = make_units(latent_dim, 2)
        likelihood = make_likelihood("bernoulli", count("data_dim", data_dim))
        self._build(units, likelihood, num_layers, nonlinear, hidden)

    def _build(
        self, units: Bits, likelihood: Likelihood, num_layers: int, nonlinear: bool, hidden: int
    ) -> None:
        self.data_dim, self.latent_dim = likelihood.data_dim, units.size
        self.units, self.likelihood = units, likelihood
        self.num_layers, self.nonlinear = count("num_layers", num_layers), bool(nonlinear)
        layers = (count("hidden", hidden),) * 2 if nonlinear else ()
        between = [(units.num_inputs, units.num_logits)] * (self.num_layers - 1)
        up = [(self.data_dim, units.num_logits), *between]
        down = [(units.num_inputs, self.data_dim * likelihood.parts), *between]
        self.prior_logits = nn.Parameter(torch.zeros(units.num_logits))
        self.encoders = nn.ModuleList(MLP(*sizes, layers, "tanh") for sizes in up)
        self.decoders = nn.ModuleList(MLP(*sizes, layers, "tanh") for sizes in down)
        self.register_buffer("data_mean", torch.full((self.data_dim,), 0.5))

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the latent sites, from the data up."""
        return ("z",) if self.num_layers == 1 else tuple(f"z{i}" for i in range(1, self.num_layers + 1))

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(x, z); `x`: [batch, data_dim] or None to generate. Returns x."""
        with self.data_plate(x):
            logits = self.prior_logits  # [num_logits]
            for name, decoder in zip(reversed(self.sites), reversed(self.decoders), strict=True):
                z = pyro.sample(name, self.units.distribution(logits))  # [batch, latent_dim] of bits
                logits = decoder(self.units.inputs(z))
            return pyro.sample("x", self.likelihood(logits), obs=x)

    def guide(self, x: Tensor | None = None) -> Tensor:
        """q(z | x); `x`: [batch, data_dim]. Returns the top layer [batch, latent_dim]."""
        if x is None:
            raise DataError(f"q(z | x) needs data: call guide(x) with x of shape [batch, {self.data_dim}]")
        below = 2 * (x - self.data_mean)  # [batch, data_dim]
        with self.data_plate(x):
            for name, encoder in zip(self.sites, self.encoders, strict=True):
                z = pyro.sample(name, self.units.distribution(encoder(below)))  # [batch, latent_dim]
                below = self.units.inputs(z)
        return z

    def objective(self) -> str:
        """Two mirrored draws: of the unbiased estimators the best bound for its cost (see the docs page)."""
        return "disarm"

    def likelihood_dist(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z_1) for z_1 [..., latent_dim], event [data_dim]; its `.mean` is the reconstruction."""
        return self.likelihood(self.decoders[0](self.units.inputs(z)))

    def decode(self, z: Tensor | Mapping[str, Tensor]) -> Tensor:
        """The mean [..., data_dim] of p(x | z_1), for z_1 or its probabilities, or a dict of the layers by name."""
        return self.likelihood_dist(z["z1"] if isinstance(z, Mapping) else z).mean

    def initialise_from(self, x: Tensor, seed: int = 0) -> None:
        """Centre by the mean of x [rows, data_dim]; without latents the decoder gives the columns' own distribution."""
        self.data_mean.copy_(x.mean(0))
        start_decoder(self.decoders[0], self.likelihood, x)
        self.fresh = False

    def log_marginal(self, x: Tensor) -> Tensor | None:
        """log p(x) [batch] in nats for x [batch, data_dim], all latents summed out; None if there are too many."""
        if not self.units.summable(self.num_layers):
            return None
        log_p = self.units.marginal(self.prior_logits, reversed(self.decoders[1:]))  # [values] of z_1
        seen = self.likelihood_dist(self.units.every(x))
        return torch.stack([(log_p + seen.log_prob(row)).logsumexp(0) for row in x])

    def check_data(self, x: Tensor) -> Tensor:
        """`x` as floats; raises `DataError` unless [rows, data_dim], finite and in the likelihood's support."""
        check_columns(x, self.data_dim, type(self).__name__)
        check_finite(x)
        self.likelihood.check(x)
        return self.as_floats(x)
