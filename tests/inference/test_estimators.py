"""Gradient estimators of discrete latents against sums over all states of a few bits."""

import copy
import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import RelaxedOneHotCategorical
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

import pyrolvm
from pyrolvm import BernoulliVAE, ProgramError, SettingError, data_plate
from pyrolvm.controls import linear
from pyrolvm.diagnostics.gradients import gradient_draws
from pyrolvm.inference.objectives import (
    LAX,
    NVIL,
    OBJECTIVES,
    REBAR,
    REINFORCE,
    RELAX,
    VIMCO,
    Concrete,
    DisARM,
    MuProp,
)
from pyrolvm.inference.objectives.concrete import BITS, CATEGORIES, concrete_density
from pyrolvm.inference.objectives.discrete import Bits, Run
from pyrolvm.inference.objectives.vimco import left_out
from pyrolvm.inference.program.plain import PlainPair
from pyrolvm.inference.program.weights import LogDensities
from pyrolvm.plates import data_rows

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
    decaying = NVIL(hidden=0, decay=0.8).average.double()
    for cost in (1.0, 2.0):
        decaying(torch.full((1, 3), cost, dtype=torch.float64))
    assert decaying(costs)[0].item() == pytest.approx((0.8 * 1 + 2) / 1.8)


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


# ---------------------------------------------------------------------- programs of other forms


def in_plates(objective, weight=1.0, mask=None, total=None):
    """Gradient draws of three bits in a plate of their own, and of a prior with logits 0 that counts `weight` times."""
    torch.manual_seed(0)
    logits = LOGITS.expand(REPLICATES, 3).clone().requires_grad_()
    x = torch.zeros(REPLICATES, 1, dtype=torch.float64)

    def latents(values):
        kept = poutine.mask(mask=True if mask is None else mask.unsqueeze(-1))
        with pyro.plate("bits", 3, dim=-1), poutine.scale(scale=weight), kept:
            return pyro.sample("b", dist.Bernoulli(logits=values))

    def guide(x):
        with data_plate(x, dim=-2):
            latents(logits)

    def model(x):
        with data_plate(x, dim=-2):
            b = latents(torch.zeros_like(LOGITS))
            pyro.factor("cost", -(b - TARGET).square().sum(-1, keepdim=True))

    with data_rows(total or REPLICATES, torch.arange(REPLICATES)):
        loss = objective.differentiable_loss(model, guide, x)
    return torch.autograd.grad(loss, logits)[0], loss.item()


@pytest.mark.parametrize("name", UNBIASED)
def test_bits_in_a_plate_with_a_weighted_prior(name):
    """The derivative of E[cost] + 0.3 KL(q || p) in each logit: that of the cost, and 0.3 theta (1 - theta) logit."""
    draws, _ = in_plates(UNBIASED[name](), weight=0.3)
    theta = LOGITS.sigmoid()
    assert z_scores(draws, EXACT + 0.3 * theta * (1 - theta) * LOGITS).abs().max() < 4


@pytest.mark.parametrize("name", [*UNBIASED, "Concrete"])
def test_masked_bits_have_no_gradient_and_minibatches_count_n_over_b(name):
    make = {**UNBIASED, "Concrete": Concrete}[name]
    mask = torch.arange(REPLICATES) % 2 == 0
    draws, loss = in_plates(make(), mask=mask)
    if name != "Concrete":  # whose path goes on through the cost
        assert draws[1::2].abs().max() == 0
    assert draws[::2].abs().max() > 0
    four, four_loss = in_plates(make(), mask=mask, total=4 * REPLICATES)
    torch.testing.assert_close(four, 4 * draws)
    assert four_loss == pytest.approx(4 * loss)


def test_masked_bits_count_neither_in_the_gradient_nor_in_its_variance():
    h, nothing = torch.arange(8.0).reshape(4, 2), torch.zeros(1, 4)
    bits = Bits("b", torch.ones(4, 2), h, h, 1, torch.tensor([True, False, True, False]))
    run = Run(None, None, LogDensities(nothing, nothing, nothing, None, 1.0, {-1: 4}), [bits])
    assert run.passed_on([h]).tolist() == [[1.0, 0.0, 9.0, 0.0]]
    assert run.squares([h]).tolist() == [[1.0, 0.0, 41.0, 0.0]]


def one_bit(objective, total):
    """The estimate of 50 rows that stand for `total`, with one bit each: q = 0.9, p = 0.5."""
    torch.manual_seed(0)
    x, logits = torch.zeros(50, 1, dtype=torch.float64), torch.tensor(0.9).double().logit().requires_grad_()

    def guide(x):
        with data_plate(x):
            pyro.sample("b", dist.Bernoulli(logits=logits.expand(50)))

    def model(x):
        with data_plate(x):
            b = pyro.sample("b", dist.Bernoulli(logits=torch.zeros(50, dtype=torch.float64)))
            pyro.factor("cost", -(b - 0.2).square())

    with data_rows(total, torch.arange(50)):
        return objective.estimate(PlainPair(model, guide, (x,), {}), {"temperature": 0.5})


@pytest.mark.parametrize(
    "make", [lambda: VIMCO(3), lambda: Concrete(0.5, num_particles=3), REBAR, lambda: NVIL(hidden=3)]
)
def test_bounds_of_several_draws_and_own_losses_count_n_over_b(make):
    objective = make()
    one_bit(objective, 50)  # its modules are made
    one, four = (one_bit(copy.deepcopy(objective), total) for total in (50, 200))
    torch.testing.assert_close(four.bound, 4 * one.bound)
    torch.testing.assert_close(four.surrogate, 4 * one.surrogate)
    torch.testing.assert_close(four.terms["kl"], 4 * one.terms["kl"])
    assert one.terms["kl"] == pytest.approx(50 * (0.9 * math.log(1.8) + 0.1 * math.log(0.2)), rel=0.4)
    if one.own_loss is not None:
        torch.testing.assert_close(four.own_loss, 4 * one.own_loss)


def test_the_baseline_of_a_draw_has_the_mean_log_weight_of_the_others_in_its_place():
    log_weight = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k, found in enumerate(left_out(log_weight)):
        others = torch.cat([log_weight[:k], log_weight[k + 1 :]])
        each = torch.cat([others, others.mean(0, keepdim=True)])
        torch.testing.assert_close(found, each.exp().mean(0).log())


VALUES = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)


def three_states(objective, family, rows=20_000):
    """Gradient draws of E[f(k)] in the logits of a category k, f given by a table."""
    torch.manual_seed(0)
    logits = LOGITS.expand(rows, 3).clone().requires_grad_()

    def guide(x):
        with data_plate(x):
            pyro.sample("k", family(logits=logits))

    def model(x):
        with data_plate(x):
            k = pyro.sample("k", family(logits=logits.detach()))
            pyro.factor("value", -(k @ VALUES if k.dim() > 1 else VALUES[k]))

    loss = objective.differentiable_loss(model, guide, torch.zeros(rows, 1, dtype=torch.float64))
    share = LOGITS.softmax(0)
    return torch.autograd.grad(loss, logits)[0], share * (VALUES - share @ VALUES)


@pytest.mark.parametrize("family", [dist.Categorical, dist.OneHotCategorical])
@pytest.mark.parametrize("make", [REINFORCE, lambda: NVIL(hidden=5, normalise=False)])
def test_categories_have_the_enumerated_gradient(make, family):
    assert z_scores(*three_states(make(), family)).abs().max() < 4


def test_relaxed_categories_come_near_the_enumerated_gradient_as_the_temperature_falls():
    """f is linear in the one-hot vector, so that only the relaxation itself is wrong."""
    far, near = (
        z_scores(*three_states(Concrete(t, t), dist.OneHotCategorical)).abs().max() for t in (2.0, 0.05)
    )
    assert near < 4 < far


def test_several_draws_of_categories_have_the_gradient_of_their_bound():
    """K = 2 draws of a category of 3 states: the bound by the 9 pairs, weights e^f since prior and guide agree."""
    logits = LOGITS.clone().requires_grad_()
    joint = (logits.log_softmax(0).unsqueeze(1) + logits.log_softmax(0)).exp()
    weight = -VALUES + LOGITS.log_softmax(0) - logits.log_softmax(0)
    bound = (joint * (torch.logaddexp(weight.unsqueeze(1), weight) - math.log(2))).sum()
    exact = torch.autograd.grad(-bound, logits)[0]
    assert z_scores(three_states(VIMCO(2), dist.Categorical)[0], exact).abs().max() < 4


# ---------------------------------------------------------------------- LAX


def test_continuous_latents_under_a_cost_that_jumps():
    """P(z > 0) of z ~ N(m, s): derivatives phi(m/s)/s in m, -m/s^2 phi(m/s) in s, which no path has."""
    torch.manual_seed(0)
    objective, rows = LAX(hidden=8, num_layers=1), 20_000
    x, m, s = torch.zeros(rows, 1, dtype=torch.float64), 0.4, 0.8

    def draws():
        p = torch.tensor([m, s], dtype=torch.float64).expand(rows, 2).clone().requires_grad_()

        def program(p, cost):
            def run(x):
                with data_plate(x):
                    z = pyro.sample("z", dist.Normal(p[:, 0], p[:, 1]))
                    if cost:
                        pyro.factor("above", (z > 0).to(z.dtype))

            return run

        loss = objective.differentiable_loss(program(p.detach(), True), program(p, False), x)
        return torch.autograd.grad(loss, p, retain_graph=True)[0], loss

    phi = math.exp(-((m / s) ** 2) / 2) / math.sqrt(2 * math.pi)
    exact = torch.tensor([-phi / s, m / s**2 * phi], dtype=torch.float64)
    first, _ = draws()
    assert z_scores(first, exact).abs().max() < 4
    parameters = list(objective.free.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(60):
        _, loss = draws()
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
    last, _ = draws()
    assert z_scores(last, exact).abs().max() < 4
    assert last.var(0).sum() < 0.6 * first.var(0).sum()


class TwoNormals:
    """z1 ~ N(0, 1), z2 ~ N(z1, 1), x ~ N(z2, 1): ELBO and gradient of a linear guide in closed form by the path."""

    def model(self, x):
        with data_plate(x):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def guide(self, x):
        a, b, s = (
            pyro.param(n, torch.tensor(v, dtype=x.dtype)) for n, v in (("a", 0.3), ("b", 0.4), ("s", 0.9))
        )
        with data_plate(x):
            z1 = pyro.sample("z1", dist.Normal(a * x, s))
            pyro.sample("z2", dist.Normal(b * z1 + a * x, s))


def test_continuous_latents_that_depend_on_each_other_have_the_gradient_of_the_path():
    program, x = TwoNormals(), torch.linspace(-1, 2, 400, dtype=torch.float64)
    options = {"guide": program.guide, "num_samples": 60, "dtype": torch.float64, "progress": False}
    found = [gradient_draws(program.model, objective, x, **options) for objective in (LAX(hidden=5), "trace")]
    for name in found[0]:
        lax, path = (f[name] for f in found)
        error = ((lax.var() + path.var()) / 60).sqrt()
        assert abs(lax.mean() - path.mean()) < 4 * error


# ---------------------------------------------------------------------- the Concrete distribution


def test_rounding_a_concrete_variable_gives_the_discrete_one():
    """P(x_k is the largest) = softmax(a)_k at every temperature (Maddison et al., proposition 1b)."""
    torch.manual_seed(0)
    a, count = torch.tensor([0.5, -0.3, 1.2, 0.0]), 40_000
    share = a.softmax(0)
    for temperature in (0.2, 1.0, 3.0):
        hard = CATEGORIES.draw(a.expand(count, 4), temperature).hard.mean(0)
        assert ((hard - share) / (share * (1 - share) / count).sqrt()).abs().max() < 4
        bits = BITS.draw(a.expand(count, 4), temperature).hard.mean(0)
        theta = a.sigmoid()
        assert ((bits - theta) / (theta * (1 - theta) / count).sqrt()).abs().max() < 4


def test_a_concrete_variable_is_discrete_at_temperature_zero():
    """x itself tends to the one-hot vector (proposition 1c): E[x] to softmax(a), its largest entry to 1."""
    torch.manual_seed(0)
    a, count = torch.tensor([0.5, -0.3, 1.2, 0.0]).double(), 40_000
    largest = []
    for temperature in (1.0, 0.1, 0.001):
        soft = CATEGORIES.draw(a.expand(count, 4), temperature).soft
        largest.append(soft.max(-1).values.mean().item())
    assert largest == sorted(largest)
    assert largest[-1] > 0.999
    share = a.softmax(0)
    assert ((soft.mean(0) - share) / (share * (1 - share) / count).sqrt()).abs().max() < 4


def test_a_concrete_density_is_log_convex_up_to_one_over_n_minus_one():
    """Proposition 1d: log p at the midpoint of two points is at most their mean; above that temperature it is not."""
    torch.manual_seed(0)
    a = torch.tensor([0.5, -0.3, 1.2, 0.0]).double()
    ends = torch.distributions.Dirichlet(torch.ones(4).double()).sample((2, 2000))

    def excess(temperature):
        middle = concrete_density(ends.mean(0), a, temperature)
        return middle - concrete_density(ends, a, temperature).mean(0)

    for temperature in (0.1, 0.25, 1 / 3):
        assert excess(temperature).max() < 1e-9
    assert excess(1.0).max() > 0.1


def test_densities_are_those_of_torch():
    torch.manual_seed(0)
    logits, temperature = torch.randn(7, 4).double(), torch.tensor(0.7).double()
    raw = CATEGORIES.draw(logits, 0.4).raw
    theirs = ExpRelaxedCategorical(temperature, logits=logits).log_prob(raw)
    torch.testing.assert_close(CATEGORIES.density(raw, logits, 0.7).squeeze(-1), theirs)
    raw = BITS.draw(logits, 0.4).raw
    theirs = LogitRelaxedBernoulli(temperature, logits=logits).log_prob(raw)
    torch.testing.assert_close(BITS.density(raw, logits, 0.7), theirs)
    x = torch.distributions.Dirichlet(torch.ones(4).double()).sample((5,))
    theirs = RelaxedOneHotCategorical(temperature, logits=logits[:1]).log_prob(x)
    torch.testing.assert_close(concrete_density(x, logits[:1], 0.7), theirs)


# ---------------------------------------------------------------------- at work

ALL = {
    "reinforce": REINFORCE, "nvil": NVIL, "vimco": VIMCO, "muprop": MuProp, "disarm": DisARM, "rebar": REBAR,
    "relax": RELAX, "concrete": Concrete,
}  # fmt: skip


@pytest.mark.parametrize("name", ["nvil", "relax"])
def test_engines_agree(name):
    def make():
        torch.manual_seed(0)
        options = {
            "nvil": {"hidden": 4},
            "relax": {"hidden": 6},
            "concrete": {"temperature": linear(1.0, 0.5)},
        }
        return ALL[name](**options[name])

    options = {"num_steps": 20, "batch_size": 20, "learning_rate": 0.02, "progress": False}
    x = X.repeat(8, 1)
    found = []
    for engine in ("eager", "compiled"):
        torch.manual_seed(1)
        found.append(pyrolvm.fit(BernoulliVAE(4, 3), x, objective=make(), engine=engine, **options))
    assert found[1].engine.startswith("compiled engine")
    for column in found[0].history.columns.drop("seconds"):
        np.testing.assert_allclose(found[1].history[column], found[0].history[column], rtol=1e-4, atol=1e-5)
    for key, value in found[0].program.tensors().items():
        torch.testing.assert_close(found[1].program.tensors()[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_each_trains_under_svi_and_by_its_name(name):
    assert OBJECTIVES[name] is ALL[name]
    torch.manual_seed(0)
    model, objective = BernoulliVAE(4, 3).double(), ALL[name]()
    bound = enumerated(model, X)[0]
    svi = pyro.infer.SVI(model.model, model.guide, pyro.optim.Adam({"lr": 0.03}), objective)
    for _ in range(80):
        svi.step(X)
    assert enumerated(model, X)[0] > bound + 0.1
    assert math.isfinite(svi.evaluate_loss(X))
    own = [p for m in objective.modules().values() for p in m.parameters()]
    assert all(any(p is q for q in pyro.get_param_store()._params.values()) for p in own)


def test_modules_are_resumed_and_kept(tmp_path):
    fits = []
    for parts in ((8,), (4, 8)):
        for i, steps in enumerate(parts):
            torch.manual_seed(0)
            model, objective = BernoulliVAE(4, 3), RELAX(hidden=5)
            kept = {"checkpoint": tmp_path / str(len(parts)), "resume": i > 0}
            fits.append(pyrolvm.fit(model, X.float(), objective=objective, num_steps=steps, **kept, **QUIET))
    for key, value in fits[0].program.tensors().items():
        assert torch.equal(value, fits[2].program.tensors()[key]), key
    assert any("objective.free" in key for key in fits[0].program.parameters)
    again = pyrolvm.load(fits[0].save(tmp_path / "run"))
    torch.testing.assert_close(again.log_evidence(X.float()), fits[0].log_evidence(X.float()))


def test_the_weight_of_the_kl_is_taken_where_the_bound_is_an_elbo():
    for name in ALL:
        options = {"objective": name, "num_steps": 3, "kl_warmup": 0.5, **QUIET}
        if name == "vimco":
            with pytest.raises(SettingError, match="weigh the KL"):
                pyrolvm.fit(BernoulliVAE(4, 3), X.float(), **options)
        else:
            assert "kl_weight" in pyrolvm.fit(BernoulliVAE(4, 3), X.float(), **options).history


@pytest.mark.parametrize("name", ["disarm", "muprop", "rebar"])
def test_points_beside_bits_have_the_gradient_of_the_density(name):
    """b ~ Bernoulli(1/2), x ~ N(b + t, 1), t a point under N(0, 1): log p(x, b, t) has d/dt = x - b - 2 t."""
    x = torch.full((4000,), 0.7, dtype=torch.float64)

    def model(x):
        with data_plate(x):
            t = pyro.sample("t", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(b + t, 1.0), obs=x)

    def guide(x):
        at = pyro.param("at", torch.tensor(0.3, dtype=x.dtype))
        with data_plate(x):
            pyro.sample("t", dist.Delta(at.expand(len(x))))
            pyro.sample("b", dist.Bernoulli(x.new_tensor(0.5)))

    torch.manual_seed(0)
    ALL[name]().differentiable_loss(model, guide, x).backward()
    found = -pyro.get_param_store()._params["at"].grad.item() / len(x)
    assert abs(found - (0.7 - 0.5 - 0.6)) < 4 * 0.5 / math.sqrt(len(x))


# ---------------------------------------------------------------------- refusals


def one_site(family, *args, event=0):
    def program(x, data):
        with data_plate(x):
            slope = pyro.param("slope", torch.tensor(0.1))
            k = pyro.sample("k", family(*(slope * 0 + a for a in args)).expand((len(x),)))
            if data:
                pyro.sample("x", dist.Normal(k.float().reshape(len(x), -1).sum(-1), 1.0), obs=x)

    return (lambda x: program(x, True)), (lambda x: program(x, False))


NORMAL = one_site(dist.Normal, 0.0, 1.0)
CATEGORICAL = one_site(dist.Categorical, torch.tensor([0.2, 0.3, 0.5]))
COUNTS = one_site(dist.Poisson, 2.0)
COIN = one_site(dist.Bernoulli, 0.4)


def indexing(x, data):
    with data_plate(x):
        b = pyro.sample("b", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1))).expand((len(x),)))
        if data:
            pyro.sample("x", dist.Normal(torch.tensor([-1.0, 2.0])[b.long()], 1.0), obs=x)


INDEXING = (lambda x: indexing(x, True)), (lambda x: indexing(x, False))


@pytest.mark.parametrize(
    ("program", "objective", "message"),
    [
        (
            NORMAL,
            "reinforce",
            "REINFORCE estimates the gradient of discrete latents, and the guide draws none",
        ),
        (NORMAL, "nvil", "NVIL estimates the gradient of discrete latents, and the guide draws none"),
        (NORMAL, "vimco", "VIMCO estimates the gradient of discrete latents, and the guide draws none"),
        (
            NORMAL,
            "disarm",
            r"latents are all Bernoulli, and 'k' \(Normal\) is continuous: use TraceGraph_ELBO",
        ),
        (NORMAL, "relax", r"RELAX takes programs .* 'k' \(Normal\) is continuous"),
        (NORMAL, "concrete", "Concrete relaxes discrete latents, and the guide draws none"),
        (CATEGORICAL, "disarm", r"'k' \(Categorical\) is a discrete latent of other values: use NVIL"),
        (CATEGORICAL, "muprop", r"MuProp takes .* 'k' \(Categorical\)"),
        (CATEGORICAL, "rebar", r"REBAR takes .* 'k' \(Categorical\)"),
        (CATEGORICAL, "concrete", r"'k' is Categorical.*write it as dist.OneHotCategorical"),
        (COUNTS, "concrete", r"'k' is Poisson, whose values have none between them: use NVIL"),
        (COIN, "lax", r"LAX takes reparameterised latents .* 'k' is Bernoulli: for latent bits use RELAX"),
        (
            INDEXING,
            "rebar",
            "REBAR runs the program at values between the discrete ones, and its log-densities jump",
        ),
        (INDEXING, "relax", "RELAX runs the program at values between"),
        (INDEXING, "concrete", "Concrete runs the program at values between"),
    ],
)
def test_a_program_that_an_estimator_cannot_take_is_refused(program, objective, message):
    model, guide = program
    x = torch.randn(6, generator=torch.Generator().manual_seed(0))
    with pytest.raises((SettingError, ProgramError), match=message):
        pyrolvm.fit(model, x, guide=guide, objective=objective, num_steps=2, **QUIET)
    with pytest.raises((SettingError, ProgramError)) as refusal:
        OBJECTIVES[objective]().differentiable_loss(model, guide, x)
    assert "\n" not in str(refusal.value)


def test_a_single_draw_has_no_number_of_particles():
    for name in ("reinforce", "muprop", "disarm"):
        with pytest.raises(TypeError):
            OBJECTIVES[name](num_particles=3)


@pytest.mark.parametrize(
    ("program", "objective"),
    [
        (CATEGORICAL, "reinforce"),
        (COUNTS, "nvil"),
        (COUNTS, "vimco"),
        (INDEXING, "disarm"),
        (INDEXING, "muprop"),
    ],
)
def test_a_program_that_an_estimator_can_take_is_taken(program, objective):
    model, guide = program
    x = torch.randn(6, generator=torch.Generator().manual_seed(0))
    pyrolvm.fit(model, x, guide=guide, objective=objective, num_steps=2, **QUIET)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Concrete(0.0), "temperature must be a positive number, not 0.0"),
        (lambda: Concrete(linear(0.5, -0.1)), "temperature must be a positive number"),
        (lambda: Concrete(0.5, -1.0), "prior_temperature must be a positive number"),
        (lambda: REBAR(0.0), "temperature must be a positive number"),
        (lambda: RELAX(hidden=0), "hidden must be a positive whole number"),
        (lambda: NVIL(decay=1.0), "decay=1.0 must be at least 0 and below 1"),
        (lambda: VIMCO(1), "num_particles must be a whole number of at least 2"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(SettingError, match=message):
        make()


def test_a_temperature_of_the_run_must_be_positive_and_modules_stay_with_their_program():
    with pytest.raises(SettingError, match="temperature must be a positive number"):
        pyrolvm.fit(
            BernoulliVAE(4, 3), X, objective="concrete", num_steps=2, controls={"temperature": 0.0}, **QUIET
        )
    for objective in (RELAX(hidden=4), NVIL(hidden=4)):
        pyrolvm.fit(BernoulliVAE(4, 3), X.float(), objective=objective, num_steps=1, **QUIET)
        with pytest.raises((SettingError, ProgramError), match="make a new objective"):
            pyrolvm.fit(BernoulliVAE(3, 3), X[:, :3].float(), objective=objective, num_steps=1, **QUIET)


def test_held_out_bounds_do_not_move_what_the_objective_has_learned():
    """The averages of the costs are those of training: a run that is validated is the run that is not."""
    fits = []
    for options in ({}, {"validation": X[:2].float(), "validate_every": 2}):
        torch.manual_seed(0)
        fits.append(
            pyrolvm.fit(BernoulliVAE(4, 3), X.float(), objective=NVIL(), num_steps=8, **options, **QUIET)
        )
    for name, value in fits[0].program.tensors().items():
        assert torch.equal(value, fits[1].program.tensors()[name]), name


def test_restarts_do_not_share_what_the_objective_has_learned():
    def build(seed):
        torch.manual_seed(seed)
        return BernoulliVAE(4, 3)

    options = {"num_steps": 6, "learning_rate": 0.05, **QUIET}
    _, table = pyrolvm.fit_restarts(build, X.float(), num_restarts=2, objective=NVIL(), **options)
    for row in table.itertuples():
        alone = pyrolvm.fit(build(row.seed), X.float(), objective=NVIL(), seed=row.seed, **options)
        elbo = alone.history["elbo"]
        assert row.bound == pytest.approx(elbo.tail(max(1, round(0.1 * len(elbo)))).mean(), abs=1e-9)
