"""Gradient estimators of discrete latents against sums over all states of a few bits."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyrolvm
from pyrolvm import BernoulliVAE, data_plate
from pyrolvm.diagnostics.gradients import gradient_draws
from pyrolvm.inference.objectives import (
    NVIL,
    REBAR,
    REINFORCE,
    RELAX,
    VIMCO,
    Concrete,
    DisARM,
    MuProp,
)

UNBIASED = {
    "REINFORCE": REINFORCE,
    "NVIL": lambda: NVIL(hidden=5, normalise=False),
    "MuProp": MuProp,
    "DisARM": DisARM,
    "ARM": lambda: DisARM(marginalise=False),
    "REBAR": REBAR,
    "RELAX": lambda: RELAX(hidden=6),
}
QUIET = {"progress": False, "engine": "eager"}
X = (torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) > 0.5).double()


@pytest.fixture(autouse=True)
def private_store():
    with pyro.get_param_store().scope():
        yield


# ---------------------------------------------------------------------- three bits whose cost is a factor

TARGET = torch.linspace(0.2, 0.9, 3, dtype=torch.float64)
LOGITS = torch.tensor(np.random.RandomState(0).rand(3)).logit()
EXACT = torch.tensor([0.14857035, -0.02036935, -0.19155175], dtype=torch.float64)
REPLICATES = 20_000


def three_bits(objective, plate=data_plate, calls=1):
    """Gradient of the cost sum (b - target)^2 in the logits, one draw for each row, and the mean loss."""
    torch.manual_seed(0)
    logits = LOGITS.expand(REPLICATES, 3).clone().requires_grad_()

    def guide(x):
        with plate(x):
            pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))

    def model(x):
        with plate(x):
            b = pyro.sample("b", dist.Bernoulli(logits=logits.detach()).to_event(1))
            pyro.factor("cost", -(b - TARGET).square().sum(-1))

    for _ in range(calls):  # averages of earlier batches
        loss = objective.differentiable_loss(model, guide, torch.zeros(REPLICATES, 1, dtype=torch.float64))
    return torch.autograd.grad(loss, logits)[0], loss.item() / REPLICATES


def z_scores(draws, exact):
    return (draws.mean(0) - exact) / (draws.var(0) / len(draws)).sqrt()


@pytest.mark.parametrize("name", UNBIASED)
def test_three_bits_have_the_enumerated_gradient(name):
    draws, loss = three_bits(UNBIASED[name](), calls=3 if name == "NVIL" else 1)
    assert z_scores(draws, EXACT).abs().max() < 4
    theta = LOGITS.sigmoid()
    assert loss == pytest.approx((theta - 2 * theta * TARGET + TARGET.square()).sum().item(), abs=0.02)
    if name != "REINFORCE":
        plain, _ = three_bits(REINFORCE())
        assert draws.var(0).sum() < 0.6 * plain.var(0).sum()


@pytest.mark.parametrize("straight_through", [False, True])
def test_the_relaxed_gradient_of_three_bits_is_another(straight_through):
    draws, _ = three_bits(Concrete(0.5, 0.5, straight_through))
    assert z_scores(draws, EXACT).abs().max() > 6
    if not straight_through:
        apart = draws.mean(0) - torch.tensor(
            [0.135, 0.009, -0.152], dtype=torch.float64
        )  # from 400,000 draws elsewhere
        assert (apart / (draws.var(0) / len(draws)).sqrt()).abs().max() < 4


def test_normalised_costs_divide_the_gradient():
    """By their deviation if that is above 1, as it is not here; mean and deviation are those of earlier batches."""
    plain, _ = three_bits(NVIL(hidden=0, normalise=False), calls=3)
    same, _ = three_bits(NVIL(hidden=0), calls=3)
    torch.testing.assert_close(plain, same)

    average = NVIL(hidden=0, decay=0.5).average.double()
    costs = torch.tensor([[1.0, 5.0, 9.0]], dtype=torch.float64)
    assert average(costs) == (0, 0)
    mean, deviation = average(costs)
    assert (mean.item(), deviation.item()) == pytest.approx((5.0, math.sqrt(32 / 3)))


# ---------------------------------------------------------------------- a belief network, all parameters


def states(model, x):
    """log p(x, b) and log q(b | x), each [2^bits, rows], of every state of all layers."""
    bits = [list(itertools.product((0.0, 1.0), repeat=model.latent_dim))] * model.num_layers
    log_joint, log_guide = [], []
    for state in itertools.product(*bits):
        given = {
            n: torch.tensor(b, dtype=x.dtype).expand(len(x), -1)
            for n, b in zip(model.sites, state, strict=True)
        }
        for program, found in ((model.model, log_joint), (model.guide, log_guide)):
            trace = poutine.trace(poutine.condition(program, given)).get_trace(x)
            trace.compute_log_prob()
            found.append(sum(s["log_prob"] for s in trace.nodes.values() if s["name"] in (*model.sites, "x")))
    return torch.stack(log_joint), torch.stack(log_guide)


def enumerated(model, x, num_particles=1):
    """The bound per datum, L_K of `num_particles`, and its gradient in every parameter, negated."""
    log_joint, log_guide = states(model, x)
    weight, total = log_joint - log_guide, 0.0
    for chosen in itertools.product(range(len(weight)), repeat=num_particles):
        probability = log_guide[list(chosen)].sum(0).exp()
        bound = weight[list(chosen)].logsumexp(0) - math.log(num_particles)
        total = total + (probability * bound).mean()
    return total.item(), dict(
        zip(
            dict(model.named_parameters()), torch.autograd.grad(-total, list(model.parameters())), strict=True
        )
    )


def trained(objective, num_layers=1, latent_dim=3, **options):
    """A network some steps from its start, so that nothing is symmetric, and the objective's modules with it."""
    torch.manual_seed(1)
    model = BernoulliVAE(4, latent_dim, num_layers)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    options = {"num_steps": 25, "learning_rate": 0.05, "dtype": torch.float64, **QUIET, **options}
    return pyrolvm.fit(model, X.repeat(20, 1), objective=objective, **options)


def agrees(fitted, objective, exact, num_samples=40, copies=150):
    """Largest distance of the mean gradient from the exact one, in standard errors, and the draws' variance."""
    draws = gradient_draws(fitted, objective, X.repeat(copies, 1), num_samples=num_samples, progress=False)
    flat = torch.cat([draws[n].reshape(num_samples, -1) for n in exact], 1)
    wanted = torch.cat([g.reshape(-1) for g in exact.values()])
    moving = flat.var(0) > 1e-24
    torch.testing.assert_close(flat.mean(0)[~moving], wanted[~moving], atol=1e-9, rtol=1e-9)
    return z_scores(flat[:, moving], wanted[moving]).abs().max().item(), flat.var(0).sum().item()


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", UNBIASED)
def test_a_belief_network_has_the_enumerated_gradient(name, num_layers):
    objective = UNBIASED[name]()
    fitted = trained(objective, num_layers, 3 if num_layers == 1 else 2)
    bound, exact = enumerated(fitted.program.source, X)
    z, variance = agrees(fitted, objective, exact)
    assert z < 4
    if name != "REINFORCE":
        assert variance < agrees(fitted, REINFORCE(), exact)[1]
    history = fitted.history
    np.testing.assert_allclose(history["elbo"], history["log_likelihood"] - history["kl"], rtol=1e-9)
    assert fitted.log_evidence(X, "iwae", 2000, num_particles=1, progress=False).mean() == pytest.approx(
        bound, abs=0.1
    )


@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_multi_sample_bound_has_the_enumerated_gradient(num_layers):
    objective = VIMCO(2)
    fitted = trained(objective, num_layers, 3 if num_layers == 1 else 2)
    bound, exact = enumerated(fitted.program.source, X, num_particles=2)
    assert agrees(fitted, objective, exact)[0] < 4
    assert (
        agrees(fitted, objective, enumerated(fitted.program.source, X)[1])[0] > 6
    )  # another bound's gradient
    last = fitted.history["elbo"].tail(1).item()
    assert last == pytest.approx(bound, abs=0.3)


def test_the_relaxed_gradient_of_a_belief_network_is_another():
    objective = Concrete(0.5, 0.5)
    fitted = trained(objective)
    assert agrees(fitted, objective, enumerated(fitted.program.source, X)[1])[0] > 6
    assert fitted.history["temperature"].eq(0.5).all()
    assert not fitted.history["relaxed"].equals(fitted.history["elbo"])
