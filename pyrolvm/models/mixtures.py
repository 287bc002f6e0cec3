"""Mixtures on R^D: of Gaussians, with a gradient through their draws; and of any distributions.

A draw of a mixture is no smooth function of its weights, but its distribution function is. With the distributional
transform S(z), the D conditional distribution functions F_d(z_d | z_1..z_{d-1}), and S(z; theta) = u held fixed,

    dz / dtheta = -(dS / dz)^-1 dS / dtheta        (dS / dz is lower triangular)

(Figurnov, Mohamed and Mnih 2018, "Implicit reparameterization gradients", section 3.4). For Gaussians of diagonal
covariance, with w_kd the weight of component k given z_1..z_{d-1},

    F_d = sum_k w_kd Phi((z_d - loc_kd) / scale_kd),    w_kd ~ pi_k prod_{j < d} N(z_j; loc_kj, scale_kj^2).
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

Size = torch.Size | list[int] | tuple[int, ...]


class MixtureOfNormals(dist.TorchDistribution):
    """sum_k pi_k N(loc_k, diag(scale_k^2)), whose draws have a gradient.

    Parameters
    ----------
    logits : Tensor [..., K]
        log pi, up to a constant.
    locs, scales : Tensor [..., K, D]
    """

    arg_constraints = {  # noqa: RUF012
        "logits": constraints.real_vector,
        "locs": constraints.independent(constraints.real, 2),
        "scales": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, logits: Tensor, locs: Tensor, scales: Tensor, validate_args: bool | None = None):
        batch = torch.broadcast_shapes(logits.shape[:-1], locs.shape[:-2], scales.shape[:-2])
        self.logits = logits.log_softmax(-1).expand(*batch, -1)
        self.locs, self.scales = locs.expand(*batch, -1, -1), scales.expand(*batch, -1, -1)
        super().__init__(batch, locs.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Size, _instance: Any = None) -> MixtureOfNormals:
        """The same law, independently over `batch_shape`."""
        shape = tuple(batch_shape)
        locs, scales = (t.expand(*shape, *t.shape[-2:]) for t in (self.locs, self.scales))
        logits = self.logits.expand(*shape, self.logits.shape[-1])
        return MixtureOfNormals(logits, locs, scales, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """[..., D]."""
        return (self.logits.exp().unsqueeze(-1) * self.locs).sum(-2)

    @property
    def variance(self) -> Tensor:
        """Of each dimension, [..., D]."""
        second = self.scales.square() + (self.locs - self.mean.unsqueeze(-2)).square()
        return (self.logits.exp().unsqueeze(-1) * second).sum(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density [...] in nats of `value` [..., D]."""
        return (self.logits + self._log_normals(self._standard(value)).sum(-1)).logsumexp(-1)

    def rsample(self, sample_shape: Size = ()) -> Tensor:
        """Draws [*sample_shape, ..., D]."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            which = dist.Categorical(logits=self.logits).sample(torch.Size(sample_shape))[..., None, None]
            index = which.expand(*which.shape[:-1], shape[-1])
            locs, scales = (t.expand(*shape[:-1], *t.shape[-2:]) for t in (self.locs, self.scales))
            loc, scale = (t.gather(-2, index).squeeze(-2) for t in (locs, scales))
            z = loc + scale * torch.randn_like(loc)
        return z + self._zero(z) if torch.is_grad_enabled() else z

    def _standard(self, z: Tensor) -> Tensor:
        """(z - loc_k) / scale_k: [..., K, D]."""
        return (z.unsqueeze(-2) - self.locs) / self.scales

    def _log_normals(self, t: Tensor) -> Tensor:
        return -0.5 * t.square() - self.scales.log() - 0.5 * math.log(2 * math.pi)

    def _zero(self, z: Tensor) -> Tensor:
        """Zeros [..., D] with the gradient of a draw at `z`."""
        t = self._standard(z)
        log_n = self._log_normals(t)
        before = log_n.cumsum(-1) - log_n  # of the dimensions before d
        w = (self.logits.unsqueeze(-1) + before).softmax(-2)  # [..., K, D]
        # F - 1 has the gradient of F: of the two, the one that is not near 1 keeps its digits
        low, high = torch.special.ndtr(t), -torch.special.ndtr(-t)
        phi = torch.where((w * low).sum(-2, keepdim=True) > 0.5, high, low)
        S = (w * phi).sum(-2)  # [..., D]
        with torch.no_grad():
            slope = -t / self.scales  # d log N / dz
            lower = torch.einsum("...kd,...kj->...dj", w * phi, slope)
            lower = lower - S.unsqueeze(-1) * torch.einsum("...kd,...kj->...dj", w, slope)
            density = (w * log_n.exp()).sum(-2)  # dF_d / dz_d
            rows = lower.tril(-1) / density.unsqueeze(-1) + torch.eye(
                z.shape[-1], dtype=z.dtype, device=z.device
            )
        right = ((S - S.detach()) / density).unsqueeze(-1)
        return -torch.linalg.solve_triangular(rows, right, upper=False, unitriangular=True).squeeze(-1)


class Mixture(dist.MixtureSameFamily):
    """A mixture of K distributions of one kind, batch [..., K] and event [D], with weights of `logits` [..., K]."""

    support = constraints.real_vector

    def __init__(self, logits: Tensor, components: dist.TorchDistribution) -> None:
        super().__init__(dist.Categorical(logits=logits), components)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Mixture:
        """The same law, independently over `batch_shape`."""
        logits = self.mixture_distribution.logits
        components = self.component_distribution.expand((*batch_shape, logits.shape[-1]))
        return Mixture(logits.expand(*batch_shape, -1), components)
