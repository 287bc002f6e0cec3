"""Probabilistic PCA, by the ELBO and by importance-weighted bounds, on scikit-learn's digits."""

from __future__ import annotations

import functools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import JitTrace_ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor

from benchmarks.rows.base import Row, Start, learnable, seeded
from pyrolvm import data_plate
from pyrolvm.data import load_dataset

LOG_2PI = math.log(2 * math.pi)


@functools.cache
def digits() -> tuple[Tensor]:
    """1797 images of 64 pixels, in [0, 1]."""
    return (torch.as_tensor(load_dataset("digits").values, dtype=torch.float32) / 16,)


@functools.cache
def gaussian_data(num_rows: int, data_dim: int) -> tuple[Tensor]:
    """Correlated Gaussian rows, for the tables of cost against size."""
    mixing = seeded(lambda: torch.randn(8, data_dim))
    return (seeded(lambda: torch.randn(num_rows, 8) @ mixing + torch.randn(num_rows, data_dim), 1),)


def start(data_dim: int, latent_dim: int) -> Start:
    """Small random loadings both ways, unit scales."""
    return {
        "W": seeded(lambda: 0.1 * torch.randn(latent_dim, data_dim)),
        "b": torch.zeros(data_dim),
        "noise": torch.ones(()),
        "A": seeded(lambda: 0.1 * torch.randn(data_dim, latent_dim), 1),
        "scale": torch.ones(latent_dim),
    }


def in_pyro(start: Start) -> tuple[Any, Any]:
    latent_dim = len(start["W"])

    def model(x: Tensor) -> None:
        W = pyro.param("W", lambda: start["W"].clone())
        b = pyro.param("b", lambda: start["b"].clone())
        noise = pyro.param("noise", lambda: start["noise"].clone(), constraint=constraints.positive)
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W + b, noise).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        A = pyro.param("A", lambda: start["A"].clone())
        scale = pyro.param("scale", lambda: start["scale"].clone(), constraint=constraints.positive)
        with data_plate(x):
            pyro.sample("z", dist.Normal(x @ A, scale).to_event(1))

    return model, guide


def in_torch(start: Start) -> tuple[list[Tensor], Any]:
    """The KL in closed form, as one writes it by hand."""
    W, b, log_noise, A, log_scale = parameters = _leaves(start)

    def loss(x: Tensor) -> Tensor:
        loc = x @ A
        z = loc + log_scale.exp() * torch.randn_like(loc)
        residual = (x - z @ W - b) * (-log_noise).exp()
        nll = 0.5 * residual.square().sum(-1) + x.shape[-1] * (log_noise + 0.5 * LOG_2PI)
        kl = 0.5 * ((2 * log_scale).exp() + loc.square() - 1 - 2 * log_scale).sum(-1)
        return (nll + kl).mean()

    return parameters, loss


def importance_weighted_in_torch(start: Start, particles: int) -> tuple[list[Tensor], Any]:
    W, b, log_noise, A, log_scale = parameters = _leaves(start)

    def loss(x: Tensor) -> Tensor:
        loc = x @ A
        noise = torch.randn(particles, *loc.shape, device=x.device)
        z = loc + log_scale.exp() * noise  # [particles, batch, latent_dim]
        residual = (x - z @ W - b) * (-log_noise).exp()
        log_likelihood = -0.5 * residual.square().sum(-1) - x.shape[-1] * (log_noise + 0.5 * LOG_2PI)
        log_ratio = (0.5 * (noise.square() - z.square()) + log_scale).sum(-1)  # log p(z) - log q(z)
        return (math.log(particles) - (log_likelihood + log_ratio).logsumexp(0)).mean()

    return parameters, loss


def _leaves(start: Start) -> list[Tensor]:
    return learnable(start["W"], start["b"], start["noise"].log(), start["A"], start["scale"].log())


def in_numpyro(start: dict[str, Any], plate: Any, particles: int = 1) -> tuple[Any, Any, Any]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as npdist
    from numpyro.distributions import constraints as npconstraints
    from numpyro.infer import RenyiELBO as NumPyroRenyi
    from numpyro.infer import Trace_ELBO as NumPyroTrace

    positive = npconstraints.positive

    def model(x: Any) -> None:
        W, b = numpyro.param("W", start["W"]), numpyro.param("b", start["b"])
        noise = numpyro.param("noise", start["noise"], constraint=positive)
        with plate(x):
            z = numpyro.sample("z", npdist.Normal(jnp.zeros(len(start["W"])), 1.0).to_event(1))
            numpyro.sample("x", npdist.Normal(z @ W + b, noise).to_event(1), obs=x)

    def guide(x: Any) -> None:
        A = numpyro.param("A", start["A"])
        scale = numpyro.param("scale", start["scale"], constraint=positive)
        with plate(x):
            numpyro.sample("z", npdist.Normal(x @ A, scale).to_event(1))

    elbo = NumPyroTrace() if particles == 1 else NumPyroRenyi(alpha=0, num_particles=particles)
    return model, guide, elbo


def ppca(name: str, about: str, data: Any, batch_size: int | None, data_dim: int, latent_dim: int = 8) -> Row:
    """PPCA trained by the ELBO."""
    return Row(
        name=name,
        about=about,
        data=data,
        batch_size=batch_size,
        start=functools.partial(start, data_dim, latent_dim),
        pyro=in_pyro,
        elbo=lambda: Trace_ELBO(max_plate_nesting=1),
        jit=lambda: JitTrace_ELBO(max_plate_nesting=1, ignore_jit_warnings=True),
        torch=in_torch,
        numpyro=in_numpyro,
    )


def iwae(particles: int, batch_size: int = 256) -> Row:
    """PPCA trained by the importance-weighted bound."""

    def elbo() -> RenyiELBO:
        return RenyiELBO(alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1)

    return Row(
        name=f"iwae-{particles}",
        about=f"PPCA, digits (1797 x 64), latent 8, IWAE with {particles} particles, batch {batch_size}",
        data=digits,
        batch_size=batch_size,
        start=functools.partial(start, 64, 8),
        pyro=in_pyro,
        elbo=elbo,
        jit="Pyro has no Jit form of RenyiELBO",
        torch=functools.partial(importance_weighted_in_torch, particles=particles),
        numpyro=functools.partial(in_numpyro, particles=particles),
    )


def rows() -> list[Row]:
    sizes = {"64": 64, "256": 256, "all": None}
    title = "PPCA, digits (1797 x 64), latent 8, batch {}"
    return [
        *(ppca(f"ppca-{key}", title.format(key), digits, size, 64) for key, size in sizes.items()),
        iwae(5),
        iwae(50),
    ]


def by_num_rows(num_rows: int) -> Row:
    """The whole data at each step."""
    return ppca(str(num_rows), f"N = {num_rows}", lambda: gaussian_data(num_rows, 64), None, 64)


def by_data_dim(data_dim: int) -> Row:
    return ppca(str(data_dim), f"D = {data_dim}", lambda: gaussian_data(2000, data_dim), 256, data_dim)
