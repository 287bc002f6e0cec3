"""Networks of a noisy x_t and its step t: what a diffusion learns.

A denoiser maps x_t [..., data_dim] and t [...], whole numbers from 1 to T, to [..., data_dim]. Any number of dimensions
may stand left of the last one. The last layer starts at 0, so that an untrained denoiser predicts 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pyrolvm.errors import ProgramError, SettingError, count, one_of
from pyrolvm.models.make import image_of, returned, shape_of, try_out
from pyrolvm.models.networks import ACTIVATIONS

TIME_FEATURES = 32


class TimeFeatures(nn.Module):
    """Sines and cosines of t (Vaswani et al. 2017, section 3.5), through one layer: t [...] -> [..., out_dim].

    Parameters
    ----------
    chain_length : int
        T; times are scaled as if it were 1000.
    out_dim : int
        Size of the result.
    """

    frequencies: Tensor

    def __init__(self, chain_length: int, out_dim: int) -> None:
        super().__init__()
        half = TIME_FEATURES // 2
        scale = 1000 / chain_length
        exponents = torch.arange(half) / (half - 1)
        self.register_buffer(
            "frequencies", scale * torch.exp(-math.log(10_000) * exponents), persistent=False
        )
        self.layer = nn.Linear(TIME_FEATURES, out_dim)

    def forward(self, t: Tensor) -> Tensor:
        """[..., out_dim] for t [...]."""
        angles = t.unsqueeze(-1).to(self.frequencies.dtype) * self.frequencies
        return self.layer(torch.cat([angles.sin(), angles.cos()], -1))


class TimeMLP(nn.Module):
    """Fully connected layers, each shifted by features of t.

    Parameters
    ----------
    data_dim : int
        Size of x_t.
    chain_length : int
        T.
    hidden : sequence of int
        Sizes of the hidden layers.
    activation : str
        A key of `ACTIVATIONS`.

    Raises
    ------
    SettingError
        For an unknown activation, or a size that is no positive whole number.
    """

    def __init__(
        self, data_dim: int, chain_length: int, hidden: Sequence[int] = (256, 256), activation: str = "silu"
    ) -> None:
        super().__init__()
        self.nonlinearity = ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)]()
        sizes = [data_dim, *(count("a size in hidden", size) for size in hidden)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.times = nn.ModuleList(TimeFeatures(chain_length, size) for size in sizes[1:])
        self.last = zeroed(nn.Linear(sizes[-1], data_dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[..., data_dim] for x_t [..., data_dim] and t [...]."""
        h = x
        for layer, time in zip(self.layers, self.times, strict=True):
            h = self.nonlinearity(layer(h) + time(t))
        return self.last(h)


class Block(nn.Module):
    """Two convolutions with a shift by features of t between them, added to their input (Ho et al. 2020, B)."""

    def __init__(self, before: int, after: int, time_dim: int) -> None:
        super().__init__()
        self.first = nn.Sequential(groups(before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.time = nn.Linear(time_dim, after)
        self.second = nn.Sequential(groups(after), nn.SiLU(), nn.Conv2d(after, after, 3, padding=1))
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[rows, after, height, width] for x [rows, before, height, width] and time [rows, time_dim]."""
        h = self.first(x) + self.time(time)[..., None, None]
        return self.skip(x) + self.second(h)


class UNet(nn.Module):
    """A small U-Net of flat images: down by halves, a block in the middle, up again beside what came down.

    Parameters
    ----------
    image_shape : sequence of int
        (channels, height, width).
    chain_length : int
        T.
    channels : sequence of int
        Feature maps of each level; the first has the image's size, each further one half of it.

    Raises
    ------
    SettingError
        For images too small for so many levels.
    """

    def __init__(
        self, image_shape: Sequence[int], chain_length: int, channels: Sequence[int] = (32, 64)
    ) -> None:
        super().__init__()
        self.image_shape = tuple(count("a size in image_shape", size) for size in image_shape)
        maps = [count("a size in channels", size) for size in channels]
        sides = image_shape[1:]
        if not maps or min(sides) >> (len(maps) - 1) < 1:
            raise SettingError(
                f"channels={tuple(channels)} must have between 1 and {min(sides).bit_length()} entries for images of "
                f"{sides[0]} by {sides[1]}: each further one halves them"
            )
        time_dim = 4 * maps[0]
        self.time = nn.Sequential(TimeFeatures(chain_length, time_dim), nn.SiLU())
        self.enter = nn.Conv2d(image_shape[0], maps[0], 3, padding=1)
        self.down = nn.ModuleList(Block(a, b, time_dim) for a, b in itertools.pairwise([maps[0], *maps]))
        self.halve = nn.ModuleList(nn.Conv2d(size, size, 3, stride=2, padding=1) for size in maps[:-1])
        self.middle = Block(maps[-1], maps[-1], time_dim)
        above = [*maps[1:], maps[-1]]
        self.up = nn.ModuleList(Block(a + b, b, time_dim) for a, b in zip(above, maps, strict=True))
        self.leave = nn.Sequential(
            groups(maps[0]), nn.SiLU(), zeroed(nn.Conv2d(maps[0], image_shape[0], 3, padding=1))
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[..., channels * height * width] for x_t of that shape and t [...]."""
        leading = x.shape[:-1]
        time = self.time(t.expand(leading).reshape(-1))
        h = self.enter(x.reshape(-1, *self.image_shape))
        levels = []
        for level, block in enumerate(self.down):
            h = self.halve[level - 1](h) if level else h
            h = block(h, time)
            levels.append(h)
        h = self.middle(h, time)
        for level in reversed(range(len(levels))):
            same = levels[level]
            h = h if h.shape[-2:] == same.shape[-2:] else interpolate(h, size=same.shape[-2:])
            h = self.up[level](torch.cat([h, same], 1), time)
        return self.leave(h).reshape(*leading, -1)


def groups(channels: int) -> nn.GroupNorm:
    """Normalisation by groups of at least four channels, eight groups at most."""
    number = max(n for n in range(1, 9) if channels % n == 0 and (n == 1 or channels // n >= 4))
    return nn.GroupNorm(number, channels)


def zeroed(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The layer with weight and bias 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def make_denoiser(
    network: str | nn.Module | None,
    data_dim: int,
    chain_length: int,
    hidden: Sequence[int],
    activation: str,
    image_shape: Sequence[int] | None,
    channels: Sequence[int],
) -> nn.Module:
    """The denoiser of this name, or `network` itself if it is a module that can be one.

    Parameters
    ----------
    network : {"mlp", "unet"} or Module, optional
        "unet" if there is an `image_shape`, else "mlp".

    Raises
    ------
    SettingError
        For an unknown name, or an `image_shape` of another number of pixels than `data_dim`.
    ProgramError
        For a module that does not map x_t [1, data_dim] and t [1] to [1, data_dim].
    """
    if isinstance(network, nn.Module):
        _check(network, data_dim)
        return network
    kind = one_of("network", network or ("unet" if image_shape else "mlp"), ("mlp", "unet"))
    if kind == "unet":
        return UNet(image_of(data_dim, image_shape), chain_length, channels)
    return TimeMLP(data_dim, chain_length, hidden, activation)


def _check(network: nn.Module, data_dim: int) -> None:
    out = try_out(network, "network", data_dim, torch.ones(1, dtype=torch.int64))
    if shape_of(out) != [1, data_dim]:
        raise ProgramError(
            f"the network {type(network).__name__} returned {returned(out)}: it must map x_t [..., {data_dim}] "
            f"and t [...], whole numbers, to [..., {data_dim}]"
        )
