"""Encoders and decoders between data and a grid of code vectors.

An encoder maps x [..., data_dim] to [..., places * code_dim], a decoder back; `grid` is (height, width), one vector
for each of its places. Convolutions keep the places where they are in the image (van den Oord et al. 2017, section
4.1: 4 by 4 convolutions of stride 2, then residual blocks); fully connected layers make a row of places, (1, places).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from pyrolvm.errors import SettingError, count, one_of
from pyrolvm.models.make import KINDS, image_of, make_coder, make_decoder
from pyrolvm.models.networks import ACTIVATIONS, Rowwise

DEFAULT_PLACES = 8


class Residual(nn.Module):
    """x + two convolutions of it, 3 by 3 and 1 by 1."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        nonlinearity = ACTIVATIONS[activation]
        self.net = nn.Sequential(
            nonlinearity(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nonlinearity(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[rows, channels, height, width] of the same shape."""
        return x + self.net(x)


class LastToFirst(nn.Module):
    """Swap the features [rows, channels, height, width] and places [rows, height * width, channels]."""

    def __init__(self, grid: Sequence[int] | None = None) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """To places without a grid, from them with one."""
        if self.grid is None:
            return x.flatten(2).mT
        return x.mT.unflatten(2, tuple(self.grid))


def grid_of(image_shape: Sequence[int], channels: Sequence[int]) -> tuple[int, int]:
    """(height, width) of the codes of images that are halved once for each entry of `channels`.

    Raises
    ------
    SettingError
        For images too small for so many levels.
    """
    sides = [side >> len(channels) for side in image_shape[1:]]
    if not channels or min(sides) < 1:
        raise SettingError(
            f"channels={tuple(channels)} must have between 1 and {min(image_shape[1:]).bit_length() - 1} entries for "
            f"images of {image_shape[1]} by {image_shape[2]}: each halves them"
        )
    return sides[0], sides[1]


def grid_encoder(
    image_shape: Sequence[int], code_dim: int, channels: Sequence[int], activation: str, blocks: int
) -> Rowwise:
    """Convolutions: flat images [..., C * H * W] -> [..., places * code_dim]."""
    nonlinearity = ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise([image_shape[0], *channels]):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nonlinearity()]
    layers += [Residual(channels[-1], activation) for _ in range(blocks)]
    return Rowwise(nn.Sequential(*layers, nn.Conv2d(channels[-1], code_dim, 1), LastToFirst()), image_shape)


def grid_decoder(
    image_shape: Sequence[int],
    code_dim: int,
    channels: Sequence[int],
    activation: str,
    blocks: int,
    parts: int,
) -> Rowwise:
    """The mirror of `grid_encoder`: [..., places * code_dim] -> [..., parts * C * H * W]."""
    nonlinearity = ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)]
    grid, maps = grid_of(image_shape, channels), [parts * image_shape[0], *channels]
    layers: list[nn.Module] = [LastToFirst(grid), nn.Conv2d(code_dim, channels[-1], 3, padding=1)]
    layers += [Residual(channels[-1], activation) for _ in range(blocks)]
    for level in range(len(channels), 0, -1):
        height, width = (side >> (level - 1) for side in image_shape[1:])
        odd = (height % 2, width % 2)  # the row that halving dropped
        up = nn.ConvTranspose2d(maps[level], maps[level - 1], 4, stride=2, padding=1, output_padding=odd)
        layers += [nonlinearity(), up]
    return Rowwise(nn.Sequential(*layers), (grid[0] * grid[1], code_dim))


def make_code_networks(
    encoder: str | nn.Module,
    decoder: str | nn.Module,
    data_dim: int,
    num_codes: int | None,
    code_dim: int,
    parts: int,
    hidden: Sequence[int],
    activation: str,
    image_shape: Sequence[int] | None,
    channels: Sequence[int],
    blocks: int = 2,
) -> tuple[nn.Module, nn.Module, tuple[int, int]]:
    """(encoder, decoder, grid).

    Parameters
    ----------
    encoder, decoder : {"mlp", "conv", "linear"} or Module
        Both or none are "conv"; a module maps x [..., data_dim] to [..., num_codes * code_dim], or such vectors to
        [..., parts * data_dim].
    num_codes : int, optional
        Places; that of the grid of "conv", else 8 by default.

    Raises
    ------
    SettingError
        For an unknown option, or a `num_codes` that is not that of the grid.
    ProgramError
        For a module whose output does not have the shapes above.
    """
    for name, kind in (("encoder", encoder), ("decoder", decoder)):
        if not isinstance(kind, nn.Module):
            one_of(name, kind, KINDS)
    if "conv" not in (encoder, decoder):
        places = DEFAULT_PLACES if num_codes is None else count("num_codes", num_codes)
        nets = (hidden, activation)
        enter = make_coder(encoder, data_dim, places * code_dim, *nets)
        return (
            enter,
            make_decoder(decoder, places * code_dim, data_dim, *nets, parts=parts),
            (1, places),
        )
    image, maps = image_of(data_dim, image_shape), [count("a size in channels", c) for c in channels]
    grid = grid_of(image, maps)
    places = grid[0] * grid[1]
    if num_codes not in (None, places):
        raise SettingError(
            f"num_codes={num_codes} is not that of the grid: images of {image[1]} by {image[2]} halved {len(maps)} "
            f"times have {places} codes; leave num_codes out, or give channels= another number of entries"
        )
    shape = (image, code_dim, maps, activation, blocks)
    enter = (
        grid_encoder(*shape)
        if encoder == "conv"
        else make_coder(encoder, data_dim, places * code_dim, hidden, activation)
    )
    leave = (
        grid_decoder(*shape, parts)
        if decoder == "conv"
        else make_decoder(decoder, places * code_dim, data_dim, hidden, activation, parts=parts)
    )
    return enter, leave, grid
