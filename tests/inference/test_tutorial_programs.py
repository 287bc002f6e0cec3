"""Programs as Pyro's tutorials have them, fitted with model, data and guide alone: converged, or it says why."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn, tensor

import pyrolvm

GENERATOR = torch.Generator().manual_seed(0)


def fit(model, *data, guide):
    """With nothing else said."""
    return pyrolvm.fit(model, *data, guide=guide, progress=False)


def moments(fitted, data, site, num_draws=4000):
    values = fitted.posterior(data, num_draws)[site].double()
    return values.mean(0), values.std(0)


# ---------------------------------------------------------------------- "SVI Part I": is the coin fair?

TOSSES = tensor([1.0] * 6 + [0.0] * 4)
FAIRNESS = 16 / 30, math.sqrt(16 * 14 / 30**2 / 31)


def coin(data):
    f = pyro.sample("latent_fairness", dist.Beta(10.0, 10.0))
    for i in range(len(data)):
        pyro.sample(f"obs_{i}", dist.Bernoulli(f), obs=data[i])


def test_a_coin_with_an_autoguide():
    fitted = fit(coin, TOSSES, guide=AutoNormal)
    mean, sd = moments(fitted, TOSSES, "latent_fairness")
    assert float(abs(mean - FAIRNESS[0])) < 0.1 * FAIRNESS[1]
    assert float(sd) == pytest.approx(FAIRNESS[1], rel=0.1)
    assert fitted.convergence.converged is True


# ---------------------------------------------------------------------- "MLE and MAP"


def test_the_maximum_likelihood_of_a_coin_is_its_share_of_heads():
    def model(data):
        f = pyro.param("f", tensor(0.5), constraint=constraints.unit_interval)
        with pyro.plate("data", data.size(0)):
            pyro.sample("obs", dist.Bernoulli(f), obs=data)

    fitted = fit(model, TOSSES, guide=lambda data: None)
    assert fitted.program.parameters["f"].sigmoid().item() == pytest.approx(0.6, abs=1e-4)
    assert fitted.convergence.converged is True


def test_a_map_estimate_by_a_delta_guide():
    """The mode of Beta(16, 14) is 15/28."""

    def model(data):
        f = pyro.sample("f", dist.Beta(10.0, 10.0))
        with pyro.plate("data", data.size(0)):
            pyro.sample("obs", dist.Bernoulli(f), obs=data)

    def guide(data):
        f = pyro.param("f_map", tensor(0.5), constraint=constraints.unit_interval)
        pyro.sample("f", dist.Delta(f))

    fitted = fit(model, TOSSES, guide=guide)
    assert fitted.program.parameters["f_map"].sigmoid().item() == pytest.approx(15 / 28, abs=1e-3)
    assert fitted.convergence.converged is True


# ---------------------------------------------------------------------- "Introduction": an unreliable scale


def test_an_unreliable_scale_has_its_closed_form():
    def scale(measurement):
        weight = pyro.sample("weight", dist.Normal(8.5, 1.0))
        pyro.sample("measurement", dist.Normal(weight, 0.75), obs=measurement)

    def guide(measurement):
        a = pyro.param("a", tensor(8.5))
        b = pyro.param("b", tensor(1.0), constraint=constraints.positive)
        pyro.sample("weight", dist.Normal(a, b))

    variance = 1 / (1 + 1 / 0.75**2)
    fitted = fit(scale, tensor(9.5), guide=guide)
    parameters = fitted.program.parameters
    mean = variance * (8.5 + 9.5 / 0.75**2)
    assert parameters["a"].item() == pytest.approx(mean, abs=0.1 * math.sqrt(variance))
    assert parameters["b"].exp().item() == pytest.approx(math.sqrt(variance), rel=0.1)
    assert fitted.convergence.converged is True


# ---------------------------------------------------------------------- "Bayesian Regression"

N = 170
RUGGED = torch.randn(N, generator=GENERATOR).abs() * 1.2
AFRICA = (torch.rand(N, generator=GENERATOR) < 0.3).float()
GDP = 9.2 - 0.2 * RUGGED - 1.95 * AFRICA + 0.39 * RUGGED * AFRICA + 0.9 * torch.randn(N, generator=GENERATOR)


def gdp(is_cont_africa, ruggedness, log_gdp=None):
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    b_a = pyro.sample("bA", dist.Normal(0.0, 1.0))
    b_r = pyro.sample("bR", dist.Normal(0.0, 1.0))
    b_ar = pyro.sample("bAR", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
    mean = a + b_a * is_cont_africa + b_r * ruggedness + b_ar * is_cont_africa * ruggedness
    with pyro.plate("data", len(ruggedness)):
        pyro.sample("obs", dist.Normal(mean, sigma), obs=log_gdp)


def gdp_guide(is_cont_africa, ruggedness, log_gdp=None):
    for name, start in (("a", 9.0), ("bA", 0.0), ("bR", 0.0), ("bAR", 0.0)):
        loc = pyro.param(f"{name}_loc", tensor(start))
        scale = pyro.param(f"{name}_scale", tensor(0.3), constraint=constraints.positive)
        pyro.sample(name, dist.Normal(loc, scale))
    sigma = pyro.param("sigma_loc", tensor(1.0), constraint=constraints.positive)
    pyro.sample("sigma", dist.LogNormal(sigma.log(), 0.05))


def least_squares():
    x = torch.stack([torch.ones(N), AFRICA, RUGGED, AFRICA * RUGGED], 1).double()
    prior = torch.tensor([0.01, 1.0, 1.0, 1.0]).double()
    sigma = 0.9
    precision = x.T @ x / sigma**2 + prior.diag()
    covariance = torch.linalg.inv(precision)
    return covariance @ (x.T @ GDP.double()) / sigma**2, covariance.diagonal().sqrt(), precision


@pytest.mark.parametrize(
    ("guide", "converged"),
    [(AutoMultivariateNormal, True), (AutoDiagonalNormal, None), (gdp_guide, None)],
    ids=["full", "diagonal", "own"],
)
def test_the_regression_tutorial(guide, converged):
    """Means as by least squares at the true noise; a factorised guide is told apart from the posterior."""
    data = (AFRICA, RUGGED, GDP)
    fitted = fit(gdp, *data, guide=guide)
    mean, sd, _ = least_squares()
    found = torch.stack([moments(fitted, data, n)[0] for n in ("a", "bA", "bR", "bAR")])
    assert ((found - mean).abs() / sd).max() < 0.25
    assert fitted.convergence.converged is converged
    assert fitted.settings["optimizer"] == "lbfgs"


class Regression(PyroModule):
    """The tutorial's first form: a linear layer whose weights are given priors."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def test_a_layer_with_priors_is_no_network():
    x = torch.stack([AFRICA, RUGGED, AFRICA * RUGGED], 1)
    fitted = fit(Regression(), x, GDP, guide=AutoMultivariateNormal)
    mean, sd, _ = least_squares()
    found = moments(fitted, (x, GDP), "linear.weight")[0].reshape(-1)
    assert ((found - mean[1:]).abs() / sd[1:]).max() < 0.25
    assert fitted.convergence.converged is True


# ---------------------------------------------------------------------- "Gaussian Mixture Model"


@pytest.mark.slow
def test_the_mixture_tutorial_finds_two_clusters():
    data = tensor([0.0, 1.0, 10.0, 11.0, 12.0])

    @config_enumerate
    def model(data):
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    guide = AutoDelta(poutine.block(model, expose=["weights", "locs", "scale"]))
    fitted = fit(model, data, guide=guide)
    locs = fitted.posterior(data, 1)["locs"].reshape(-1).sort().values
    torch.testing.assert_close(locs, tensor([0.49, 10.98]), atol=0.05, rtol=0)
    assert fitted.convergence.converged is True


# ---------------------------------------------------------------------- summed-out states


def test_a_state_without_a_plate_is_drawn_from_its_exact_posterior():
    """p(z = 1 | y) of one summed-out state, given that m is known to within 0.01."""

    @config_enumerate
    def model(y):
        m = pyro.sample("m", dist.Normal(1.0, 0.01))
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(m * z, 1.0), obs=y)

    y = tensor(0.8)
    fitted = fit(model, y, guide=AutoNormal(poutine.block(model, expose=["m"])))
    share = fitted.posterior(y, 2000)["z"].float().mean()
    odds = 0.3 / 0.7 * math.exp(-0.5 * (0.8 - 1) ** 2 + 0.5 * 0.8**2)
    assert float(share) == pytest.approx(odds / (1 + odds), abs=0.05)


# ---------------------------------------------------------------------- logistic regression, partial pooling


def test_logistic_regression_by_pyros_plate():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(4))
    y = torch.bernoulli(
        (x @ tensor([1.0, -2.0, 0.5]) + 0.3).sigmoid(), generator=torch.Generator().manual_seed(5)
    )

    def model(x, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ beta + alpha), obs=y)

    fitted = fit(model, x, y, guide=AutoMultivariateNormal)
    beta, sd = moments(fitted, (x, y), "beta")
    assert ((beta - tensor([1.0, -2.0, 0.5])).abs() / sd).max() < 3
    assert fitted.convergence.converged is True


@pytest.mark.slow
def test_baseball_by_partial_pooling_says_why():
    at_bats = torch.full((18,), 45.0)
    hits = tensor([18.0, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7])

    def pooled(at_bats, hits):
        m = pyro.sample("m", dist.Uniform(0.0, 1.0))
        kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
        with pyro.plate("players", 18):
            phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
            pyro.sample("hits", dist.Binomial(at_bats, phi), obs=hits)

    fitted = fit(pooled, at_bats, hits, guide=AutoMultivariateNormal)
    assert fitted.convergence.converged is None
    assert "kappa" in fitted.convergence.sentence


@pytest.mark.slow
def test_separated_data_under_a_vague_prior_are_flagged():
    """Half of a normal of sd 1e6: no normal in the slope is like it."""
    x = torch.linspace(-1, 1, 20)

    def separated(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1e6))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=b * x), obs=y)

    fitted = fit(separated, x, (x > 0).float(), guide=AutoNormal)
    assert fitted.convergence.converged is not True
