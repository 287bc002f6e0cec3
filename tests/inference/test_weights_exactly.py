"""Masks, scales and what is given, in bounds and weights: the guides are exact, so that every number is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate

import pyrolvm
from pyrolvm import data_plate

FREEZE = {"learning_rate": 1e-12, "progress": False, "engine": "eager", "dtype": "float64"}
X = torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64)
SEEN = torch.tensor([True, False, True, True])
ALONE = dist.Normal(0.0, 2**0.5)
"""p(x) of z ~ N(0, 1), x | z ~ N(z, 1)."""


def left_out(x, seen):
    with data_plate(x), poutine.mask(mask=seen):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def left_out_guide(x, seen):
    shift = pyro.param("shift", torch.tensor(0.0))
    with data_plate(x), poutine.mask(mask=seen):
        pyro.sample("z", dist.Normal(x / 2 + shift, 0.5**0.5))


def same(found, expected):
    assert found.detach().numpy() == pytest.approx(expected.detach().numpy(), abs=1e-5)


@pytest.mark.parametrize("method", ["importance", "iwae"])
def test_rows_that_a_mask_leaves_out_have_the_evidence_of_nothing(method):
    fitted = pyrolvm.fit(left_out, X, SEEN, guide=left_out_guide, num_steps=1, **FREEZE)
    expected = torch.where(SEEN, ALONE.log_prob(X), torch.zeros(()))
    options = {"num_particles": 4} if method == "iwae" else {}
    same(fitted.log_evidence((X, SEEN), method, 8, progress=False, **options), expected)
    same(fitted.draws((X, SEEN), 5).log_weight, expected.expand(5, 4))
    assert fitted.history.elbo[0] == pytest.approx(expected.mean().item(), abs=1e-5)


@pytest.mark.parametrize("objective", ["trace", "iwae"])
def test_minibatches_of_masked_rows_weigh_what_all_rows_weigh(objective):
    """Two steps of two rows are a pass: their bounds' mean is the bound of all, under any order of the rows."""
    fitted = pyrolvm.fit(
        left_out, X, SEEN, guide=left_out_guide, objective=objective, batch_size=2, num_steps=6, **FREEZE
    )
    expected = torch.where(SEEN, ALONE.log_prob(X), torch.zeros(())).mean().item()
    for step in (0, 2, 4):
        assert fitted.history.elbo[step : step + 1 + 1].mean() == pytest.approx(expected, abs=1e-5)


def test_entries_that_an_inner_mask_leaves_out_are_marginalised():
    """x_t | z ~ N(z, 1) for the times that are there: p(x there) = N(0, 1 1' + I)."""
    x = torch.tensor([[1.0, 2.0, 9.0], [0.5, 9.0, 9.0]], dtype=torch.float64)
    there = torch.tensor([[True, True, False], [True, False, False]])

    def model(x, there):
        with data_plate(x, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("time", x.shape[1], dim=-1), poutine.mask(mask=there):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, there):
        n = there.sum(-1, keepdim=True)
        loc = (x * there).sum(-1, keepdim=True) / (n + 1) + pyro.param("shift", torch.tensor(0.0))
        with data_plate(x, dim=-2):
            pyro.sample("z", dist.Normal(loc, (n + 1.0) ** -0.5))

    fitted = pyrolvm.fit(model, x, there, guide=guide, num_steps=1, **FREEZE)
    found = fitted.log_evidence((x, there), num_samples=6, progress=False)
    rows = [row[mask] for row, mask in zip(x, there, strict=True)]
    exact = [
        dist.MultivariateNormal(torch.zeros(len(r)).double(), torch.eye(len(r)).double() + 1).log_prob(r)
        for r in rows
    ]
    same(found, torch.stack(exact))


def mixed(x, seen):
    p = pyro.param("p", torch.tensor(0.3))
    with data_plate(x), poutine.mask(mask=seen):
        k = pyro.sample("k", dist.Bernoulli(p), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(3 * k, 1.0), obs=x)


def test_states_of_rows_that_a_mask_leaves_out_sum_to_one():
    fitted = pyrolvm.fit(mixed, X, SEEN, guide=lambda x, seen: None, num_steps=1, **FREEZE)
    terms = [math.log(w) + dist.Normal(m, 1.0).log_prob(X) for w, m in ((0.7, 0.0), (0.3, 3.0))]
    joint = torch.stack(terms)
    expected = torch.where(SEEN, joint.logsumexp(0), torch.zeros(()))
    same(fitted.log_evidence((X, SEEN), "exact", progress=False), expected)
    assert fitted.history.elbo[0] == pytest.approx(expected.mean().item(), abs=1e-5)
    draws = fitted.posterior((X, SEEN), 4000)["k"]
    assert (draws[:, ~SEEN] == -1).all()
    share = torch.softmax(joint, 0)[1][SEEN]
    error = (share * (1 - share) / 4000).sqrt()
    assert ((draws[:, SEEN].double().mean(0) - share).abs() < 4 * error + 1e-3).all()


def noisy(x):
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, noise), obs=x)


def noisy_guide(x):
    shift = pyro.param("shift", torch.tensor(0.0))
    with data_plate(x):
        pyro.sample("z", dist.Normal(x / 5 + shift, 0.8**0.5))  # the posterior at noise = 2


@pytest.mark.parametrize("batch_size", [None, 2])
def test_what_is_given_counts_in_the_bound_and_in_no_rows_evidence(batch_size):
    model = poutine.condition(noisy, data={"noise": torch.tensor(2.0)})
    fitted = pyrolvm.fit(model, X, guide=noisy_guide, batch_size=batch_size, num_steps=2, **FREEZE)
    rows = dist.Normal(0.0, 5**0.5).log_prob(X)
    given = dist.LogNormal(torch.zeros(()).double(), 1.0).log_prob(torch.tensor(2.0).double())
    same(fitted.log_evidence(X, num_samples=5, progress=False), rows)
    assert fitted.history.elbo.mean() == pytest.approx((rows.mean() + given / 4).item(), abs=1e-5)
    assert [s.kind for s in fitted.structure.sites if s.name == "noise"] == ["given"]


def without_size(x):
    with pyro.plate("rows"):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def without_size_guide(x):
    with pyro.plate("rows"):
        pyro.sample("z", dist.Normal(x / 2 + pyro.param("shift", torch.tensor(0.0)), 0.5**0.5))


def test_minibatches_of_a_plate_without_a_size():
    fitted = pyrolvm.fit(without_size, X, guide=without_size_guide, batch_size=2, num_steps=4, **FREEZE)
    rows = ALONE.log_prob(X)
    assert fitted.history.elbo[:2].mean() == pytest.approx(rows.mean().item(), abs=1e-5)
    same(fitted.log_evidence(X, num_samples=4, progress=False), rows)
    same(fitted.log_evidence(X[:3] + 1, num_samples=4, progress=False), ALONE.log_prob(X[:3] + 1))


def test_a_plate_that_draws_its_rows_is_trained_on_the_bound_of_all():
    """Each step's bound is N / B times that of the rows drawn: all pairs of rows are met, and no other value is."""

    def model(x):
        with pyro.plate("rows", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("rows", len(x), subsample_size=2) as index:
            pyro.sample("z", dist.Normal(x[index] / 2 + shift, 0.5**0.5))

    fitted = pyrolvm.fit(model, X, guide=guide, num_steps=40, **FREEZE)
    rows = ALONE.log_prob(X)
    pairs = [(rows[i] + rows[j]).item() / 2 for i in range(4) for j in range(i)]
    found = fitted.history.elbo.to_numpy()
    assert all(min(abs(f - p) for p in pairs) < 1e-5 for f in found)
    assert len({round(f, 4) for f in found}) == len({round(p, 4) for p in pairs})
    same(fitted.log_evidence(X, num_samples=4, progress=False), rows)


@pytest.mark.parametrize(("power", "weight"), [(2.0, 1.0), (1.0, 3.0)])
def test_a_power_of_the_likelihood_is_in_the_weights_and_a_scale_of_all_is_not(power, weight):
    """log int N(z; 0, 1) N(x; z, 1)^p dz = -(p log 2 pi + log(1 + p) + p x^2 / (1 + p)) / 2."""

    def model(x):
        with poutine.scale(scale=weight), data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.scale(scale=power):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = power * x / (1 + power) + pyro.param("shift", torch.tensor(0.0))
        with poutine.scale(scale=weight), data_plate(x):
            pyro.sample("z", dist.Normal(loc, (1 + power) ** -0.5))

    fitted = pyrolvm.fit(model, X, guide=guide, num_steps=1, **FREEZE)
    normaliser = -(power * math.log(2 * math.pi) + math.log(1 + power) + power * X**2 / (1 + power)) / 2
    same(fitted.draws(X, 4).log_weight, normaliser.expand(4, 4))
    assert fitted.history.elbo[0] == pytest.approx(weight * normaliser.mean().item(), abs=1e-4)
    assert fitted.structure.tempered == (power != 1)


@config_enumerate
def chain(x):
    with data_plate(x):
        k = pyro.sample("k_0", dist.Bernoulli(torch.full((len(x),), 0.5, dtype=x.dtype)))
        pyro.sample("x_0", dist.Normal(k, 1.0), obs=x[:, 0])
        k = pyro.sample("k_1", dist.Bernoulli(0.2 + 0.6 * k))
        pyro.sample("x_1", dist.Normal(k, pyro.param("s", torch.tensor(1.0))), obs=x[:, 1])


def test_states_summed_out_in_turn_are_those_of_all_paths():
    x = torch.stack([X, X.flip(0)], -1)
    fitted = pyrolvm.fit(chain, x, guide=lambda x: None, num_steps=1, **FREEZE)
    paths = []
    for a in (0.0, 1.0):
        for b in (0.0, 1.0):
            p = 0.2 + 0.6 * a
            prior = math.log(0.5) + math.log(p if b else 1 - p)
            paths.append(
                prior + dist.Normal(a, 1.0).log_prob(x[:, 0]) + dist.Normal(b, 1.0).log_prob(x[:, 1])
            )
    same(fitted.log_evidence(x, "exact", progress=False), torch.stack(paths).logsumexp(0))
    best = torch.stack(paths).argmax(0)
    found = fitted.most_probable(x)
    assert (2 * found["k_0"] + found["k_1"]).long().tolist() == best.tolist()
