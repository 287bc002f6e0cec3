"""Structured prediction: the lower half of an image given its upper half, through layers of discrete units.

Generative story, for each of N rows x = (x_top, x_bottom) of zeros and ones, with L layers of `latent_dim` units:

    z_1 | x_top ~ Bernoulli(logits = layers_0(x_top)), or OneHotCategorical for units of n > 2 states
    z_l | z_{l-1} ~ the same, logits = layers_{l-1}(inputs(z_{l-1}))                        l = 2, ..., L
    x_bottom | z_L ~ Bernoulli(logits = layers_L(inputs(z_L)))

All layers are linear, bits enter them as -1 and 1, pixels centred by their mean. The guide is the prior,

    q(z | x) = p(z | x_top),        L_m = E[ log (1/m) sum_k p(x_bottom | z^k) ] <= log p(x_bottom | x_top),

so that log p(z) and log q(z) cancel in the weight of each draw, and the bound is on the conditional log-likelihood. The
density of the given part is not modelled.

The model is given whole rows and takes them apart itself: an image is one datum in a file, in a minibatch and among
held-out rows, and what the model fills in stands in its place in the row.

C. Maddison, A. Mnih and Y. W. Teh, "The Concrete distribution", ICLR 2017, section 5.2.
T. Raiko et al., "Techniques for learning binary stochastic feedforward neural networks", ICLR 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrolvm.errors import DataError, SettingError, count
from pyrolvm.models.base import LatentVariableModel, check_columns, check_finite
from pyrolvm.models.likelihoods import check_binary, make_likelihood
from pyrolvm.models.make import start_decoder
from pyrolvm.models.networks import MLP
from pyrolvm.models.units import Bits, make_units, temperatures

CERTAIN = 40.0
"""The logit of what is given: sigmoid(40) is 1 in float32."""


class StructuredPrediction(LatentVariableModel):
    """The rest of a row of bits given its first columns.

    Parameters
    ----------
    data_dim : int
        Columns of the data, at least 2; images are flat vectors.
    num_given : int, optional
        The first columns, which are given; half of them if None, the upper half of an image.
    latent_dim : int
        Units of each layer.
    num_layers : int
        Layers of units: sites "z" if one, else "z1" (below what is given), "z2", ...
    num_states : int
        States of a unit, at least 2; sites are bits [batch, latent_dim] if 2, else one-hot vectors [batch, latent_dim,
        num_states].
    num_particles : int
        m of the bound that is trained.
    temperature : float or (float, float), optional
        As in `ConcreteVAE`; densities of prior and guide have the same, so that they cancel.

    Raises
    ------
    SettingError
        For a size that is no positive whole number or leaves nothing to predict, fewer than two states, or a
        temperature that is not positive.
    """

    data_mean: Tensor
    is_new: Tensor
    units: Bits

    def __init__(
        self,
        data_dim: int,
        num_given: int | None = None,
        latent_dim: int = 240,
        num_layers: int = 2,
        num_states: int = 2,
        num_particles: int = 1,
        temperature: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.data_dim, self.units = count("data_dim", data_dim, 2), make_units(latent_dim, num_states)
        self.num_given = count("num_given", self.data_dim // 2 if num_given is None else num_given)
        if self.num_given >= self.data_dim:
            raise SettingError(
                f"num_given={num_given} leaves nothing to predict: it must be below data_dim={self.data_dim}"
            )
        self.latent_dim, self.num_layers = self.units.size, count("num_layers", num_layers)
        self.num_particles = count("num_particles", num_particles)
        self.temperature, _ = temperatures(num_states, temperature, None)
        self.likelihood = make_likelihood("bernoulli", self.data_dim - self.num_given)
        before = [self.num_given] + [self.units.num_inputs] * self.num_layers
        after = [self.units.num_logits] * self.num_layers + [self.likelihood.data_dim]
        self.layers = nn.ModuleList(MLP(*sizes, ()) for sizes in zip(before, after, strict=True))
        self.register_buffer("data_mean", torch.full((self.data_dim,), 0.5))
        self.register_buffer("is_new", torch.arange(self.data_dim) >= self.num_given)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the latent sites, from what is given down."""
        return ("z",) if self.num_layers == 1 else tuple(f"z{i}" for i in range(1, self.num_layers + 1))

    # ------------------------------------------------------------------ the program

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(z, x_bottom | x_top).

        Parameters
        ----------
        x : Tensor [batch, data_dim] or None
            None generates: what is given is then drawn pixel by pixel from the columns' means.

        Returns
        -------
        Tensor [batch, data_dim]
        """
        with self.data_plate(x) as rows:
            given = self.any_given(rows) if x is None else x[..., : self.num_given]  # [..., num_given]
            return pyro.sample("x", self.row_dist(given, self._descend(given)), obs=x)

    def guide(self, x: Tensor | None = None) -> Tensor:
        """p(z | x_top); `x`: [batch, data_dim]. Returns the inputs of the last layer [batch, ...]."""
        if x is None:
            raise DataError(
                f"p(z | x_top) needs data: call guide(x) with x of shape [batch, {self.data_dim}]"
            )
        with self.data_plate(x):
            return self._descend(x[..., : self.num_given])

    def _descend(self, given: Tensor) -> Tensor:
        """Draw the layers below what is given [..., num_given]; the inputs of the last one."""
        inputs = self.centred(given)
        for name, layer in zip(self.sites, self.layers, strict=False):
            z = pyro.sample(name, self.units.distribution(layer(inputs)))  # [batch, latent_dim] of bits
            inputs = self.units.inputs(z)
        return inputs

    def centred(self, given: Tensor) -> Tensor:
        """What the first layer sees of [..., num_given]."""
        return 2 * (given - self.data_mean[: self.num_given])

    def any_given(self, rows: Any) -> Tensor:
        """What is given to generated rows: each pixel by itself, from its mean; [rows, num_given]."""
        return torch.bernoulli(self.data_mean[: self.num_given].expand(len(rows), -1))

    def row_dist(self, given: Tensor, inputs: Tensor) -> dist.TorchDistribution:
        """The whole row, event [data_dim]: what is given is certain and has no density, the rest is predicted."""
        logits = self.layers[-1](inputs)  # [..., data_dim - num_given]
        certain = CERTAIN * (2 * given - 1).expand(*logits.shape[:-1], self.num_given)
        bits = dist.Bernoulli(logits=torch.cat([certain, logits], -1))
        return bits.mask(self.is_new.expand(bits.batch_shape)).to_event(1)

    # ------------------------------------------------------------------ what it knows

    def objective(self) -> tuple[str, dict[str, Any]]:
        """The relaxed bound of `num_particles` draws; "vimco" is the other that the paper has."""
        return "concrete", {
            "temperature": self.temperature,
            "prior_temperature": None,
            "num_particles": self.num_particles,
        }

    def initialise_from(self, x: Tensor, seed: int = 0) -> None:
        """Centre by the mean of x [rows, data_dim]; without latents the last layer gives the columns' means."""
        self.data_mean.copy_(x.mean(0))
        start_decoder(self.layers[-1], self.likelihood, x[:, self.num_given :])
        self.fresh = False

    def log_marginal(self, x: Tensor) -> Tensor | None:
        """log p(x_bottom | x_top) [batch] in nats for x [batch, data_dim], all units summed out; None if too many."""
        if not self.units.summable(self.num_layers):
            return None
        first = self.layers[0](self.centred(x[:, : self.num_given]))
        log_p = self.units.marginal(first, self.layers[1:-1])  # [batch, values] of z_L
        inputs = self.units.inputs(self.units.every(x))
        logits = self.layers[-1](inputs)  # [values, data_dim - num_given]
        seen = x[:, self.num_given :] @ logits.mT - softplus(logits).sum(-1)  # [batch, values]
        return (log_p + seen).logsumexp(-1)

    def check_data(self, x: Tensor) -> Tensor:
        """`x` as floats; raises `DataError` unless [rows, data_dim] of zeros and ones."""
        check_columns(x, self.data_dim, type(self).__name__)
        check_finite(x)
        check_binary(x, instead="")
        return self.as_floats(x)
