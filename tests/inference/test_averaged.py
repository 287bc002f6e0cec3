"""Fixed draws for models that learn parameters and guides of one's own, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from scipy.optimize import minimize
from torch import nn

import pyrolvm
from pyrolvm import SettingError

QUIET = {"progress": False}
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 3, generator=GENERATOR)
Y = X @ torch.tensor([1.0, -0.5, 0.2]) + 0.7 * torch.randn(60, generator=GENERATOR)


def learned(x, y):
    """Empirical Bayes: the spread of the weights and the noise are parameters."""
    spread = pyro.param("spread", torch.tensor(1.0), constraint=constraints.positive)
    noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
    w = pyro.sample("w", dist.Normal(torch.zeros(3), spread).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def evidence(spread, noise):
    x, y = X.double(), Y.double()
    covariance = spread**2 * x @ x.T + noise**2 * torch.eye(60, dtype=torch.float64)
    return float(dist.MultivariateNormal(torch.zeros(60).double(), covariance).log_prob(y))


def best_evidence():
    found = minimize(lambda t: -evidence(*map(math.exp, t)), [0.0, 0.0], method="Nelder-Mead", tol=1e-8)
    return -found.fun


def test_parameters_of_the_model_are_those_of_the_largest_evidence():
    """The full-rank guide holds the posterior, so that bound and evidence have one maximum."""
    fitted = pyrolvm.fit(learned, X, Y, guide=AutoMultivariateNormal, **QUIET)
    assert fitted.settings["optimizer"] == "lbfgs"
    assert fitted.convergence.converged is True, fitted.convergence.sentence
    found = [value_of(fitted, name) for name in ("spread", "noise")]
    assert evidence(*found) > best_evidence() - 0.02
    assert fitted.elbo * 60 == pytest.approx(best_evidence(), abs=0.1)


def value_of(fitted, name):
    parameter = fitted.program.parameters[name].detach()
    return float(fitted.program.transform_of(name)(parameter))


def test_a_guide_of_ones_own_has_its_closed_form():
    """m | x ~ N(sum x / (N + 1), 1 / (N + 1)): the optimum within the error that is told."""
    program, x = GlobalMean(), 0.5 + torch.randn(200, generator=torch.Generator().manual_seed(1))
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, **QUIET)
    assert fitted.settings["optimizer"] == "lbfgs"
    assert fitted.convergence.converged is True
    sd = 1 / math.sqrt(201)
    loc, scale = (fitted.program.parameters[n].item() for n in ("loc", "scale"))
    error = fitted.convergence.numbers["monte_carlo_error"]
    assert 0 < error < 0.1
    assert abs(loc - x.sum().item() / 201) < 0.1 * sd
    assert math.exp(scale) == pytest.approx(sd, rel=0.1)
    assert fitted.program.parameters["loc"].dtype == torch.float32


def test_a_guide_that_cannot_be_the_posterior_is_flagged():
    """A normal of sd 0.3 for a posterior of sd 1 / sqrt(201)."""
    program, x = GlobalMean(), 0.5 + torch.randn(200, generator=torch.Generator().manual_seed(1))

    def guide(x):
        pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.3))

    fitted = pyrolvm.fit(program.model, x, guide=guide, optimizer="lbfgs", **QUIET)
    assert fitted.convergence.converged is None
    assert "the guide is not the posterior" in fitted.convergence.sentence


def test_a_maximum_likelihood_has_no_noise():
    """No latents: the maximum is that of least squares, to float32."""

    def model(x, y):
        w = pyro.param("w", torch.zeros(3))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    fitted = pyrolvm.fit(model, X, Y, guide=lambda x, y: None, **QUIET)
    wanted = torch.linalg.lstsq(X.double(), Y.double()[:, None]).solution[:, 0]
    assert (fitted.program.parameters["w"].double() - wanted).abs().max() < 1e-5
    assert fitted.convergence.converged is True
    assert fitted.convergence.numbers["num_draws"] == 1


def coin(x):
    f = pyro.sample("f", dist.Beta(10.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(f), obs=x)


def beta(x):
    a = pyro.param("a", torch.tensor(15.0), constraint=constraints.positive)
    b = pyro.param("b", torch.tensor(15.0), constraint=constraints.positive)
    pyro.sample("f", dist.Beta(a, b))


TOSSES = torch.tensor([1.0] * 6 + [0.0] * 4)


def test_a_beta_guide_is_left_to_steps():
    """Its derivatives are no recorded operations."""
    with pytest.raises(SettingError, match="cannot be repeated over draws"):
        pyrolvm.fit(coin, TOSSES, guide=beta, optimizer="lbfgs", **QUIET)


def test_draws_that_do_not_move_with_their_gradient_are_refused():
    """A straight-through guide: its gradient is of something else than what it draws."""

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.2))
        rounded = loc + (10 * loc).round().detach() / 10 - loc.detach()
        pyro.sample("m", dist.Normal(rounded, 0.1))

    program, x = GlobalMean(), torch.randn(20, generator=torch.Generator().manual_seed(1))
    with pytest.raises(SettingError, match="do not move smoothly"):
        pyrolvm.fit(program.model, x, guide=guide, optimizer="lbfgs", **QUIET)


def test_a_refusal_leaves_parameters_as_they_were():
    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    with pytest.raises(SettingError, match="the bound on fixed draws"):
        pyrolvm.fit(model, torch.zeros(5), guide=lambda x: None, optimizer="lbfgs", **QUIET)


def test_layers_are_refused():
    layer = nn.Linear(3, 1)

    def model(x, y):
        pyro.module("layer", layer)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(w + layer(x)[:, 0], 1.0), obs=y)

    with pytest.raises(SettingError, match="layers are trained"):
        pyrolvm.fit(model, X, Y, guide=AutoNormal, optimizer="lbfgs", **QUIET)
