"""Normalising flows as guide families: a standard normal through maps whose parameters depend on the data."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform, Transform

from pyrolvm.errors import count
from pyrolvm.models.flows import Autoregressive, Conditioner, Flow, Map, Planar, affine, spline
from pyrolvm.models.guide_families import GuideFamily


class FlowGuide(GuideFamily):
    """z = loc + scale u, u a standard normal pushed through transforms; a new one defines `transforms(features)`."""

    def transforms(self, features: Tensor) -> list[Transform]:
        """Of standard units, in the order of a draw."""
        raise NotImplementedError(f"{type(self).__name__} must define transforms(self, features)")

    def forward(self, loc: Tensor, scale: Tensor, features: Tensor | None = None) -> dist.TorchDistribution:
        """Event [latent_dim]."""
        assert features is not None
        batch = torch.broadcast_shapes(loc.shape[:-1], scale.shape[:-1], features.shape[:-1])
        zeros = torch.zeros_like(loc).expand(*batch, -1)
        last = AffineTransform(loc, scale, event_dim=1, cache_size=1)
        return Flow(dist.Normal(zeros, 1.0).to_event(1), [*self.transforms(features), last])


class PlanarFlow(FlowGuide):
    """u pushed through planar maps u + a tanh(w'u + b); (a, w, b) are the features.

    Parameters
    ----------
    latent_dim : int
    num_flows : int
        Maps.
    """

    def __init__(self, latent_dim: int, num_flows: int = 4) -> None:
        super().__init__(latent_dim)
        self.num_flows = count("num_flows", num_flows)
        self.num_features = num_flows * (2 * latent_dim + 1)

    def transforms(self, features: Tensor) -> list[Transform]:
        """`num_flows` planar maps."""
        sizes = [self.latent_dim, self.latent_dim, 1]
        parts = [part.split(sizes, -1) for part in features.chunk(self.num_flows, -1)]
        return [Planar(a, w, b.squeeze(-1)) for a, w, b in parts]


class AutoregressiveFlow(FlowGuide):
    """u pushed through maps u_d -> map(u_d; net(u_1..u_{d-1}, features)); a new one defines `map` and calls `build`.

    Every second map counts the dimensions from the last.
    """

    map: Map

    def build(self, outputs: int, num_flows: int, hidden: int | None, context: int) -> None:
        """Make the networks, each of `outputs` numbers for a dimension."""
        self.num_flows, self.context = count("num_flows", num_flows), count("context", context)
        self.hidden = hidden if hidden is None else count("hidden", hidden, self.latent_dim)
        self.num_features = context
        sizes = (self.latent_dim, context, outputs, self.hidden or max(32, 3 * self.latent_dim))
        self.nets = nn.ModuleList(Conditioner(*sizes, reverse=bool(t % 2)) for t in range(num_flows))

    def transforms(self, features: Tensor) -> list[Transform]:
        """`num_flows` autoregressive maps."""
        return [Autoregressive(net, features, self.map) for net in self.nets]


class InverseAutoregressive(AutoregressiveFlow):
    """u pushed through u_d -> m_d + exp(s_d) u_d, with (m_d, s_d) a masked network of u_1..u_{d-1} and the features.

    Parameters
    ----------
    latent_dim : int
    num_flows : int
        Maps, each with a network of its own.
    hidden : int, optional
        Units of a network's hidden layer; by default 32, or three for each dimension if that is more.
    context : int
        Features.
    """

    map = staticmethod(affine)

    def __init__(
        self, latent_dim: int, num_flows: int = 2, hidden: int | None = None, context: int = 16
    ) -> None:
        super().__init__(latent_dim)
        self.build(2, num_flows, hidden, context)


class SplineFlow(AutoregressiveFlow):
    """u pushed through monotone rational-quadratic splines, each a masked network of u_1..u_{d-1} and the features.

    Parameters
    ----------
    latent_dim, num_flows, hidden, context : int
        As in `InverseAutoregressive`.
    num_bins : int
        Pieces of a spline on [-4, 4]; outside it is the identity.
    """

    map = staticmethod(spline)

    def __init__(
        self,
        latent_dim: int,
        num_flows: int = 2,
        hidden: int | None = None,
        context: int = 16,
        num_bins: int = 8,
    ) -> None:
        super().__init__(latent_dim)
        self.num_bins = count("num_bins", num_bins, 2)
        self.build(3 * num_bins - 1, num_flows, hidden, context)
