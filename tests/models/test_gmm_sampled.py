import copy

import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceGraph_ELBO
from pyro.optim import Adam

import pyrolvm
from pyrolvm.models.gmm import GaussianMixture
from pyrolvm.plates import data_rows

COVARIANCES = ["full", "diagonal", "spherical"]


def random_mixture(covariance="full"):
    mixture = GaussianMixture(4, 3, covariance, "sampled").double()
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_()
    return mixture


def sampled_mixture(x, baseline, covariance="full"):
    """A guide that is away from the exact posterior, so that its gradient is noisy and not zero."""
    mixture = GaussianMixture(x.shape[1], 3, covariance, "sampled", baseline=baseline).double()
    mixture.initialise_from(x)
    with torch.no_grad():
        mixture.recognition.weight.mul_(0.2)
        mixture.recognition.bias.mul_(0.2)
    return mixture


def exact_bound(mixture, x):
    """sum_n sum_k q(k | x_n) (log p(x_n, k) - log q(k | x_n)), in nats."""
    guide = poutine.trace(mixture.guide).get_trace(x).nodes["z"]["fn"]
    log_q = guide.logits.log_softmax(-1)
    return (log_q.exp() * (mixture.log_joint(x) - log_q)).sum()


def gradients(mixture, x, estimates, particles):
    parameters = [p for n, p in mixture.named_parameters() if not n.startswith("baseline")]
    elbo = TraceGraph_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    flat = []
    for _ in range(estimates):
        _, surrogate = elbo._loss_and_surrogate_loss(mixture.model, mixture.guide, (x,), {})
        grads = torch.autograd.grad(surrogate, parameters)
        flat.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(flat), parameters


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_guide_can_be_the_exact_posterior(iris, covariance):
    mixture = random_mixture(covariance)
    mixture.match_guide()
    guide = poutine.trace(mixture.guide).get_trace(iris).nodes["z"]["fn"]
    torch.testing.assert_close(guide.probs, mixture.responsibilities(iris))
    loss = TraceGraph_ELBO(max_plate_nesting=1).loss(mixture.model, mixture.guide, iris)
    assert loss == pytest.approx(-mixture.log_marginal(iris).sum().item())  # no variance is left


@pytest.mark.parametrize("baseline", ["none", "scalar", "input"])
@pytest.mark.parametrize("total", [30, 150])
def test_sampled_gradient_is_the_enumerated_gradient(iris, baseline, total):
    mixture, rows = sampled_mixture(iris, baseline), torch.arange(0, 150, 5)
    x = iris[rows]
    with data_rows(total, rows):
        estimates, parameters = gradients(mixture, x, estimates=80, particles=80)
    # the surrogate is a loss, and each row stands for total / 30 rows
    exact = torch.autograd.grad(-total / 30 * exact_bound(mixture, x), parameters)
    wanted = torch.cat([g.flatten() for g in exact])
    error = (estimates.mean(0) - wanted).abs()
    assert (error <= 4 * estimates.std(0) / len(estimates) ** 0.5 + 1e-9).all()


def test_baselines_lower_the_variance(iris):
    variance = {}
    for baseline in ["none", "scalar", "input"]:
        mixture = sampled_mixture(iris, baseline)
        if mixture.baseline is not None:
            train_baseline(mixture, iris)
        torch.manual_seed(1)  # common draws: the ratios are surer than the variances
        estimates, _ = gradients(mixture, iris, estimates=60, particles=8)
        guide = estimates[:, -mixture.recognition.weight.numel() - mixture.recognition.bias.numel() :]
        variance[baseline] = guide.var(0).sum().item()
    assert variance["scalar"] < 0.9 * variance["none"]
    assert variance["input"] < 0.9 * variance["scalar"]


def train_baseline(mixture, x):
    elbo = TraceGraph_ELBO(max_plate_nesting=1)
    optimiser = torch.optim.Adam(mixture.baseline.parameters(), lr=0.03)
    for _ in range(120):
        optimiser.zero_grad()
        (elbo._loss_and_surrogate_loss(mixture.model, mixture.guide, (x,), {})[1] / len(x)).backward()
        optimiser.step()


def test_baseline_regresses_on_unscaled_costs(iris):
    """At the exact posterior the cost of a datum is log p(x), whatever z: the regression is known exactly."""
    mixture = random_mixture()
    mixture.match_guide()
    rows = torch.arange(30)
    with data_rows(150, rows):
        _, surrogate = TraceGraph_ELBO(max_plate_nesting=1)._loss_and_surrogate_loss(
            mixture.model, mixture.guide, (iris[rows],), {}
        )
    residual = mixture.log_marginal(iris[rows]) - mixture.baseline.bias
    gradient = torch.autograd.grad(surrogate, mixture.baseline.bias)[0]
    torch.testing.assert_close(gradient, -2 * 150 / 30 * residual.sum())


@pytest.mark.parametrize("baseline", ["scalar", "input"])
def test_any_batch_size_follows_any_other(iris, baseline):
    """At the exact posterior each batch's loss is known, whatever z is drawn; no step moves away from it."""
    mixture = sampled_mixture(iris, baseline)
    mixture.match_guide()
    svi = SVI(mixture.model, mixture.guide, Adam({"lr": 0.0}), TraceGraph_ELBO(max_plate_nesting=1))
    for rows in (64, 22, 1):
        with data_rows(150, torch.arange(rows)):
            loss = svi.step(iris[:rows])
        assert loss == pytest.approx(-150 / rows * mixture.log_marginal(iris[:rows]).sum().item())


def test_plain_svi_trains_every_parameter(iris):
    mixture = GaussianMixture(4, 3, assignments="sampled", baseline="input").double()
    mixture.initialise_from(iris)
    before = copy.deepcopy(dict(mixture.named_parameters()))
    svi = SVI(mixture.model, mixture.guide, Adam({"lr": 0.01}), TraceGraph_ELBO(max_plate_nesting=1))
    for _ in range(2):
        svi.step(iris)
    assert [n for n, p in mixture.named_parameters() if torch.equal(p, before[n])] == []


@pytest.mark.parametrize("baseline", ["scalar", "input"])
def test_sampled_assignments_reach_the_enumerated_optimum(iris, baseline):
    """The bound itself, with its sampled q(z | x), within 0.05 nats per datum of the best enumerated fit."""
    options = {"batch_size": 50, "learning_rate": 0.01, "progress": False, "engine": "eager"}
    mixtures = {a: GaussianMixture(4, 3, assignments=a, baseline=baseline) for a in ("enumerated", "sampled")}
    for mixture in mixtures.values():
        mixture.initialise_from(iris.float())
    best = pyrolvm.fit(mixtures["enumerated"], iris, num_steps=600, **options)
    fitted = pyrolvm.fit(mixtures["sampled"], iris, num_steps=600, **options)
    wanted = float(best.model.log_marginal(iris.float()).mean().detach())
    assert abs(float(fitted.model.log_marginal(iris.float()).mean().detach()) - wanted) < 0.05
    assert float(fitted.log_evidence(iris, "importance", 200).mean()) == pytest.approx(wanted, abs=0.05)
