"""Fits on fixed draws against closed forms: bounds, covariances, verdicts and weights whose constants all count."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import autoguide

import pyrolvm
from pyrolvm.inference.log_joint import solve
from pyrolvm.inference.log_joint.climbing import climb
from pyrolvm.inference.log_joint.families import DIAGONAL, Family, Gaussian
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.pathfinder import find_paths, mixture_log_prob, normals_along
from pyrolvm.inference.log_joint.response import respond
from pyrolvm.inference.log_joint.verdict import weigh

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 3, generator=GENERATOR) @ torch.tensor(
    [[1.0, 0.8, 0.0], [0.0, 0.6, 0.3], [0.0, 0.0, 5.0]]
)
Y = X @ torch.tensor([1.0, -1.0, 0.2]) + torch.randn(40, generator=GENERATOR)
QUIET = {"progress": False, "dtype": "float64"}


def regression(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 3.0).expand([3]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


def exact():
    """(log evidence, mean, precision) of the regression."""
    x, y = X.double(), Y.double()
    precision = x.T @ x + torch.eye(3) / 9
    evidence = dist.MultivariateNormal(torch.zeros(40).double(), torch.eye(40) + 9 * x @ x.T).log_prob(y)
    return float(evidence), torch.linalg.solve(precision, x.T @ y), precision


def gap_of_the_mean_field():
    """KL(q || p) of the best factorised normal: (sum_i log Lambda_ii - log det Lambda) / 2."""
    precision = exact()[2]
    return 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))


@pytest.mark.parametrize(
    ("guide", "short"),
    [
        (autoguide.AutoMultivariateNormal, 0.0),
        (lambda model: autoguide.AutoLowRankMultivariateNormal(model, rank=3), 0.0),
        (autoguide.AutoNormal, None),
    ],
    ids=["full", "low rank", "mean field"],
)
def test_the_bound_is_the_evidence_less_the_gap_of_the_family(guide, short):
    evidence, _, precision = exact()
    fitted = pyrolvm.fit(regression, X, Y, guide=guide(regression), optimizer="lbfgs", **QUIET)
    wanted = evidence - (gap_of_the_mean_field() if short is None else short)
    assert fitted.elbo * 40 == pytest.approx(wanted, abs=0.01)
    if short is not None:
        own = torch.as_tensor(fitted.covariance((X, Y), method="guide").to_numpy(copy=True))
        torch.testing.assert_close(own @ precision, torch.eye(3).double(), atol=0.03, rtol=0)


EFFECTS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])


def schools(y, error):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, error), obs=y)


def one_number(x):
    m = pyro.sample("m", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


@pytest.mark.parametrize(("off", "wide"), [(0.5, 1.0), (-0.4, 1.0), (0.0, 1.6)])
def test_the_verdict_measures_by_how_much_weights_move_an_answer(off, wide):
    """q = N(mean + off sd, (wide sd)^2) of a normal posterior: the mean moves by off / wide, the log-sd by log wide."""
    x = torch.randn(25, generator=torch.Generator().manual_seed(1))
    pair = pyrolvm.fit(one_number, x, guide="AutoNormal", **QUIET).pair(x)
    log_joint = LogJoint(pair)
    family = Family(pair.program, log_joint)
    q = family.read()
    family.write(Gaussian(DIAGONAL, q.location + off * q.scale, sd=wide * q.scale))
    numbers = weigh(pair, log_joint, num_draws=20_000).numbers
    assert numbers["mean_shift"] == pytest.approx(abs(off) / wide, abs=0.04)
    assert numbers["sd_shift"] == pytest.approx(math.log(wide), abs=0.04)


def test_draws_are_doubled_until_others_leave_the_optimum_where_it_is():
    """Eight schools in low rank: 64 draws give sds off by up to a quarter, and weights would let it pass."""
    fitted = pyrolvm.fit(schools, EFFECTS, ERRORS, guide="AutoLowRankMultivariateNormal", progress=False)
    numbers = fitted.convergence.numbers
    assert numbers["num_draws"] > 64
    assert numbers["moved"] <= 0.1
    assert numbers["monte_carlo_error"] <= 0.1 / math.sqrt(3)
    draws = fitted.posterior((EFFECTS, ERRORS), 4000)
    assert float(draws["z"].std(0).log().abs().max()) < 0.25  # they are within 2% of 1 by NUTS
    assert fitted.convergence.converged is None
    assert "take AutoMultivariateNormal" in fitted.convergence.sentence


# ---------------------------------------------------------------------- linear response


def test_linear_response_gains_the_gap_of_the_mean_field():
    fitted = pyrolvm.fit(regression, X, Y, guide=autoguide.AutoNormal, **QUIET)
    response = respond(solve(fitted.pair((X, Y))).optimum)
    assert response.gain == pytest.approx(gap_of_the_mean_field(), abs=0.01)


def test_linear_response_that_lowers_the_bound_is_refused():
    fitted = pyrolvm.fit(schools, EFFECTS, ERRORS, guide=autoguide.AutoNormal, progress=False)
    with pytest.raises(pyrolvm.SettingError, match="lowers the bound"):
        fitted.covariance((EFFECTS, ERRORS))


# ---------------------------------------------------------------------- Pathfinder


def test_every_normal_of_a_path_is_a_newton_step_and_keeps_the_last_secant():
    """Sigma z = s for the last move s and change of slope z; the location is theta + Sigma slope (section 2.2)."""
    target = dist.MultivariateNormal(
        torch.ones(4).double(), torch.diag(torch.tensor([4.0, 1.0, 0.25, 9.0]).double())
    )

    def banana(u):
        at = u.clone().requires_grad_()
        value = target.log_prob(at) - 0.05 * at[0] ** 2 * at[1] ** 2
        (slope,) = torch.autograd.grad(value, at)
        return float(value.detach()), slope

    path = climb(banana, torch.full((4,), -1.5).double(), gradient_tolerance=1e-8)
    normals = list(normals_along(path))
    assert len(normals) == len(path.steps) - 1 > 3
    for before, after, normal in zip(path.steps, path.steps[1:], normals, strict=False):
        root = (normal.at(torch.eye(4).double()) - normal.location).T
        covariance = root @ root.T
        torch.testing.assert_close(normal.location, after.point + covariance @ after.slope)
        torch.testing.assert_close(covariance @ (before.slope - after.slope), after.point - before.point)
        assert normal.log_scale == pytest.approx(0.5 * float(torch.logdet(covariance)))


def test_a_mixture_of_one_normal_twice_is_that_normal():
    x = torch.randn(25, generator=torch.Generator().manual_seed(1))
    pair = pyrolvm.fit(one_number, x, guide="AutoNormal", **QUIET).pair(x)
    normal = find_paths(LogJoint(pair), 0)[0]
    u = torch.linspace(-1, 1, 7).double()[:, None]
    torch.testing.assert_close(mixture_log_prob([normal, normal], u), normal.log_prob(u))


# ---------------------------------------------------------------------- weights of any guide


def test_corrected_draws_weigh_shared_latents_by_all_rows():
    """A guide of one's own that is shifted by a sd and too wide: each draw has one weight, of all 25 rows."""
    x = torch.randn(25, generator=torch.Generator().manual_seed(1)) + 1.0
    mean, sd = x.double().sum() / 25.01, 25.01**-0.5

    def guide(x):
        loc = pyro.param("loc", lambda: torch.tensor(float(mean) + sd))
        scale = pyro.param("scale", lambda: torch.tensor(1.5 * sd), constraint=constraints.positive)
        pyro.sample("m", dist.Normal(loc, scale))

    fitted = pyrolvm.fit(one_number, x, guide=guide, num_steps=1, learning_rate=1e-12, progress=False)
    found = fitted.posterior(x, 2000, corrected=True)["m"].double()
    error = 1 / math.sqrt(2000 * 0.5)  # about half of the weights are effective
    assert abs((found.mean() - mean) / sd) < 4 * error
    assert abs((found.std() / sd).log()) < 4 * error
