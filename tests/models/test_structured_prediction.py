"""Structured prediction with a few units, against sums over all their values."""

import itertools
import math

import pyro
import pytest
import torch
from pyro import poutine

import pyrolvm
from pyrolvm import DataError, SettingError, StructuredPrediction
from pyrolvm.data import load_dataset
from pyrolvm.inference.objectives import VIMCO, Concrete

X = (torch.rand(8, 7, generator=torch.Generator().manual_seed(0)) > 0.4).double()
QUIET = {"progress": False, "engine": "eager"}


@pytest.fixture(autouse=True)
def private_store():
    with pyro.get_param_store().scope():
        yield


def made(**settings):
    """A model of double precision some way from its start."""
    torch.manual_seed(1)
    model = StructuredPrediction(7, **{"num_given": 3, "latent_dim": 2, **settings}).double()
    for parameter in model.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return model


def terms(model):
    """log p(z | x_top) and log p(x_bottom | z), each [values of all layers, rows]."""
    found = []
    for state in itertools.product(model.units.every(X), repeat=model.num_layers):
        given = {n: v.expand(len(X), *v.shape) for n, v in zip(model.sites, state, strict=True)}
        trace = poutine.trace(poutine.condition(model.model, given)).get_trace(X)
        trace.compute_log_prob()
        prior = sum(trace.nodes[n]["log_prob"] for n in model.sites)
        found.append(torch.stack([prior, trace.nodes["x"]["log_prob"]]))
    return torch.stack(found, 1)


def enumerated(model, m):
    """L_m, summed over rows."""
    prior, seen = terms(model)
    total = 0.0
    for chosen in itertools.product(range(len(prior)), repeat=m):
        bound = seen[list(chosen)].logsumexp(0) - math.log(m)
        total = total + (prior[list(chosen)].sum(0).exp() * bound).sum()
    return total


def gradients(loss, model):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("settings", [{"num_layers": 1}, {}, {"num_layers": 3}, {"num_states": 3}])
def test_the_conditional_likelihood_is_the_sum_over_all_values(settings):
    model = made(**settings)
    with torch.no_grad():
        prior, seen = terms(model)
        torch.testing.assert_close(prior.logsumexp(0), torch.zeros(len(X)).double(), atol=1e-9, rtol=0)
        exact = (prior + seen).logsumexp(0)
        torch.testing.assert_close(model.log_marginal(X), exact)
    fitted = pyrolvm.fit(
        model, X, num_steps=1, learning_rate=1e-12, dtype="float64", initialise=False, **QUIET
    )
    found = fitted.log_evidence(X, "importance", 20_000, progress=False)
    torch.testing.assert_close(found, exact, atol=0.03, rtol=0)
    assert StructuredPrediction(7).log_marginal(X) is None


def test_what_is_given_has_no_density_and_stays_in_its_place():
    model = made()
    fitted = pyrolvm.fit(
        model, X, num_steps=1, learning_rate=1e-12, dtype="float64", initialise=False, **QUIET
    )
    drawn = fitted.predict(X, 50)["x"]
    assert torch.equal(drawn[..., :3], X[:, :3].expand(50, -1, -1))
    assert (drawn[..., 3:] != X[:, 3:]).any()
    other = torch.cat([X[:, :3], 1 - X[:, 3:]], 1)
    torch.testing.assert_close(
        model.log_marginal(X).exp() + model.log_marginal(other).exp() < 1, torch.ones(8) > 0
    )
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4))).double()
    rows = torch.cat([X[:1, :3].expand(16, -1), every], 1)
    assert model.log_marginal(rows).logsumexp(0).item() == pytest.approx(0, abs=1e-9)
    generated = fitted.sample(400)
    mean = model.data_mean[:3]
    assert ((generated[:, :3].mean(0) - mean) / (mean * (1 - mean) / 400).sqrt()).abs().max() < 4


@pytest.mark.parametrize("num_layers", [1, 2])
def test_vimco_has_the_enumerated_bound_and_gradient(num_layers):
    """And they are no gradient of the bound of one draw."""
    torch.manual_seed(0)
    model, draws = made(num_layers=num_layers), 4000
    objective = VIMCO(2)
    wide = X.repeat(20, 1)  # 20 draws of every row at once
    found, losses = [], []
    for _ in range(draws // 20):
        loss = objective.differentiable_loss(model.model, model.guide, wide) / 20
        losses.append(loss.item())
        found.append(gradients(loss, model))
    found, losses = torch.stack(found), torch.tensor(losses)
    error = (found.var(0) / len(found)).sqrt()
    assert ((found.mean(0) - gradients(-enumerated(model, 2), model)) / error).abs().max() < 4.5
    assert ((found.mean(0) - gradients(-enumerated(model, 1), model)) / error).abs().max() > 6
    exact = -enumerated(model, 2).item()
    assert abs(losses.mean() - exact) < 4 * losses.std() / len(losses) ** 0.5


@pytest.mark.parametrize("m", [1, 3])
def test_concrete_has_the_relaxed_bound_of_m_draws(m):
    """By hand: units relaxed one layer after the other, no densities, log-mean-exp over the draws; and it is biased."""
    torch.manual_seed(0)
    model = made()
    name, settings = StructuredPrediction(7, num_particles=m).objective()
    assert name == "concrete"
    objective = Concrete(**settings)

    def by_hand(x):
        inputs = model.centred(x[:, :3]).expand(m, -1, -1)
        for layer in model.layers[:-1]:
            u = torch.rand(m, len(x), 2).double()
            inputs = 2 * ((layer(inputs) + u.logit()) / (2 / 3)).sigmoid() - 1
        seen = torch.distributions.Bernoulli(logits=model.layers[-1](inputs)).log_prob(x[:, 3:]).sum(-1)
        return -(seen.logsumexp(0) - math.log(m)).sum()

    wide, batches = X.repeat(20, 1), 150
    ours, theirs = (
        torch.stack([gradients(make(wide) / 20, model) for _ in range(batches)])
        for make in (lambda x: objective.differentiable_loss(model.model, model.guide, x), by_hand)
    )
    error = (ours.var(0) / batches + theirs.var(0) / batches).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)) / error).abs().max() < 4.5
    exact = gradients(-enumerated(model, m), model)
    assert ((ours.mean(0) - exact) / (ours.var(0) / batches).sqrt()).abs().max() > 6


def test_the_reported_bound_is_of_discrete_draws():
    """L_3 by enumeration, in training and of held-out rows."""
    model = made(num_particles=3)
    with torch.no_grad():
        exact = enumerated(model, 3).item() / len(X)
    fitted = pyrolvm.fit(
        model, X.repeat(500, 1), num_steps=2, learning_rate=1e-12, validation=X.repeat(500, 1), dtype="float64",
        initialise=False, **QUIET,
    )  # fmt: skip
    assert fitted.history["elbo"].mean() == pytest.approx(exact, abs=0.03)
    assert fitted.history["validation_elbo"].dropna().iloc[-1] == pytest.approx(exact, abs=0.03)
    assert (fitted.history["relaxed"] != fitted.history["elbo"]).all()
    assert fitted.history["kl"].abs().max() < 1e-9


@pytest.mark.parametrize("objective", [None, "vimco"])
def test_it_predicts_digits_better_than_their_pixels_by_themselves(objective):
    digits, _ = load_dataset("digits").binarise()
    train, test = (
        torch.from_numpy(digits.values[:1500]).float(),
        torch.from_numpy(digits.values[1500:]).float(),
    )
    mean = (train.sum(0) + 1) / (len(train) + 2)
    alone = torch.distributions.Bernoulli(mean[32:]).log_prob(test[:, 32:]).sum(-1).mean().item()
    fitted = pyrolvm.fit(
        StructuredPrediction(64, latent_dim=20), train, objective=objective, num_steps=200, batch_size=100,
        learning_rate=0.03, **QUIET,
    )  # fmt: skip
    assert fitted.log_evidence(test, "importance", 100, progress=False).mean() > alone + 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_dim": 1}, "data_dim must be a whole number of at least 2"),
        ({"num_given": 7}, "leaves nothing to predict"),
        ({"num_given": 0}, "num_given must be a positive whole number"),
        ({"temperature": -1.0}, "temperature must be a positive number"),
        ({"num_states": 1}, "num_states must be a whole number of at least 2"),
        ({"num_particles": 0}, "num_particles must be a positive whole number"),
    ],
)
def test_bad_settings_end_in_a_sentence(settings, message):
    with pytest.raises(SettingError, match=message) as error:
        StructuredPrediction(**{"data_dim": 7, **settings})
    assert "\n" not in str(error.value)


def test_bad_data_end_in_a_sentence():
    with pytest.raises(DataError, match=r"zeros and ones.*\(x > 0.5\)\.float\(\)$"):
        pyrolvm.fit(StructuredPrediction(7), X / 2, num_steps=1, **QUIET)
    with pytest.raises(DataError, match="needs data"):
        StructuredPrediction(7).guide()
