"""The variational autoencoder (Kingma and Welling 2014).

Generative story, for each of N rows:

    z ~ N(0, I)                                            [latent_dim]
    x | z ~ Bernoulli(logits = decoder(z))                 likelihood="bernoulli",
    x | z ~ N(decoder(z), diag(noise_scale^2))             likelihood="gaussian", or another

The guide is amortised by the encoder, q(z | x) = N(loc, diag(scale^2)) with (loc, scale) = encoder(x).
The likelihood, the guide's family and the prior are pieces with files of their own (`likelihoods.py`,
`guides.py`, `latent_priors.py`). All networks climb the evidence lower bound (their equation 3)

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
from typing import Literal

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyrolvm.errors import DataError, SettingError, count
from pyrolvm.models.base import LatentVariableModel, check_columns
from pyrolvm.models.guides import GuideFamily, make_guide
from pyrolvm.models.latent_priors import LatentPrior, make_prior
from pyrolvm.models.likelihoods import WITH_NOISE, Likelihood, make_likelihood
from pyrolvm.models.make import make_decoder, make_encoder, start_decoder
from pyrolvm.models.missing import MaskAware, as_missing, check_columns_seen, check_entries, observe


class VAE(LatentVariableModel):
    """Variational autoencoder.

    Parameters
    ----------
    data_dim : int
        Columns of the data; images are flat vectors.
    latent_dim : int
        Dimensions of z.
    likelihood : str or Likelihood
        "bernoulli" for data of zeros and ones, "gaussian" for real numbers, or another of
        `pyrolvm.models.likelihoods.LIKELIHOODS`, such as "poisson" for counts or "categorical:6" for codes 0 to 5.
    encoder : {"mlp", "conv", "linear"} or Module
        A module maps x [..., data_dim] to (loc, scale), each [..., latent_dim], and to what else the guide wants.
    decoder : {"mlp", "conv", "linear"} or Module
        A module maps z [..., latent_dim] to logits or means [..., data_dim]; to several blocks of data_dim columns
        where the likelihood has more `parts`.
    noise_scale : float or {"shared", "per_feature", "network"}, optional
        Of "gaussian" and "student_t", in the units of the data: a number (fixed), "shared" (one learned number, the
        default), "per_feature" (data_dim learned numbers), or "network" (a function of z, the decoder's second part).
    hidden : sequence of int
        Sizes of the encoder's fully connected hidden layers; the decoder has them reversed.
    activation : str
        A key of `pyrolvm.models.networks.ACTIVATIONS`.
    image_shape : sequence of int, optional
        (channels, height, width) for "conv"; by default one square channel.
    guide : str or GuideFamily
        The family of q(z | x), of `pyrolvm.models.guides.GUIDES`, with its settings: "full", "iaf:4".
    prior : str or LatentPrior
        p(z), of `pyrolvm.models.latent_priors.PRIORS`, with its settings: "mixture:20".
    missing : {"mask"}, optional
        "mask" takes rows in which entries are missing (NaN): see `pyrolvm.models.missing`. By default they are refused.

    Raises
    ------
    SettingError
        For an unknown option or a size that is no positive whole number.
    ProgramError
        For a module whose output does not have the shapes above.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        likelihood: str | Likelihood = "bernoulli",
        encoder: str | nn.Module = "mlp",
        decoder: str | nn.Module = "mlp",
        noise_scale: float | str | None = None,
        hidden: Sequence[int] = (400,),
        activation: str = "relu",
        image_shape: Sequence[int] | None = None,
        guide: str | GuideFamily = "diagonal",
        prior: str | LatentPrior = "normal",
        missing: Literal["mask"] | None = None,
    ) -> None:
        super().__init__()
        self.data_dim, self.latent_dim = count("data_dim", data_dim), count("latent_dim", latent_dim)
        self.likelihood = make_likelihood(likelihood, self.data_dim, noise_scale)
        self.guide_family = make_guide(guide, self.latent_dim)
        self.latent_prior = make_prior(prior, self.latent_dim, self.data_dim)
        self.missing = as_missing(missing)
        nets = (hidden, activation, image_shape)
        features, parts = self.guide_family.num_features, self.likelihood.parts
        self.encoder = make_encoder(encoder, self.data_dim, self.latent_dim, *nets, features, self.missing)
        self.decoder = make_decoder(decoder, self.latent_dim, self.data_dim, *nets, parts=parts)

    @property
    def noise_scale(self) -> Tensor:
        """Standard deviation, [] or [data_dim], of x around decoder(z); of likelihoods that have one number for it."""
        if not isinstance(self.likelihood, WITH_NOISE):
            raise SettingError(
                f'a {type(self.likelihood).__name__} decoder has no noise_scale: say likelihood="gaussian"'
            )
        return self.likelihood.noise_scale

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(x, z); `x`: [batch, data_dim] or None to generate. Returns x."""
        with self.data_plate(x):
            z = pyro.sample("z", self.prior())  # [batch, latent_dim]
            return observe("x", self.likelihood_dist(z), x, self.missing)  # [batch, data_dim]

    def guide(self, x: Tensor | None = None) -> Tensor:
        """q(z | x); `x`: [batch, data_dim]. Returns z [batch, latent_dim]."""
        if x is None:
            raise DataError(f"q(z | x) needs data: call guide(x) with x of shape [batch, {self.data_dim}]")
        with self.data_plate(x):
            return pyro.sample("z", self.posterior_dist(x))  # [batch, latent_dim]

    def prior(self) -> dist.TorchDistribution:
        """p(z), batch [], event [latent_dim]."""
        return self.latent_prior(self.posterior_dist)

    def likelihood_dist(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z [..., latent_dim], event [data_dim]; its `.mean` is the reconstruction."""
        return self.likelihood(self.decoder(z).to(z.dtype))  # a network under autocast may return bf16

    def posterior_dist(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) for x [..., data_dim], event [latent_dim]."""
        return self.guide_family(*(part.to(x.dtype) for part in self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """The mean [..., data_dim] of p(x | z) for z [..., latent_dim]: a probability if Bernoulli."""
        return self.likelihood_dist(z).mean

    def initialise_from(self, x: Tensor, seed: int = 0) -> None:
        """Let the decoder begin at the columns' own distribution, and the prior at the data, where they know how.

        Parameters
        ----------
        x : Tensor [rows, data_dim]
        seed : int
            Of the prior's start.
        """
        x = self.check_data(x)
        check_columns_seen(x)
        if isinstance(self.encoder, MaskAware):
            self.encoder.fill.copy_(x.nanmean(0))
        start_decoder(self.decoder, self.likelihood, x)
        self.latent_prior.initialise_from(x, seed)
        self.fresh = False

    def check_data(self, x: Tensor) -> Tensor:
        """`x` as floats; raises `DataError` unless [rows, data_dim], in the likelihood's support (or missing)."""
        check_columns(x, self.data_dim, type(self).__name__)
        check_entries(x, self.missing)
        self.likelihood.check(x)
        return self.as_floats(x)
