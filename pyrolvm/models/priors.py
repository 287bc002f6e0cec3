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
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraint_registry import biject_to, transform_to
from torch.distributions.transforms import PowerTransform, Transform

Size = torch.Size | list[int] | tuple[int, ...]


class _Root(dist.TransformedDistribution):
    """The root of an inverse Gamma variable."""

    @property
    def mean(self) -> Tensor:
        a, rate = self.base_dist.concentration, self.base_dist.rate
        known = torch.where(a > 0.5, a, torch.nan)
        return rate.sqrt() * (torch.lgamma(known - 0.5) - torch.lgamma(a)).exp()


def inverse_chi(df: float | Tensor, scale: Tensor) -> dist.TransformedDistribution:
    """The law of sigma when sigma^2 ~ InverseGamma(df / 2, df scale^2 / 2).

    Parameters
    ----------
    df : float or Tensor [...]
        The prior is worth so many earlier observations,
    scale : Tensor [...]
        of this standard deviation; the batch shape is its shape.
    """
    variance = dist.InverseGamma(torch.ones_like(scale) * df / 2, df / 2 * scale**2)
    return _Root(variance, [PowerTransform(torch.full_like(scale, 0.5))])


class _LowerCholesky(type(constraints.lower_cholesky)):  # type: ignore[misc]
    """As torch's own, which has no bijection from free numbers: NUTS and AutoGuides need one."""


class _FromEntries(Transform):
    """Entries [D (D + 1) / 2] of a lower triangle by rows, the diagonal's in logs, to the triangle [D, D]."""

    domain = constraints.real_vector
    codomain = _LowerCholesky()
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _FromEntries)

    def _call(self, x: Tensor) -> Tensor:
        shape = self.forward_shape(x.shape)
        rows, columns = torch.tril_indices(*shape[-2:], device=x.device)
        entries = torch.where(rows == columns, x.exp(), x)
        triangle = x.new_zeros(shape)
        triangle[..., rows, columns] = entries
        return triangle

    def _inverse(self, y: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(*y.shape[-2:], device=y.device)
        entries = y[..., rows, columns]
        return torch.where(rows == columns, entries.abs().log(), entries)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: Size) -> torch.Size:
        D = math.isqrt(2 * shape[-1])
        return torch.Size((*shape[:-1], D, D))

    def inverse_shape(self, shape: Size) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


for _registry in (biject_to, transform_to):
    _registry.register(_LowerCholesky, lambda constraint: _FromEntries())


class InverseWishartCholesky(dist.TorchDistribution):
    """The law of the Cholesky factor L when L L^T ~ InverseWishart(df, C C^T).

        log p(L) = log InverseWishart(L L^T) + D log 2 + sum_i (D - i + 1) log L_ii,   i = 1..D

    (the last terms are the Jacobian of L -> L L^T; Muirhead 1982, theorem 2.1.9).

    Parameters
    ----------
    df : float or Tensor [...]
        Degrees of freedom, above D - 1.
    scale_tril : Tensor [..., D, D]
        C, the Cholesky factor of the scale matrix.
    """

    arg_constraints = {"df": constraints.positive, "scale_tril": constraints.lower_cholesky}  # noqa: RUF012
    support = _LowerCholesky()
    has_rsample = True

    def __init__(self, df: float | Tensor, scale_tril: Tensor, validate_args: bool | None = None):
        self.df = torch.as_tensor(df, dtype=scale_tril.dtype, device=scale_tril.device)  # [] or [...]
        shape = torch.broadcast_shapes(self.df.shape, scale_tril.shape[:-2])
        self.df, self.scale_tril = self.df.expand(shape), scale_tril.expand(shape + scale_tril.shape[-2:])
        super().__init__(shape, scale_tril.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Size, _instance: object = None) -> InverseWishartCholesky:
        """The same law, independently over `batch_shape`."""
        shape = torch.Size(batch_shape)
        scale_tril = self.scale_tril.expand(shape + self.event_shape)
        return InverseWishartCholesky(self.df.expand(shape), scale_tril, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density [...] in nats of the lower-triangular `value` [..., D, D]."""
        D = self.event_shape[0]
        log_diagonal = value.diagonal(dim1=-2, dim2=-1).log()  # [..., D]
        # L^-1 C, whose squared norm is tr(C C^T Sigma^-1)
        ratio = torch.linalg.solve_triangular(value, self.scale_tril, upper=False)
        power = self.df.unsqueeze(-1) + D + 1 - self._countdown()  # (df + D + 1) - (D - i + 1)
        log_density = self.df * self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_density = log_density - (power * log_diagonal).sum(-1) - 0.5 * ratio.square().sum((-2, -1))
        return log_density - self._log_normaliser()

    @property
    def mean(self) -> Tensor:
        """E[L] [..., D, D] = C diag(E[1 / A_ii]), not finite where df <= D."""
        df = self.df.unsqueeze(-1) + 1 - self._countdown()
        known = torch.where(df > 1, df, torch.nan)
        inverse_chi = (torch.lgamma((known - 1) / 2) - torch.lgamma(df / 2)).exp() / math.sqrt(2)
        return self.scale_tril * inverse_chi.unsqueeze(-2)

    def _countdown(self) -> Tensor:
        """D, ..., 1."""
        return torch.arange(self.event_shape[0], 0, -1, dtype=self.df.dtype, device=self.df.device)

    def _log_normaliser(self) -> Tensor:
        D = self.event_shape[0]
        log_gamma = torch.lgamma((self.df.unsqueeze(-1) + 1 - self._countdown()) / 2).sum(-1)
        return log_gamma + D * (D - 1) / 4 * math.log(math.pi) + D * (self.df / 2 - 1) * math.log(2)

    def rsample(self, sample_shape: Size = ()) -> Tensor:
        """Draws [*sample_shape, ..., D, D]: Bartlett's decomposition of the precision, C^-T (A A^T) C^-1."""
        shape = self._extended_shape(torch.Size(sample_shape))
        # A upper triangular, so that L = C A^-T is lower triangular
        df = self.df.unsqueeze(-1) + 1 - self._countdown()  # [..., D]
        diagonal = dist.Chi2(df).expand(shape[:-1]).rsample().sqrt()
        A = self.scale_tril.new_empty(shape).normal_().triu(1) + torch.diag_embed(diagonal)
        return torch.linalg.solve_triangular(A.mT, self.scale_tril.expand(shape), upper=False, left=False)


def normal_component(covariance: str, means: Tensor, scale: Tensor, z: Tensor) -> dist.TorchDistribution:
    """Normal(mu_z, Sigma_z) with event [D], for components `z` [...] of a mixture.

    Parameters
    ----------
    covariance : {"full", "diagonal", "spherical"}
    means : Tensor [..., K, D]
    scale : Tensor [..., K, D, D], [..., K, D] or [..., K, 1]
        The roots of the covariances, as from `covariance_prior`.
    """
    loc = Vindex(means)[..., z, :]
    if covariance == "full":
        return dist.MultivariateNormal(loc, scale_tril=Vindex(scale)[..., z, :, :])
    return dist.Normal(loc, Vindex(scale)[..., z, :]).to_event(1)


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
        return InverseWishartCholesky(spread.shape[1] + 2, torch.diag_embed(spread)).to_event(1)
    columns = spread[:, :1] if covariance == "spherical" else spread
    return inverse_chi(3, columns / 3**0.5).to_event(2)
