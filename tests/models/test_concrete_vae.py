"""Concrete VAEs of a few units, against sums over all their values."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyrolvm
from pyrolvm import ConcreteVAE, SettingError
from pyrolvm.controls import linear
from pyrolvm.data import load_dataset

X = (torch.rand(30, 5, generator=torch.Generator().manual_seed(0)) > 0.4).double()
QUIET = {"progress": False, "engine": "eager"}


@pytest.fixture(autouse=True)
def private_store():
    with pyro.get_param_store().scope():
        yield


def every_layer(model):
    """Every value of all layers together: dicts of site -> [...]."""
    one = model.units.every(X)
    return [
        dict(zip(model.sites, state, strict=True))
        for state in itertools.product(one, repeat=model.num_layers)
    ]


def densities(program, x, state):
    """log-density of every site at the same latents for all rows: {site: [rows]}."""
    given = {name: value.expand(len(x), *value.shape) for name, value in state.items()}
    trace = poutine.trace(poutine.condition(program, given)).get_trace(x)
    trace.compute_log_prob()
    return {n: s["log_prob"] for n, s in trace.nodes.items() if s["type"] == "sample" and n != "data"}


@pytest.mark.parametrize(
    "settings",
    [
        {"latent_dim": 3},
        {"latent_dim": 2, "num_states": 3},
        {"latent_dim": 2, "num_states": 4, "coding": "one_hot", "nonlinear": True, "hidden": 4},
        {"latent_dim": 2, "num_states": 3, "num_layers": 2},
    ],
)
def test_the_marginal_is_the_sum_over_all_values(settings):
    torch.manual_seed(0)
    model = ConcreteVAE(5, **settings).double()
    for parameter in model.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    states = every_layer(model)
    with torch.no_grad():
        joint = torch.stack([sum(densities(model.model, X, state).values()) for state in states])
        guide = torch.stack([sum(densities(model.guide, X, state).values()) for state in states])
        torch.testing.assert_close(model.log_marginal(X), joint.logsumexp(0))
        torch.testing.assert_close(guide.logsumexp(0), torch.zeros(len(X)).double(), atol=1e-9, rtol=0)


def test_corners_keep_the_number_of_inputs_and_one_hot_vectors_do_not():
    assert {n: ConcreteVAE(5, 6, n).units.num_inputs for n in (2, 4, 5, 8)} == {2: 6, 4: 12, 5: 18, 8: 18}
    assert ConcreteVAE(5, 6, 8, coding="one_hot").units.num_inputs == 48
    units = ConcreteVAE(5, 1, 4).double().units
    assert sorted(units.inputs(units.every(X)).tolist()) == [[-1, -1], [-1, 1], [1, -1], [1, 1]]


@pytest.mark.parametrize("num_states", [2, 3])
def test_the_relaxed_bound_is_the_one_of_the_paper(num_states):
    """Written down with torch's own relaxed distributions at the same draws: equation 20 of the paper's appendix."""
    torch.manual_seed(0)
    model = ConcreteVAE(5, 3, num_states).double()
    settings = model.objective()[1]
    warm, cold = (torch.tensor(settings[name]).double() for name in ("temperature", "prior_temperature"))
    kind = torch.distributions
    objective = pyrolvm.inference.objectives.Concrete(warm.item(), cold.item())
    gradient = _mean_gradient(model, objective, 400)

    def by_hand():
        logits, prior = model.encoders[0](2 * (X - model.data_mean)), model.prior_logits
        if num_states == 2:
            q, p = (
                kind.relaxed_bernoulli.LogitRelaxedBernoulli(t, logits=a)
                for t, a in ((warm, logits), (cold, prior))
            )
        else:
            q, p = (
                kind.relaxed_categorical.ExpRelaxedCategorical(t, logits=a.unflatten(-1, (3, 3)))
                for t, a in ((warm, logits), (cold, prior))
            )
        raw = q.rsample()
        z = raw.sigmoid() if num_states == 2 else raw.exp()
        seen = dist.Bernoulli(logits=model.decoders[0](model.units.inputs(z))).log_prob(X).sum()
        return -(seen + p.log_prob(raw).sum() - q.log_prob(raw).sum())

    theirs = torch.stack(
        [_flat(torch.autograd.grad(by_hand(), list(model.parameters()))) for _ in range(400)]
    )
    error = (gradient.var(0) / 400 + theirs.var(0) / 400).sqrt()
    assert ((gradient.mean(0) - theirs.mean(0)) / error).abs().max() < 4.5  # of about 60 parameters


def _mean_gradient(model, objective, draws):
    found = []
    for _ in range(draws):
        loss = objective.differentiable_loss(model.model, model.guide, X)
        found.append(_flat(torch.autograd.grad(loss, list(model.parameters()))))
    return torch.stack(found)


def _flat(gradients):
    return torch.cat([g.reshape(-1) for g in gradients])


@pytest.mark.parametrize("num_states", [2, 4])
def test_it_learns_what_the_exact_marginal_says(num_states):
    """Two kinds of rows: the evidence rises to that of the truth, log 1/2 and the noise of the pixels."""
    kinds = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    generator = torch.Generator().manual_seed(0)
    clean = kinds[torch.randint(2, (400,), generator=generator)]
    x = torch.where(torch.rand(400, 6, generator=generator) < 0.1, 1 - clean, clean)
    truth = dist.Bernoulli(0.8 * kinds + 0.1).log_prob(x.unsqueeze(1)).sum(-1).logsumexp(1) - math.log(2)
    fitted = pyrolvm.fit(
        ConcreteVAE(6, 1, num_states), x, num_steps=400, batch_size=100, learning_rate=0.05, **QUIET
    )
    exact = fitted.log_evidence(x, "exact").mean().item()
    assert exact > truth.mean().item() - 0.1
    assert fitted.log_evidence(x, "importance", 500, progress=False).mean() == pytest.approx(exact, abs=0.01)


def test_the_temperature_is_a_control_with_a_schedule():
    options = {"num_steps": 5, **QUIET}
    assert pyrolvm.fit(ConcreteVAE(5, 3), X, **options).history["temperature"].tolist() == pytest.approx(
        [2 / 3] * 5
    )
    assert pyrolvm.fit(ConcreteVAE(5, 3, 4), X, **options).history["temperature"].iloc[0] == 1
    falling = pyrolvm.fit(ConcreteVAE(5, 3, temperature=(1.0, 0.5)), X, **options).history["temperature"]
    assert falling.tolist() == pytest.approx([0.5 ** (k / 5) for k in range(1, 6)])
    assert (
        ConcreteVAE(5, 3, temperature=(1.0, 0.5)).objective()[1]["prior_temperature"] is None
    )  # the guide's
    own = pyrolvm.fit(ConcreteVAE(5, 3), X, controls={"temperature": linear(2.0, 1.0)}, **options)
    assert own.history["temperature"].tolist() == pytest.approx([1.8, 1.6, 1.4, 1.2, 1.0])


def test_digits_from_grey_levels_and_other_estimators():
    digits = load_dataset("digits")
    fitted = pyrolvm.fit(
        ConcreteVAE(64, 8, 4, likelihood="gaussian"),
        digits,
        num_steps=60,
        batch_size=100,
        learning_rate=0.005,
        **QUIET,
    )
    assert fitted.encode(digits).shape == (1797, 8, 4)
    assert fitted.reconstruct(digits.values[:5]).shape == (5, 64)
    for objective in ("vimco", "nvil", "reinforce"):
        pyrolvm.fit(
            ConcreteVAE(64, 8, 4, likelihood="gaussian"), digits, objective=objective, num_steps=2, **QUIET
        )


@pytest.mark.filterwarnings("ignore:the data. whole numbers that float32 rounds")
def test_rounding_of_a_large_cost_is_no_jump():
    x = 1e12 * torch.randn(23, 4, generator=torch.Generator().manual_seed(3))
    fitted = pyrolvm.fit(ConcreteVAE(4, 3, likelihood="gaussian"), x, num_steps=1, **QUIET)
    assert fitted.elbo == pytest.approx(-2 * x.square().mean().item(), rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive number, not 0.0"),
        ({"temperature": (1.0, -0.5)}, "temperature must be a positive number, not -0.5"),
        ({"temperature": (1.0, 0.5, 0.2)}, "the first and the last of a run"),
        ({"prior_temperature": -1}, "prior_temperature must be a positive number"),
        ({"num_states": 1}, "num_states must be a whole number of at least 2"),
        ({"latent_dim": 0}, "latent_dim must be a positive whole number"),
        ({"coding": "binary"}, "coding"),
        ({"likelihood": "normal"}, "likelihood"),
    ],
)
def test_bad_settings_end_in_a_sentence(settings, message):
    with pytest.raises(SettingError, match=message) as error:
        ConcreteVAE(5, **settings)
    assert "\n" not in str(error.value)


def test_estimators_of_bits_refuse_categories_by_name():
    for objective in ("disarm", "rebar", "relax", "muprop"):
        with pytest.raises(SettingError, match="OneHotCategorical") as error:
            pyrolvm.fit(ConcreteVAE(5, 2, 3), X.float(), objective=objective, num_steps=1, **QUIET)
        assert "NVIL" in str(error.value)
