"""L_K rises with K to the exact value, and annealing bounds it from both sides: PPCA, factors, mixtures."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrolvm
from pyrolvm import PPCA, VAE, SettingError, data_plate
from pyrolvm.inference.engine.recorded import Recorded
from pyrolvm.inference.posterior.evidence import bidirectional, evidence_table, iwae_bounds
from pyrolvm.inference.program import pair

QUIET = {"progress": False, "engine": "eager"}
STILL = {"num_steps": 1, "learning_rate": 1e-12, **QUIET}
X = torch.randn(30, 4, generator=torch.Generator().manual_seed(3)) @ torch.randn(
    4, 4, generator=torch.Generator().manual_seed(4)
)
ROWS, CHAINS = 60, 32


# ---------------------------------------------------------------------- three programs with a known log p(x)


def ppca():
    """Its guide is wide and off centre: weights of finite variance, so that a standard error means something."""
    model = PPCA.closed_form(X, 2, guide="full")
    with torch.no_grad():
        model.guide_loadings.mul_(0.5)
        model.guide_log_scale.add_(0.3)
    fitted = pyrolvm.fit(model, X, **STILL)
    mean, scale_tril = (t.detach() for t in model.exact_posterior(X))
    return (
        fitted,
        X,
        fitted.log_evidence(X, "exact").detach(),
        dist.MultivariateNormal(mean, scale_tril=scale_tril),
    )


LOADINGS = torch.tensor([[1.0, 0.5, 0.0, -1.0], [0.0, 1.0, 1.5, 0.5]])  # [factors, columns]
NOISE = torch.tensor([0.3, 0.5, 0.8, 1.0])


def factors():
    """z ~ N(0, I), x ~ N(z LOADINGS, diag(NOISE^2)): log N(x; 0, LOADINGS' LOADINGS + diag(NOISE^2))."""

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ LOADINGS, NOISE).to_event(1), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(1.1))
        with data_plate(x):
            pyro.sample("z", dist.Normal(torch.zeros(2), scale).expand([2]).to_event(1))

    covariance = LOADINGS.T @ LOADINGS + torch.diag(NOISE**2)
    x = dist.MultivariateNormal(torch.zeros(4), covariance).sample((ROWS,))
    exact = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(x)
    precision = torch.eye(2) + (LOADINGS / NOISE**2) @ LOADINGS.T
    mean = torch.linalg.solve(precision, ((LOADINGS / NOISE**2) @ x.T)).T
    fitted = pyrolvm.fit(model, x, guide=guide, **STILL)
    return fitted, x, exact, dist.MultivariateNormal(mean, precision_matrix=precision)


WEIGHTS, MEANS, SCALE, WIDTH = torch.tensor([0.3, 0.7]), torch.tensor([-1.2, 1.2]), 0.6, 0.8


def components(loc=MEANS, scale=SCALE, weights=WEIGHTS):
    return dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, scale))


def mixture():
    """z ~ a mixture of two normals, x ~ N(z, WIDTH^2): x and z | x are such mixtures too."""

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", components())
            pyro.sample("x", dist.Normal(z, WIDTH), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(1.5))
        with data_plate(x):
            pyro.sample("z", dist.Normal(0.0, scale))

    total = math.sqrt(SCALE**2 + WIDTH**2)
    x = components(scale=total).sample((ROWS,))
    joint = WEIGHTS.log() + dist.Normal(MEANS, total).log_prob(x.unsqueeze(-1))  # [rows, 2]
    share = SCALE**2 / total**2
    centres = MEANS + share * (x.unsqueeze(-1) - MEANS)
    posterior = components(centres, SCALE * WIDTH / total, joint.softmax(-1))
    return pyrolvm.fit(model, x, guide=guide, **STILL), x, joint.logsumexp(-1), posterior


@pytest.mark.parametrize("program", [ppca, factors, mixture])
def test_l_k_rises_to_the_exact_value(program):
    fitted, x, exact, _ = program()
    table = iwae_bounds(fitted.pair(x), 6000, (1, 5, 50, 6000), seed=1)
    assert list(table) == ["L_1", "L_5", "L_50", "L_6000", "k_hat"]
    means = table.drop(columns="k_hat").mean()
    assert means.is_monotonic_increasing
    assert means["L_1"] < exact.mean() - 0.05
    last = evidence_table(fitted.pair(x), "importance", 6000, seed=1)
    assert (last.log_evidence == table["L_6000"]).all()
    error = math.sqrt((last.standard_error**2).sum()) / len(x)
    assert abs(means["L_6000"] - exact.mean().item()) < 4 * error + 1e-3


@pytest.mark.parametrize("program", [ppca, factors, mixture])
def test_annealing_is_exact_and_bounds_from_both_sides(program):
    fitted, x, exact, posterior = program()
    exact = exact.double().numpy()
    options = {"num_steps": 60, "num_leapfrog": 5}
    table = evidence_table(fitted.pair(x), "ais", CHAINS, **options)
    assert abs(table.log_evidence.mean() - exact.mean()) < 0.05
    both = bidirectional(
        fitted.pair(x), exact_draws={"z": posterior.sample((CHAINS,))}, num_chains=CHAINS, **options
    )
    error = both[["lower_error", "upper_error"]].pow(2).sum().pow(0.5) / len(x)
    assert both.lower.mean() < exact.mean() + 3 * error["lower_error"]
    assert both.upper.mean() > exact.mean() - 3 * error["upper_error"]
    assert both.gap.mean() < 0.1


def test_the_bounds_of_one_k_are_those_of_iwae():
    fitted, x, *_ = mixture()
    bounds = iwae_bounds(fitted.pair(x), 300, (1, 50))
    torch.testing.assert_close(
        torch.tensor(bounds["L_50"]), fitted.log_evidence(x, "iwae", 300, num_particles=50)
    )
    assert (bounds.k_hat == evidence_table(fitted.pair(x), "iwae", 300).k_hat).all()
    with pytest.raises(SettingError, match="num_samples=300 must be a multiple of num_particles=7"):
        iwae_bounds(fitted.pair(x), 300, (7,))


# ---------------------------------------------------------------------- fast ways to the same numbers


def test_the_two_pass_density_of_bits_is_torchs(monkeypatch):
    images = (torch.rand(7, 30) > 0.5).float()
    fitted = pyrolvm.fit(VAE(30, 3, hidden=(8,)), images, num_steps=5, **QUIET)
    fast = evidence_table(fitted.pair(images), "importance", 50)
    monkeypatch.setattr(pair, "_weigh_bits", lambda site: None)
    slow = evidence_table(fitted.pair(images), "importance", 50)
    torch.testing.assert_close(*(torch.tensor(t.log_evidence) for t in (fast, slow)), atol=1e-4, rtol=1e-6)


def test_the_record_of_a_function_does_what_it_does():
    weight = torch.randn(3, 3)

    def noisy(x, scale):
        return (x @ (weight.T * 2) + scale * torch.randn(2, 3), x.exp())

    recorded, x = Recorded(patience=2), torch.randn(2, 3)
    for call in range(6):
        x = x + 1
        scale = torch.tensor(0.1 * call)
        torch.manual_seed(call)
        wanted = noisy(x, scale)
        torch.manual_seed(call)
        found = recorded(noisy, x, scale)
        torch.testing.assert_close(found, wanted)
        assert len(recorded.replays) == (call >= 2)
    assert all(recorded.replays.values())
    assert recorded(noisy, torch.ones(2, 3, dtype=torch.float64).float(), scale)[0].shape == (2, 3)


def test_a_function_that_branches_on_values_or_writes_is_called():
    seen = torch.zeros(())

    def branches(x):
        return (x if x.sum() > 0 else -x,)

    def writes(x):
        seen.add_(1)
        return (-x,)

    for function in (branches, writes):
        recorded = Recorded(patience=0)
        assert torch.equal(recorded(function, -torch.ones(2))[0], torch.ones(2))
        assert torch.equal(recorded(function, torch.ones(2))[0], function(torch.ones(2))[0])
        assert list(recorded.replays.values()) == [None]


def test_annealing_by_the_record_is_annealing_by_pyro(monkeypatch):
    fitted, x, *_ = factors()
    fast = evidence_table(fitted.pair(x), "ais", 4, num_steps=10, num_leapfrog=4)
    monkeypatch.setattr("pyrolvm.inference.engine.recorded.PATIENCE", 10**9)
    slow = evidence_table(fitted.pair(x), "ais", 4, num_steps=10, num_leapfrog=4)
    torch.testing.assert_close(*(torch.tensor(t.log_evidence) for t in (fast, slow)), atol=1e-2, rtol=1e-3)


def test_equal_weights_up_to_rounding_have_no_tail():
    """An exact guide's weights differ by what single precision rounds off: no heavy tail, at any size."""
    model = PPCA.closed_form(100 * X, 2, guide="full")
    fitted = pyrolvm.fit(model, 100 * X, **STILL)
    for method in ("importance", "iwae"):
        assert (evidence_table(fitted.pair(100 * X), method, 1000).k_hat == -math.inf).all()
