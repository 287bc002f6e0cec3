"""Probabilistic principal component analysis (Tipping and Bishop 1999).

Generative story, for each of N rows:

    z ~ N(0, I)                              a point on the latent plane, [latent_dim]
    x | z ~ N(W z + b, sigma^2 I)            carried to the data by the loadings W [data_dim, latent_dim]

Everything is Gaussian, so that with M = W' W + sigma^2 I [latent_dim, latent_dim]

    p(x)     = N(b, W W' + sigma^2 I)                                  (their equation 4, log_marginal)
    p(z | x) = N(M^-1 W' (x - b), sigma^2 M^-1)                        (equation 7, exact_posterior)

and the maximum of the likelihood is known (equations 14 and 15, `closed_form`): with U and lambda the
eigenvectors and eigenvalues of the covariance of the data,

    W = U_L (Lambda_L - sigma^2 I)^1/2,    sigma^2 = mean of the data_dim - latent_dim smallest lambda.

The guide is amortised and linear, q(z | x) = N(A (x - b), S) with one S for all rows. The exact
posterior has this form, and is reached when S is a full matrix (`guide="full"`). A diagonal S loses

    KL(q || p) = 1/2 (sum_i log M_ii - log det M)   nats per datum, at best:

nothing where the columns of W are orthogonal, as they are in the closed form. Families that are not
Gaussian read linear features of x.

Three ways to train: `PPCA.closed_form(x, latent_dim)`; gradient on the exact likelihood, with
`marginal_model` as the program and a guide that samples nothing; stochastic variational inference,
with `model` and `guide`.

M. E. Tipping and C. M. Bishop, "Probabilistic principal component analysis", J. R. Stat. Soc. B 61
(1999) 611-622.
"""

from __future__ import annotations

import math
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.errors import DataError, SettingError
from pyrolvm.models.base import LatentVariableModel, check_columns, check_sizes
from pyrolvm.models.guides import FullCovariance, GuideFamily, linear_features, make_guide, set_covariance
from pyrolvm.models.linear_gaussian import (
    capacitance,
    linear_gaussian_log_marginal,
    linear_gaussian_posterior,
    observed_log_marginal,
    observed_posterior,
    posterior_scale_tril,
)
from pyrolvm.models.missing import as_missing, check_columns_seen, check_entries, filled, observe


class PPCA(LatentVariableModel):
    """Probabilistic PCA: z ~ N(0, I), x | z ~ N(W z + b, sigma^2 I), with a linear Gaussian guide.

    Parameters
    ----------
    data_dim : int
        Columns of the data.
    latent_dim : int
        Dimensions of z, at most `data_dim`.
    guide : str or GuideFamily, optional
        "mean_field" (or "diagonal"; the default) for a diagonal covariance of q(z | x), "full" for a Cholesky factor,
        another family of `pyrolvm.models.guides.GUIDES`, or "exact" for p(z | x) itself at the present W, b and sigma,
        which has no parameters of its own (the default where entries are missing, and the only one).
    missing : {"mask"}, optional
        "mask" takes rows in which entries are missing (NaN); by default they are refused.

    Attributes
    ----------
    loadings : Parameter [data_dim, latent_dim]
        W.
    offset : Parameter [data_dim]
        b.
    noise_scale : Tensor []
        sigma, in the units of the data; the parameter is its logarithm.

    Raises
    ------
    SettingError
        For an unknown guide or `latent_dim` outside 1..`data_dim`.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        guide: str | GuideFamily | None = None,
        missing: Literal["mask"] | None = None,
    ) -> None:
        super().__init__()
        self.missing = as_missing(missing)
        guide = guide or ("exact" if missing else "mean_field")
        if missing and guide != "exact":
            raise SettingError(
                f'guide={guide!r} is one linear map for all rows, and takes no missing entries: write guide="exact"'
            )
        self.data_dim, self.latent_dim = data_dim, latent_dim = check_sizes(data_dim, latent_dim)
        self.exact_guide = guide == "exact"
        self.loadings = nn.Parameter(torch.randn(data_dim, latent_dim) / math.sqrt(data_dim))
        self.offset = nn.Parameter(torch.zeros(data_dim))
        self.log_noise_scale = nn.Parameter(torch.zeros(()))
        if not self.exact_guide:
            self.guide_family = make_guide(guide, latent_dim)
            self.guide_loadings = nn.Parameter(torch.empty(latent_dim, data_dim))
            self.guide_log_scale = nn.Parameter(torch.empty(latent_dim))
            self.guide_features = linear_features(self.guide_family, data_dim)
        self.solve_guide()

    @property
    def noise_scale(self) -> Tensor:
        """Standard deviation [] of x around W z + b."""
        return self.log_noise_scale.exp()

    # ------------------------------------------------------------------ the program

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

    def marginal_model(self, x: Tensor | None = None) -> Tensor:
        """p(x) with z integrated out: a program without latents, whose bound is the exact likelihood.

        Pyro's low-rank normal inverts a latent_dim x latent_dim matrix (Woodbury's identity); no
        data_dim x data_dim matrix is formed. Train with `guide=lambda x: None`.
        """
        if self.missing is not None:
            raise SettingError(
                "marginal_model is of complete rows: train the model itself, whose bound is the exact likelihood"
            )
        noise_variance = self.noise_scale.square().expand(self.data_dim)
        marginal = dist.LowRankMultivariateNormal(self.offset, self.loadings, noise_variance)
        with self.data_plate(x):
            return pyro.sample("x", marginal, obs=x)  # [batch, data_dim]

    def prior(self) -> dist.TorchDistribution:
        """p(z) = N(0, I), event [latent_dim]."""
        return dist.Normal(self.loadings.new_zeros(self.latent_dim), 1.0).to_event(1)

    def likelihood_dist(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) = N(W z + b, sigma^2 I) for z [..., latent_dim], event [data_dim]."""
        return dist.Normal(z @ self.loadings.T + self.offset, self.noise_scale).to_event(1)

    def posterior_dist(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) = N(A (x - b), S), or of another family, for x [..., data_dim]; event [latent_dim]."""
        if self.exact_guide:
            mean, scale_tril = self.exact_posterior(x)
            return dist.MultivariateNormal(mean, scale_tril=scale_tril)
        r = x - self.offset
        loc, scale = r @ self.guide_loadings.T, self.guide_log_scale.exp()  # [..., latent_dim], [latent_dim]
        return self.guide_family(loc, scale, self.guide_features(r))

    def decode(self, z: Tensor) -> Tensor:
        """W z + b [..., data_dim], the mean of p(x | z) for z [..., latent_dim]."""
        return self.likelihood_dist(z).mean

    # ------------------------------------------------------------------ what is known exactly

    def log_marginal(self, x: Tensor) -> Tensor:
        """log p(x) [batch] in nats for x [batch, data_dim]; differentiable, O(data_dim latent_dim) a row.

        Of rows with missing entries, the log-density of the others.
        """
        log_marginal = linear_gaussian_log_marginal if self.missing is None else observed_log_marginal
        return log_marginal(x - self.offset, self.loadings, self.noise_scale)

    def exact_posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """p(z | x): mean [batch, latent_dim], Cholesky factor [latent_dim, latent_dim] of the covariance.

        Where entries may be missing, p(z | those observed), a factor for each row: [batch, latent_dim, latent_dim].
        """
        posterior = linear_gaussian_posterior if self.missing is None else observed_posterior
        return posterior(x - self.offset, self.loadings, self.noise_scale)

    @torch.no_grad()
    def solve_guide(self) -> None:
        """Set the guide to the best of its family for the present W, b and sigma.

        "full": the exact posterior. "mean_field": its mean, and the variances sigma^2 / M_ii that
        minimise KL(q || p) (the inverse of the diagonal of the precision). Other families start there. "exact": nothing
        is to be set.
        """
        if self.exact_guide:
            return
        M = capacitance(self.loadings, self.noise_scale)
        self.guide_loadings.copy_(torch.linalg.solve(M, self.loadings.T))
        if isinstance(self.guide_family, FullCovariance):
            scale_tril = posterior_scale_tril(M, self.noise_scale)
            self.guide_log_scale.copy_(scale_tril.diagonal().log())
            set_covariance(self.guide_family, self.guide_features, scale_tril)
        else:
            self.guide_log_scale.copy_(self.log_noise_scale - 0.5 * M.diagonal().log())

    @classmethod
    def closed_form(cls, x: Tensor, latent_dim: int, guide: str | GuideFamily = "mean_field") -> PPCA:
        """Maximum likelihood in closed form, with a Gaussian guide at its best (the exact posterior).

        Parameters
        ----------
        x : Tensor [rows, data_dim]
            The data; the answer has their dtype and device, computed in float64.
        latent_dim : int
            Dimensions of z, less than data_dim and less than rows - 1.
        guide : str or GuideFamily
            As in the constructor.

        Returns
        -------
        PPCA
            With the parameters of greatest likelihood; no longer fresh.

        Raises
        ------
        DataError
            For data that are not finite, or lie within a plane of `latent_dim` dimensions.
        SettingError
            If `latent_dim` leaves no direction for the noise.

        Notes
        -----
        The covariance of the data is divided by the number of rows, which maximises the likelihood
        (scikit-learn's PCA divides by one less).
        """
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        ppca = cls(x.shape[-1], latent_dim, guide).to(x.device, dtype)
        ppca.check_data(x)
        if latent_dim == ppca.data_dim:
            raise SettingError(
                f"latent_dim={latent_dim} leaves no direction for the noise of {latent_dim} columns: "
                f"choose 1 to {latent_dim - 1}"
            )
        loadings, offset, noise_scale = _maximum_likelihood(x.double(), latent_dim)
        with torch.no_grad():
            ppca.loadings.copy_(loadings)
            ppca.offset.copy_(offset)
            ppca.log_noise_scale.copy_(noise_scale.log())
        ppca.solve_guide()
        ppca.fresh = False
        return ppca

    @torch.no_grad()
    def initialise_from(self, x: Tensor, seed: int = 0) -> None:
        """Where entries are missing, start at the closed form of the data with the columns' means in the gaps.

        Parameters
        ----------
        x : Tensor [rows, data_dim]
        seed : int
            Not used: the start has a closed form.
        """
        if self.missing is None:
            return
        check_columns_seen(x)
        if self.latent_dim < self.data_dim:
            started = self.closed_form(filled(self.check_data(x)), self.latent_dim, "exact")
            self.load_state_dict(started.state_dict())
        self.fresh = False

    def check_data(self, x: Tensor) -> Tensor:
        """`x` as floats; raises `DataError` unless they are [rows, data_dim] and finite (or missing)."""
        check_columns(x, self.data_dim, type(self).__name__)
        check_entries(x, self.missing)
        return self.as_floats(x)


def _maximum_likelihood(x: Tensor, latent_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """W [data_dim, latent_dim], b [data_dim] and sigma [] of greatest likelihood, equations 14 and 15."""
    rows, data_dim = x.shape
    offset = x.mean(0)
    _, singular, Vt = torch.linalg.svd(x - offset, full_matrices=False)
    eigenvalues = singular.square() / rows  # [min(rows, data_dim)], falling; the others are 0
    noise_variance = eigenvalues[latent_dim:].sum() / (data_dim - latent_dim)
    if not bool(noise_variance > 1e-14 * eigenvalues.sum()):
        raise DataError(
            f"the {rows} rows lie within a plane of {latent_dim} dimensions, so that the noise would be 0 "
            "and the likelihood infinite: choose a smaller latent_dim or pass more rows"
        )
    U = Vt[:latent_dim].T  # [data_dim, latent_dim]
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))  # its sign: the likelihood leaves signs free
    loadings = U * largest.sign() * (eigenvalues[:latent_dim] - noise_variance).clamp_min(0).sqrt()
    return loadings, offset, noise_variance.sqrt()
