"""Semi-implicit guides: draws whose mixing distribution is that of a network's output, with a density that is a bound.

    psi = net(noise),   noise ~ N(0, I)             implicit: its density is unknown
    z | psi ~ q(z | psi)                            explicit and reparameterised
    h_K(z; psi_0, ..., psi_K) = 1/(K + 1) sum_k q(z | psi_k)

(Yin & Zhou 2018, "Semi-implicit variational inference"). z is drawn from one of the K + 1 components, each as
probable as the others, so that *given* the psi it has the density h_K: log p(x, z) - log h_K is a log-weight like any
other. Its mean is the surrogate bound, below log p(x) and rising with K (theorem 1 there; Molchanov et al. 2019,
"Doubly semi-implicit variational inference"), and the mean of p(x, z) / h_K is p(x) for every K, so that the
importance-weighted bounds, the evidence and k-hat hold as they are. As K grows, h_K becomes the density of z itself.
With K = 0 the best mixing distribution is a point (proposition 1 there).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyrolvm.errors import SettingError

BUDGET = 2**24
"""Numbers (value x component) whose densities are computed at once."""

Conditional = Callable[[Tensor], Any]


class SemiImplicit(TorchDistribution):
    """1/M sum_m q(z | psi_m): an even mixture of M reparameterised components that is itself reparameterised.

    The component of a draw is chosen at random, with a probability that depends on no parameter, and the draw follows
    the path of that component.

    Parameters
    ----------
    conditional : callable
        psi [..., psi_dim] -> q(z | psi) with batch [...], reparameterised.
    psi : tensor [batch..., M, psi_dim]
        M = K + 1 fresh draws of the mixing distribution.

    Raises
    ------
    SettingError
        The conditional is not reparameterised, or its batch is not that of psi.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, conditional: Conditional, psi: Tensor, validate_args: bool | None = None) -> None:
        component = conditional(psi)
        if not component.has_rsample:
            name = type(component).__name__
            raise SettingError(
                f"the conditional of a semi-implicit guide must be reparameterised, not {name}"
            )
        if component.batch_shape != psi.shape[:-1]:
            raise SettingError(
                f"the conditional has the batch shape {list(component.batch_shape)} for psi of shape "
                f"{list(psi.shape)}, not {list(psi.shape[:-1])}: end it by .to_event(1)"
            )
        self.conditional, self.psi, self.component = conditional, psi, component
        super().__init__(psi.shape[:-2], component.event_shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """That of a component."""
        return self.component.support

    @property
    def mean(self) -> Tensor:
        """Of these components: an estimate, by M draws, of the mean over the mixing distribution."""
        return self.component.mean.mean(-1 - self.event_dim)

    @property
    def variance(self) -> Tensor:
        """Within the components and between them."""
        dim = -1 - self.event_dim
        return self.component.variance.mean(dim) + self.component.mean.var(dim, correction=0)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SemiImplicit:
        """The same components for a larger batch: draws under a further plate share them."""
        return SemiImplicit(self.conditional, self.psi.expand(*batch_shape, *self.psi.shape[-2:]))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A draw from a component chosen at random."""
        M, psi_dim = self.psi.shape[-2:]
        shape = (*sample_shape, *self.batch_shape)
        index = torch.randint(M, (*shape, 1, 1), device=self.psi.device).expand(*shape, 1, psi_dim)
        return self.conditional(self.psi.expand(*shape, M, psi_dim).gather(-2, index).squeeze(-2)).rsample()

    def log_prob(self, value: Tensor) -> Tensor:
        """log 1/M sum_m q(value | psi_m), some components at a time."""
        M = self.psi.shape[-2]
        value = value.unsqueeze(-1 - self.event_dim)
        parts = self.psi.split(max(1, min(M, BUDGET // max(1, value.numel()))), -2)
        if len(parts) == 1:
            return self.component.log_prob(value).logsumexp(-1) - math.log(M)
        terms = [self.conditional(psi).log_prob(value).logsumexp(-1) for psi in parts]
        return torch.stack(terms).logsumexp(0) - math.log(M)


class GaussianConditional(nn.Module):
    """q(u | psi) = N(psi, diag(scale^2)).

    Parameters
    ----------
    size : int
        Dimensions of u and of psi.
    scale : float
        Deviation, at the start if it is learned.
    learn_scale : bool
        Whether each dimension learns its own.
    """

    def __init__(self, size: int, scale: float = 0.1, learn_scale: bool = False) -> None:
        super().__init__()
        if not scale > 0:
            raise SettingError(f"scale must be positive, not {scale}")
        self.psi_dim = size
        log_scale = torch.full((size,), math.log(scale))
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self, psi: Tensor) -> TorchDistribution:
        """Batch [...], event [size], for psi [..., size]."""
        return dist.Normal(psi, self.log_scale.exp()).to_event(1)
