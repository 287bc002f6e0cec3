"""The systems on images of MNIST's shape: the VAE's relatives, other guides, priors and gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO
from torch import Tensor, nn

import pyrolvm
from benchmarks.rows import systems_by_hand as by_hand
from benchmarks.rows.base import Peer, Row, Start, Through, seeded
from benchmarks.rows.system import NO_JIT, NOT_WRITTEN, made, system
from benchmarks.rows.vae import IMAGES, MNIST, PIXELS, images
from pyrolvm import data_plate
from pyrolvm.data import load_mnist
from pyrolvm.inference.objectives import mmd
from pyrolvm.plates import row_entries

LATENT = 20
NOISE = math.sqrt(0.5)
ALPHA, LAMBDA = 0.5, 100.0
COMPONENTS = 50
PARTICLES = 50


@functools.cache
def labelled_images() -> tuple[Tensor, Tensor]:
    (x,) = images()
    if MNIST:
        return x, torch.as_tensor(load_mnist(download=False).labels)
    return x, seeded(lambda: torch.randint(10, (len(x),)), 1)


@functools.cache
def numbered_images() -> tuple[Tensor, Tensor]:
    (x,) = images()
    return x, torch.arange(len(x))


def autoencoder() -> Any:
    return pyrolvm.Autoencoder(PIXELS, LATENT, noise_scale=NOISE)


def info_vae() -> Any:
    return pyrolvm.InfoVAE(PIXELS, LATENT, alpha=ALPHA, lambda_=LAMBDA)


def hierarchical_vae() -> Any:
    return pyrolvm.HierarchicalVAE(PIXELS, (100, 50), hidden=((200, 200), (100, 100)))


def conditional_vae() -> Any:
    return pyrolvm.ConditionalVAE(PIXELS, LATENT, num_classes=10)


def iaf() -> Any:
    return pyrolvm.VAE(PIXELS, LATENT, guide="iaf")


def vamp() -> Any:
    """Pseudo-data between 0 and 1, where pythae keeps them."""
    found = pyrolvm.VAE(PIXELS, LATENT, prior=f"vamp:{COMPONENTS}")
    pseudo_data: Any = found.latent_prior.pseudo_data
    nn.init.uniform_(pseudo_data)
    return found


def deep_vae() -> Any:
    return pyrolvm.VAE(PIXELS, 50, hidden=(200, 200), activation="tanh")


class PrivateVAE(nn.Module):
    """A VAE's decoder under q(z_n) = N(loc_n, diag(scale_n^2)), a table of them in the place of an encoder."""

    def __init__(self) -> None:
        super().__init__()
        num_rows = len(images()[0])
        self.decoder = pyrolvm.VAE(PIXELS, LATENT).decoder
        self.loc, self.log_scale = (nn.Embedding(num_rows, LATENT, sparse=True) for _ in range(2))
        nn.init.normal_(self.loc.weight, std=0.1)
        nn.init.constant_(self.log_scale.weight, -1.0)
        for table in (self.loc, self.log_scale):
            setattr(table.weight, "is_table", True)  # noqa: B010 (mypy knows no such attribute)

    def model(self, x: Tensor, row: Tensor) -> None:
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor, row: Tensor) -> None:
        loc, log_scale = row_entries(self.loc.weight), row_entries(self.log_scale.weight)
        with data_plate(x):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def info_in_pyro(model: Any, guide: Any, x: Tensor) -> Tensor:
    """-J, as Pyro's tutorial on custom objectives writes one; the divergence is pyrolvm's function."""
    q = pyro.poutine.trace(guide).get_trace(x)
    p = pyro.poutine.trace(pyro.poutine.replay(model, trace=q)).get_trace(x)
    nodes: Any = q.nodes["z"], p.nodes["z"]
    z = nodes[0]["value"]
    kl = nodes[0]["fn"].log_prob(z).sum() - nodes[1]["fn"].log_prob(z).sum()
    price = len(z) * (ALPHA + LAMBDA - 1)
    return (1 - ALPHA) * kl - p.nodes["x"]["fn"].log_prob(x).sum() + price * mmd(z, torch.randn_like(z))


def importance_weighted() -> Any:
    return RenyiELBO(alpha=0, num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=1)


def autoencoder_in_pythae(start: Start) -> Peer:
    """Its AE has no prior; RAE_L2 has, and is trained here by its plain trainer, all parameters alike."""
    net = made(autoencoder, start)
    constant = PIXELS * math.log(NOISE) + 0.5 * (PIXELS + LATENT) * by_hand.LOG_2PI
    return Peer("RAE_L2", net.encoder, net.decoder, LATENT, {"embedding_weight": 1.0}, constant)


def vae_in_pythae(
    start: Start, build: Callable[[], Any], kind: str, settings: dict[str, Any], prepare: Any = None
) -> Peer:
    net = made(build, start)
    encoder = Through(net.encoder, lambda out: (out[0], 2 * out[1].log()))
    settings = {"reconstruction_loss": "bce", **settings}
    ready = None if prepare is None else functools.partial(prepare, net)
    return Peer(kind, encoder, Through(net.decoder, torch.sigmoid), LATENT, settings, prepare=ready)


@torch.no_grad()
def same_pseudo_data(net: Any, theirs: Any) -> None:
    """Theirs are the columns of a linear layer's weight."""
    theirs.pseudo_inputs[0].weight.copy_(net.latent_prior.pseudo_data.T)
    theirs.pseudo_inputs[0].bias.zero_()


def rows() -> list[Row]:
    info = {"kernel_choice": "rbf", "kernel_bandwidth": 1.0, "alpha": ALPHA, "lbd": LAMBDA}
    return [
        system(
            "autoencoder", f"autoencoder 784-400-20 with a prior, squared error, {IMAGES}", autoencoder,
            images, 256, by_hand.autoencoder, pythae=autoencoder_in_pythae,
        ),
        system(
            "info-vae", f"InfoVAE 784-400-20, alpha {ALPHA}, lambda {LAMBDA:g}, {IMAGES}", info_vae, images, 256,
            functools.partial(by_hand.info_vae, alpha=ALPHA, lambda_=LAMBDA),
            elbo=lambda: made(info_vae).objective(), pyro_elbo=lambda: info_in_pyro, jit=NO_JIT, reported="info",
            pythae=functools.partial(vae_in_pythae, build=info_vae, kind="INFOVAE_MMD", settings=info),
        ),
        system(
            "hierarchical-vae", f"two stochastic layers, 784-200-200-100-100-100-50, {IMAGES}", hierarchical_vae,
            images, 100, by_hand.hierarchical_vae,
        ),
        system(
            "conditional-vae", f"conditional VAE 784-400-20 given the label, {IMAGES}", conditional_vae,
            labelled_images, 256, by_hand.conditional_vae,
        ),
        system(
            "vae-iaf", f"VAE 784-400-20, two inverse autoregressive maps, {IMAGES}", iaf, images, 256,
            NOT_WRITTEN, pythae="its VAE_IAF has other networks in its flow",
        ),
        system(
            "vae-vamp", f"VAE 784-400-20, VampPrior of {COMPONENTS}, {IMAGES}", vamp, images, 256, by_hand.vamp,
            pythae=functools.partial(
                vae_in_pythae, build=vamp, kind="VAMP", prepare=same_pseudo_data,
                settings={"number_components": COMPONENTS, "linear_scheduling_steps": 0},
            ),
        ),
        system(
            "per-datum", f"decoder 20-400-784, a q(z_n) of its own for each datum, {IMAGES}", PrivateVAE,
            numbered_images, 256, by_hand.per_datum, has_globals=True,
            jit="its trace would keep the rows of the first batch",
        ),
        system(
            "iwae-dreg-50", f"VAE 784-200-200-50, IWAE with 50 particles and DReG, {IMAGES}", deep_vae, images, 20,
            functools.partial(by_hand.dreg, particles=PARTICLES), longest_chunk=64,
            elbo=lambda: ("iwae", {"num_particles": PARTICLES, "gradient": "dreg"}),
            pyro_elbo=importance_weighted, jit=NO_JIT,
        ),
    ]  # fmt: skip
