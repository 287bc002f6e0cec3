"""Programs of sequences: chains as one site, recurrent networks, sequential plates. Compiled they are as eager."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrolvm
from pyrolvm import data_plate

LENGTHS = torch.tensor([4, 2, 3, 4, 1])


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def discrete_chain(x):
    """A hidden Markov model summed out by Pyro's own distribution."""
    probs = pyro.sample("probs", dist.Dirichlet(torch.eye(3) + 0.5).to_event(1))
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 1.0).to_event(1))
    with data_plate(x):
        law = dist.DiscreteHMM(torch.zeros(3), probs.log(), dist.Normal(locs, 1.0), duration=x.shape[1])
        pyro.sample("x", law, obs=x)


def gaussian_chain(y):
    """A linear-Gaussian state space model, its states integrated out by Pyro's own distribution."""
    q = pyro.sample("q", dist.LogNormal(-1.0, 0.5))
    r = pyro.sample("r", dist.LogNormal(-1.0, 0.5))
    eye, zero = torch.eye(2), torch.zeros(2)
    start, step, seen = (dist.MultivariateNormal(zero, scale * eye) for scale in (1.0, q, r))
    pyro.sample("y", dist.GaussianHMM(start, 0.9 * eye, step, eye, seen, duration=len(y)), obs=y)


def groups_in_turn(y):
    """A plate that is a loop: each group has rows of its own."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("groups", len(y)):
        a = pyro.sample(f"a_{i}", dist.Normal(mu, 1.0))
        with pyro.plate(f"rows_{i}", y.shape[1]):
            pyro.sample(f"y_{i}", dist.Normal(a, 1.0), obs=y[i])


def guide_of_groups(y):
    """AutoGuides do not take sequential plates."""
    loc, scale = (
        pyro.param("loc", torch.zeros(len(y) + 1)),
        pyro.param("log_scale", torch.zeros(len(y) + 1)).exp(),
    )
    pyro.sample("mu", dist.Normal(loc[-1], scale[-1]))
    for i in pyro.plate("groups", len(y)):
        pyro.sample(f"a_{i}", dist.Normal(loc[i], scale[i]))


class Recurrent(nn.Module):
    """A deep Markov model: a recurrent cell in the model, a recurrent network over the sequence in the guide."""

    def __init__(self):
        super().__init__()
        self.network = nn.GRU(3, 4, batch_first=True, bidirectional=True)
        self.cell, self.emit = nn.GRUCell(2, 4), nn.Linear(4, 3)
        self.combine = nn.Linear(2 + 8, 4)

    def model(self, x, lengths):
        pyro.module("recurrent", self)
        with data_plate(x):
            z, h = x.new_zeros(len(x), 2), x.new_zeros(len(x), 4)
            for t in range(x.shape[1]):
                with pyro.poutine.mask(mask=t < lengths):
                    h = self.cell(z, h)
                    z = pyro.sample(f"z_{t}", dist.Normal(h[:, :2], 1.0).to_event(1))
                    pyro.sample(f"x_{t}", dist.Normal(self.emit(h), 1.0).to_event(1), obs=x[:, t])

    def guide(self, x, lengths):
        pyro.module("recurrent", self)
        states, _ = self.network(x)
        with data_plate(x):
            z = x.new_zeros(len(x), 2)
            for t in range(x.shape[1]):
                with pyro.poutine.mask(mask=t < lengths):
                    loc, log_scale = self.combine(torch.cat([z, states[:, t]], -1)).chunk(2, -1)
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, log_scale.exp()).to_event(1))


class Packed(nn.Module):
    """A guide whose network reads sequences of several lengths packed."""

    def __init__(self):
        super().__init__()
        self.network, self.read = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)
        self.emit = nn.Linear(1, 3)

    def model(self, x, lengths):
        pyro.module("packed", self)
        mask = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)  # [rows, steps]
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            law = dist.Normal(self.emit(z.unsqueeze(-1)).unsqueeze(-2).expand_as(x), 1.0).to_event(1)
            pyro.sample("x", law.mask(mask).to_event(1), obs=x)

    def guide(self, x, lengths):
        pyro.module("packed", self)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, last = self.network(packed)
        with data_plate(x):
            loc, log_scale = self.read(last[0]).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


class Long(nn.Module):
    """An LSTM of two layers in the guide, its states all read."""

    def __init__(self):
        super().__init__()
        self.network, self.read = nn.LSTM(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 2)

    def model(self, x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z.unsqueeze(-1).unsqueeze(-1).expand_as(x)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(2), obs=x)

    def guide(self, x):
        pyro.module("long", self)
        loc, log_scale = self.read(self.network(x)[0].mean(-2)).unbind(-1)
        with data_plate(x):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


PROGRAMS = {
    "discrete chain": lambda: (discrete_chain, noise(5, 4), "AutoNormal"),
    "gaussian chain": lambda: (gaussian_chain, noise(6, 2), "AutoNormal"),
    "sequential plate": lambda: (groups_in_turn, noise(4, 3), guide_of_groups),
    "recurrent networks": lambda: (Recurrent(), {"x": noise(5, 4, 3), "lengths": LENGTHS}, None),
    "long short-term memory": lambda: (Long(), noise(5, 4, 3), None),
    "packed sequences": lambda: (Packed(), {"x": noise(5, 4, 3), "lengths": LENGTHS}, None),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_sequences_are_the_eager_ones(name):
    bounds = {}
    for engine in ("eager", "compiled"):
        torch.manual_seed(0)
        model, data, guide = PROGRAMS[name]()
        fitted = pyrolvm.fit(
            model, data, guide=guide, engine=engine, num_steps=20, learning_rate=0.01, progress=False
        )
        assert fitted.engine.startswith(engine)
        bounds[engine] = torch.tensor(fitted.history["elbo"].tolist())
    torch.testing.assert_close(bounds["compiled"], bounds["eager"], rtol=1e-4, atol=1e-4)
    assert bounds["eager"][0] != bounds["eager"][-1]
