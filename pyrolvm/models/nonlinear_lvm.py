"""The nonlinear latent variable model: a density of few latent dimensions, with a noise of its own at each z.

Generative story, for each of N rows:

    z ~ N(0, I)                                            [latent_dim]
    x | z ~ N(mu(z), diag(sigma(z)^2))                     likelihood="gaussian"
    x | z ~ Bernoulli(logits = mu(z))                      likelihood="bernoulli"

where mu and sigma are the two parts of one network's output. The marginal

    p(x) = integral of p(x | z) N(z; 0, I) dz

is a continuous mixture along a curved manifold, wide where sigma(z) is. It has no closed form, but z is small:
with one or two dimensions a sum over a grid is exact to many digits (`quadrature_log_marginal`).

The likelihood has no upper bound: where mu(z) passes through a datum, sigma(z) can go to zero there (Mattei and
Frellsen 2018). `noise_floor` bounds sigma from below and is part of the model. At the other end, a sigma that is
learned before mu widens over all data, and then nothing moves mu: so the noise is one number for the first third of
a run, c = 0 in

    sigma(z) = noise_floor + softplus(s + c (s(z) - s)),      s = the mean of s(0),

and c goes to 1 in the second (the control "noise_network"). What remains is a VAE, whose guide, priors and other
options it shares; smooth networks and a learned Sigma(z) are the defaults.

D. J. C. MacKay, "Bayesian neural networks and density networks", Nucl. Instrum. Methods A 354 (1995) 73-80.
C. M. Bishop, M. Svensen and C. K. I. Williams, "GTM: the generative topographic mapping", Neural Comput. 10 (1998).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.controls import control
from pyrolvm.errors import SettingError, count
from pyrolvm.models.guides import GuideFamily
from pyrolvm.models.latent_priors import LatentPrior
from pyrolvm.models.likelihoods import WITH_NOISE, Gaussian, Likelihood
from pyrolvm.models.missing import without_gaps
from pyrolvm.models.vae import VAE

NOISE_NETWORK = "noise_network"
WIDTH = 6.0
"""The grid of `quadrature_log_marginal` reaches so many standard deviations of z to each side."""


class NonlinearLVM(VAE):
    """Nonlinear latent variable model N(mu(z), Sigma(z)) of data [batch, data_dim].

    Parameters
    ----------
    data_dim, latent_dim : int
        As in `VAE`.
    likelihood : str or Likelihood
        As in `VAE`; "gaussian" by default.
    noise_scale : float or {"network", "shared", "per_feature"}, optional
        Of the Gaussian: "network", a function of z, by default.
    noise_floor : float
        The Gaussian's learned noise stays above it, in the units of the data: a hundredth of standardised columns'
        deviation by default.
    encoder, decoder, hidden, activation, image_shape, guide, prior, missing
        As in `VAE`.

    Raises
    ------
    SettingError
        As `VAE`, and for a `noise_floor` that is not positive.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        likelihood: str | Likelihood = "gaussian",
        noise_scale: float | str | None = None,
        noise_floor: float = 0.01,
        encoder: str | nn.Module = "mlp",
        decoder: str | nn.Module = "mlp",
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        image_shape: Sequence[int] | None = None,
        guide: str | GuideFamily = "diagonal",
        prior: str | LatentPrior = "normal",
        missing: Literal["mask"] | None = None,
    ) -> None:
        if likelihood == "gaussian":
            noise = "network" if noise_scale is None else noise_scale
            likelihood, noise_scale = Gaussian(count("data_dim", data_dim), noise, noise_floor), None
        super().__init__(
            data_dim, latent_dim, likelihood, encoder, decoder, noise_scale, hidden, activation, image_shape,
            guide, prior, missing,
        )  # fmt: skip
        self.learns_noise = isinstance(self.likelihood, WITH_NOISE) and self.likelihood.parts == 2

    def controls(self) -> dict[str, float | Callable[[float], float]]:
        """The control "noise_network": 0 for the first third of a run, then a line to 1 at two thirds."""
        return {NOISE_NETWORK: lambda share: min(1.0, max(0.0, 3 * share - 1))} if self.learns_noise else {}

    def likelihood_dist(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z [..., latent_dim], event [data_dim]; the noise is one for all z while its control is 0."""
        out = self.decoder(z).to(z.dtype)
        if not self.learns_noise:
            return self.likelihood(out)
        mean, raw = out.chunk(2, -1)
        shared = self.decoder(z.new_zeros(1, self.latent_dim))[:, self.data_dim :].mean()
        raw = shared + control(NOISE_NETWORK, 1.0) * (raw - shared)
        return self.likelihood(torch.cat([mean, raw], -1))

    @torch.no_grad()
    def quadrature_log_marginal(self, x: Tensor, num_points: int = 400) -> Tensor:
        """log p(x) by a sum over a grid of z; under the standard normal prior, with one or two latent dimensions.

        Parameters
        ----------
        x : Tensor [rows, data_dim]
        num_points : int
            Points in each dimension, from -6 to 6. Double them: where the answer changes, it was too few.

        Returns
        -------
        Tensor [rows]
            In nats.
        """
        if self.latent_dim > 2:
            raise SettingError(
                f"a grid in {self.latent_dim} dimensions is too large: estimate log p(x) by fitted.log_evidence(x)"
            )
        points = count("num_points", num_points, least=2)
        axis = torch.linspace(-WIDTH, WIDTH, points, dtype=x.dtype, device=x.device)
        z = torch.cartesian_prod(*[axis] * self.latent_dim).reshape(
            -1, self.latent_dim
        )  # [points, latent_dim]
        log_cell = self.latent_dim * math.log(axis[1] - axis[0])
        log_prior = self.prior().log_prob(z) + log_cell  # [points]
        total = x.new_full((len(x),), -math.inf)
        for part, weight in zip(z.split(4096), log_prior.split(4096), strict=True):
            seen, values = without_gaps(self.likelihood_dist(part), x.unsqueeze(-2))
            joint = seen.log_prob(values) + weight  # [rows, part]
            total = torch.logaddexp(total, joint.logsumexp(-1))
        return total
