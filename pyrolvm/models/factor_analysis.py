"""Bayesian factor analysis with an amortised linear guide: a linear VAE with a posterior over its weights.

Generative story, for N data of D features and L factors, in units of each feature's deviation s_d:

    alpha_l       ~ Gamma(0.01, 0.01)               one relevance per factor ("ard"; 1 if "normal")
    W_dl          ~ Normal(0, s_d^2 / alpha_l)      "loadings"
    psi_d         ~ scaled inverse chi^2(1, s_d^2 / 2),  psi_d = noise_scale_d^2
    b_d           ~ Normal(m_d, s_d^2)              "offset"
    z_n           ~ Normal(0, I_L)                  for n = 1..N
    x_n | z_n     ~ Normal(W z_n + b, diag(psi))

Guide: mean-field over the global latents, and one linear map for the local ones,

    q(W) q(b)     Normal,      q(noise_scale) q(alpha)   LogNormal
    q(z_n | x_n) = Normal(A (x_n - m) / s + c, C C^T),   C lower triangular

(or another family: `guides.py`), which contains the exact p(z | x, W, b, psi), itself linear in x with one
covariance for all data:

    p(z | x, W, b, psi) = Normal(M^-1 W' Psi^-1 (x - b), M^-1),   M = I + W' Psi^-1 W.

This q(z) takes no notice of the draw of (W, psi, b), so that their posterior comes out too narrow. With
factors="integrated" there is no site z, and the guide of the offset has the form of its exact posterior,

    x_n ~ Normal(b, W W' + diag(psi)),     q(b) = Normal(h, F F' + diag(d^2)),   F [data_dim, latent_dim]

so that the bound is higher and the widths are nearer to the exact ones.

A feature that one factor explains wholly has maximum-likelihood noise zero (a Heywood case); the prior of
psi vanishes there exponentially fast. The sites outside the data plate need the trainer's N/B scale when x
is a minibatch: see `pyrolvm.plates`.

Sources: Bishop (1999), "Bayesian PCA", NeurIPS 11 (ARD); Lopes and West (2004), "Bayesian model assessment in
factor analysis", Statistica Sinica 14 (priors); Martin and McDonald (1975), Psychometrika 40 (Heywood cases).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.errors import SettingError, one_of
from pyrolvm.models.alignment import Aligned, align_loadings, canonical
from pyrolvm.models.base import LatentVariableModel, check_columns, check_finite, check_sizes
from pyrolvm.models.guides import GuideFamily, linear_features, make_guide, set_covariance
from pyrolvm.models.priors import inverse_chi
from pyrolvm.models.starts import moments, principal_loadings


class BayesianFactorAnalysis(LatentVariableModel):
    """Factor analysis of data [batch, data_dim] with `latent_dim` factors and a posterior over its loadings.

    Parameters
    ----------
    data_dim : int
        D, columns of the data.
    latent_dim : int
        L, factors, at most `data_dim`.
    loadings_prior : {"normal", "ard"}
        "ard" lets the data switch factors off.
    guide : str or GuideFamily
        The family of q(z | x), of `pyrolvm.models.guides.GUIDES`; "full" contains the exact one.
    factors : {"sampled", "integrated"}
        Draw z from q(z | x), or integrate it out; `exact_posterior` then tells the codes.

    Raises
    ------
    SettingError
        For an unknown option or `latent_dim` outside 1..`data_dim`.

    Notes
    -----
    `initialise_from(x)` gives the guide its start and the priors their units m and s (0 and 1 without it).
    """

    location: Tensor  # m [data_dim]
    unit: Tensor  # s [data_dim]

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        loadings_prior: Literal["normal", "ard"] = "normal",
        guide: str | GuideFamily = "full",
        factors: Literal["sampled", "integrated"] = "sampled",
    ):
        super().__init__()
        self.data_dim, self.latent_dim = data_dim, latent_dim = check_sizes(data_dim, latent_dim)
        self.loadings_prior = one_of("loadings_prior", loadings_prior, ("normal", "ard"))
        self.factors = one_of("factors", factors, ("sampled", "integrated"))
        self.register_buffer("location", torch.zeros(data_dim))
        self.register_buffer("unit", torch.ones(data_dim))
        # q of the global latents, in units of s: location and log deviation of each normal or log-normal
        self.loadings_loc = nn.Parameter(0.1 * torch.randn(data_dim, latent_dim))
        self.loadings_log_sd = nn.Parameter(torch.full((data_dim, latent_dim), -2.0))
        self.offset_loc = nn.Parameter(torch.zeros(data_dim))
        self.offset_log_sd = nn.Parameter(torch.full((data_dim,), -2.0))
        self.noise_loc = nn.Parameter(torch.zeros(data_dim))
        self.noise_log_sd = nn.Parameter(torch.full((data_dim,), -2.0))
        if loadings_prior == "ard":
            self.relevance_loc = nn.Parameter(torch.zeros(latent_dim))
            self.relevance_log_sd = nn.Parameter(torch.full((latent_dim,), -1.0))
        if factors == "sampled":
            self.guide_family = make_guide(guide, latent_dim)
            self.encoder = nn.Linear(data_dim, latent_dim)  # A, c
            self.log_scale = nn.Parameter(torch.zeros(latent_dim))  # of the diagonal of C
            self.guide_features = linear_features(self.guide_family, data_dim)
        else:
            self.offset_factor = nn.Parameter(0.1 * torch.randn(data_dim, latent_dim))

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(W, psi, b, z, x), or p(W, psi, b, x); returns x [batch, data_dim]."""
        s = self.unit
        relevance = s.new_ones(self.latent_dim)
        if self.loadings_prior == "ard":
            relevance = pyro.sample("relevance", dist.Gamma(0.01 * relevance, 0.01).to_event(1))  # [L]
        spread = s.unsqueeze(-1) * relevance.rsqrt().unsqueeze(-2)  # [data_dim, latent_dim]
        loadings = pyro.sample("loadings", dist.Normal(torch.zeros_like(spread), spread).to_event(2))
        noise_scale = pyro.sample("noise_scale", inverse_chi(1, s * 0.5**0.5).to_event(1))  # [data_dim]
        offset = pyro.sample("offset", dist.Normal(self.location, s).to_event(1))  # [data_dim]
        with self.data_plate(x):
            if self.factors == "integrated":
                return pyro.sample("x", self._marginal(loadings, noise_scale, offset), obs=x)
            z = pyro.sample("z", dist.Normal(s.new_zeros(self.latent_dim), 1.0).to_event(1))  # [batch, L]
            mean = torch.einsum("...dl,...l->...d", loadings, z) + offset  # [batch, data_dim]
            return pyro.sample("x", dist.Normal(mean, noise_scale).to_event(1), obs=x)

    def guide(self, x: Tensor | None = None) -> None:
        """q(W) q(psi) q(b) q(z | x); without data z is left to p(z), which is how new data are generated."""
        s = self.unit
        if self.loadings_prior == "ard":
            q = dist.LogNormal(self.relevance_loc, self.relevance_log_sd.exp())
            pyro.sample("relevance", q.to_event(1))
        pyro.sample("loadings", self._loadings_posterior().to_event(2))
        q = dist.LogNormal(self.noise_loc + s.log(), self.noise_log_sd.exp())
        pyro.sample("noise_scale", q.to_event(1))
        pyro.sample("offset", self._offset_posterior())
        if x is not None and self.factors == "sampled":
            with self.data_plate(x):
                r = (x - self.location) / s
                q = self.guide_family(self.encoder(r), self.log_scale.exp(), self.guide_features(r))
                pyro.sample("z", q)

    def _loadings_posterior(self) -> dist.Normal:
        s = self.unit.unsqueeze(-1)
        return dist.Normal(s * self.loadings_loc, s * self.loadings_log_sd.exp())

    def _offset_posterior(self) -> dist.TorchDistribution:
        s, loc = self.unit, self.location + self.unit * self.offset_loc
        if self.factors == "sampled":
            return dist.Normal(loc, s * self.offset_log_sd.exp()).to_event(1)
        factor = s.unsqueeze(-1) * self.offset_factor
        return dist.LowRankMultivariateNormal(loc, factor, (s * self.offset_log_sd.exp()).square())

    @torch.no_grad()
    def posterior_mean(self) -> dict[str, Tensor]:
        """Means under q: "loadings" [data_dim, latent_dim], "noise_scale" [data_dim], "offset" [data_dim]."""
        log_mean = self.noise_loc + 0.5 * (2 * self.noise_log_sd).exp()
        return {
            "loadings": self._loadings_posterior().mean,
            "noise_scale": self.unit * log_mean.exp(),
            "offset": self.location + self.unit * self.offset_loc,
        }

    def log_marginal_given(self, x: Tensor, loadings: Tensor, noise_scale: Tensor, offset: Tensor) -> Tensor:
        """Exact log p(x | W, psi, b), z integrated out: Normal(b, W W' + diag(psi)).

        Parameters
        ----------
        x : Tensor [batch, data_dim]
        loadings : Tensor [data_dim, latent_dim]
            W; draws [S, 1, data_dim, latent_dim] give [S, batch].
        noise_scale, offset : Tensor [data_dim]
            The square root of psi, and b.

        Returns
        -------
        Tensor [batch]
            In nats.

        Examples
        --------
        At the guide's means: `log_marginal_given(x, **posterior_mean())`.
        """
        return self._marginal(loadings, noise_scale, offset).log_prob(x)

    @staticmethod
    def _marginal(loadings: Tensor, noise_scale: Tensor, offset: Tensor) -> dist.LowRankMultivariateNormal:
        return dist.LowRankMultivariateNormal(offset, loadings, noise_scale.square())

    def exact_posterior(
        self, x: Tensor, loadings: Tensor, noise_scale: Tensor, offset: Tensor
    ) -> dist.MultivariateNormal:
        """p(z | x, W, psi, b) of every row, by Woodbury's identity: no D x D matrix is formed.

        Parameters
        ----------
        x, loadings, noise_scale, offset : Tensor
            As in `log_marginal_given`.

        Returns
        -------
        MultivariateNormal
            Batch shape [batch], event shape [latent_dim].

        Notes
        -----
        Normal(M^-1 W' Psi^-1 (x - b), M^-1), M = I + W' Psi^-1 W; Bishop (2006), equations 12.66 to 12.68.
        """
        weighted = loadings.mT / noise_scale.square().unsqueeze(-2)  # W' Psi^-1 [latent_dim, data_dim]
        precision = weighted @ loadings + torch.eye(self.latent_dim, dtype=x.dtype, device=x.device)
        projected = torch.einsum("...ld,...d->...l", weighted, x - offset).unsqueeze(-1)
        loc = torch.cholesky_solve(projected, torch.linalg.cholesky(precision)).squeeze(-1)
        return dist.MultivariateNormal(loc, precision_matrix=precision)

    @torch.no_grad()
    def loadings_draws(self, num_samples: int, seed: int = 0) -> Aligned:
        """Draws from q(W) in one rotation, order and sign.

        Parameters
        ----------
        num_samples : int
        seed : int
            Of the draws.

        Returns
        -------
        Aligned
            Loadings [num_samples, data_dim, latent_dim] and their rotations.

        Notes
        -----
        The reference is the mean of q(W), put to simple structure by varimax unless ARD settles the rotation.
        """
        q = self._loadings_posterior()
        generator = torch.Generator(q.loc.device).manual_seed(seed)
        draws = q.loc.new_empty(num_samples, *q.loc.shape).normal_(generator=generator) * q.scale + q.loc
        if self.loadings_prior == "ard":
            return align_loadings(draws, q.loc, "signs")
        return align_loadings(draws, canonical(q.loc).loadings, "procrustes")

    def loadings_table(
        self, num_samples: int = 1000, columns: Sequence[str] | None = None, prob: float = 0.9, seed: int = 0
    ) -> pd.DataFrame:
        """Posterior of the aligned loadings.

        Parameters
        ----------
        num_samples : int
            Draws from q(W).
        columns : sequence of str, optional
            The features' names.
        prob : float
            Mass of the equal-tailed interval [lower, upper].
        seed : int
            Of the draws.

        Returns
        -------
        DataFrame
            A row per (feature, factor), columns mean, sd, lower, upper, in the units of the data.

        Raises
        ------
        SettingError
            For a wrong number of names, or `prob` outside (0, 1).
        """
        names = list(columns) if columns is not None else [f"x{d}" for d in range(self.data_dim)]
        if len(names) != self.data_dim or not 0 < prob < 1:
            raise SettingError(
                f"loadings_table got {len(names)} column names and prob={prob}: "
                f"give one name for each of the {self.data_dim} features and prob between 0 and 1"
            )
        draws = self.loadings_draws(num_samples, seed).loadings.flatten(1)  # [num_samples, D * L]
        lower, upper = draws.quantile(draws.new_tensor([(1 - prob) / 2, (1 + prob) / 2]), dim=0)
        index = pd.MultiIndex.from_product([names, range(self.latent_dim)], names=["feature", "factor"])
        table = {"mean": draws.mean(0), "sd": draws.std(0), "lower": lower, "upper": upper}
        return pd.DataFrame({name: value.cpu().numpy() for name, value in table.items()}, index=index)

    @torch.no_grad()
    def initialise_from(self, x: Tensor, seed: int = 0) -> None:
        """Start at probabilistic PCA of the standardised data and its exact q(z | x).

        Parameters
        ----------
        x : Tensor [rows, data_dim]
        seed : int
            Not used: the start has a closed form.

        Notes
        -----
        Sets the units m and s of the priors, and the deviations of q to their order of magnitude, noise / sqrt(N).
        """
        x = self.check_data(x).to(self.unit)
        for buffer, value in zip((self.location, self.unit), moments(x), strict=True):
            buffer.copy_(value)
        loadings, noise = principal_loadings((x - self.location) / self.unit, self.latent_dim)
        log_sd = noise.clamp(min=0.01).log() - 0.5 * torch.tensor(float(len(x))).log()  # [data_dim]
        self.loadings_loc.copy_(loadings)
        self.noise_loc.copy_(noise.clamp(min=0.01).log())
        self.offset_loc.zero_()
        self.loadings_log_sd.copy_(log_sd.unsqueeze(-1).expand_as(loadings))
        self.offset_log_sd.copy_(log_sd)
        self.noise_log_sd.fill_(-0.5 * float(torch.tensor(2.0 * len(x)).log()))
        if self.factors == "sampled":
            self._match_encoder(loadings, noise.clamp(min=0.01))
        else:
            self.offset_factor.copy_(loadings / len(x) ** 0.5)
        self.fresh = False

    def _match_encoder(self, loadings: Tensor, noise_scale: Tensor) -> None:
        identity = torch.eye(self.data_dim, dtype=loadings.dtype, device=loadings.device)
        q = self.exact_posterior(identity, loadings, noise_scale, torch.zeros_like(noise_scale))
        self.encoder.weight.copy_(q.mean.mT)  # the mean's answer to each unit vector
        self.encoder.bias.zero_()
        tril = q.scale_tril[0] if q.scale_tril.dim() == 3 else q.scale_tril
        self.log_scale.copy_(tril.diagonal().log())
        set_covariance(self.guide_family, self.guide_features, tril)

    def decode(self, z: Tensor) -> Tensor:
        """E_q[W] z + E_q[b] [..., data_dim], the mean of x given z [..., latent_dim] under q(W) q(b)."""
        given = self.posterior_mean()
        return z @ given["loadings"].mT + given["offset"]

    def check_data(self, x: Tensor) -> Tensor:
        """`x` as floats; raises `DataError` unless they are [rows, data_dim] and finite."""
        check_columns(x, self.data_dim, type(self).__name__)
        check_finite(x)
        return self.as_floats(x)
