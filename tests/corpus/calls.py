"""Arguments of all kinds."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from corpus.form import Pair, program

NO_LATENTS_OF_ROWS = {"encode": "no local latents"}


def slope_guide(*args, **kwargs):
    loc = pyro.param("w_loc", torch.tensor(0.1))
    scale = pyro.param("w_scale", torch.tensor(0.3), constraint=dist.constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale))


@program(declines=NO_LATENTS_OF_ROWS)
def polynomial_of_a_degree() -> Pair:
    """A polynomial regression whose degree is an int."""
    x = torch.linspace(-1, 1, 25)
    y = x**2 + 0.1 * torch.randn(25)

    def model(x, y, degree):
        w = pyro.sample("w", dist.Normal(torch.zeros(degree + 1), 1.0).to_event(1))
        mean = sum(w[k] * x**k for k in range(degree + 1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.2), obs=y)

    return Pair(model, "AutoNormal", (x, y, 3))


@program(declines=NO_LATENTS_OF_ROWS, quick_compiled=True)
def settings_in_a_namespace() -> Pair:
    """Hyperparameters from argparse, as in Pyro's examples."""
    x = torch.randn(20)
    args = argparse.Namespace(prior_scale=2.0, noise=0.5, student=True)

    def model(x, args):
        w = pyro.sample("w", dist.Normal(0.0, args.prior_scale))
        noise = dist.StudentT(4.0, w, args.noise) if args.student else dist.Normal(w, args.noise)
        with pyro.plate("data", len(x)):
            pyro.sample("x", noise, obs=x)

    return Pair(model, slope_guide, (x, args))


@program(declines=NO_LATENTS_OF_ROWS)
def settings_in_a_dataclass() -> Pair:
    """Hyperparameters in a dataclass, and a callable as link."""

    @dataclass
    class Config:
        rate: float
        link: object

    x = torch.rand(20)

    def model(x, config):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Exponential(config.link(w) * config.rate), obs=x)

    return Pair(model, slope_guide, (x, Config(2.0, nn.functional.softplus)))


@program(declines=NO_LATENTS_OF_ROWS)
def a_flag_by_keyword() -> Pair:
    """A robust likelihood behind a flag that has a default."""
    x = torch.randn(20)

    def model(x, robust=False):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Cauchy(w, 1.0) if robust else dist.Normal(w, 1.0), obs=x)

    return Pair(model, slope_guide, (x,), {"robust": True})


@program(declines=NO_LATENTS_OF_ROWS)
def one_dict_of_tensors() -> Pair:
    """A batch that is a dict, and a setting beside it."""
    batch = {"x": torch.randn(20), "y": torch.randn(20)}

    def model(batch, scale):
        w = pyro.sample("w", dist.Normal(0.0, scale))
        with pyro.plate("data", len(batch["x"])):
            pyro.sample("y", dist.Normal(w * batch["x"], 1.0), obs=batch["y"])

    return Pair(model, slope_guide, (batch, 2.0))


@program(declines=NO_LATENTS_OF_ROWS)
def list_of_flips() -> Pair:
    """Flips in a list, each observed by a site of its own."""
    flips = [torch.tensor(1.0)] * 4 + [torch.tensor(0.0)] * 2

    def model(data):
        f = pyro.sample("f", dist.Beta(10.0, 10.0))
        for i in range(len(data)):
            pyro.sample(f"obs_{i}", dist.Bernoulli(f), obs=data[i])

    def guide(data):
        alpha = pyro.param("alpha", torch.tensor(15.0), constraint=dist.constraints.positive)
        beta = pyro.param("beta", torch.tensor(15.0), constraint=dist.constraints.positive)
        pyro.sample("f", dist.Beta(alpha, beta))

    return Pair(model, guide, (flips,))


@program(declines=NO_LATENTS_OF_ROWS)
def ragged_list_of_groups() -> Pair:
    """Groups of unequal size in a list, in a sequential plate."""
    groups = [torch.randn(n) for n in (3, 5, 2)]

    def model(groups, spread):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        for i in pyro.plate("groups", len(groups)):
            with pyro.plate(f"rows_{i}", len(groups[i])):
                pyro.sample(f"x_{i}", dist.Normal(w, spread), obs=groups[i])

    return Pair(model, slope_guide, (groups, 1.5))


@program(declines=NO_LATENTS_OF_ROWS)
def numpy_and_pandas() -> Pair:
    """An array and a column of a table."""
    frame = pd.DataFrame({"x": np.linspace(0, 1, 20), "y": np.linspace(1, 2, 20)})

    def model(x, y):
        x, y = torch.as_tensor(x, dtype=torch.float), torch.as_tensor(y, dtype=torch.float)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    return Pair(model, slope_guide, (frame["x"].to_numpy(np.float32), frame["y"].to_numpy(np.float32)))


@program(declines=NO_LATENTS_OF_ROWS)
def none_for_no_covariates() -> Pair:
    """An optional argument that is None."""
    x = torch.randn(20)

    def model(x, covariates=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        mean = w if covariates is None else w * covariates
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    return Pair(model, slope_guide, (x, None))


@program(declines=NO_LATENTS_OF_ROWS)
def inducing_points() -> Pair:
    """Inducing points before the data: arguments of two lengths."""
    points, x = torch.linspace(-1, 1, 5).unsqueeze(-1), torch.randn(20, 1)
    y = x[:, 0].sin()

    def model(points, x, y):
        f = pyro.sample("f", dist.Normal(torch.zeros(len(points)), 1.0).to_event(1))
        weights = (-torch.cdist(x, points)).softmax(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(weights @ f, 0.3), obs=y)

    return Pair(model, "AutoNormal", (points, x, y))


@program
def padded_sequences_with_lengths() -> Pair:
    """A sequence model with a recurrent guide over padded sequences, their lengths as a tensor."""
    x, lengths = torch.randn(8, 5), torch.tensor([5, 3, 4, 2, 5, 1, 3, 4])
    rnn, head = nn.GRU(1, 3, batch_first=True), nn.Linear(3, 2)

    def model(x, lengths):
        mask = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
        with pyro.plate("sequences", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand(x.shape).mask(mask).to_event(1), obs=x)

    def guide(x, lengths):
        pyro.module("rnn", rnn)
        pyro.module("head", head)
        packed = pack_padded_sequence(x.unsqueeze(-1), lengths, batch_first=True, enforce_sorted=False)
        loc, scale = head(rnn(packed)[1][0]).unbind(-1)
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()))

    return Pair(model, guide, (x, lengths))


@program
def packed_sequences() -> Pair:
    """A PackedSequence as the argument itself."""
    x, lengths = torch.randn(6, 4, 1), torch.tensor([4, 3, 2, 4, 1, 2])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    rnn, head = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 1)

    def model(sequences):
        values, lengths = pad_packed_sequence(sequences, batch_first=True)
        mask = torch.arange(values.shape[1]) < lengths.unsqueeze(-1)
        with pyro.plate("sequences", len(lengths)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            every = dist.Normal(z.unsqueeze(-1), 1.0).expand(mask.shape).mask(mask).to_event(1)
            pyro.sample("x", every, obs=values.squeeze(-1))

    def guide(sequences):
        pyro.module("rnn", rnn)
        pyro.module("head", head)
        loc = head(rnn(sequences)[1][0][0]).squeeze(-1)
        with pyro.plate("sequences", len(loc)):
            pyro.sample("z", dist.Normal(loc, 0.5))

    return Pair(model, guide, (packed,))
