"""The manners in which programs are written: classes, partial functions, arguments and names of every kind."""

from __future__ import annotations

from collections import namedtuple
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import constraints

from corpus.form import NO_LATENTS_OF_ROWS, Pair, program

Data = namedtuple("Data", ["x", "y"])


def line() -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) along a line."""
    x = torch.linspace(-1, 1, 16)
    return x, 2 * x + 0.3 * torch.randn(16)


@program(declines=NO_LATENTS_OF_ROWS)
def a_named_tuple() -> Pair:
    """The data as one namedtuple."""

    def model(data):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data.x)):
            pyro.sample("y", dist.Normal(w * data.x, 0.5), obs=data.y)

    return Pair(model, AutoNormal(model), (Data(*line()),))


@program(declines=NO_LATENTS_OF_ROWS)
def observations_by_name() -> Pair:
    """Observations as one dict of sites, None where they are to be made; the model returns a dict."""
    x, y = line()

    def model(x, obs=None):
        obs = obs or {}
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(w * x, 0.5), obs=obs.get("y"))
            n = pyro.sample("n", dist.Poisson(y.exp()), obs=obs.get("n"))
        return {"y": y, "n": n}

    return Pair(model, AutoNormal(model), (x, {"y": y, "n": torch.poisson(y.exp())}))


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def keywords_alone() -> Pair:
    """Arguments by keyword only."""
    x, y = line()

    def model(*, x, degree=2, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(degree), 1.0).to_event(1))
        mean = torch.stack([x**k for k in range(degree)], -1) @ w
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    return Pair(model, AutoNormal(model), (), {"x": x, "y": y, "degree": 3})


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def lambdas() -> Pair:
    """A model by partial of a lambda's function and a guide as a lambda."""
    x, y = line()

    def base(slope_scale, x, y):
        w = pyro.sample("w", dist.Normal(0.0, slope_scale))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 0.5), obs=y)

    model = partial(base, 2.0)
    guide = lambda x, y: pyro.sample(  # noqa: E731
        "w",
        dist.Normal(
            pyro.param("w_loc", torch.tensor(0.0)),
            pyro.param("w_scale", torch.tensor(0.5), constraints.positive),
        ),
    )
    return Pair(model, guide, (x, y))


@program
def an_instance_that_is_called() -> Pair:
    """Model and guide as instances with __call__, a network inside one that they register."""

    class Model:
        def __init__(self):
            self.decoder = nn.Linear(2, 4)

        def __call__(self, x):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    class Guide:
        def __init__(self):
            self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 2))

        def __call__(self, x):
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))

    return Pair(Model(), Guide(), (torch.randn(12, 4),))


@program
def latents_by_name_in_a_loop() -> Pair:
    """Latents of each row named in a loop, each depending on the last."""
    x = torch.randn(14, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for k in range(3):
                z = pyro.sample(f"z_{k}", dist.Normal(0.5 * z, 1.0))
                pyro.sample(f"x_{k}", dist.Normal(z, 0.5), obs=x[:, k])

    def guide(x):
        with pyro.plate("data", len(x)):
            for k in range(3):
                slope = pyro.param(f"slope_{k}", torch.tensor(0.5))
                pyro.sample(f"z_{k}", dist.Normal(slope * x[:, k], 0.5))

    return Pair(model, guide, (x,))


@program(
    declines=NO_LATENTS_OF_ROWS | {"log_evidence": "belong to no row"},
    missing={"log p(x)": "belong to no row"},
)
def two_sources_of_data() -> Pair:
    """Two tables of different lengths that share a latent, each in a plate of its own."""

    def model(counts, sizes):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("counts_plate", len(counts)):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)
        with pyro.plate("sizes_plate", len(sizes)):
            pyro.sample("sizes", dist.Exponential(rate), obs=sizes)

    return Pair(model, AutoNormal(model), (torch.poisson(2 * torch.ones(9)), torch.rand(14)))


@program(declines=NO_LATENTS_OF_ROWS)
def causes_and_effects() -> Pair:
    """A structural model with a confounder, intervened on and conditioned."""

    def scm(x):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        with pyro.plate("units", len(x)):
            t = pyro.sample("t", dist.Bernoulli(logits=x))
            return pyro.sample("y", dist.Normal(effect * t + x, 0.5))

    x = torch.randn(18)
    treated = (torch.arange(18) % 2).float()
    model = pyro.poutine.condition(scm, data={"t": treated, "y": treated + x})
    return Pair(model, AutoNormal(model), (x,))


@program(quick=False)
def a_score_by_graph() -> Pair:
    """A Poisson latent of each row that cannot be reparameterised, under TraceGraph_ELBO with a network as baseline."""
    x = torch.poisson(3 * torch.ones(12)) + 0.3 * torch.randn(12)
    baseline = nn.Linear(1, 1)

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(3.0))
            pyro.sample("x", dist.Normal(k, 0.5), obs=x)

    def guide(x):
        pyro.module("baseline", baseline)
        a = pyro.param("a", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            value = baseline(x.unsqueeze(-1)).squeeze(-1)
            pyro.sample(
                "k", dist.Poisson(a * x.clamp(min=0.2)), infer={"baseline": {"baseline_value": value}}
            )

    return Pair(model, guide, (x,), objective=TraceGraph_ELBO)


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def stages_by_block() -> Pair:
    """A second stage: what the first found is blocked and replayed, the rest is fitted."""

    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    held = pyro.poutine.condition(model, data={"a": torch.tensor(0.5)})
    return Pair(
        held, AutoNormal(pyro.poutine.block(held, hide_fn=lambda m: m["name"] == "a")), (torch.randn(12),)
    )


@program
def both_plates_subsampled() -> Pair:
    """A matrix in two plates that both draw a subsample, latents of rows and columns by AutoNormal."""
    y = torch.randn(8, 6)

    def plates(y):
        return [
            pyro.plate("users", 8, subsample_size=4, dim=-2),
            pyro.plate("items", 6, subsample_size=3, dim=-1),
        ]

    def model(y):
        users, items = plates(y)
        with users as u:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with items as i:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with users, items:
            pyro.sample("y", dist.Normal(a * b, 1.0), obs=y[u][:, i])

    return Pair(model, AutoNormal(model, create_plates=plates), (y,))


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def scaled_minibatch_by_hand() -> Pair:
    """A minibatch whose likelihood is scaled to the whole data by poutine.scale, as programs without plates do."""
    x, y = line()

    def model(x, y, total):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.poutine.scale(scale=total / len(x)):
            pyro.sample("y", dist.Normal(w * x, 0.5).to_event(1), obs=y)

    return Pair(model, AutoNormal(model), (x, y, 160))


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def strings_and_switches() -> Pair:
    """Settings as text, None, a list of numbers and a nested dict, read by the model."""
    x, y = line()

    def model(x, y, kind, options, knots):
        w = pyro.sample("w", dist.Normal(0.0, options["prior"]["scale"]).expand([len(knots)]).to_event(1))
        mean = torch.stack([(x - k).clamp(min=0) for k in knots], -1) @ w
        law = {"normal": dist.Normal, "robust": dist.Laplace}[kind]
        with pyro.plate("data", len(x)):
            pyro.sample("y", law(mean, 0.5), obs=y)

    settings = {"prior": {"scale": 2.0}, "note": None}
    return Pair(model, AutoNormal(model), (x, y, "robust", settings, [-1.0, 0.0, 0.5]))
