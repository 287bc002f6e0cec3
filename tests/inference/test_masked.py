"""Masks around latents under guides that are made from the model: entries that a mask leaves out count nowhere."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrolvm
from pyrolvm import data_plate

QUIET = {"progress": False}
ROWS, MISSING = 24, 6


def data():
    """(x, which are there): a quarter missing, and absurd where it is."""
    x = 1.0 + torch.randn(ROWS, generator=torch.Generator().manual_seed(0))
    seen = torch.arange(ROWS) % 4 != 0
    return torch.where(seen, x, torch.tensor(1e3)), seen


def partly_observed(x, seen):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with data_plate(x):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=seen)


def exact():
    """Of the mean field's optimum: bound in nats, mean of mu, and the sd of mu under q and of a missing x.

    The posterior of (mu, missing x) has precision [1/4 + N, -1 ...; -1, 1]; a mean field keeps its diagonal and its
    mean, and its bound is log p(x) - (sum log diag - log det) / 2.
    """
    x, seen = data()
    there = x[seen].double()
    n = len(there)
    covariance = torch.eye(n, dtype=torch.float64) + 4.0
    log_evidence = dist.MultivariateNormal(torch.zeros(n, dtype=torch.float64), covariance).log_prob(there)
    log_det = math.log(0.25 + n)  # the missing entries marginalised: their Schur complement
    gap = 0.5 * (math.log(0.25 + ROWS) - log_det)
    return float(log_evidence) - gap, float(there.sum() / (0.25 + n)), (0.25 + ROWS) ** -0.5


@pytest.mark.parametrize("guide", ["AutoNormal", "per_datum"])
def test_what_is_observed_costs_nothing_under_obs_mask(guide):
    """A mean field reaches the optimum of its family; under SVI the entropy of entries that are observed has no end."""
    x, seen = data()
    fitted = pyrolvm.fit(partly_observed, x, seen, guide=guide, engine="compiled", **QUIET)
    bound, mean, sd = exact()
    draws = fitted.posterior((x, seen), 4000)
    found = fitted.draws((x, seen), 4000)
    weight = found.log_weight.sum(-1) + found.global_log_prior - found.global_log_guide
    assert weight.mean().item() == pytest.approx(bound, abs=4 * weight.std().item() / 4000**0.5 + 0.04)
    assert draws["mu"].mean().item() == pytest.approx(mean, abs=0.02)
    assert draws["mu"].std().item() == pytest.approx(sd, rel=0.1)
    # the optimiser's noise leaves each of six locations within a few tenths of its sd, 1
    missing = draws["x_unobserved"][:, ~seen]
    assert missing.mean().item() == pytest.approx(mean, abs=0.1)
    assert missing.std().item() == pytest.approx(1.0, rel=0.1)


def test_both_engines_mask_alike():
    x, seen = data()
    options = {"guide": "AutoNormal", "num_steps": 5, "learning_rate": 0.01, **QUIET}
    eager, compiled = (
        pyrolvm.fit(partly_observed, x, seen, engine=e, **options).history["elbo"]
        for e in ("eager", "compiled")
    )
    assert eager.to_numpy() == pytest.approx(compiled.to_numpy(), rel=1e-4)


def test_joint_guides_of_masked_latents_are_refused():
    x, seen = data()
    with pytest.raises(pyrolvm.ProgramError, match=r"'x_unobserved'.*pass guide='AutoNormal'"):
        pyrolvm.fit(partly_observed, x, seen, guide="AutoDiagonalNormal", num_steps=2, **QUIET)


def padded(x, lengths):
    """A local level of each sequence, padded to the longest."""
    spread = pyro.sample("spread", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("sequences", len(x)):
        level = torch.zeros(len(x))
        for t in range(x.shape[1]):
            with pyro.poutine.mask(mask=t < lengths):
                level = pyro.sample(f"level_{t}", dist.Normal(level, spread))
                pyro.sample(f"x_{t}", dist.Normal(level, 0.5), obs=x[:, t])


def ragged(rows):
    """The same, sequence by sequence, without padding."""
    spread = pyro.sample("spread", dist.LogNormal(-1.0, 0.5))
    for i, row in enumerate(rows):
        level = torch.tensor(0.0)
        for t in range(len(row)):
            level = pyro.sample(f"level_{i}_{t}", dist.Normal(level, spread))
            pyro.sample(f"x_{i}_{t}", dist.Normal(level, 0.5), obs=row[t])


def test_padding_changes_nothing():
    """Latents of padded sequences have the bound of the same sequences without padding."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(n, generator=generator) for n in (4, 2, 3)]
    x, lengths = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([4, 2, 3])
    options = {"num_steps": 200, "learning_rate": 0.03, "engine": "eager", "initialise": False, **QUIET}
    with_padding = pyrolvm.fit(padded, x, lengths, guide="AutoNormal", **options)
    without = pyrolvm.fit(ragged, rows, guide="AutoNormal", **options)
    totals = [f.history["elbo"].tail(80) * f.num_data for f in (with_padding, without)]
    error = math.hypot(*(t.std() / 80**0.5 for t in totals))
    assert abs(totals[0].mean() - totals[1].mean()) < 4 * error + 0.05


def test_the_density_of_a_row_that_is_left_out_is_one():
    x, seen = data()

    def model(x, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with data_plate(x), pyro.poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    fitted = pyrolvm.fit(model, x, seen, guide="AutoNormal", num_steps=2, engine="eager", **QUIET)
    draws = fitted.draws((x, seen), 3)
    exact = dist.Normal(draws.values["mu"].unsqueeze(1), 1.0).log_prob(x).where(seen, torch.tensor(0.0))
    torch.testing.assert_close(draws.pointwise["x"], exact)
    torch.testing.assert_close(draws.log_likelihood, exact)
