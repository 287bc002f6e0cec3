"""The variational autoencoder (Kingma and Welling 2014).

Generative story, for each of N rows:

    z ~ N(0, I)                                            [latent_dim]
    x | z ~ Bernoulli(logits = decoder(z))                 likelihood="bernoulli", or
    x | z ~ N(decoder(z), diag(noise_scale^2))             likelihood="gaussian"

The guide is amortised by the encoder, q(z | x) = N(loc, diag(scale^2)) with (loc, scale) = encoder(x),
and both networks climb the evidence lower bound (their equation 3)

    log p(x) >= E_q(z | x) [log p(x | z)] - KL(q(z | x) || p(z)).

The noise of a Gaussian decoder is fixed, learned once, or learned for each feature. Learned noise is
what makes the Gaussian VAE a generalisation of PPCA: with linear networks it is PPCA. Where a flexible
decoder can pass through the data, the likelihood has no upper bound as the noise goes to zero (Mattei
and Frellsen 2018), hence the small floor under it.

D. P. Kingma and M. Welling, "Auto-encoding variational Bayes", ICLR 2014.
P.-A. Mattei and J. Frellsen, "Leveraging the exact likelihood of deep latent variable models", NeurIPS 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.errors import DataError, SettingError, count, one_of
from pyrolvm.models.base import LatentVariableModel, check_columns, check_finite, first_row_where
from pyrolvm.models.make import make_decoder, make_encoder
from pyrolvm.models.networks import SCALE_FLOOR


class VAE(LatentVariableModel):
    """Variational autoencoder with a Bernoulli or Gaussian decoder.

    Parameters
    ----------
    data_dim : int
        Columns of the data; images are flat vectors.
    latent_dim : int
        Dimensions of z.
    likelihood : {"bernoulli", "gaussian"}
        For data of zeros and ones, or for real numbers.
    encoder : {"mlp", "conv", "linear"} or Module
        A module maps x [..., data_dim] to (loc, scale), each [..., latent_dim].
    decoder : {"mlp", "conv", "linear"} or Module
        A module maps z [..., latent_dim] to logits or means [..., data_dim].
    noise_scale : float or {"shared", "per_feature"}, optional
        Of the Gaussian, in the units of the data: a number (fixed), "shared" (one learned number, the default) or
        "per_feature" (data_dim learned numbers).
    hidden : sequence of int
        Sizes of the encoder's fully connected hidden layers; the decoder has them reversed.
    activation : str
        A key of `pyrolvm.models.networks.ACTIVATIONS`.
    image_shape : sequence of int, optional
        (channels, height, width) for "conv"; by default one square channel.

    Raises
    ------
    SettingError
        For an unknown option or a size that is no positive whole number.
    ProgramError
        For a module whose output does not have the shapes above.
    """

    prior_loc: Tensor
    fixed_noise_scale: Tensor | None

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        likelihood: str = "bernoulli",
        encoder: str | nn.Module = "mlp",
        decoder: str | nn.Module = "mlp",
        noise_scale: float | str | None = None,
        hidden: Sequence[int] = (400,),
        activation: str = "relu",
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.data_dim, self.latent_dim = count("data_dim", data_dim), count("latent_dim", latent_dim)
        self.likelihood = one_of("likelihood", likelihood, ("bernoulli", "gaussian"))
        self.encoder = make_encoder(encoder, self.data_dim, self.latent_dim, hidden, activation, image_shape)
        self.decoder = make_decoder(decoder, self.latent_dim, self.data_dim, hidden, activation, image_shape)
        self.register_buffer("prior_loc", torch.zeros(latent_dim), persistent=False)
        self._make_noise(noise_scale)

    def _make_noise(self, noise_scale: float | str | None) -> None:
        """Hold the noise as a learnable logarithm, starting at 0, or as a constant."""
        fixed: Tensor | None = None
        if self.likelihood == "bernoulli":
            if noise_scale is not None:
                raise SettingError(
                    f"noise_scale={noise_scale!r} has no meaning for a Bernoulli decoder: "
                    'leave it out, or say likelihood="gaussian"'
                )
        elif noise_scale in (None, "shared"):
            self.log_noise_scale = nn.Parameter(torch.zeros(()))
        elif noise_scale == "per_feature":
            self.log_noise_scale = nn.Parameter(torch.zeros(self.data_dim))
        elif isinstance(noise_scale, str) or not noise_scale > 0 or noise_scale == float("inf"):
            raise SettingError(
                f'noise_scale={noise_scale!r} is not known: pass a positive number, "shared" or "per_feature"'
            )
        else:
            fixed = torch.tensor(float(noise_scale))
        self.register_buffer("fixed_noise_scale", fixed)

    @property
    def noise_scale(self) -> Tensor:
        """Standard deviation, [] or [data_dim], of x around decoder(z); Gaussian likelihood only."""
        if self.likelihood == "bernoulli":
            raise SettingError('a Bernoulli decoder has no noise_scale: say likelihood="gaussian"')
        if self.fixed_noise_scale is not None:
            return self.fixed_noise_scale
        return SCALE_FLOOR + self.log_noise_scale.exp()

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(x, z); `x`: [batch, data_dim] or None to generate. Returns x."""
        with self.data_plate(x):
            z = pyro.sample("z", self.prior())  # [batch, latent_dim]
            return pyro.sample("x", self.likelihood_dist(z), obs=x)  # [batch, data_dim]

    def guide(self, x: Tensor | None = None) -> Tensor:
        """q(z | x); `x`: [batch, data_dim]. Returns z [batch, latent_dim]."""
        if x is None:
            raise DataError(f"q(z | x) needs data: call guide(x) with x of shape [batch, {self.data_dim}]")
        with self.data_plate(x):
            return pyro.sample("z", self.posterior_dist(x))  # [batch, latent_dim]

    def prior(self) -> dist.TorchDistribution:
        """p(z) = N(0, I), event [latent_dim]."""
        return dist.Normal(self.prior_loc, 1.0).to_event(1)

    def likelihood_dist(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z [..., latent_dim], event [data_dim]; its `.mean` is the reconstruction."""
        out = self.decoder(z).to(z.dtype)  # [..., data_dim]; a network under autocast may return bf16
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=out).to_event(1)
        return dist.Normal(out, self.noise_scale).to_event(1)

    def posterior_dist(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) = N(loc, diag(scale^2)) for x [..., data_dim], event [latent_dim]."""
        loc, scale = self.encoder(x)  # each [..., latent_dim]
        return dist.Normal(loc.to(x.dtype), scale.to(x.dtype)).to_event(1)

    def decode(self, z: Tensor) -> Tensor:
        """The mean [..., data_dim] of p(x | z) for z [..., latent_dim]: a probability if Bernoulli."""
        return self.likelihood_dist(z).mean

    def check_data(self, x: Tensor) -> Tensor:
        """`x` as floats; raises `DataError` unless they are [rows, data_dim], finite and, if Bernoulli, 0 or 1."""
        check_columns(x, self.data_dim, type(self).__name__)
        check_finite(x)
        if self.likelihood == "bernoulli":
            check_binary(x)
        return self.as_floats(x)


def check_binary(x: Tensor) -> None:
    """Raise `DataError` naming the first entry of x [rows, columns] that is neither 0 nor 1."""
    where = first_row_where(x, lambda part: (part != 0) & (part != 1))
    if where is None:
        return
    row, column = where
    low, high = x.min().item(), x.max().item()
    raise DataError(
        f"a Bernoulli decoder needs zeros and ones, but row {row}, column {column} is "
        f"{x[row, column].item():.6g} (the data range from {low:.6g} to {high:.6g}): binarise them, e.g. "
        f'(x > {_threshold(low, high):g}).float(), or say likelihood="gaussian"'
    )


def _threshold(low: float, high: float) -> float:
    """A cut that splits the range found: 0.5 for data within [0, 1], else its middle."""
    return 0.5 if low >= 0 and high <= 1 else (low + high) / 2
