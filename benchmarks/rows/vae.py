"""Variational autoencoders with Bernoulli decoders on images of MNIST's shape."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.rows import vae_jax
from benchmarks.rows.base import Peer, Row, Start, Through, seeded
from pyrolvm import data_plate
from pyrolvm.data import load_mnist

PIXELS = 784
MNIST = "PYROLVM_DATA" in os.environ
IMAGES = "MNIST (60000 x 784, pixels above one half)" if MNIST else "random binary images (10000 x 784)"

Networks = Callable[[], dict[str, nn.Sequential]]
"""-> the encoder, x -> (loc, log scale), and the decoder, z -> logits."""


@functools.cache
def images() -> tuple[Tensor]:
    """MNIST where the environment says where it is; else coin flips, at which matrices are as fast."""
    if MNIST:
        return ((torch.as_tensor(load_mnist(download=False).values) > 0.5).float(),)
    return (seeded(lambda: (torch.rand(10_000, PIXELS) > 0.5).float()),)


def dense(sizes: tuple[int, ...], activation: type[nn.Module]) -> dict[str, nn.Sequential]:
    """784 - hidden - latent, and back."""

    def layers(sizes: tuple[int, ...]) -> nn.Sequential:
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            parts += [nn.Linear(before, after), activation()]
        return nn.Sequential(*parts[:-1])

    return {"encoder": layers((*sizes[:-1], 2 * sizes[-1])), "decoder": layers(sizes[::-1])}


def convolutional(latent_dim: int = 20) -> dict[str, nn.Sequential]:
    """Two levels of 32 and 64 maps, kernels of 4, and back."""
    encoder = nn.Sequential(
        nn.Unflatten(-1, (1, 28, 28)),
        nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 49, 2 * latent_dim),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(latent_dim, 64 * 49), nn.ReLU(), nn.Unflatten(-1, (64, 7, 7)),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1), nn.Flatten(),
    )  # fmt: skip
    return {"encoder": encoder, "decoder": decoder}


def start(networks: Networks) -> Start:
    """torch's own initial weights, from one seed."""
    nets = seeded(networks)
    return {f"{key}.{name}": value for key, net in nets.items() for name, value in net.state_dict().items()}


def load(networks: Networks, start: Start) -> dict[str, nn.Sequential]:
    """Networks of one's own that hold the weights of `start`."""
    nets = networks()
    for key, net in nets.items():
        net.load_state_dict({n.partition(".")[2]: v for n, v in start.items() if n.startswith(key)})
        net.to(next(iter(start.values())).device)
    return nets


def in_pyro(start: Start, networks: Networks) -> tuple[Any, Any]:
    """As in Pyro's tutorial."""
    nets = load(networks, start)
    encoder, decoder = nets["encoder"], nets["decoder"]
    latent_dim = _latent_dim(start)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with data_plate(x):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def in_torch(start: Start, networks: Networks) -> tuple[list[Tensor], Any]:
    """The KL in closed form (Kingma and Welling 2014, appendix B)."""
    nets = load(networks, start)
    encoder, decoder = nets["encoder"], nets["decoder"]

    def loss(x: Tensor) -> Tensor:
        loc, log_scale = encoder(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        nll = binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
        kl = 0.5 * ((2 * log_scale).exp() + loc.square() - 1 - 2 * log_scale).sum()
        return (nll + kl) / len(x)

    return [*encoder.parameters(), *decoder.parameters()], loss


def in_pythae(start: Start, networks: Networks) -> Peer:
    """Its "bce" takes probabilities."""
    nets = load(networks, start)

    def read(out: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = out.chunk(2, -1)
        return loc, 2 * log_scale

    encoder, decoder = Through(nets["encoder"], read), Through(nets["decoder"], torch.sigmoid)
    return Peer("VAE", encoder, decoder, _latent_dim(start), {"reconstruction_loss": "bce"})


def _latent_dim(start: Start) -> int:
    return [v for k, v in start.items() if k.startswith("encoder") and k.endswith("bias")][-1].numel() // 2


def vae(name: str, about: str, batch_size: int, networks: Networks, pythae: bool = False) -> Row:
    return Row(
        name=name,
        about=f"{about}, {IMAGES}, batch {batch_size}",
        data=images,
        batch_size=batch_size,
        start=functools.partial(start, networks),
        pyro=functools.partial(in_pyro, networks=networks),
        elbo=lambda: Trace_ELBO(max_plate_nesting=1),
        jit=lambda: JitTrace_ELBO(max_plate_nesting=1, ignore_jit_warnings=True),
        torch=functools.partial(in_torch, networks=networks),
        numpyro=functools.partial(vae_jax.in_numpyro, networks=networks),
        longest_chunk=1024 if _is_dense(networks) else 16,
        products=_products(networks, batch_size),
        pythae=functools.partial(in_pythae, networks=networks)
        if pythae
        else "not the architecture of its contender",
    )


def _products(networks: Networks, batch_size: int) -> tuple[tuple[int, int, int], ...]:
    """(batch, in, out) of each linear layer in its order; none beside convolutions."""
    if not _is_dense(networks):
        return ()
    modules = [m for net in seeded(networks).values() for m in net]
    return tuple((batch_size, m.in_features, m.out_features) for m in modules if isinstance(m, nn.Linear))


def _is_dense(networks: Networks) -> bool:
    return not any(isinstance(m, nn.Conv2d) for m in seeded(networks)["encoder"])


def shallow() -> dict[str, nn.Sequential]:
    return dense((PIXELS, 400, 20), nn.ReLU)


def deep() -> dict[str, nn.Sequential]:
    return dense((PIXELS, 200, 200, 50), nn.Tanh)


def rows() -> list[Row]:
    return [
        vae("vae-400", "VAE 784-400-20", 256, shallow, pythae=True),
        vae("vae-200-200", "VAE 784-200-200-50 (the IWAE paper's networks)", 20, deep),
        vae("vae-conv", "convolutional VAE, 32 and 64 maps, latent 20", 128, convolutional),
    ]


def by_batch(batch_size: int) -> Row:
    """For the table of cost against the batch; larger batches than there are images repeat some."""
    row = vae(str(batch_size), f"batch {batch_size}", batch_size, shallow)
    if batch_size <= len(images()[0]):
        return row
    return Row(**{**vars(row), "data": functools.partial(_repeated, batch_size)})


@functools.cache
def _repeated(num_rows: int) -> tuple[Tensor]:
    (x,) = images()
    return (x.repeat(-(-num_rows // len(x)), 1)[:num_rows],)
