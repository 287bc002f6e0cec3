"""Encoders and decoders: the networks a model takes as arguments.

An encoder maps data to the parameters of q(z | x), a decoder maps latents to those of p(x | z)::

    encoder: x [..., data_dim]   -> loc [..., latent_dim], scale [..., latent_dim] and, if wanted, features
    decoder: z [..., latent_dim] -> mean or logits [..., data_dim]

Any number of dimensions may stand left of the last one: a particle plate puts one left of the batch.
Any `nn.Module` of these shapes will do; `Rowwise` gives them to a network that knows only [rows, ...].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrolvm.errors import SettingError, count, one_of

SCALE_FLOOR = 1e-4  # below it, z - loc of float32 numbers near 1 has no correct digits left

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def split_loc_scale(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Split raw [..., 2 * latent_dim] into loc and scale = floor + softplus > 0, each [..., latent_dim]."""
    loc, raw_scale = raw.chunk(2, dim=-1)
    return loc, SCALE_FLOOR + softplus(raw_scale)


class MLP(nn.Module):
    """Fully connected layers: x [..., in_dim] -> [..., out_dim], with no activation after the last.

    Parameters
    ----------
    in_dim, out_dim : int
        Sizes of the last dimension before and after.
    hidden : sequence of int
        Sizes of the hidden layers; `()` leaves one affine map.
    activation : str
        A key of `ACTIVATIONS`.

    Raises
    ------
    SettingError
        For an unknown activation or a size that is no positive whole number.
    """

    def __init__(
        self, in_dim: int, out_dim: int, hidden: Sequence[int] = (400,), activation: str = "relu"
    ) -> None:
        super().__init__()
        nonlinearity = ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)]
        sizes = [in_dim, *(count("a size in hidden", size) for size in hidden)]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nonlinearity()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], out_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in_dim] to [..., out_dim], in the dtype of x."""
        return self.layers(x).to(x.dtype)  # under autocast the layers are bf16; densities must not be


class GaussianEncoder(nn.Module):
    """Read (loc, scale) of a diagonal Gaussian, and features if wanted, from the output of a network.

    Parameters
    ----------
    net : Module
        Maps x [..., data_dim] to [..., 2 * latent_dim + num_features].
    num_features : int
        Numbers beside loc and scale that a guide family wants (`pyrolvm.models.guides`).
    """

    def __init__(self, net: nn.Module, num_features: int = 0) -> None:
        super().__init__()
        self.net, self.num_features = net, num_features

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map x [..., data_dim] to loc and scale [..., latent_dim], and to features [..., num_features] if any."""
        raw = self.net(x).to(x.dtype)
        if not self.num_features:
            return split_loc_scale(raw)
        rest = raw.shape[-1] - self.num_features
        return (*split_loc_scale(raw[..., :rest]), raw[..., rest:])


class MLPEncoder(GaussianEncoder):
    """A fully connected Gaussian encoder: x [..., data_dim] -> loc, scale, each [..., latent_dim].

    Parameters
    ----------
    data_dim, latent_dim : int
        Sizes of x and z.
    hidden, activation
        As in `MLP`.
    num_features : int
        As in `GaussianEncoder`.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        hidden: Sequence[int] = (400,),
        activation: str = "relu",
        num_features: int = 0,
    ) -> None:
        super().__init__(MLP(data_dim, 2 * latent_dim + num_features, hidden, activation), num_features)


class Rowwise(nn.Module):
    """Let a network that takes [rows, *row_shape] take flat vectors with any leading dimensions.

    Parameters
    ----------
    net : Module
        Maps [rows, *row_shape] to [rows, ...], or to a tuple of such tensors (an encoder's loc and scale).
    row_shape : sequence of int
        The shape of one row.

    Examples
    --------
    `Rowwise(net, (1, 28, 28))` maps x [..., 784] to [..., out].
    """

    def __init__(self, net: nn.Module, row_shape: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.row_shape = tuple(row_shape)

    def forward(self, x: Tensor) -> Any:
        """Map x [..., prod(row_shape)] to [..., out], or to a tuple of such tensors."""
        leading = x.shape[:-1]
        out = self.net(x.reshape(leading.numel(), *self.row_shape))  # [rows, ...]
        if isinstance(out, tuple):
            return tuple(_lead_with(leading, part) for part in out)
        return _lead_with(leading, out)


def _lead_with(leading: torch.Size, rows: Tensor) -> Tensor:
    """Reshape rows [rows, ...] to [*leading, out]."""
    return rows.reshape(*leading, rows.shape[1:].numel())


def conv_net(
    image_shape: Sequence[int],
    out_dim: int,
    channels: Sequence[int] = (32, 64),
    hidden: Sequence[int] = (),
    activation: str = "relu",
) -> Rowwise:
    """Convolutions, then fully connected layers: flat images x [..., C * H * W] -> [..., out_dim].

    Arguments and errors as of `ConvEncoder`.
    """
    nonlinearity = ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)]
    (height, width), maps = _sizes(image_shape, channels)[-1], [image_shape[0], *channels]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(maps):
        layers += [nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1), nonlinearity()]
    head = MLP(maps[-1] * height * width, out_dim, hidden, activation)
    return Rowwise(nn.Sequential(*layers, nn.Flatten(), head), image_shape)


class ConvEncoder(GaussianEncoder):
    """A convolutional Gaussian encoder of flat images, x [..., C * H * W] -> loc, scale [..., latent_dim].

    Parameters
    ----------
    image_shape : sequence of int
        (channels, height, width), each side at least 2 ** len(channels).
    latent_dim : int
        Size of z.
    channels : sequence of int
        Feature maps per level; each level halves height and width.
    hidden : sequence of int
        Sizes of the fully connected layers after the last level.
    activation : str
        A key of `ACTIVATIONS`.
    num_features : int
        As in `GaussianEncoder`.

    Raises
    ------
    SettingError
        For images too small for so many levels, or an unknown activation.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        latent_dim: int,
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (),
        activation: str = "relu",
        num_features: int = 0,
    ) -> None:
        net = conv_net(image_shape, 2 * latent_dim + num_features, channels, hidden, activation)
        super().__init__(net, num_features)


class ConvDecoder(nn.Module):
    """The mirror of `ConvEncoder`: z [..., latent_dim] -> means or logits of flat images [..., C * H * W].

    Parameters
    ----------
    latent_dim, image_shape, channels, activation
        As in `ConvEncoder`.
    hidden : sequence of int
        Sizes of the fully connected layers before the first level.
    """

    def __init__(
        self,
        latent_dim: int,
        image_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        nonlinearity = ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)]
        sizes, maps = _sizes(image_shape, channels), [image_shape[0], *channels]
        top = (maps[-1], *sizes[-1])
        layers = [MLP(latent_dim, torch.Size(top).numel(), hidden, activation), nn.Unflatten(-1, top)]
        for level in range(len(channels), 0, -1):
            odd = (sizes[level - 1][0] % 2, sizes[level - 1][1] % 2)  # the row that halving dropped
            up = nn.ConvTranspose2d(maps[level], maps[level - 1], 4, stride=2, padding=1, output_padding=odd)
            layers += [nonlinearity(), up]
        self.net = Rowwise(nn.Sequential(*layers), (latent_dim,))

    def forward(self, z: Tensor) -> Tensor:
        """Map z [..., latent_dim] to [..., C * H * W], in the dtype of z."""
        return self.net(z).to(z.dtype)


def _sizes(image_shape: Sequence[int], channels: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) before each level and after the last; a level halves both, rounding down."""
    if len(image_shape) != 3:
        raise SettingError(f"image_shape={tuple(image_shape)} must be (channels, height, width)")
    _, height, width = image_shape
    sizes = [(height >> level, width >> level) for level in range(len(channels) + 1)]
    if min(sizes[-1]) < 1:
        raise SettingError(
            f"image_shape={tuple(image_shape)} is too small to be halved {len(channels)} times: "
            f"use at most {min(height, width).bit_length() - 1} entries in channels={tuple(channels)}"
        )
    return sizes
