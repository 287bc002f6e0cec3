"""The deep autoencoder, as a point estimate of the latent variables.

Generative story, for each of N rows, that of the VAE:

    z ~ N(0, I)                                            [latent_dim]
    x | z ~ N(decoder(z), noise_scale^2 I)                 likelihood="gaussian",
    x | z ~ Bernoulli(logits = decoder(z))                 likelihood="bernoulli", or another

The guide puts all its mass on one point, the code of the encoder g:

    q(z | x) = delta(z - g(x)).

What is climbed is the joint log-density at the code, the regularised reconstruction error

    L(x) = log p(x | z) + log p(z)   at z = g(x)
         = - |x - decoder(g(x))|^2 / (2 noise_scale^2) - |g(x)|^2 / 2 + const        (Gaussian, fixed noise).

L is no bound on log p(x): a point has no entropy, so that there is no evidence by this guide, no k-hat and no
posterior to compare with. For a given decoder the best code is the maximum of the posterior; of a linear decoder W

    g(x) = (W' W + noise_scale^2 I)^-1 W' (x - b),

which is PPCA's posterior mean. Where the decoder is free the prior on z fixes no scale: codes shrink by c while weights
grow by c, and L rises towards minus the squared error of PCA. The linear autoencoder thus spans the principal subspace
(Bourlard and Kamp 1988; Baldi and Hornik 1989).

H. Bourlard and Y. Kamp, "Auto-association by multilayer perceptrons and singular value decomposition", Biological
Cybernetics 59 (1988). P. Baldi and K. Hornik, "Neural networks and principal component analysis", Neural Networks 2
(1989). G. E. Hinton and R. R. Salakhutdinov, "Reducing the dimensionality of data with neural networks", Science 313
(2006).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyro.distributions as dist
from torch import Tensor, nn

from pyrolvm.errors import count
from pyrolvm.models.base import LatentVariableModel
from pyrolvm.models.latent_priors import make_prior
from pyrolvm.models.likelihoods import Likelihood, make_likelihood
from pyrolvm.models.make import make_coder, make_decoder
from pyrolvm.models.missing import as_missing
from pyrolvm.models.vae import VAE


class Autoencoder(VAE):
    """Deep autoencoder: the VAE's model with a point estimate of z.

    Parameters
    ----------
    data_dim : int
        Columns of the data; images are flat vectors.
    latent_dim : int
        Dimensions of the code z.
    likelihood : str or Likelihood
        "gaussian" for the squared error, "bernoulli" for data of zeros and ones, or another of
        `pyrolvm.models.likelihoods.LIKELIHOODS`.
    encoder : {"mlp", "conv", "linear"} or Module
        g; a module maps x [..., data_dim] to z [..., latent_dim].
    decoder : {"mlp", "conv", "linear"} or Module
        As in `VAE`.
    noise_scale : float or {"shared", "per_feature", "network"}, optional
        As in `VAE`. The smaller it is, the less the prior weighs against the reconstruction error.
    hidden : sequence of int
        Sizes of the encoder's fully connected hidden layers; the decoder has them reversed.
    activation, image_shape, missing
        As in `VAE`.

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
        likelihood: str | Likelihood = "gaussian",
        encoder: str | nn.Module = "mlp",
        decoder: str | nn.Module = "mlp",
        noise_scale: float | str | None = None,
        hidden: Sequence[int] = (400,),
        activation: str = "relu",
        image_shape: Sequence[int] | None = None,
        missing: Literal["mask"] | None = None,
    ) -> None:
        LatentVariableModel.__init__(self)  # the VAE's own would build an encoder of distributions
        self.data_dim, self.latent_dim = count("data_dim", data_dim), count("latent_dim", latent_dim)
        self.likelihood = make_likelihood(likelihood, self.data_dim, noise_scale)
        self.latent_prior = make_prior("normal", self.latent_dim, self.data_dim)
        nets = (hidden, activation, image_shape)
        self.missing = as_missing(missing)
        self.encoder = make_coder(encoder, self.data_dim, self.latent_dim, *nets, self.missing)
        self.decoder = make_decoder(
            decoder, self.latent_dim, self.data_dim, *nets, parts=self.likelihood.parts
        )

    def posterior_dist(self, x: Tensor) -> dist.Delta:
        """The point g(x) for x [..., data_dim], event [latent_dim]; it has no density."""
        return dist.Delta(self.encoder(x).to(x.dtype), event_dim=1)
