"""Hierarchies, plates within plates and beside each other, subsamples."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from torch.distributions import constraints

from corpus.form import NO_LATENTS_OF_ROWS, Pair, program


@program
def eight_schools() -> Pair:
    """Eight schools, the effects in the plate of the data, by AutoNormal."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model(sigma, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("J", len(sigma)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return Pair(model, AutoNormal(model), (sigma, y))


@program(
    declines={"log_evidence": "at once"},
    missing=dict.fromkeys(("k-hat per datum", "log p(x)", "collapse"), "at once"),
)
def eight_schools_joint() -> Pair:
    """Eight schools, decentred by LocScaleReparam, by AutoMultivariateNormal over all of it."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    @pyro.poutine.reparam(config={"theta": LocScaleReparam(0.0)})
    def model(sigma, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("J", len(sigma)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return Pair(model, AutoMultivariateNormal(model), (sigma, y))


@program(declines=NO_LATENTS_OF_ROWS)
def radon() -> Pair:
    """Intercepts of counties and a slope, counties by index, data as keywords."""
    county, floor = torch.arange(24) % 4, (torch.arange(24) % 3 == 0).float()
    radon = 1 + 0.4 * torch.randn(4)[county] - 0.6 * floor + 0.2 * torch.randn(24)

    def model(county, floor, radon=None):
        mu_a = pyro.sample("mu_a", dist.Normal(0.0, 5.0))
        sigma_a = pyro.sample("sigma_a", dist.HalfCauchy(2.0))
        b = pyro.sample("b", dist.Normal(0.0, 5.0))
        with pyro.plate("counties", 4):
            a = pyro.sample("a", dist.Normal(mu_a, sigma_a))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.0))
        with pyro.plate("houses", len(county)):
            pyro.sample("radon", dist.Normal(a[county] + b * floor, sigma), obs=radon)

    return Pair(model, AutoDiagonalNormal(model), (), {"county": county, "floor": floor, "radon": radon})


@program(declines=NO_LATENTS_OF_ROWS)
def nested_plates() -> Pair:
    """Pupils within classes within schools, three nested plates."""
    y = torch.randn(5, 4, 3)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("schools", 3, dim=-1):
            school = pyro.sample("school", dist.Normal(mu, 0.5))
            with pyro.plate("classes", 4, dim=-2):
                room = pyro.sample("room", dist.Normal(school, 0.5))
                with pyro.plate("pupils", 5, dim=-3):
                    pyro.sample("y", dist.Normal(room, 1.0), obs=y)

    return Pair(model, AutoNormal(model), (y,))


@program
def crossed_plates() -> Pair:
    """Raters by items, two plates that cross."""
    y = torch.randn(6, 4)

    def model(y):
        items, raters = pyro.plate("items", 4, dim=-1), pyro.plate("raters", 6, dim=-2)
        with items:
            item = pyro.sample("item", dist.Normal(0.0, 1.0))
        with raters:
            rater = pyro.sample("rater", dist.Normal(0.0, 1.0))
        with items, raters:
            pyro.sample("y", dist.Normal(item + rater, 0.5), obs=y)

    def guide(y):
        items, raters = pyro.plate("items", 4, dim=-1), pyro.plate("raters", 6, dim=-2)
        with items:
            loc = pyro.param("item_loc", torch.zeros(4))
            pyro.sample("item", dist.Normal(loc, 0.3))
        with raters:
            loc = pyro.param("rater_loc", torch.zeros(6, 1))
            pyro.sample("rater", dist.Normal(loc, 0.3))

    return Pair(model, guide, (y,), objective=TraceMeanField_ELBO)


@program(declines=NO_LATENTS_OF_ROWS)
def sequential_plates() -> Pair:
    """A plate that is looped over: three groups of different sizes."""
    groups = [torch.randn(4), torch.randn(6), torch.randn(5)]

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for i in pyro.plate("groups", 3):
            level = pyro.sample(f"level_{i}", dist.Normal(mu, 0.5))
            with pyro.plate(f"rows_{i}", len(groups[i])):
                pyro.sample(f"y_{i}", dist.Normal(level, 1.0), obs=groups[i])

    def guide():
        loc = pyro.param("mu_loc", torch.tensor(0.0))
        pyro.sample("mu", dist.Normal(loc, 0.3))
        for i in pyro.plate("groups", 3):
            loc = pyro.param(f"level_loc_{i}", torch.tensor(0.1 * i))
            scale = pyro.param(f"level_scale_{i}", torch.tensor(0.5), constraint=constraints.positive)
            pyro.sample(f"level_{i}", dist.Normal(loc, scale))

    return Pair(model, guide, objective=TraceGraph_ELBO)


@program(declines=NO_LATENTS_OF_ROWS)
def subsample_in_the_model() -> Pair:
    """A plate that draws its own subsample of rows, ten of fifty each step."""
    x = torch.randn(50) + 2.0

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x), subsample_size=10) as index:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))

    return Pair(model, guide, (x,))


@program
def subsample_by_autoguide() -> Pair:
    """A plate with subsample= and local latents of its rows under AutoNormal, as in Pyro's guide of AutoGuides."""
    x = torch.randn(20) + 1.0

    def create_plates(x):
        return pyro.plate("rows", 20, subsample_size=5)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with create_plates(x):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=pyro.subsample(x, event_dim=0))

    return Pair(model, AutoNormal(model, create_plates=create_plates), (x,))


@program(declines=NO_LATENTS_OF_ROWS)
def matrix_factorisation() -> Pair:
    """Users by items from triples, both factors in plates of their own, ratings in a third with its own subsample."""
    user, item = torch.arange(40) % 8, (torch.arange(40) * 3) % 5
    rating = torch.randn(40)

    def model(user, item, rating):
        with pyro.plate("users", 8):
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("items", 5):
            v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("ratings", 40, subsample_size=20) as index:
            mean = (u[user[index]] * v[item[index]]).sum(-1)
            pyro.sample("rating", dist.Normal(mean, 0.5), obs=rating[index])

    return Pair(model, AutoNormal(model), (user, item, rating))
