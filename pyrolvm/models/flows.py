"""Normalising flows on R^D that broadcast over batches and can be inverted.

    u_0 ~ N(0, I),   u_t = f_t(u_{t-1}; h),   log q(u_T) = log N(u_0; 0, I) - sum_t log |det df_t / du_{t-1}|

with h a context: what an encoder says of x. The transforms are torch's `Transform`s with a cache of one: the density
of a draw costs nothing more. Of other values, an autoregressive transform is inverted in D passes, a planar one by
bisection.

Planar: Rezende and Mohamed (2015), "Variational inference with normalizing flows", equations 10 and 12.
Inverse autoregressive: Kingma et al. (2016), "Improved variational inference with inverse autoregressive flow".
Splines: Durkan, Bekasov, Murray and Papamakarios (2019), "Neural spline flows", section 3.1 and appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions.transforms import Transform
from torch.nn.functional import elu, linear, pad, softplus

MEAN_POINTS = 256
UNIT = math.log(math.e - 1)  # softplus(UNIT) = 1
Map = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""(x, parameters, inverse) -> (y, log |dy / dx|), entry by entry."""


class Flow(dist.TransformedDistribution):
    """A standard normal pushed through transforms.

    Its mean and variance have no closed form: they are those of 256 fixed quasi-random points (Sobol, antithetic)
    pushed through, the same for all rows.
    """

    _narrow: Flow | None = None  # before it was expanded

    def expand(self, batch_shape: Any, _instance: Any = None) -> Flow:
        """The same law, independently over `batch_shape`."""
        new = super().expand(batch_shape, self._get_checked_instance(Flow, _instance))
        new._narrow = self._narrow or self
        return new

    @property
    def mean(self) -> Tensor:
        """[..., D]."""
        return self._moments()[0]

    @property
    def variance(self) -> Tensor:
        """Of each dimension, [..., D]."""
        return self._moments()[1]

    def _moments(self) -> tuple[Tensor, Tensor]:
        narrow, shape = self._narrow or self, self.batch_shape + self.event_shape
        like = narrow.base_dist.mean
        points = _normal_points(shape[-1]).to(like).reshape(-1, *(1,) * (like.dim() - 1), shape[-1])
        centre = first = second = torch.zeros_like(like)
        for transform in narrow.transforms:
            centre = transform(centre)  # of the origin: sums of differences lose no digits
        for part in points.split(max(1, 2**16 // max(1, like.numel()))):
            u = part.expand(len(part), *like.shape)
            for transform in narrow.transforms:
                u = transform(u)
            first, second = first + (u - centre).sum(0), second + (u - centre).square().sum(0)
        first, second = first / len(points), second / len(points)
        return (centre + first).expand(shape), (second - first.square()).clamp_min(0).expand(shape)


@cache
def _normal_points(dim: int) -> Tensor:
    """Quasi-random standard normal [MEAN_POINTS, dim], in pairs of opposite signs."""
    with torch.device("cpu"):
        half = torch.quasirandom.SobolEngine(dim, scramble=True, seed=0).draw(
            MEAN_POINTS // 2, dtype=torch.float64
        )
        half = torch.special.ndtri(half.clamp(1e-6, 1 - 1e-6))
        return torch.stack([half, -half], 1).flatten(0, 1)


class CachedTransform(Transform):
    """A bijection of R^D that keeps log |det| of its last pair. A new one defines `forward_map` and `inverse_map`."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self) -> None:
        super().__init__(cache_size=1)
        self._log_det = torch.zeros(())

    def forward_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y [..., D] and log |det dy / dx| [...]."""
        raise NotImplementedError

    def inverse_map(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] and log |det dy / dx| [...]."""
        raise NotImplementedError

    def _call(self, x: Tensor) -> Tensor:
        y, self._log_det = self.forward_map(x)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, self._log_det = self.inverse_map(y)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """[...]; kept from the call that made the pair."""
        known_x, known_y = self._cached_x_y
        return self._log_det if x is known_x and y is known_y else self.forward_map(x)[1]


class Planar(CachedTransform):
    """y = x + u tanh(w'x + b), with u moved along w so that w'u > -1, as invertibility demands.

    Parameters
    ----------
    u, w : Tensor [..., D]
    b : Tensor [...]

    Notes
    -----
    The move is u + (m(w'u) - w'u) w / |w|^2 with m(c) = -1 + softplus(c + log(e - 1)), for which m(0) = 0: u = 0 is the
    identity.
    """

    def __init__(self, u: Tensor, w: Tensor, b: Tensor) -> None:
        super().__init__()
        c = (w * u).sum(-1, keepdim=True)
        moved = softplus(c + UNIT) - 1 - c
        self.u, self.w, self.b = u + moved * w / (w.square().sum(-1, keepdim=True) + 1e-12), w, b
        self.slope = (self.w * self.u).sum(-1)  # w'u > -1

    def forward_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and its log determinant."""
        return self._mapped(x, (self.w * x).sum(-1) + self.b, 1)

    def inverse_map(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """By bisection for a in a + w'u tanh(a) = w'y + b, which rises with a; x = y - u tanh(a)."""
        target = (self.w * y).sum(-1) + self.b
        with torch.no_grad():
            low, high = target - self.slope.abs(), target + self.slope.abs()
            for _ in range(60):
                middle = (low + high) / 2
                above = middle + self.slope * middle.tanh() > target
                low, high = torch.where(above, low, middle), torch.where(above, middle, high)
            root = (low + high) / 2
            steepness = 1 + self.slope * (1 - root.tanh().square())
        # a Newton step, for the gradient
        return self._mapped(y, root - (root + self.slope * root.tanh() - target) / steepness, -1)

    def _mapped(self, x: Tensor, a: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        t = a.tanh()
        return x + sign * self.u * t.unsqueeze(-1), torch.log1p((1 - t.square()) * self.slope)


class Conditioner(nn.Module):
    """A masked network (MADE): x [..., D], context [..., C] -> numbers [..., P, D], those of d from x_1..x_{d-1} only.

    Parameters
    ----------
    dim, context, outputs, hidden : int
        D, C, P and the units of its one hidden layer.
    reverse : bool
        Count the dimensions from the last.

    Notes
    -----
    Germain, Gregor, Murray and Larochelle (2015), "MADE: masked autoencoder for distribution estimation". Context and
    x are multiplied apart, so that either may be broadcast.
    """

    from_x: Tensor
    to_out: Tensor

    def __init__(self, dim: int, context: int, outputs: int, hidden: int, reverse: bool) -> None:
        super().__init__()
        self.dim, self.outputs = dim, outputs
        degree = torch.arange(dim - 1, -1, -1) if reverse else torch.arange(dim)
        seen = torch.arange(hidden) % dim  # each unit sees so many dimensions
        # not persistent: they follow from the sizes
        self.register_buffer("from_x", (degree < seen.unsqueeze(1)).float(), persistent=False)  # [hidden, D]
        self.register_buffer("to_out", (seen <= degree.unsqueeze(1)).float(), persistent=False)  # [D, hidden]
        self.first = nn.Linear(dim + context, hidden)
        self.last = nn.Linear(hidden, outputs * dim)
        with torch.no_grad():
            # bent where x is, which is of unit scale: a hidden layer that is nearly linear learns curves slowly
            self.first.weight[:, :dim].normal_().mul_(min(1.0, 2 / math.sqrt(dim)))
            self.first.bias.normal_()
            self.last.weight.mul_(0.1)  # near the identity
            self.last.bias.zero_()

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """[..., P, D]."""
        weight = self.first.weight
        before = linear(x, weight[:, : self.dim] * self.from_x, self.first.bias)
        if context is not None:
            before = before + linear(context, weight[:, self.dim :])
        mask = self.to_out.repeat(self.outputs, 1)
        return linear(elu(before), self.last.weight * mask, self.last.bias).unflatten(
            -1, (self.outputs, self.dim)
        )


class Autoregressive(CachedTransform):
    """y_d = map(x_d; net(x_1..x_{d-1}, context)): one pass forward, D passes back.

    Parameters
    ----------
    net : Module
        A `Conditioner`.
    context : Tensor [..., C], optional
    elementwise : callable
        `affine` or `spline`.
    """

    def __init__(self, net: nn.Module, context: Tensor | None, elementwise: Map) -> None:
        super().__init__()
        self.net, self.context, self.map = net, context, elementwise

    def forward_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and its log determinant."""
        y, log_slope = self.map(x, self.net(x, self.context), False)
        return y, log_slope.sum(-1)

    def inverse_map(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x, found one dimension in each pass."""
        x, log_slope = torch.zeros_like(y), y
        for _ in range(y.shape[-1]):
            x, log_slope = self.map(y, self.net(x, self.context), True)
        return x, -log_slope.sum(-1)


def affine(x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """y = shift + scale x, raw [..., 2, D]; |log scale| < 3."""
    shift, log_scale = raw[..., 0, :], 3 * (raw[..., 1, :] / 3).tanh()
    if inverse:
        return (x - shift) * (-log_scale).exp(), -log_scale
    return shift + x * log_scale.exp(), log_scale


def spline(x: Tensor, raw: Tensor, inverse: bool, bound: float = 4.0) -> tuple[Tensor, Tensor]:
    """A monotone rational-quadratic spline of K bins within the bound, outside the identity; raw [..., 3 K - 1, D]."""
    num_bins = (raw.shape[-2] + 1) // 3
    # many parameters move a knot: without the factor a step of Adam moves them all, and training is chaotic
    widths, heights, slopes = (0.2 * raw.mT).split([num_bins, num_bins, num_bins - 1], -1)
    xs, ys = _knots(widths, bound), _knots(heights, bound)  # [..., D, K + 1]
    slopes = pad(1e-3 + softplus(slopes + UNIT) * (1 - 1e-3), (1, 1), value=1.0)
    inside = x.abs() < bound
    value = torch.where(inside, x, torch.zeros_like(x)).unsqueeze(-1)  # [..., D, 1]
    index = (value >= (ys if inverse else xs)[..., 1:-1]).sum(-1, keepdim=True)  # the bin
    index = index.expand(*torch.broadcast_shapes(index.shape[:-1], xs.shape[:-1]), 1)
    left, right, low, high, d0, d1 = (
        t.expand(*index.shape[:-1], t.shape[-1]).gather(-1, index + i)
        for t in (xs, ys, slopes)
        for i in (0, 1)
    )
    width, height = right - left, high - low
    s = height / width
    bend = d1 + d0 - 2 * s
    if inverse:
        rise = value - low
        a, b, c = height * (s - d0) + rise * bend, height * d0 - rise * bend, -s * rise
        share = 2 * c / (-b - (b.square() - 4 * a * c).clamp_min(0).sqrt())
    else:
        share = (value - left) / width
    mixed = share * (1 - share)
    below = s + bend * mixed
    slope = s.square() * (d1 * share.square() + 2 * s * mixed + d0 * (1 - share).square()) / below.square()
    y = left + share * width if inverse else low + height * (s * share.square() + d0 * mixed) / below
    log_slope = (-slope.log() if inverse else slope.log()).squeeze(-1)
    return torch.where(inside, y.squeeze(-1), x), torch.where(inside, log_slope, torch.zeros_like(log_slope))


def _knots(raw: Tensor, bound: float, least: float = 1e-3) -> Tensor:
    """[..., K] -> K + 1 knots from -bound to bound, at least 2 bound least apart."""
    shares = least + (1 - least * raw.shape[-1]) * raw.softmax(-1)
    inner = bound * (2 * shares[..., :-1].cumsum(-1) - 1)
    return pad(pad(inner, (1, 0), value=-bound), (0, 1), value=bound)
