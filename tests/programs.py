"""Programs that several tests use: linear-Gaussian ones with exact answers, and users' own styles."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm import data_plate

SCHOOLS_Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
SCHOOLS_SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])


def eight_schools(y: Tensor) -> None:
    """Non-centred, as in Rubin 1981."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, SCHOOLS_SIGMA), obs=y)


class GlobalMean:
    """m ~ N(0, 1); x_n ~ N(m, 1): posterior N(sum x / (N + 1), 1 / (N + 1)) and evidence in closed form."""

    def __init__(self, plate=data_plate) -> None:
        self.plate = plate

    def model(self, x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with self.plate(x):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample("m", dist.Normal(loc, scale))


class LocalNormal:
    """z_n ~ N(0, 1); x_n | z_n ~ N(z_n, 1), so x_n ~ N(0, 2). A guide that is too wide: q = N(x/2 + shift, 1)."""

    def __init__(self, plate=data_plate, shift: float = 0.3) -> None:
        self.plate, self.shift = plate, shift

    def model(self, x: Tensor) -> None:
        offset = pyro.param("offset", torch.tensor(0.0))
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + offset, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        shift = pyro.param("shift", torch.tensor(self.shift))
        with self.plate(x):
            pyro.sample("z", dist.Normal(x / 2 + shift, 1.0))

    @staticmethod
    def log_evidence(x: Tensor) -> Tensor:
        return dist.Normal(0.0, math.sqrt(2)).log_prob(x)


def ppca_functions(data_dim: int, latent_dim: int):
    """PPCA in the style of `pyro.param`."""

    def model(x: Tensor) -> None:
        W = pyro.param("W", lambda: 0.3 * torch.randn(latent_dim, data_dim))
        b = pyro.param("b", lambda: torch.zeros(data_dim))
        noise = pyro.param("noise", lambda: torch.ones(()), constraint=dist.constraints.positive)
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W + b, noise).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        A = pyro.param("A", lambda: 0.1 * torch.randn(data_dim, latent_dim))
        c = pyro.param("c", lambda: torch.zeros(latent_dim))
        scale = pyro.param("scale", lambda: torch.ones(latent_dim), constraint=dist.constraints.positive)
        with data_plate(x):
            pyro.sample("z", dist.Normal(x @ A + c, scale).to_event(1))

    return model, guide


class RegisteredNets:
    """A small VAE in the style of Pyro's tutorial: networks shown by `pyro.module`."""

    def __init__(self, data_dim: int = 6, latent_dim: int = 2) -> None:
        self.encoder = nn.Sequential(nn.Linear(data_dim, 8), nn.Tanh(), nn.Linear(8, 2 * latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 8), nn.Tanh(), nn.Linear(8, data_dim))
        self.latent_dim = latent_dim

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with data_plate(x):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
