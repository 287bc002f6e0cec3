"""What the verdict on a guide rests on: its thresholds, one by one, and walks that leave a posterior as it is."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrolvm
from pyrolvm.inference.log_joint.verdict import _flags_of_optimum, _flags_of_weights
from pyrolvm.inference.log_joint.walks import drift, walked

GOOD_WEIGHTS = {"khat": 0.3, "effective_share": 0.9, "mean_shift": 0.0, "sd_shift": 0.0}
GOOD_OPTIMUM = {"gradient_norm": 1e-5, "moved": 0.0, "monte_carlo_error": 0.0}


@pytest.mark.parametrize(
    ("found", "flags"),
    [
        ({}, ()),
        ({"mean_shift": 0.099}, ()),
        ({"mean_shift": 0.101}, ("shift",)),
        ({"sd_shift": 0.099}, ()),
        ({"sd_shift": 0.101}, ("shift",)),
        ({"mean_shift": math.nan}, ("shift",)),
        ({"effective_share": 0.051}, ()),
        ({"effective_share": 0.049}, ("few",)),
        ({"effective_share": 0.099, "khat": 0.69}, ()),
        ({"effective_share": 0.099, "khat": 0.71}, ("tail",)),
        ({"effective_share": 0.101, "khat": 0.99}, ()),
        ({"effective_share": 0.949, "khat": 1.01}, ("tail",)),
        ({"effective_share": 0.951, "khat": 5.0}, ()),  # all but equal
        ({"khat": -math.inf}, ()),
    ],
)
def test_what_the_weights_may_do_without_a_word(found, flags):
    assert _flags_of_weights(GOOD_WEIGHTS | found) == flags


@pytest.mark.parametrize(
    ("found", "flags"),
    [
        ({}, ()),
        ({"gradient_norm": 0.9e-2}, ()),
        ({"gradient_norm": 1.1e-2}, ("gradient",)),
        ({"gradient_norm": math.nan}, ("gradient",)),
        ({"moved": 0.19}, ()),
        ({"moved": 0.21}, ("moves",)),
        ({"monte_carlo_error": 0.09}, ()),
        ({"monte_carlo_error": 0.11}, ("moves",)),
        ({"moved": math.inf}, ("moves",)),
    ],
)
def test_what_counts_as_an_optimum(found, flags):
    assert _flags_of_optimum(GOOD_OPTIMUM | found) == flags


def test_tails_that_no_draw_has_reached_are_flagged():
    """A location seen twice with Cauchy noise: the best normal's sd is 14% too small, and weights move it by 6%."""

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Cauchy(m, 1.0), obs=y)

    fitted = pyrolvm.fit(model, torch.tensor([-0.3, 0.9]), guide="AutoMultivariateNormal", progress=False)
    assert fitted.convergence.numbers["khat"] > 1
    assert fitted.convergence.converged is None
    assert "is not the posterior: it misses tails (k-hat" in fitted.convergence.sentence


class LogGamma:
    """u = (log x_1, log x_2) of independent x_i ~ Gamma(shape_i, 1), as a log joint."""

    def __init__(self, *shapes):
        self.shapes = torch.tensor(shapes, dtype=torch.float64)

    def slope(self, u):
        return (self.shapes * u - u.exp()).sum(-1), self.shapes - u.exp()

    def scalars(self, u):
        return u.exp(), ["x[0]", "x[1]"]


def test_walks_leave_a_posterior_as_it_is_and_spread_what_is_too_narrow():
    target = LogGamma(3.0, 12.0)
    gamma = torch.distributions.Gamma(target.shapes, torch.ones(2).double())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = gamma.sample((20_000,))
    after = walked(target, x.log(), 1).exp()
    moved = float((after - x).abs().mean(0).min())
    assert moved > 0.5  # they do walk
    error = target.shapes.sqrt() / math.sqrt(20_000)
    assert ((after.mean(0) - target.shapes).abs() < 4 * error).all()
    # the variance of a Gamma's sample variance: its excess kurtosis is 6 / shape
    spread = ((2 + 6 / target.shapes) / 20_000).sqrt()
    assert ((after.var(0) / target.shapes - 1).abs() < 4 * spread).all()
    narrow = target.shapes.log() + 0.3 * (x.log() - target.shapes.log())
    assert drift(target, x.log()[:2000], 1)[0] < 0.1
    assert drift(target, narrow[:2000], 1)[0] > 0.5
