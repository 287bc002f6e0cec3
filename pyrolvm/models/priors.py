"""Priors on scales and covariances that keep their mass away from zero.

A variance that may shrink onto a single datum makes the likelihood of a mixture unbounded, and sends one
noise variance of factor analysis to zero (a Heywood case). A prior bars this if its density falls
exponentially in 1 / variance, as the inverse Gamma and the inverse Wishart do:

    Martin and McDonald (1975), "Bayesian estimation in unrestricted factor analysis: a treatment for
    Heywood cases", Psychometrika 40;
    Fraley and Raftery (2007), "Bayesian regularization for normal mixture estimation and model-based
    clustering", Journal of Classification 24.

Both densities here are of the scale (standard deviation, Cholesky factor) and not of the variance: the
models and guides of this package are written in scales.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import PowerTransform

Size = torch.Size | list[int] | tuple[int, ...]


def inverse_chi(df: float, scale: Tensor) -> dist.TransformedDistribution:
    """The law of sigma when sigma^2 ~ InverseGamma(df / 2, df scale^2 / 2).

    Parameters
    ----------
    df : float
        The prior is worth so many earlier observations,
    scale : Tensor [...]
        of this standard deviation; the batch shape is its shape.
    """
    variance = dist.InverseGamma(torch.full_like(scale, df / 2), df / 2 * scale**2)
    return dist.TransformedDistribution(variance, [PowerTransform(torch.full_like(scale, 0.5))])


class InverseWishartCholesky(dist.TorchDistribution):
    """The law of the Cholesky factor L when L L^T ~ InverseWishart(df, diag(scale^2)).

        log p(L) = log InverseWishart(L L^T) + D log 2 + sum_i (D - i + 1) log L_ii,   i = 1..D

    (the last terms are the Jacobian of L -> L L^T; Muirhead 1982, theorem 2.1.9).

    Parameters
    ----------
    df : float
        Degrees of freedom, above D - 1.
    scale : Tensor [..., D]
        The square roots of the diagonal of the scale matrix.
    """

    arg_constraints = {"scale": constraints.independent(constraints.positive, 1)}  # noqa: RUF012
    support = constraints.lower_cholesky
    has_rsample = True

    def __init__(self, df: float, scale: Tensor, validate_args: bool | None = None):
        self.df, self.scale = df, scale
        data_dim = scale.shape[-1]
        super().__init__(scale.shape[:-1], torch.Size([data_dim, data_dim]), validate_args=validate_args)

    def expand(self, batch_shape: Size, _instance: object = None) -> InverseWishartCholesky:
        """The same law, independently over `batch_shape`."""
        scale = self.scale.expand(torch.Size(batch_shape) + self.scale.shape[-1:])
        return InverseWishartCholesky(self.df, scale, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density [...] in nats of the lower-triangular `value` [..., D, D]."""
        D = self.scale.shape[-1]
        diagonal = value.diagonal(dim1=-2, dim2=-1)  # [..., D]
        # L^-1 diag(scale), whose squared norm is tr(Lambda Sigma^-1)
        ratio = torch.linalg.solve_triangular(value, torch.diag_embed(self.scale), upper=False)
        power = self.df + D + 1 - torch.arange(D, 0, -1, device=value.device)  # (df + D + 1) - (D - i + 1)
        log_density = self.df * self.scale.log().sum(-1) - (power * diagonal.log()).sum(-1)
        return log_density - 0.5 * ratio.square().sum((-2, -1)) - self._log_normaliser()

    def _log_normaliser(self) -> float:
        D = self.scale.shape[-1]
        log_gamma = D * (D - 1) / 4 * math.log(math.pi)
        log_gamma += sum(math.lgamma((self.df - j) / 2) for j in range(D))
        return log_gamma + D * (self.df / 2 - 1) * math.log(2)

    def rsample(self, sample_shape: Size = ()) -> Tensor:
        """Draws [*sample_shape, ..., D, D]: Bartlett's decomposition of the precision, (A A^T) / (s s^T)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        D = shape[-1]
        # A upper triangular, so that L = diag(s) A^-T is lower triangular
        df = self.df - torch.arange(D - 1, -1, -1, dtype=self.scale.dtype, device=self.scale.device)
        diagonal = dist.Chi2(df).expand(shape[:-1]).rsample().sqrt()
        A = self.scale.new_empty(shape).normal_().triu(1) + torch.diag_embed(diagonal)
        identity = torch.eye(D, dtype=A.dtype, device=A.device).expand(shape)
        return self.scale.unsqueeze(-1) * torch.linalg.solve_triangular(A.mT, identity, upper=False)


def covariance_prior(covariance: str, spread: Tensor) -> dist.TorchDistribution:
    """The prior of the roots of K covariances: InverseWishart(D + 2, diag(spread_k^2)).

    Parameters
    ----------
    covariance : {"full", "diagonal", "spherical"}
        "full" for Cholesky factors [K, D, D]; else the same in one dimension, for deviations [K, D], or [K, 1] if
        "spherical".
    spread : Tensor [K, D]
        Prior deviations of each feature within each component.
    """
    if covariance == "full":
        return InverseWishartCholesky(spread.shape[1] + 2, spread).to_event(1)
    columns = spread[:, :1] if covariance == "spherical" else spread
    return inverse_chi(3, columns / 3**0.5).to_event(2)
