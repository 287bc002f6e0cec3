"""Laws of the weights of a mixture: the Dirichlet, and sticks broken off one after the other.

Both are written for log pi and not for pi. A component that the data leave empty has a weight like
exp(-1/a) for a small concentration a: far below the smallest float, and nothing unusual as a logarithm.

    v_k ~ Beta(a_k, b_k)  for k < K,  v_K = 1,         pi_k = v_k (1 - v_1) ... (1 - v_{k-1})

    a_k = 1, b_k = c                        the Dirichlet process of concentration c, cut off after K sticks
    a_k = alpha_k, b_k = sum_{j>k} alpha_j  Dirichlet(alpha)

Sources: Sethuraman (1994), "A constructive definition of Dirichlet priors", Statistica Sinica 4; Ishwaran and
James (2001), "Gibbs sampling methods for stick-breaking priors", JASA 96; Connor and Mosimann (1969), JASA 64.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraint_registry import biject_to, transform_to
from torch.distributions.transforms import Transform
from torch.nn.functional import logsigmoid, pad

Size = torch.Size | list[int] | tuple[int, ...]


class _LogWeights(constraints.Constraint):
    """Logarithms of weights, up to a constant: normalised in draws, not in a mean such as E[log pi]."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return torch.isfinite(value).all(-1)


class _FromLogRatios(Transform):
    """log(pi_k / pi_K) for k < K to log pi; of unit Jacobian, for the densities here are those of the ratios."""

    domain = constraints.real_vector
    codomain = _LogWeights()
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _FromLogRatios)

    def _call(self, x: Tensor) -> Tensor:
        return pad(x, (0, 1)).log_softmax(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return y[..., :-1] - y[..., -1:]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(x.shape[:-1])

    def forward_shape(self, shape: Size) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] + 1))

    def inverse_shape(self, shape: Size) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] - 1))


log_weights = _LogWeights()
for registry in (biject_to, transform_to):
    registry.register(_LogWeights, lambda constraint: _FromLogRatios())


class StickBreaking(dist.TorchDistribution):
    """The law of log pi [..., K] when the sticks are independent Beta(a_k, b_k).

    Its density is that of the log ratios y_k = log(pi_k / pi_K), k < K. The logit of stick k is y_k minus a function of
    the later ones, so that the Jacobian is 1 and

        log p = sum_{k<K} a_k log v_k + b_k log(1 - v_k) - log B(a_k, b_k).

    Parameters
    ----------
    a, b : Tensor [..., K - 1]
        Positive.
    """

    arg_constraints = {  # noqa: RUF012
        "a": constraints.independent(constraints.positive, 1),
        "b": constraints.independent(constraints.positive, 1),
    }
    support = log_weights
    has_rsample = True

    def __init__(self, a: Tensor, b: Tensor, validate_args: bool | None = None):
        self.a, self.b = torch.broadcast_tensors(a, b)
        shape = self.a.shape
        super().__init__(shape[:-1], torch.Size([shape[-1] + 1]), validate_args=validate_args)

    @classmethod
    def dirichlet(cls, concentration: Tensor) -> StickBreaking:
        """The law of log pi when pi ~ Dirichlet(`concentration` [..., K])."""
        after = concentration.flip(-1).cumsum(-1).flip(-1)  # [..., K], each with those after it
        return cls(concentration[..., :-1], after[..., 1:])

    def expand(self, batch_shape: Size, _instance: object = None) -> StickBreaking:
        """The same law, independently over `batch_shape`."""
        shape = torch.Size(batch_shape) + self.a.shape[-1:]
        return StickBreaking(self.a.expand(shape), self.b.expand(shape), validate_args=False)

    @property
    def mean_weights(self) -> Tensor:
        """E[pi] [..., K]."""
        total = self.a + self.b
        return _chained((self.a / total).log(), (self.b / total).log()).exp()

    @property
    def mean(self) -> Tensor:
        """E[log pi] [..., K]."""
        total = torch.digamma(self.a + self.b)
        return _chained(torch.digamma(self.a) - total, torch.digamma(self.b) - total)

    @property
    def variance(self) -> Tensor:
        """Var[log pi] [..., K]."""
        total = torch.polygamma(1, self.a + self.b)
        return _chained(torch.polygamma(1, self.a) - total, torch.polygamma(1, self.b) - total)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density [...] in nats of log weights [..., K]."""
        rest = value.flip(-1).logcumsumexp(-1).flip(-1)  # log of what is left before each stick is broken
        log_v, log_left = value[..., :-1] - rest[..., :-1], rest[..., 1:] - rest[..., :-1]
        log_beta = torch.lgamma(self.a) + torch.lgamma(self.b) - torch.lgamma(self.a + self.b)
        return (self.a * log_v + self.b * log_left - log_beta).sum(-1)

    def rsample(self, sample_shape: Size = ()) -> Tensor:
        """Draws [*sample_shape, ..., K], from two log-Gamma draws for each stick."""
        shape = torch.Size(sample_shape) + self.a.shape
        logit = _log_gamma(self.a.expand(shape)) - _log_gamma(self.b.expand(shape))
        return _chained(logsigmoid(logit), logsigmoid(-logit))


def _chained(of_stick: Tensor, of_rest: Tensor) -> Tensor:
    """Sums over the sticks before each component, [..., K] from [..., K - 1]: its own stick, and what each left."""
    return pad(of_stick, (0, 1)) + pad(of_rest.cumsum(-1), (1, 0))


def _log_gamma(concentration: Tensor) -> Tensor:
    """The logarithm of a Gamma draw: log Gamma(a) = log Gamma(a + 1) + log(U) / a, which never underflows."""
    exponential = torch._standard_gamma(torch.ones_like(concentration))  # -log U
    return torch._standard_gamma(concentration + 1).log() - exponential / concentration
