"""Programs inside handlers, and sites that are neither latents nor data."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import TransformReparam
from torch.distributions import constraints

from corpus.form import NO_LATENTS_OF_ROWS, Pair, program


def line() -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) along a line."""
    x = torch.linspace(-1, 1, 20)
    return x, 2 * x + 0.3 * torch.randn(20)


def regression(x, y=None):
    """A slope, an intercept and a noise."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(a + b * x, sigma), obs=y)


@program(declines=NO_LATENTS_OF_ROWS, quick_compiled=True)
def closure_without_arguments() -> Pair:
    """Data in a closure: the model takes no arguments."""
    x, y = line()

    def model():
        return regression(x, y)

    return Pair(model, AutoMultivariateNormal(model))


@program(declines=NO_LATENTS_OF_ROWS)
def conditioned_noise() -> Pair:
    """poutine.condition holds the noise and gives the data."""
    x, y = line()
    model = pyro.poutine.condition(regression, data={"sigma": torch.tensor(0.3), "y": y})
    return Pair(model, AutoNormal(model), (x,))


@program(declines=NO_LATENTS_OF_ROWS)
def intervened() -> Pair:
    """poutine.do sets the intercept."""
    model = pyro.poutine.do(regression, data={"a": torch.tensor(0.0)})
    return Pair(model, AutoNormal(model), line())


@program(declines=NO_LATENTS_OF_ROWS)
def annealed_by_scale() -> Pair:
    """poutine.scale divides the whole loss by the number of data."""
    scaled = pyro.poutine.scale(regression, scale=1 / 20)
    guide = pyro.poutine.scale(AutoNormal(regression), scale=1 / 20)
    return Pair(scaled, guide, line())


@program(declines=NO_LATENTS_OF_ROWS)
def power_likelihood() -> Pair:
    """A likelihood to the power of a half, by poutine.scale around the observation."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    return Pair(model, AutoNormal(model), (torch.randn(20),))


@program(declines=NO_LATENTS_OF_ROWS)
def transformed_reparam() -> Pair:
    """A LogNormal decentred by TransformReparam."""

    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    model = pyro.poutine.reparam(model, config={"scale": TransformReparam()})
    return Pair(model, AutoNormal(model), (torch.randn(20),))


@program
def deterministic_sites() -> Pair:
    """pyro.deterministic inside and outside the plate of the data."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * mu)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            shifted = pyro.deterministic("shifted", z + 1.0)
            pyro.sample("x", dist.Normal(shifted, 0.5), obs=x)

    return Pair(model, AutoNormal(model), (torch.randn(15),))


@program
def factors() -> Pair:
    """pyro.factor inside and outside the plate: a soft constraint and a penalty of each row."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("near_one", -0.5 * (mu - 1) ** 2)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.factor("small", -0.1 * z.abs())
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    return Pair(model, AutoNormal(model), (torch.randn(15),))


@program(
    declines={
        **NO_LATENTS_OF_ROWS,
        **dict.fromkeys(("predict", "reconstruct", "sample"), "observes no data"),
    },
    missing={"predictive check": "observes no data"},
)
def only_a_density() -> Pair:
    """No data at all: a banana density by pyro.factor."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        pyro.factor("banana", -0.5 * (z[1] - z[0] ** 2) ** 2)

    return Pair(model, AutoMultivariateNormal(model))


@program(apart="not that of SVI, which counts log q of what is observed")
def missing_by_obs_mask() -> Pair:
    """Missing entries by obs_mask, imputed by AutoNormal."""
    x = torch.randn(20) + 1.0
    seen = torch.arange(20) % 4 != 0

    def model(x, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=seen)

    return Pair(model, AutoNormal(model), (x, seen))


@program(declines=NO_LATENTS_OF_ROWS)
def masked_lengths() -> Pair:
    """Sequences padded to one length, the padding masked out, times in an inner plate."""
    x, lengths = torch.randn(6, 5), torch.tensor([5, 3, 4, 2, 5, 1])

    def model(x, lengths):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("sequences", len(x), dim=-2), pyro.plate("times", x.shape[1], dim=-1):
            mask = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
            with pyro.poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    return Pair(model, AutoNormal(model), (x, lengths))


@program(declines=NO_LATENTS_OF_ROWS)
def plate_without_size() -> Pair:
    """A plate without a size: pyro.plate("data") gets it from its sites."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data"):
            pyro.sample("x", dist.Normal(mu, torch.ones(len(x))), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))

    return Pair(model, guide, (torch.randn(20),))


@program(declines=NO_LATENTS_OF_ROWS)
def independent_rows() -> Pair:
    """No plate: the rows are one event by to_event."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu, 1.0).expand([len(x)]).to_event(1), obs=x)

    return Pair(model, AutoNormal(model), (torch.randn(20),))


@program
def renyi() -> Pair:
    """RenyiELBO of three particles over latents of each row."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.5))

    return Pair(model, guide, (torch.randn(15),), objective=lambda: RenyiELBO(alpha=0, num_particles=3))


@program(declines=NO_LATENTS_OF_ROWS)
def maximum_likelihood() -> Pair:
    """No latents at all: a guide that does nothing, maximum likelihood."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    def guide(x):
        pass

    return Pair(model, guide, (torch.randn(20),))


@program(
    declines={"log_evidence": "point estimate"},
    missing=dict.fromkeys(("k-hat per datum", "log p(x)", "collapse"), "point estimate"),
)
def penalised_points() -> Pair:
    """AutoDelta over latents of each row: the most probable value of each."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    return Pair(model, AutoDelta(model), (torch.randn(15),))
