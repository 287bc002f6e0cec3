"""Posteriors with known answers: programs as a user of Pyro writes them, data, and what is exactly known."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.posteriors.further import FURTHER
from benchmarks.posteriors.posterior import Moments, Posterior
from benchmarks.posteriors.posterior import random as _random

# ---------------------------------------------------------------------- regressions

SCALES = torch.tensor([1e-2, 1.0, 1e2, 10.0], dtype=torch.float64)
_X = torch.randn(60, 4, generator=_random(1), dtype=torch.float64)
_NOISE = torch.randn(60, generator=_random(2), dtype=torch.float64)
X_SCALED = _X * SCALES
Y_SCALED = X_SCALED @ (torch.tensor([1.0, -0.5, 0.3, 0.2], dtype=torch.float64) / SCALES) + _NOISE
X_FAR = 50 + _X[:, :2] * torch.tensor([1.0, 0.01], dtype=torch.float64)
Y_FAR = 1e4 + X_FAR @ torch.tensor([2.0, 30.0], dtype=torch.float64) + _NOISE
PRIOR_SD = 1e5


def regression(x: Tensor, y: Tensor) -> None:
    """Columns of scales from 0.01 to 100, noise of known size."""
    b = pyro.sample("b", dist.Normal(0.0, PRIOR_SD).expand([x.shape[1]]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


def regression_intercept(x: Tensor, y: Tensor) -> None:
    """An intercept of 10,000, and columns far from 0 that it is confounded with."""
    a = pyro.sample("a", dist.Normal(0.0, PRIOR_SD))
    b = pyro.sample("b", dist.Normal(0.0, PRIOR_SD).expand([x.shape[1]]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a + x @ b, 1.0), obs=y)


def _conjugate(x: Tensor, y: Tensor) -> Moments:
    precision = x.T @ x + torch.eye(x.shape[1], dtype=x.dtype) / PRIOR_SD**2
    unit = precision.diagonal().rsqrt()
    L = torch.linalg.cholesky(unit[:, None] * precision * unit)
    mean = unit * torch.cholesky_solve((unit * (x.T @ y))[:, None], L)[:, 0]
    return mean, unit * torch.cholesky_inverse(L).diagonal().sqrt()


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x], 1)


def unknown_noise(x: Tensor, y: Tensor) -> None:
    """The usual regression: coefficients, intercept and noise."""
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(5.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a + x @ b, s), obs=y)


_LOGITS = _X @ torch.tensor([1.0, -1.5, 0.5, 0.0], dtype=torch.float64) + 0.3
Y_BINARY = (torch.rand(60, generator=_random(3), dtype=torch.float64) < _LOGITS.sigmoid()).double()
Y_COUNTS = torch.poisson((0.4 * _LOGITS + 1.0).exp(), generator=_random(4))


def logistic(x: Tensor, y: Tensor) -> None:
    """Logistic regression."""
    a = pyro.sample("a", dist.Normal(0.0, 2.5))
    b = pyro.sample("b", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=a + x @ b), obs=y)


def poisson(x: Tensor, y: Tensor) -> None:
    """Poisson regression."""
    a = pyro.sample("a", dist.Normal(0.0, 2.5))
    b = pyro.sample("b", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Poisson((a + x @ b).exp()), obs=y)


def horseshoe(x: Tensor, y: Tensor) -> None:
    """A regularised regression with as many slopes as a third of the data, most of them 0."""
    log = dist.transforms.ExpTransform().inv  # a half-Cauchy itself has no moments to compare
    tau = pyro.sample("log_tau", dist.TransformedDistribution(dist.HalfCauchy(0.1), [log])).exp()
    with pyro.plate("columns", x.shape[1]):
        lam = pyro.sample("log_lam", dist.TransformedDistribution(dist.HalfCauchy(1.0), [log])).exp()
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ (z * lam * tau), 1.0), obs=y)


X_MANY = torch.randn(60, 20, generator=_random(5), dtype=torch.float64)
Y_MANY = X_MANY[:, :2] @ torch.tensor([2.0, -1.0], dtype=torch.float64) + _NOISE

# ---------------------------------------------------------------------- hierarchies

EFFECTS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)


def schools_noncentred(y: Tensor, error: Tensor) -> None:
    """Eight schools (Rubin 1981), effects in units of their spread."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, error), obs=y)


def schools_centred(y: Tensor, error: Tensor) -> None:
    """Eight schools, effects as they are: a funnel."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, error), obs=y)


def _effects(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "mu": draws["mu"],
        "tau": draws["tau"],
        "theta": draws["mu"][:, None] + draws["tau"][:, None] * draws["z"],
    }


GROUPS = torch.arange(50).repeat_interleave(6)
_GROUP_MEANS = 3 + 1.5 * torch.randn(50, generator=_random(6), dtype=torch.float64)
Y_GROUPS = _GROUP_MEANS[GROUPS] + torch.randn(300, generator=_random(7), dtype=torch.float64)


def groups(group: Tensor, y: Tensor) -> None:
    """Fifty groups of six, means from a common normal."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    s = pyro.sample("s", dist.HalfNormal(5.0))
    with pyro.plate("groups", 50):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(theta[group], s), obs=y)


# ---------------------------------------------------------------------- shapes


def funnel() -> None:
    """Neal's funnel in 10 dimensions (Neal 2003)."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("coordinates", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def _funnel() -> Moments:
    sd = torch.full((10,), math.exp(9 / 4), dtype=torch.float64)
    sd[0] = 3.0
    return torch.zeros(10, dtype=torch.float64), sd


def banana() -> None:
    """A normal bent along a parabola."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.3))


def _banana() -> Moments:
    wanted = torch.tensor([1.0, math.sqrt(2 + 0.09)], dtype=torch.float64)
    return torch.tensor([0.0, 1.0], dtype=torch.float64), wanted


_A = torch.randn(100, 100, generator=_random(8), dtype=torch.float64)
COVARIANCE = _A @ _A.T / 100 + 0.05 * torch.eye(100, dtype=torch.float64)
LOCATION = torch.linspace(-5, 5, 100, dtype=torch.float64)


def gaussian() -> None:
    """A correlated normal in 100 dimensions."""
    pyro.sample("z", dist.MultivariateNormal(LOCATION, COVARIANCE))


def _gaussian() -> Moments:
    return LOCATION, COVARIANCE.diagonal().sqrt()


_SIDE = torch.rand(80, generator=_random(9), dtype=torch.float64) < 0.35
Y_MIXED = torch.where(_SIDE, -2.0, 1.5) + torch.randn(80, generator=_random(10), dtype=torch.float64)


def mixture(y: Tensor) -> None:
    """Two normals whose means are in order, so that no labels can be exchanged."""
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    low = pyro.sample("low", dist.Normal(0.0, 5.0))
    gap = pyro.sample("gap", dist.HalfNormal(5.0))
    s = pyro.sample("s", dist.HalfNormal(2.0))
    parts = dist.Normal(torch.stack([low, low + gap]), s)
    with pyro.plate("rows", len(y)):
        pyro.sample(
            "y", dist.MixtureSameFamily(dist.Categorical(torch.stack([weight, 1 - weight])), parts), obs=y
        )


T_GP = torch.linspace(0, 1, 25, dtype=torch.float64)
Y_GP = (6 * T_GP).sin() + 0.3 * torch.randn(25, generator=_random(11), dtype=torch.float64)


def process(t: Tensor, y: Tensor) -> None:
    """Length, size and noise of a Gaussian process, the function itself integrated out."""
    length = pyro.sample("length", dist.LogNormal(-1.0, 0.7))
    size = pyro.sample("size", dist.LogNormal(0.0, 0.7))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.7))
    K = size**2 * (-0.5 * ((t[:, None] - t) / length) ** 2).exp()
    eye = torch.eye(len(t), dtype=t.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(t), K + (noise**2 + 1e-6) * eye), obs=y)


COUNTS, TOTAL = torch.tensor([25.0, 14, 9], dtype=torch.float64), 48
_L = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [-0.3, 0.4, 0.866]], dtype=torch.float64)
Y_VECTORS = torch.randn(80, 3, generator=_random(12), dtype=torch.float64) @ _L.T + torch.tensor(
    [-1.0, 0.0, 1.0]
)


def constrained(counts: Tensor, y: Tensor) -> None:
    """A simplex, the Cholesky factor of a correlation matrix, and locations in order."""
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    L = pyro.sample("L", dist.LKJCholesky(3, torch.tensor(2.0)))
    rising = dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0), [dist.transforms.OrderedTransform()]
    )
    location = pyro.sample("location", rising)
    pyro.sample("counts", dist.Multinomial(TOTAL, p), obs=counts)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MultivariateNormal(location, scale_tril=L), obs=y)


POSTERIORS: dict[str, Posterior] = {
    "regression, scales 0.01 to 100": Posterior(
        regression, (X_SCALED, Y_SCALED), lambda: _conjugate(X_SCALED, Y_SCALED), gaussian=True
    ),
    "regression, intercept 10,000": Posterior(
        regression_intercept, (X_FAR, Y_FAR), lambda: _conjugate(_with_ones(X_FAR), Y_FAR), gaussian=True
    ),
    "regression, unknown noise": Posterior(
        unknown_noise, (_X, 1 + _LOGITS + _NOISE), gaussian=True, quick=False
    ),
    "logistic regression": Posterior(logistic, (_X, Y_BINARY), gaussian=True),
    "Poisson regression": Posterior(poisson, (_X, Y_COUNTS), gaussian=True),
    "eight schools, non-centred": Posterior(schools_noncentred, (EFFECTS, ERRORS)),
    "eight schools, centred": Posterior(
        schools_centred, (EFFECTS, ERRORS), quick=False, of=("eight schools, non-centred", _effects)
    ),
    "funnel": Posterior(funnel, (), _funnel),
    "banana": Posterior(banana, (), _banana),
    "50 groups": Posterior(groups, (GROUPS, Y_GROUPS), gaussian=True, quick=False),
    "mixture": Posterior(mixture, (Y_MIXED,)),
    "Gaussian process": Posterior(process, (T_GP, Y_GP), quick=False),
    "horseshoe": Posterior(horseshoe, (X_MANY, Y_MANY), quick=False),
    "normal, 100 dimensions": Posterior(gaussian, (), _gaussian, gaussian=True, quick=False),
    "simplex, Cholesky factor, ordered": Posterior(constrained, (COUNTS, Y_VECTORS), gaussian=True),
}
POSTERIORS |= FURTHER
