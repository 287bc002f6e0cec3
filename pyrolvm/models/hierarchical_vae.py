"""The hierarchical VAE: several stochastic layers, two in Burda, Grosse and Salakhutdinov (2016), table 1.

Generative story, for each of N rows, from the top layer L down to the data:

    z_L ~ N(0, I)                                                    [sizes[L - 1]]
    z_l | z_l+1 ~ N(loc, diag(scale^2)),  (loc, scale) = descents[l](z_l+1)      l = L - 1, ..., 1
    x | z_1 ~ Bernoulli(logits = decoder(z_1))                       likelihood="bernoulli", or another

The guide goes the other way, from the data up:

    q(z_1, ..., z_L | x) = q(z_1 | x) q(z_2 | z_1) ... q(z_L | z_L-1),      each N(loc, diag(scale^2)) of an encoder.

The KL of the bound is a sum over layers, which the history has one by one (`kl_z1`, `kl_z2`, ...):

    KL = sum_l E_q [ log q(z_l | z_l-1) - log p(z_l | z_l+1) ],      z_0 = x.

An upper layer is easily left unused: its KL goes to zero before the layer below has something to say. Free bits
(Kingma et al. 2016) take away the gain of that: the objective counts a layer's KL as `free_bits` nats where it is
less. The bound that is reported stays the ELBO.

Y. Burda, R. Grosse and R. Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.
D. P. Kingma et al., "Improved variational inference with inverse autoregressive flow", NeurIPS 2016 (free bits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyrolvm.errors import DataError, SettingError, count
from pyrolvm.models.base import LatentVariableModel, check_columns
from pyrolvm.models.guides import make_guide
from pyrolvm.models.latent_priors import make_prior
from pyrolvm.models.likelihoods import Likelihood, make_likelihood
from pyrolvm.models.make import make_decoder, make_encoder, start_decoder
from pyrolvm.models.missing import MaskAware, as_missing, check_columns_seen, check_entries, observe
from pyrolvm.models.networks import MLPEncoder

Hidden = Sequence[int] | Sequence[Sequence[int]]


class HierarchicalVAE(LatentVariableModel):
    """A VAE of several stochastic layers.

    Parameters
    ----------
    data_dim : int
        Columns of the data; images are flat vectors.
    latent_dim : int or sequence of int
        Dimensions of z_1 (above the data), z_2, ...: (100, 50) in the paper. A number is that of the top of two layers,
        the one below having twice as many.
    likelihood : str or Likelihood
        As in `VAE`.
    encoder, decoder : {"mlp", "conv", "linear"} or Module
        Between x and z_1, as in `VAE`; fully connected above.
    noise_scale : float or {"shared", "per_feature", "network"}, optional
        As in `VAE`.
    hidden : sequence of int, or one for each layer
        Sizes of the hidden layers between x and z_1, halved from layer to layer above; or those of each layer:
        ((200, 200), (100, 100)).
    activation : str
        A key of `pyrolvm.models.networks.ACTIVATIONS`.
    image_shape : sequence of int, optional
        As in `VAE`.
    guide : str
        The family of q(z_l | z_l-1), of `pyrolvm.models.guides.GUIDES`.
    free_bits : float
        Nats of KL that cost nothing, 0 for the ELBO itself.
    free_bits_per : {"site", "dimension"}
        What they are given to: each layer, or each of its dimensions.
    missing : "mask" or None
        As in `VAE`.

    Attributes
    ----------
    sizes : tuple of int
        Dimensions of z_1, z_2, ...

    Raises
    ------
    SettingError
        For an unknown option, a size that is no positive whole number, or fewer than two layers.
    ProgramError
        For a module whose output does not have the shapes above.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int | Sequence[int],
        likelihood: str | Likelihood = "bernoulli",
        encoder: str | nn.Module = "mlp",
        decoder: str | nn.Module = "mlp",
        noise_scale: float | str | None = None,
        hidden: Sequence[int] | Sequence[Sequence[int]] = (200, 200),
        activation: str = "tanh",
        image_shape: Sequence[int] | None = None,
        guide: str = "diagonal",
        free_bits: float = 0.0,
        free_bits_per: str = "site",
        missing: Literal["mask"] | None = None,
    ) -> None:
        super().__init__()
        self.data_dim, self.sizes = count("data_dim", data_dim), _sizes(latent_dim)
        self.latent_dim, layers = self.sizes[-1], _hidden(hidden, len(self.sizes))
        self.likelihood = make_likelihood(likelihood, self.data_dim, noise_scale)
        families = [make_guide(guide, size) for size in self.sizes]
        self.guide_families = nn.ModuleList(families)
        self.latent_prior = make_prior("normal", self.latent_dim, self.data_dim)
        nets, features = (activation, image_shape), [family.num_features for family in families]
        parts = self.likelihood.parts
        self.missing = as_missing(missing)
        first = make_encoder(
            encoder, self.data_dim, self.sizes[0], layers[0], *nets, features[0], self.missing
        )
        self.decoder = make_decoder(decoder, self.sizes[0], self.data_dim, layers[0], *nets, parts=parts)
        self.encoders, self.descents = nn.ModuleList([first]), nn.ModuleList()
        for below, above, sizes, wanted in zip(
            self.sizes, self.sizes[1:], layers[1:], features[1:], strict=False
        ):
            self.encoders.append(MLPEncoder(below, above, sizes, activation, wanted))
            self.descents.append(MLPEncoder(above, below, tuple(reversed(sizes)), activation))
        self.free_bits, self.free_bits_per = free_bits, free_bits_per

    # ------------------------------------------------------------------ the program

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(x, z_1, ..., z_L); `x`: [batch, data_dim] or None to generate. Returns x."""
        with self.data_plate(x):
            z = pyro.sample(f"z{len(self.sizes)}", self.latent_prior(None))  # [batch, sizes[-1]]
            for layer in range(len(self.descents), 0, -1):
                z = pyro.sample(f"z{layer}", self.descent_dist(layer, z))  # [batch, sizes[layer - 1]]
            return observe("x", self.likelihood_dist(z), x, self.missing)  # [batch, data_dim]

    def guide(self, x: Tensor | None = None) -> Tensor:
        """q(z_1, ..., z_L | x); `x`: [batch, data_dim]. Returns z_L [batch, sizes[-1]]."""
        if x is None:
            raise DataError(f"q(z | x) needs data: call guide(x) with x of shape [batch, {self.data_dim}]")
        with self.data_plate(x):
            z = x
            for layer in range(1, len(self.sizes) + 1):
                z = pyro.sample(f"z{layer}", self.ascent_dist(layer, z))  # [batch, sizes[layer - 1]]
            return z

    def descent_dist(self, layer: int, above: Tensor) -> dist.TorchDistribution:
        """p(z_layer | z_layer+1) for z_layer+1 [..., sizes[layer]], event [sizes[layer - 1]]."""
        loc, scale = (part.to(above.dtype) for part in self.descents[layer - 1](above))
        return dist.Normal(loc, scale).to_event(1)

    def ascent_dist(self, layer: int, below: Tensor) -> dist.TorchDistribution:
        """q(z_layer | z_layer-1) for z_layer-1 (x for the first), event [sizes[layer - 1]]."""
        parts = (part.to(below.dtype) for part in self.encoders[layer - 1](below))
        return self.guide_families[layer - 1](*parts)

    def likelihood_dist(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z_1) for z_1 [..., sizes[0]], event [data_dim]; its `.mean` is the reconstruction."""
        return self.likelihood(self.decoder(z).to(z.dtype))

    # ------------------------------------------------------------------ what it knows

    def objective(self) -> tuple[str, dict[str, Any]] | None:
        """The ELBO, or with free bits."""
        if self.free_bits == 0:
            return None
        return "free_bits", {"free_bits": self.free_bits, "per": self.free_bits_per}

    def decode(self, z: Tensor | Mapping[str, Tensor]) -> Tensor:
        """The mean [..., data_dim] of p(x | z_1), for z_1 [..., sizes[0]] or a dict of the layers by name."""
        return self.likelihood_dist(z["z1"] if isinstance(z, Mapping) else z).mean

    def descend(self, z: Tensor) -> Tensor:
        """z_1 [..., sizes[0]] below the top layer z [..., latent_dim], each layer at its mean: what `decode` takes."""
        for layer in range(len(self.descents), 0, -1):
            z = self.descent_dist(layer, z).mean
        return z

    def initialise_from(self, x: Tensor, seed: int = 0) -> None:
        """Let the decoder begin at the columns' own distribution, as in the paper, where its likelihood knows how.

        Parameters
        ----------
        x : Tensor [rows, data_dim]
        seed : int
            Of no effect.
        """
        x = self.check_data(x)
        check_columns_seen(x)
        if isinstance(self.encoders[0], MaskAware):
            self.encoders[0].fill.copy_(x.nanmean(0))
        start_decoder(self.decoder, self.likelihood, x)
        self.fresh = False

    def check_data(self, x: Tensor) -> Tensor:
        """`x` as floats; raises `DataError` unless [rows, data_dim], finite and in the likelihood's support."""
        check_columns(x, self.data_dim, type(self).__name__)
        check_entries(x, self.missing)
        self.likelihood.check(x)
        return self.as_floats(x)


def _sizes(latent_dim: int | Sequence[int]) -> tuple[int, ...]:
    """The dimensions of each layer, from the data up."""
    if not isinstance(latent_dim, Sequence):
        top = count("latent_dim", latent_dim)
        return 2 * top, top
    sizes = tuple(count("a size in latent_dim", size) for size in latent_dim)
    if len(sizes) < 2 or isinstance(latent_dim, str):
        raise SettingError(
            f"latent_dim={latent_dim!r} must be the dimensions of two layers at least, from the data up: (100, 50); "
            "one layer is a VAE"
        )
    return sizes


def _hidden(hidden: Hidden, num_layers: int) -> list[tuple[int, ...]]:
    """The sizes of the hidden layers of each stochastic layer."""
    if not any(isinstance(size, Sequence) for size in hidden):
        flat: Any = hidden
        return [tuple(max(1, size // 2**layer) for size in flat) for layer in range(num_layers)]
    if len(hidden) != num_layers or not all(isinstance(sizes, Sequence) for sizes in hidden):
        raise SettingError(
            f"hidden={hidden!r} must be sizes of the first layer, (200, 200), or those of each of the {num_layers} "
            "layers, ((200, 200), (100, 100))"
        )
    nested: Any = hidden
    return [tuple(sizes) for sizes in nested]
