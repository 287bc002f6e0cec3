"""More posteriors with known answers: counts, tails, bounds, ridges, several modes.

Most thresholds of the verdict were chosen before these were fitted; that of k-hat above 1 came of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.posteriors.posterior import Moments, Posterior, random

F64 = torch.float64


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random(seed), dtype=F64)


# ---------------------------------------------------------------------- regressions

X = _normal(21, 80, 3)
LINEAR = X @ torch.tensor([0.8, -0.5, 0.0], dtype=F64) + 0.7
_RATE = torch.distributions.Gamma(torch.tensor(1.5, dtype=F64), 1.5 / LINEAR.exp())
with torch.random.fork_rng():
    torch.manual_seed(22)
    Y_OVERDISPERSED = torch.poisson(_RATE.sample())
Y_OUTLIERS = LINEAR + 0.5 * _normal(23, 80) + torch.where(torch.arange(80) % 11 == 0, 8.0, 0.0)
Y_LEVELS = (LINEAR + 1.6 * torch.logit(torch.rand(80, generator=random(24), dtype=F64)) > 0).long() + (
    LINEAR + 0.4 * _normal(25, 80) > 1.2
).long()


def overdispersed(x: Tensor, y: Tensor) -> None:
    """Negative binomial regression of unknown dispersion."""
    a = pyro.sample("a", dist.Normal(0.0, 2.5))
    b = pyro.sample("b", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
    size = pyro.sample("size", dist.Gamma(2.0, 0.5))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.GammaPoisson(size, size / (a + x @ b).exp()), obs=y)


def outliers(x: Tensor, y: Tensor) -> None:
    """Student-t regression, degrees of freedom and scale unknown; every eleventh row is 8 too high."""
    a = pyro.sample("a", dist.Normal(0.0, 2.5))
    b = pyro.sample("b", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
    nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
    s = pyro.sample("s", dist.HalfNormal(2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.StudentT(nu, a + x @ b, s), obs=y)


def ordinal(x: Tensor, y: Tensor) -> None:
    """Three levels in order: slopes and two cutpoints."""
    b = pyro.sample("b", dist.Normal(0.0, 2.5).expand([x.shape[1]]).to_event(1))
    rising = dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 2.0), [dist.transforms.OrderedTransform()]
    )
    cut = pyro.sample("cut", rising)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.OrderedLogistic(x @ b, cut), obs=y)


Y_SEPARATED = (X[:, 0] > 0).double()


def separated(x: Tensor, y: Tensor) -> None:
    """Logistic regression of classes that a line parts, under a wide prior: long tails to one side."""
    b = pyro.sample("b", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ b), obs=y)


DOSE = torch.tensor([0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0], dtype=F64)
RESPONSE = 10 * DOSE / (1.5 + DOSE) + 0.5 * _normal(26, 7)


def saturating(x: Tensor, y: Tensor) -> None:
    """A saturating curve through seven points."""
    top = pyro.sample("top", dist.LogNormal(2.0, 1.0))
    middle = pyro.sample("middle", dist.LogNormal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(top * x / (middle + x), s), obs=y)


# ---------------------------------------------------------------------- hierarchies

TRIALS = torch.tensor([3.0, 5, 2, 8, 4, 3, 6, 2, 5, 7, 3, 4], dtype=F64)
HITS = torch.tensor([1.0, 0, 1, 5, 0, 2, 1, 0, 4, 1, 0, 2], dtype=F64)


def few_trials(trials: Tensor, hits: Tensor) -> None:
    """Beta-binomial: a chance for each of twelve groups of two to eight trials."""
    mean = pyro.sample("mean", dist.Beta(2.0, 2.0))
    size = pyro.sample("size", dist.LogNormal(2.0, 1.0))
    with pyro.plate("groups", len(trials)):
        p = pyro.sample("p", dist.Beta(mean * size, (1 - mean) * size))
        pyro.sample("hits", dist.Binomial(trials, p), obs=hits)


ABILITY, DIFFICULTY = _normal(27, 50), _normal(28, 10)
DISCRIMINATION = (0.4 * _normal(29, 10)).exp()
ANSWERS = (
    torch.rand(50, 10, generator=random(30), dtype=F64)
    < (DISCRIMINATION * (ABILITY[:, None] - DIFFICULTY)).sigmoid()
).double()


def items(y: Tensor) -> None:
    """Item response with two parameters for each of ten items, and fifty persons."""
    with pyro.plate("items", y.shape[1]):
        slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
    with pyro.plate("persons", len(y)):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        logits = slope * (ability[:, None] - level)
        pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)


ROWS = torch.tensor([[8.0, 1, 1], [2, 6, 2], [5, 5, 0], [1, 2, 7], [9, 1, 0], [3, 3, 4]], dtype=F64)


def shares(counts: Tensor) -> None:
    """Dirichlet-multinomial counts: the common shares and how far rows are from them."""
    base = pyro.sample("base", dist.Dirichlet(torch.ones(3)))
    size = pyro.sample("size", dist.LogNormal(1.0, 1.0))
    with pyro.plate("rows", len(counts)):
        pyro.sample("counts", dist.DirichletMultinomial(size * base, counts.sum(-1)), obs=counts)


# ---------------------------------------------------------------------- series

_STEPS = 0.5 * _normal(31, 100)
SERIES = torch.zeros(100, dtype=F64)
for _i in range(1, 100):
    SERIES[_i] = 0.1 + 0.95 * SERIES[_i - 1] + _STEPS[_i]


def series(y: Tensor) -> None:
    """A first-order autoregression near a random walk."""
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    rho = pyro.sample("rho", dist.Uniform(-1.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("steps", len(y) - 1):
        pyro.sample("y", dist.Normal(level + rho * y[:-1], s), obs=y[1:])


# ---------------------------------------------------------------------- shapes


def ridge(y: Tensor) -> None:
    """Only the sum of three numbers is seen, to a thousandth."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(), 1e-3), obs=y)


SUM = torch.tensor(1.5, dtype=F64)


def _ridge() -> Moments:
    ones = torch.ones(3, dtype=F64)
    covariance = torch.eye(3, dtype=F64) - torch.outer(ones, ones) / (3 + 1e-6)
    return ones * 1.5 / (3 + 1e-6), covariance.diagonal().sqrt()


def sizes(y: Tensor) -> None:
    """One latent of a millionth and one of a million, each seen once with noise as large as itself."""
    small = pyro.sample("small", dist.Normal(0.0, 1e-6))
    large = pyro.sample("large", dist.Normal(0.0, 1e6))
    pyro.sample("x", dist.Normal(small, 1e-6), obs=y[0])
    pyro.sample("y", dist.Normal(large, 1e6), obs=y[1])


SMALL_LARGE = torch.tensor([2e-6, 3e6], dtype=F64)


def _sizes() -> Moments:
    return SMALL_LARGE / 2, torch.tensor([1e-6, 1e6], dtype=F64) * math.sqrt(0.5)


def waiting(y: Tensor) -> None:
    """The rate of two waiting times: a skewed Gamma posterior."""
    rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Exponential(rate), obs=y)


TIMES = torch.tensor([0.4, 1.1], dtype=F64)


def _waiting() -> Moments:
    shape, rate = 3.0, 2.5
    return torch.tensor([shape / rate], dtype=F64), torch.tensor([math.sqrt(shape) / rate], dtype=F64)


def _quadrature(log_density: Callable[[Tensor], Tensor], low: float, high: float) -> Moments:
    z = torch.linspace(low, high, 400_001, dtype=F64)
    p = log_density(z).softmax(0)
    mean = (p * z).sum()
    return mean[None], (p * (z - mean).square()).sum().sqrt()[None]


def boundary(y: Tensor) -> None:
    """A spread beyond the known noise, of data that have none: its posterior is highest at 0."""
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(0.0, (1 + s**2).sqrt()), obs=y)


CALM = 0.8 * _normal(32, 30)


def _boundary() -> Moments:
    def log_density(s: Tensor) -> Tensor:
        spread = (1 + s**2).sqrt()
        return -0.5 * s**2 - 30 * spread.log() - 0.5 * CALM.square().sum() / spread**2

    return _quadrature(log_density, 0.0, 8.0)


def heavy(y: Tensor) -> None:
    """A location seen twice with Cauchy noise."""
    m = pyro.sample("m", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Cauchy(m, 1.0), obs=y)


PAIR = torch.tensor([-0.3, 0.9], dtype=F64)


def _heavy() -> Moments:
    return _quadrature(
        lambda m: -0.5 * (m / 10) ** 2 - sum(torch.log1p((y - m) ** 2) for y in PAIR), -100.0, 100.0
    )


def two_roots(y: Tensor) -> None:
    """The square of a number is seen: two modes of one shape."""
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(z**2, 1.0), obs=y)


def _two_roots() -> Moments:
    return _quadrature(lambda z: -z.square() / 18 - 0.5 * (4.0 - z**2) ** 2, -8.0, 8.0)


def _two_parts(z: Tensor) -> Tensor:
    logs = dist.Normal(torch.tensor([0.0, 20.0]), torch.tensor([1.0, 0.1])).log_prob(z[..., None])
    return torch.logsumexp(logs + torch.tensor([2.0, 1.0]).log(), -1)


def narrow_beside() -> None:
    """A narrow mode of a third of the mass, 20 sds of the wide one away."""
    z = pyro.sample("z", dist.Normal(0.0, 100.0))
    pyro.factor("parts", _two_parts(z))


def _narrow_beside() -> Moments:
    return _quadrature(lambda z: _two_parts(z) - 0.5 * (z / 100) ** 2, -10.0, 30.0)


def product(y: Tensor) -> None:
    """The product of two numbers is seen: two curved ridges."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a * b, 0.2), obs=y)


def _product() -> Moments:
    grid = torch.linspace(-8, 8, 4001, dtype=F64)
    a, b = grid[:, None], grid
    log_p = -0.5 * (a**2 + b**2) - 0.5 * ((1.0 - a * b) / 0.2) ** 2
    p = (log_p - log_p.max()).exp()
    p = p / p.sum()
    sd = (p.sum(1) * grid.square()).sum().sqrt()
    return torch.zeros(2, dtype=F64), torch.stack([sd, sd])


FURTHER: dict[str, Posterior] = {
    "negative binomial regression": Posterior(
        overdispersed, (X, Y_OVERDISPERSED), gaussian=True, quick=False
    ),
    "Student-t regression, outliers": Posterior(outliers, (X, Y_OUTLIERS), quick=False),
    "ordinal regression": Posterior(ordinal, (X, Y_LEVELS), gaussian=True, quick=False),
    "separated classes": Posterior(separated, (X, Y_SEPARATED), quick=False),
    "saturating curve": Posterior(saturating, (DOSE, RESPONSE)),
    "beta-binomial, few trials": Posterior(few_trials, (TRIALS, HITS), quick=False),
    "item response, 70 latents": Posterior(items, (ANSWERS,), quick=False),
    "Dirichlet-multinomial": Posterior(shares, (ROWS,)),
    "autoregression": Posterior(series, (SERIES,)),
    "a sum, seen to a thousandth": Posterior(ridge, (SUM,), _ridge, gaussian=True),
    "scales of 1e-6 and 1e6": Posterior(sizes, (SMALL_LARGE,), _sizes, gaussian=True),
    "two waiting times": Posterior(waiting, (TIMES,), _waiting),
    "spread at its boundary": Posterior(boundary, (CALM,), _boundary),
    "location, Cauchy noise": Posterior(heavy, (PAIR,), _heavy),
    "two roots": Posterior(two_roots, (torch.tensor(4.0, dtype=F64),), _two_roots),
    "a narrow mode beside a wide one": Posterior(narrow_beside, (), _narrow_beside, quick=False, unseen=True),
    "product of two": Posterior(product, (torch.tensor(1.0, dtype=F64),), _product, quick=False),
}
