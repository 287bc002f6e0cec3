"""The normal distribution around the point of an AutoLaplaceApproximation."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.infer.autoguide.initialization import init_to_value

import pyrolvm

QUIET = {"progress": False}
X = 1.0 + torch.randn(40, generator=torch.Generator().manual_seed(0))


def conjugate(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def with_scale(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, scale), obs=x)


def test_of_a_gaussian_posterior_it_is_the_posterior():
    fitted = pyrolvm.fit(conjugate, X, guide="AutoLaplaceApproximation", **QUIET)
    normal = fitted.laplace_approximation(X)
    precision = 0.25 + len(X)
    draws = normal.posterior(X, 4000)["mu"]
    assert draws.mean().item() == pytest.approx(
        X.sum().item() / precision, abs=4 * precision**-0.5 / 4000**0.5
    )
    assert draws.std().item() == pytest.approx(precision**-0.5, rel=0.05)
    covariance = torch.eye(len(X), dtype=torch.float64) + 4.0
    evidence = dist.MultivariateNormal(torch.zeros(len(X), dtype=torch.float64), covariance).log_prob(
        X.double()
    )
    assert normal.elbo * len(X) == pytest.approx(evidence.item(), abs=1e-3)
    assert normal.convergence.converged
    assert fitted.posterior(X, 3)["mu"].std() == 0  # the fit is the point still


def test_how_far_the_point_is_from_the_mode_is_counted_in_sds():
    precision = 0.25 + len(X)
    at = X.sum() / precision + 3 * precision**-0.5
    guide = AutoLaplaceApproximation(conjugate, init_loc_fn=init_to_value(values={"mu": at}))
    still = {"num_steps": 1, "learning_rate": 1e-9, "engine": "eager", "initialise": False}
    found = pyrolvm.fit(conjugate, X, guide=guide, **still, **QUIET).laplace_approximation(X).convergence
    assert found.numbers["away"] == pytest.approx(3, rel=1e-4)
    assert not found.converged
    assert found.sentence == "not the mode: a Newton step from the point is 3 sd long"


def test_it_is_that_of_pyro(tmp_path):
    fitted = pyrolvm.fit(with_scale, X, guide="AutoLaplaceApproximation", **QUIET)
    normal = fitted.laplace_approximation(X)
    with fitted.program.scope():
        theirs = fitted.program.auto_guide.laplace_approximation(X)
    ours = normal.program.auto_guide
    for guide in (ours, theirs):
        guide.tril = (guide.scale[:, None] * guide.scale_tril).detach()
    torch.testing.assert_close(ours.tril @ ours.tril.T, theirs.tril @ theirs.tril.T, rtol=1e-3, atol=1e-6)
    loaded = pyrolvm.load(
        normal.save(tmp_path / "run"), model=with_scale, guide="AutoMultivariateNormal", example=X
    )
    assert torch.equal(loaded.posterior(X, 5)["scale"], normal.posterior(X, 5)["scale"])


def test_discrete_latents_are_summed_out():
    """Two heaps far apart: each location has the posterior of its own heap."""

    @config_enumerate
    def heaps(x):
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-3.0, 3.0]), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(locs[k], 0.5), obs=x)

    x = torch.cat([0.5 * X[:15] - 4, 0.5 * X[15:] + 4])
    start = init_to_value(values={"locs": torch.tensor([-3.5, 4.5])})
    guide = AutoLaplaceApproximation(pyro.poutine.block(heaps, hide=["k"]), init_loc_fn=start)
    steps = {"num_steps": 60, "learning_rate": 0.1, "engine": "eager", "initialise": False}
    fitted = pyrolvm.fit(
        heaps, x, guide=guide, objective=TraceEnum_ELBO(max_plate_nesting=1), **steps, **QUIET
    )
    draws = fitted.laplace_approximation(x).posterior(x, 600)["locs"]
    precision = 0.01 + torch.tensor([15.0, 25.0]) / 0.25
    torch.testing.assert_close(draws.std(0), precision.rsqrt(), rtol=0.12, atol=0)


def test_other_guides_and_points_that_are_no_maximum_are_declined():
    other = pyrolvm.fit(with_scale, X, guide="AutoNormal", num_steps=2, **QUIET)
    with pytest.raises(pyrolvm.SettingError, match="this guide is AutoNormal"):
        other.laplace_approximation(X)

    def two_bumps(x):
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z**2, 1.0), obs=x)

    options = {"num_steps": 1, "engine": "eager", "initialise": False, **QUIET}
    guide = AutoLaplaceApproximation(two_bumps, init_loc_fn=init_to_value(values={"z": torch.tensor(0.1)}))
    between = pyrolvm.fit(two_bumps, X + 3, guide=guide, **options)
    with pytest.raises(pyrolvm.ProgramError, match="no maximum"):
        between.laplace_approximation(X + 3)
