"""The InfoVAE (Zhao, Song and Ermon 2019): a VAE whose objective does not charge for information.

Generative story and guide are the VAE's:

    z ~ N(0, I),      x | z ~ Bernoulli(logits = decoder(z)) or N(decoder(z), diag(noise_scale^2)),
    q(z | x) = N(loc, diag(scale^2)) with (loc, scale) = encoder(x).

The average KL of the ELBO is the information that z has about the datum, and the mismatch of the aggregated posterior
q(z) = (1/N) sum_n q(z | x_n) and the prior,

    (1/N) sum_n KL(q(z | x_n) || p(z)) = I_q(n; z) + KL(q(z) || p(z)).

A decoder strong enough to do without z lets both go to zero: the posterior collapses. The InfoVAE pays less for the
first and more for the second (their equation 6), with D the maximum mean discrepancy,

    J = E_q log p(x | z) - (1 - alpha) KL(q(z | x) || p(z)) - (alpha + lambda - 1) D(q(z), p(z)).

This file says which objective is meant ("info"); the divergence and its gradient are the objective's. What is
reported as the bound is the ELBO, so that an InfoVAE compares with a VAE.

S. Zhao, J. Song and S. Ermon, "InfoVAE: balancing learning and inference in variational autoencoders", AAAI 2019.
M. D. Hoffman and M. J. Johnson, "ELBO surgery", NIPS workshop on approximate Bayesian inference, 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from pyrolvm.models.guides import GuideFamily
from pyrolvm.models.latent_priors import LatentPrior
from pyrolvm.models.likelihoods import Likelihood
from pyrolvm.models.vae import VAE


class InfoVAE(VAE):
    """A VAE trained for information between data and latents, and an aggregated posterior near the prior.

    Parameters
    ----------
    data_dim, latent_dim : int
        As in `VAE`.
    alpha : float
        At most 1: the share of the KL that is not paid. 1 is the MMD-VAE.
    lambda_ : float
        At least 1 - alpha: alpha + lambda - 1 is the price of one unit of D, in nats per datum.
    kernel : {"rbf", "imq"}
        Of D, a Gaussian or an inverse multiquadric.
    bandwidth : float, sequence of float, or {"dimension", "authors", "median"}
        Of the kernel, in the units of z; by name from latent_dim, or from the distances of draws.
    statistic : {"unbiased", "v"}
        Of D, without or with the pairs of a draw with itself.
    likelihood, encoder, decoder, noise_scale, hidden, activation, image_shape, guide, prior, missing
        As in `VAE`.

    Raises
    ------
    SettingError
        As `VAE`; and from `fit` for an alpha, a lambda or a kernel that the objective cannot have.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        alpha: float = 0.5,
        lambda_: float = 100.0,
        kernel: str = "rbf",
        bandwidth: float | str | Sequence[float] = "dimension",
        statistic: str = "unbiased",
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
        super().__init__(
            data_dim, latent_dim, likelihood, encoder, decoder, noise_scale, hidden, activation, image_shape,
            guide, prior, missing,
        )  # fmt: skip
        self.divergence = {
            "alpha": alpha, "lambda_": lambda_, "kernel": kernel, "bandwidth": bandwidth, "statistic": statistic,
        }  # fmt: skip

    def objective(self) -> tuple[str, dict[str, Any]]:
        """The InfoVAE's, with these settings."""
        return "info", dict(self.divergence)
