"""Variational inference on the power posterior, and the beta-VAE.

Generative story, for each of N rows, with the likelihood raised to a power eta > 0:

    z ~ N(0, I)                              [latent_dim]
    x | z with density p(x | z)^eta          p(x | z) as in the VAE; weighed by eta, not normalised

What is inferred is the power (or tempered) posterior p_eta(z | x) = p(x | z)^eta p(z) / Z_eta(x), and
the bound is one on its normaliser:

    log Z_eta(x) = log of the integral of p(x | z)^eta p(z) dz
                >= L_eta = eta E_q [log p(x | z)] - KL(q(z | x) || p(z))

with equality when q is the power posterior. eta < 1 trusts the data less (a wider posterior), eta > 1
more; eta = 1 is the VAE.

The beta-VAE (Higgins et al. 2017, equation 4) weighs the other term:

    L_beta = E_q [log p(x | z)] - beta KL(q(z | x) || p(z)),      L_eta = eta L_beta   for beta = 1 / eta.

The two have the same maxima, so that there is one program here, the power posterior's, and `beta=` is
another name for `eta = 1 / beta`. Every bound reported for it is L_eta: a bound on log Z_eta, which is
not log p(x). `beta_objective` turns it into L_beta.

I. Higgins et al., "beta-VAE: learning basic visual concepts with a constrained variational framework",
ICLR 2017.
A. A. Alemi et al., "Fixing a broken ELBO", ICML 2018, for the same objective as rate and distortion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import pyro
from pyro import poutine
from torch import Tensor, nn

from pyrolvm.errors import SettingError
from pyrolvm.models.guides import GuideFamily
from pyrolvm.models.latent_priors import LatentPrior
from pyrolvm.models.likelihoods import Likelihood
from pyrolvm.models.linear_gaussian import linear_gaussian_log_marginal, linear_gaussian_posterior
from pyrolvm.models.missing import observe
from pyrolvm.models.ppca import PPCA
from pyrolvm.models.vae import VAE

Bound = TypeVar("Bound", float, Tensor)


class PowerVAE(VAE):
    """A VAE whose likelihood is raised to the power eta; the beta-VAE of beta = 1 / eta.

    Parameters
    ----------
    data_dim, latent_dim : int
        As in `VAE`.
    eta, beta : float, optional
        Exactly one of them, a positive number; eta = 1 is the VAE.
    likelihood, encoder, decoder, noise_scale, hidden, activation, image_shape, guide, prior, missing
        As in `VAE`.

    Raises
    ------
    SettingError
        Unless exactly one of `eta` and `beta` is given, positive and finite; and as `VAE`.

    Notes
    -----
    A learned `noise_scale` is redundant with eta, since N(x; m, s^2)^eta is proportional to N(x; m, s^2 / eta):
    with a Gaussian decoder, fix the noise for eta to have an effect of its own.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        eta: float | None = None,
        beta: float | None = None,
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
        self.eta = _power(eta, beta)

    @property
    def beta(self) -> float:
        """The weight 1 / eta of the KL term in L_beta."""
        return 1 / self.eta

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(x | z)^eta p(z); `x`: [batch, data_dim], or None to generate from p(x | z) p(z). Returns x."""
        with self.data_plate(x):
            z = pyro.sample("z", self.prior())  # [batch, latent_dim]
            with poutine.scale(scale=self.eta):
                return observe("x", self.likelihood_dist(z), x, self.missing)  # [batch, data_dim]

    def beta_objective(self, bound: Bound) -> Bound:
        """L_beta = beta L_eta: the beta-VAE's objective from the bound reported, both in nats per datum."""
        return self.beta * bound


def _power(eta: float | None, beta: float | None) -> float:
    """The power, from exactly one of `eta` and `beta` = 1 / eta."""
    if (eta is None) == (beta is None):
        raise SettingError("say exactly one of eta= (the power of the likelihood) and beta= (its inverse)")
    name, value = ("eta", eta) if beta is None else ("beta", beta)
    if value is None or not 0 < value < math.inf:
        raise SettingError(f"{name}={value} must be a positive number; {name}=1 is the plain VAE")
    return float(value) if name == "eta" else 1 / value


def tempered_log_marginal(ppca: PPCA, x: Tensor, eta: float) -> Tensor:
    """log Z_eta(x), exact for PPCA.

    Parameters
    ----------
    ppca : PPCA
    x : Tensor [batch, data_dim]
    eta : float
        The power of the likelihood.

    Returns
    -------
    Tensor [batch]
        In nats.

    Notes
    -----
    N(x; m, s^2 I)^eta = N(x; m, s^2 / eta I) (2 pi s^2)^(D (1 - eta) / 2) eta^(-D / 2), so that the power
    acts as more or less noise, up to a constant.
    """
    noise_scale = ppca.noise_scale / math.sqrt(eta)
    log_marginal = linear_gaussian_log_marginal(x - ppca.offset, ppca.loadings, noise_scale)
    log_variance = math.log(2 * math.pi) + 2 * ppca.log_noise_scale
    return log_marginal + 0.5 * ppca.data_dim * ((1 - eta) * log_variance - math.log(eta))


def tempered_posterior(ppca: PPCA, x: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """p_eta(z | x), exact for PPCA.

    Parameters
    ----------
    ppca : PPCA
    x : Tensor [batch, data_dim]
    eta : float
        The power of the likelihood.

    Returns
    -------
    mean : Tensor [batch, latent_dim]
    scale_tril : Tensor [latent_dim, latent_dim]
        Cholesky factor of the covariance, the same for all rows.
    """
    return linear_gaussian_posterior(x - ppca.offset, ppca.loadings, ppca.noise_scale / math.sqrt(eta))
