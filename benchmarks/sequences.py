"""Programs whose seconds of compiling are measured (`compiling.py`): small ones, and sequences of many kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

import pyrolvm
from benchmarks.rows.base import seeded
from pyrolvm import data_plate
from pyrolvm.data import load_dataset


@dataclass(frozen=True)
class Given:
    """What `pyrolvm.fit` is given."""

    model: Any
    data: Any
    options: dict[str, Any]


def noise(*shape: int) -> Tensor:
    return seeded(lambda: torch.randn(*shape))


def ppca() -> Given:
    """PPCA, digits (1797 x 64), latent 8, batch 64"""
    x = torch.as_tensor(load_dataset("digits").values, dtype=torch.float32)
    return Given(pyrolvm.PPCA(64, 8), x, {"batch_size": 64})


def schools() -> Given:
    """eight schools, AutoNormal"""
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", 8):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)

    return Given(model, torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), {"guide": "AutoNormal"})


def vae() -> Given:
    """VAE 784-400-20, batch 256"""
    return Given(pyrolvm.VAE(784, 20, hidden=(400,)), (noise(1024, 784) > 0).float(), {"batch_size": 256})


def no_guide(*args: Any, **kwargs: Any) -> None:
    pass


def chain(x: Tensor, lengths: Tensor) -> None:
    """A hidden Markov model of three states, enumerated; sequences end at their lengths."""
    start = pyro.param("start", torch.ones(3) / 3, constraint=constraints.simplex)
    move = pyro.param("move", torch.eye(3) * 0.7 + 0.1, constraint=constraints.simplex)
    mean = pyro.param("mean", torch.tensor([-1.0, 0.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z: Any = None
        for t in pyro.markov(range(x.shape[1])):
            with pyro.poutine.mask(mask=t < lengths):
                probs = start if z is None else move[z]
                z = pyro.sample(f"z_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Normal(mean[z], 1.0), obs=x[:, t])


def enumerated(steps: int) -> Callable[[], Given]:
    def given() -> Given:
        x = noise(32, steps)
        lengths = torch.randint(1, steps + 1, (32,), generator=torch.Generator().manual_seed(0))
        return Given(chain, {"x": x, "lengths": lengths}, {"guide": no_guide, "objective": "enum"})

    given.__doc__ = f"enumerated HMM of {steps} steps by pyro.markov, 32 sequences masked by their lengths"
    return given


def discrete_hmm() -> Given:
    """HMM as one site, DiscreteHMM, 100 steps, 32 sequences"""

    def model(x: Tensor) -> None:
        probs = pyro.sample("probs", dist.Dirichlet(torch.eye(3) + 0.5).to_event(1))
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 1.0).to_event(1))
        with data_plate(x):
            law = dist.DiscreteHMM(torch.zeros(3), probs.log(), dist.Normal(locs, 1.0), duration=x.shape[1])
            pyro.sample("x", law, obs=x)

    return Given(model, noise(32, 100), {"guide": "AutoNormal"})


def gaussian_hmm() -> Given:
    """linear-Gaussian state space as one site, GaussianHMM, 100 steps"""

    def model(y: Tensor) -> None:
        q = pyro.sample("q", dist.LogNormal(-1.0, 0.5))
        r = pyro.sample("r", dist.LogNormal(-1.0, 0.5))
        eye, zero = torch.eye(2), torch.zeros(2)
        start, step, seen = (dist.MultivariateNormal(zero, scale * eye) for scale in (1.0, q, r))
        pyro.sample("y", dist.GaussianHMM(start, 0.9 * eye, step, eye, seen, duration=len(y)), obs=y)

    return Given(model, noise(100, 2), {"guide": "AutoNormal"})


class DeepMarkov(nn.Module):
    """A deep Markov model; its guide reads the sequence by a GRU, then draws step by step."""

    def __init__(self, data_dim: int = 4, latent_dim: int = 2, hidden: int = 8) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.gru = nn.GRU(data_dim, hidden, batch_first=True)
        self.combine = nn.Linear(latent_dim + hidden, 2 * latent_dim)
        self.move = nn.Sequential(nn.Linear(latent_dim, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent_dim))
        self.emit = nn.Linear(latent_dim, data_dim)

    def model(self, x: Tensor) -> None:
        pyro.module("deep_markov", self)
        with data_plate(x):
            z = x.new_zeros(len(x), self.latent_dim)
            for t in range(x.shape[1]):
                loc, log_scale = self.move(z).chunk(2, -1)
                z = pyro.sample(f"z_{t}", dist.Normal(loc, log_scale.exp()).to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(self.emit(z), 1.0).to_event(1), obs=x[:, t])

    def guide(self, x: Tensor) -> None:
        pyro.module("deep_markov", self)
        h, _ = self.gru(x)
        with data_plate(x):
            z = x.new_zeros(len(x), self.latent_dim)
            for t in range(x.shape[1]):
                loc, log_scale = self.combine(torch.cat([z.tanh(), h[:, t]], -1)).chunk(2, -1)
                z = pyro.sample(f"z_{t}", dist.Normal(loc, log_scale.exp()).to_event(1))


def deep_markov(steps: int) -> Callable[[], Given]:
    def given() -> Given:
        return Given(seeded(DeepMarkov), noise(16, steps, 4), {})

    given.__doc__ = f"deep Markov model of {steps} steps, GRU in the guide, 16 sequences"
    return given


def sequential(groups: int) -> Callable[[], Given]:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for i in pyro.plate("groups", groups):
            a = pyro.sample(f"a_{i}", dist.Normal(mu, 1.0))
            with pyro.plate(f"rows_{i}", y.shape[1]):
                pyro.sample(f"y_{i}", dist.Normal(a, 1.0), obs=y[i])

    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(groups + 1))
        scale = pyro.param("scale", torch.ones(groups + 1), constraint=constraints.positive)
        pyro.sample("mu", dist.Normal(loc[-1], scale[-1]))
        for i in pyro.plate("groups", groups):
            pyro.sample(f"a_{i}", dist.Normal(loc[i], scale[i]))

    def given() -> Given:
        return Given(model, noise(groups, 5), {"guide": guide})

    given.__doc__ = f"sequential plate of {groups} groups, normal guide"
    return given


PROGRAMS: dict[str, Callable[[], Given]] = {
    "ppca": ppca,
    "schools": schools,
    "vae": vae,
    "hmm-9": enumerated(9),
    "hmm-100": enumerated(100),
    "hmm-300": enumerated(300),
    "discrete-hmm": discrete_hmm,
    "gaussian-hmm": gaussian_hmm,
    "deep-markov-9": deep_markov(9),
    "deep-markov-40": deep_markov(40),
    "sequential-10": sequential(10),
    "sequential-60": sequential(60),
}
