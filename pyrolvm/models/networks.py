"""Encoders and decoders: the networks a model takes as arguments.

An encoder maps data to the parameters of q(z | x), a decoder maps latents to those of p(x | z)::

    encoder: x [..., data_dim]   -> loc [..., latent_dim], scale [..., latent_dim]
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

from pyrolvm.errors import ProgramError, SettingError

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


def choose(argument: str, value: Any, options: Sequence[str]) -> Any:
    """Return `value` if it is one of `options`, else raise `SettingError` naming them."""
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise SettingError(f"{argument}={value!r} is not known: choose one of {listed}")
    return value


def split_loc_scale(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Split raw [..., 2 * latent_dim] into loc and scale = floor + softplus > 0, each [..., latent_dim]."""
    loc, raw_scale = raw.chunk(2, dim=-1)
    return loc, SCALE_FLOOR + softplus(raw_scale)


class MLP(nn.Module):
    """Fully connected layers: x [..., in_dim] -> [..., out_dim], with no activation after the last.

    Parameters
    ----------
    in_dim, out_dim: sizes of the last dimension before and after.
    hidden: sizes of the hidden layers; `()` leaves one affine map.
    activation: a key of `ACTIVATIONS`.
    """

    def __init__(
        self, in_dim: int, out_dim: int, hidden: Sequence[int] = (400,), activation: str = "relu"
    ) -> None:
        super().__init__()
        nonlinearity = ACTIVATIONS[choose("activation", activation, list(ACTIVATIONS))]
        sizes = [in_dim, *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nonlinearity()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], out_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in_dim] to [..., out_dim], in the dtype of x."""
        return self.layers(x).to(x.dtype)  # under autocast the layers are bf16; densities must not be


class GaussianEncoder(nn.Module):
    """Read (loc, scale) of a diagonal Gaussian from a network's output [..., 2 * latent_dim]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x [..., data_dim] to loc and scale, each [..., latent_dim]."""
        return split_loc_scale(self.net(x).to(x.dtype))


class MLPEncoder(GaussianEncoder):
    """A fully connected Gaussian encoder: x [..., data_dim] -> loc, scale, each [..., latent_dim]."""

    def __init__(
        self, data_dim: int, latent_dim: int, hidden: Sequence[int] = (400,), activation: str = "relu"
    ) -> None:
        super().__init__(MLP(data_dim, 2 * latent_dim, hidden, activation))


class Rowwise(nn.Module):
    """Let a network that takes [rows, *row_shape] take flat vectors with any leading dimensions.

    `Rowwise(net, (1, 28, 28))` maps x [..., 784] to [..., out]; a net that returns a tuple (an
    encoder's loc and scale) has each member reshaped.
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


class ConvEncoder(GaussianEncoder):
    """A convolutional Gaussian encoder of flat images, x [..., C * H * W] -> loc, scale [..., latent_dim].

    Parameters
    ----------
    image_shape: (channels, height, width), each side at least 2 ** len(channels).
    latent_dim: size of z.
    channels: feature maps per level; each level halves height and width.
    hidden: sizes of the fully connected layers after the last level.
    activation: a key of `ACTIVATIONS`.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        latent_dim: int,
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (),
        activation: str = "relu",
    ) -> None:
        nonlinearity = ACTIVATIONS[choose("activation", activation, list(ACTIVATIONS))]
        (height, width), maps = _sizes(image_shape, channels)[-1], [image_shape[0], *channels]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(maps):
            layers += [nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1), nonlinearity()]
        head = MLP(maps[-1] * height * width, 2 * latent_dim, hidden, activation)
        super().__init__(Rowwise(nn.Sequential(*layers, nn.Flatten(), head), image_shape))


class ConvDecoder(nn.Module):
    """The mirror of `ConvEncoder`: z [..., latent_dim] -> means or logits of flat images [..., C * H * W]."""

    def __init__(
        self,
        latent_dim: int,
        image_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        nonlinearity = ACTIVATIONS[choose("activation", activation, list(ACTIVATIONS))]
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
    """List (height, width) before each level and after the last; a level halves both, rounding down."""
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


def square_image(data_dim: int) -> tuple[int, int, int]:
    """Return (1, side, side) for a square number of pixels, else raise `SettingError`."""
    side = round(data_dim**0.5)
    if side * side != data_dim:
        raise SettingError(
            f"data_dim={data_dim} is not a square: say image_shape=(channels, height, width) of the images"
        )
    return 1, side, side


def make_encoder(
    kind: str | nn.Module,
    data_dim: int,
    latent_dim: int,
    hidden: Sequence[int] = (400,),
    activation: str = "relu",
    image_shape: Sequence[int] | None = None,
) -> nn.Module:
    """Build the encoder named "mlp", "conv" or "linear"; an `nn.Module` is returned as it is."""
    if isinstance(kind, nn.Module):
        return kind
    choose("encoder", kind, ("mlp", "conv", "linear"))
    if kind == "conv":
        image_shape = image_shape or square_image(data_dim)
        return ConvEncoder(image_shape, latent_dim, hidden=hidden, activation=activation)
    return MLPEncoder(data_dim, latent_dim, () if kind == "linear" else hidden, activation)


def make_decoder(
    kind: str | nn.Module,
    latent_dim: int,
    data_dim: int,
    hidden: Sequence[int] = (400,),
    activation: str = "relu",
    image_shape: Sequence[int] | None = None,
) -> nn.Module:
    """Build the decoder named "mlp", "conv" or "linear", hidden layers in the encoder's order reversed."""
    if isinstance(kind, nn.Module):
        return kind
    choose("decoder", kind, ("mlp", "conv", "linear"))
    backwards = tuple(reversed(tuple(hidden)))
    if kind == "conv":
        image_shape = image_shape or square_image(data_dim)
        return ConvDecoder(latent_dim, image_shape, hidden=backwards, activation=activation)
    return MLP(latent_dim, data_dim, () if kind == "linear" else backwards, activation)


def check_encoder(encoder: nn.Module, data_dim: int, latent_dim: int) -> None:
    """Raise `ProgramError` unless `encoder` maps [1, data_dim] to (loc, scale > 0), each [1, latent_dim]."""
    out = _try_out(encoder, data_dim, "encoder")
    wanted = f"it must map x [..., {data_dim}] to a tuple (loc, scale), each [..., {latent_dim}]"
    if not (isinstance(out, tuple) and len(out) == 2 and all(isinstance(part, Tensor) for part in out)):
        raise ProgramError(f"the encoder {type(encoder).__name__} returned {_describe(out)}: {wanted}")
    if any(part.shape != (1, latent_dim) for part in out):
        raise ProgramError(
            f"the encoder {type(encoder).__name__} returned {_describe(out)} for x [1, {data_dim}]: {wanted}"
        )
    if not bool((out[1] > 0).all()):
        raise ProgramError(
            f"the encoder {type(encoder).__name__} returned a scale of {out[1].min().item():.4g}: "
            "make it positive, e.g. return loc, 1e-4 + torch.nn.functional.softplus(raw_scale)"
        )


def check_decoder(decoder: nn.Module, latent_dim: int, data_dim: int) -> None:
    """Raise `ProgramError` unless `decoder` maps [1, latent_dim] to [1, data_dim]."""
    out = _try_out(decoder, latent_dim, "decoder")
    if not isinstance(out, Tensor) or out.shape != (1, data_dim):
        raise ProgramError(
            f"the decoder {type(decoder).__name__} returned {_describe(out)} for z [1, {latent_dim}]: "
            f"it must map z [..., {latent_dim}] to one tensor [..., {data_dim}]"
        )


def _try_out(net: nn.Module, in_dim: int, role: str) -> Any:
    """Run a row of zeros [1, in_dim] through `net`, leaving its statistics and modes as they were."""
    like = next(net.parameters(), torch.empty(()))
    row = torch.zeros(1, in_dim, device=like.device, dtype=like.dtype)
    training = [(module, module.training) for module in net.modules()]
    try:
        net.eval()
        with torch.no_grad():
            return net(row)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ProgramError(
            f"the {role} {type(net).__name__} does not take a row [1, {in_dim}] ({error}): give it layers of "
            f"that size, or wrap a network of images in Rowwise(net, (channels, height, width))"
        ) from error
    finally:
        for module, mode in training:
            module.training = mode


def _describe(out: Any) -> str:
    """Say what a network returned, with shapes."""
    if isinstance(out, Tensor):
        return f"a tensor {list(out.shape)}"
    if isinstance(out, tuple):
        return "(" + ", ".join(_describe(part) for part in out) + ")"
    return f"a {type(out).__name__}"
