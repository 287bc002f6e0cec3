"""Encoders and decoders by name, and a user's own tried out on a row of zeros before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrolvm.errors import ProgramError, SettingError, one_of
from pyrolvm.models.likelihoods.base import Likelihood
from pyrolvm.models.missing import MaskAware, Missing
from pyrolvm.models.networks import MLP, ConvDecoder, GaussianEncoder, conv_net

KINDS = ("mlp", "conv", "linear")


def square_image(data_dim: int) -> tuple[int, int, int]:
    """(1, side, side) for a square number of pixels, else `SettingError`."""
    side = round(data_dim**0.5)
    if side * side != data_dim:
        raise SettingError(
            f"data_dim={data_dim} is not a square: say image_shape=(channels, height, width) of the images"
        )
    return 1, side, side


def image_of(data_dim: int, image_shape: Sequence[int] | None) -> Sequence[int]:
    """`image_shape`, by default one square channel; `SettingError` for another number of pixels than `data_dim`."""
    image_shape = image_shape or square_image(data_dim)
    if math.prod(image_shape) != data_dim:
        raise SettingError(
            f"image_shape={tuple(image_shape)} has {math.prod(image_shape)} pixels, but data_dim={data_dim}: "
            "both must describe the same images"
        )
    return image_shape


def _doubled(data_dim: int, image_shape: Sequence[int] | None) -> tuple[int, ...]:
    """The shape of an image with as many channels again."""
    channels, *sides = image_of(data_dim, image_shape)
    return (2 * channels, *sides)


def make_encoder(
    kind: str | nn.Module,
    data_dim: int,
    latent_dim: int,
    hidden: Sequence[int] = (400,),
    activation: str = "relu",
    image_shape: Sequence[int] | None = None,
    num_features: int = 0,
    missing: Missing = None,
) -> nn.Module:
    """The encoder named `kind`, or `kind` itself if it is a module that can be one.

    Parameters
    ----------
    kind : {"mlp", "conv", "linear"} or Module
    data_dim, latent_dim : int
        Sizes of x and z.
    hidden, activation
        As in `MLP`; of no effect on "linear" and modules.
    image_shape : sequence of int, optional
        (channels, height, width) for "conv"; by default one square channel.
    num_features : int
        Numbers beside loc and scale that the guide's family wants.
    missing : "mask" or None
        "mask" makes it take x in which entries are NaN: the encoder, a module too, then takes [..., 2 * data_dim], the
        data with the gaps filled and 1 where they are observed.

    Raises
    ------
    SettingError
        For an unknown name, or an `image_shape` of another number of pixels than `data_dim`.
    ProgramError
        For a module that does not map x [..., data_dim] to (loc, scale > 0), each [..., latent_dim], and to features
        [..., num_features] where there are any.
    """
    if missing is not None:
        image_shape = _doubled(data_dim, image_shape) if kind == "conv" else None
        nets = (hidden, activation, image_shape, num_features)
        return MaskAware(make_encoder(kind, 2 * data_dim, latent_dim, *nets), data_dim)
    if isinstance(kind, nn.Module):
        check_encoder(kind, data_dim, latent_dim, num_features)
        return kind
    net = make_coder(kind, data_dim, 2 * latent_dim + num_features, hidden, activation, image_shape)
    return GaussianEncoder(net, num_features)


def make_coder(
    kind: str | nn.Module,
    data_dim: int,
    latent_dim: int,
    hidden: Sequence[int] = (400,),
    activation: str = "relu",
    image_shape: Sequence[int] | None = None,
    missing: Missing = None,
) -> nn.Module:
    """The encoder of a point named `kind`, or `kind` itself: x [..., data_dim] -> z [..., latent_dim].

    Arguments and errors as of `make_encoder`.
    """
    if missing is not None:
        image_shape = _doubled(data_dim, image_shape) if kind == "conv" else None
        return MaskAware(
            make_coder(kind, 2 * data_dim, latent_dim, hidden, activation, image_shape), data_dim
        )
    if isinstance(kind, nn.Module):
        _check_map(kind, "encoder", "x", data_dim, latent_dim)
        return kind
    one_of("encoder", kind, KINDS)
    if kind == "conv":
        image_shape = image_of(data_dim, image_shape)
        return conv_net(image_shape, latent_dim, hidden=hidden, activation=activation)
    return MLP(data_dim, latent_dim, () if kind == "linear" else hidden, activation)


def make_decoder(
    kind: str | nn.Module,
    latent_dim: int,
    data_dim: int,
    hidden: Sequence[int] = (400,),
    activation: str = "relu",
    image_shape: Sequence[int] | None = None,
    parts: int = 1,
) -> nn.Module:
    """The decoder named `kind`, or `kind` itself if it is a module that can be one.

    Parameters
    ----------
    kind, latent_dim, data_dim, activation, image_shape
        As in `make_encoder`.
    hidden : sequence of int
        Sizes of the hidden layers in the encoder's order: the decoder has them reversed.
    parts : int
        Numbers for each feature that the likelihood wants (`pyrolvm.models.likelihoods`).

    Raises
    ------
    SettingError
        For an unknown name, or an `image_shape` of another number of pixels than `data_dim`.
    ProgramError
        For a module that does not map z [..., latent_dim] to [..., parts * data_dim].
    """
    if isinstance(kind, nn.Module):
        check_decoder(kind, latent_dim, parts * data_dim)
        return kind
    one_of("decoder", kind, KINDS)
    backwards = tuple(reversed(tuple(hidden)))
    if kind == "conv":
        channels, *sides = image_of(data_dim, image_shape)
        return ConvDecoder(latent_dim, (parts * channels, *sides), hidden=backwards, activation=activation)
    return MLP(latent_dim, parts * data_dim, () if kind == "linear" else backwards, activation)


@torch.no_grad()
def start_decoder(decoder: nn.Module, likelihood: Likelihood, x: Tensor) -> None:
    """Let an `MLP` or `ConvDecoder` begin at the columns' own distribution, by the bias of its last layer.

    A convolution has one bias for each channel: the average of its pixels. Other modules stay as they are, and so does
    the decoder of a likelihood that has no `start` for x [rows, data_dim].
    """
    out = likelihood.start(x)  # [parts * data_dim]
    layers = [m for m in decoder.modules() if isinstance(m, nn.Linear | nn.ConvTranspose2d)]
    if out is not None and isinstance(decoder, MLP | ConvDecoder) and layers[-1].bias is not None:
        bias = layers[-1].bias
        bias.copy_(out.reshape(len(bias), -1).mean(-1))


def check_encoder(encoder: nn.Module, data_dim: int, latent_dim: int, num_features: int = 0) -> None:
    """Raise `ProgramError` unless `encoder` maps [1, data_dim] to (loc, scale > 0), each [1, latent_dim].

    And to features [1, num_features] where there are any.
    """
    out = try_out(encoder, "encoder", data_dim)
    parts = out if isinstance(out, tuple) else ()
    wanted = [[1, latent_dim], [1, latent_dim], *([[1, num_features]] if num_features else [])]
    if [shape_of(part) for part in parts] != wanted:
        more = f", and features [..., {num_features}] for its guide" if num_features else ""
        raise ProgramError(
            f"the encoder {type(encoder).__name__} returned {returned(out)} for x [1, {data_dim}]: it must map "
            f"x [..., {data_dim}] to a tuple (loc, scale), each [..., {latent_dim}]{more}"
        )
    if not bool((out[1] > 0).all()):
        raise ProgramError(
            f"the encoder {type(encoder).__name__} returned a scale of {out[1].min().item():.4g}: "
            "make it positive, e.g. return loc, 1e-4 + torch.nn.functional.softplus(raw_scale)"
        )


def check_decoder(decoder: nn.Module, latent_dim: int, data_dim: int) -> None:
    """Raise `ProgramError` unless `decoder` maps [1, latent_dim] to [1, data_dim].

    Pyro would take a decoder of width 1 without an error, broadcast over all columns.
    """
    _check_map(decoder, "decoder", "z", latent_dim, data_dim)


def _check_map(net: nn.Module, role: str, symbol: str, in_dim: int, out_dim: int) -> None:
    """Raise `ProgramError` unless `net` maps [1, in_dim] to [1, out_dim]; `symbol` is what it maps."""
    out = try_out(net, role, in_dim)
    if shape_of(out) != [1, out_dim]:
        raise ProgramError(
            f"the {role} {type(net).__name__} returned {returned(out)} for {symbol} [1, {in_dim}]: "
            f"it must map {symbol} [..., {in_dim}] to one tensor [..., {out_dim}]"
        )


def try_out(net: nn.Module, role: str, in_dim: int, *more: Tensor) -> Any:
    """Run a row of zeros [1, in_dim], and `more`, through `net` in eval mode; its statistics and modes stay."""
    like = next(net.parameters(), torch.empty(()))
    modes = [(module, module.training) for module in net.modules()]
    try:
        net.eval()
        with torch.no_grad():
            return net(torch.zeros(1, in_dim, device=like.device, dtype=like.dtype), *more)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ProgramError(
            f"the {role} {type(net).__name__} does not take a row [1, {in_dim}] ({error}): give it layers of "
            "that size, or wrap a network of images in Rowwise(net, (channels, height, width))"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode


def shape_of(out: Any) -> list[int] | None:
    """The shape of a tensor; None of anything else."""
    return list(out.shape) if isinstance(out, Tensor) else None


def returned(out: Any) -> str:
    """What a network returned, with shapes."""
    if isinstance(out, tuple):
        return f"({', '.join(map(returned, out))})"
    return f"a tensor {shape_of(out)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
