"""Regressions."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from corpus.form import NO_LATENTS_OF_ROWS, Pair, program


def table(rows: int = 30, columns: int = 3) -> torch.Tensor:
    """Covariates [rows, columns]."""
    return torch.randn(rows, columns)


@program(declines=NO_LATENTS_OF_ROWS)
def linear_regression() -> Pair:
    """Bayesian linear regression as a PyroModule with PyroSample weights, by AutoDiagonalNormal."""
    x = table()
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(30)

    class BayesianRegression(PyroModule):
        def __init__(self, in_features: int, out_features: int) -> None:
            super().__init__()
            self.linear = PyroModule[nn.Linear](in_features, out_features)
            self.linear.weight = PyroSample(
                dist.Normal(0.0, 1.0).expand([out_features, in_features]).to_event(2)
            )
            self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([out_features]).to_event(1))

        def forward(self, x, y=None):
            sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", x.shape[0]):
                pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
            return mean

    model = BayesianRegression(3, 1)
    return Pair(model, AutoDiagonalNormal(model), (x, y))


@program(declines=NO_LATENTS_OF_ROWS)
def logistic_regression() -> Pair:
    """Logistic regression by a guide with a full covariance of its own."""
    x = table(40)
    y = torch.bernoulli(torch.sigmoid(x @ torch.tensor([2.0, -1.0, 0.0])))

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        with pyro.plate("N", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)

    def guide(x, y):
        loc = pyro.param("loc", torch.zeros(4))
        scale_tril = pyro.param("scale_tril", 0.5 * torch.eye(4), constraint=dist.constraints.lower_cholesky)
        both = pyro.sample(
            "both", dist.MultivariateNormal(loc, scale_tril=scale_tril), infer={"is_auxiliary": True}
        )
        pyro.sample("w", dist.Delta(both[:3], event_dim=1))
        pyro.sample("b", dist.Delta(both[3]))

    return Pair(model, guide, (x, y))


@program(declines=NO_LATENTS_OF_ROWS)
def poisson_regression() -> Pair:
    """Poisson regression with an exposure, the guide by name, the data as keywords."""
    x, exposure = table(), torch.rand(30) + 0.5
    counts = torch.poisson(exposure * (x[:, 0]).exp())

    def model(x, exposure, counts=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        rate = exposure * (x @ w).exp()
        with pyro.plate("visits", len(x)):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)

    return Pair(model, "AutoNormal", (x, exposure), {"counts": counts})


@program(declines=NO_LATENTS_OF_ROWS)
def horseshoe() -> Pair:
    """A horseshoe over twelve coefficients, by AutoNormal."""
    x = table(25, 12)
    y = 3 * x[:, 0] + torch.randn(25)

    def model(x, y):
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("features", x.shape[1]):
            lam = pyro.sample("lam", dist.HalfCauchy(1.0))
            beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ (beta * lam * tau), sigma), obs=y)

    return Pair(model, "AutoNormal", (x, y))
