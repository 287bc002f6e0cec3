"""The held-out bound of programs whose latents are shared by all data, against exact values.

With q(m) over what all N training rows share, the bound per datum that is trained is

    (1/N) sum_n E_q [log p(x_n | m)] - KL(q(m) || p(m)) / N,

and held-out rows y_1..y_M take the place of the x_n in the first term alone: however many there are, they
do not pay for m again.
"""

import math

import pyro
import pytest
import torch
from programs import GlobalMean
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import Normal, kl_divergence

import pyrolvm
from pyrolvm import data_plate
from pyrolvm.inference.training import evaluation

FREEZE = {"num_steps": 1, "learning_rate": 1e-12, "validate_every": 1, "progress": False, "engine": "eager"}
N = 40
Q = Normal(torch.tensor(3.0), torch.tensor(0.5))


def own_length(x):
    return pyro.plate("rows", len(x))


def guide(x):
    loc = pyro.param("loc", Q.loc.clone())
    pyro.sample("m", pyro.distributions.Normal(loc, Q.scale))


def draws(rows, seed):
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed)) + 1


def exact(y):
    """E_q log N(y; m, 1) over held-out rows, less the share of KL(q || N(0, 1)) = 4.57 nats."""
    likelihood = -0.5 * math.log(2 * math.pi) - 0.5 * ((y - Q.loc) ** 2 + Q.scale**2)
    return float(likelihood.mean() - kl_divergence(Q, Normal(0.0, 1.0)) / N)


def held_out(model, guide, y, **options):
    objective = TraceMeanField_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    fitted = pyrolvm.fit(
        model, draws(N, 0), guide=guide, validation=y, objective=objective, **FREEZE, **options
    )
    return fitted.history["validation_elbo"].iloc[-1]


@pytest.mark.parametrize("rows", [1, 7, N, 200])
@pytest.mark.parametrize("plate", [data_plate, own_length])
def test_held_out_rows_do_not_pay_for_the_shared_latent_again(plate, rows):
    y = draws(rows, 1)
    # the draws' mean has error 0.5 / sqrt(4000), times the slope of the mean of (y - m)^2 / 2
    error = 0.5 / math.sqrt(4000) * (abs(float(y.mean() - Q.loc)) + 0.5)
    assert held_out(GlobalMean(plate).model, guide, y) == pytest.approx(exact(y), abs=4 * error)


@pytest.mark.parametrize("plate", [data_plate, own_length])
def test_nor_do_they_when_they_come_in_chunks(monkeypatch, plate):
    monkeypatch.setattr(evaluation, "CHUNK_ROWS", 16)
    y = draws(50, 1)
    assert held_out(GlobalMean(plate).model, guide, y) == pytest.approx(exact(y), abs=0.08)


def test_minibatches_are_judged_alike():
    y = draws(7, 1)
    assert held_out(GlobalMean().model, guide, y, batch_size=10) == pytest.approx(exact(y), abs=0.08)


def test_an_autoguide_of_the_shared_latent():
    """AutoNormal starts at the median of the prior with deviation 0.1: q = N(0, 0.1)."""
    y, q = draws(20, 1), Normal(0.0, 0.1)
    likelihood = -0.5 * math.log(2 * math.pi) - 0.5 * (y**2 + 0.01)
    wanted = float(likelihood.mean() - kl_divergence(q, Normal(0.0, 1.0)) / N)
    model = GlobalMean(own_length).model
    auto = AutoNormal(model, init_loc_fn=pyro.infer.autoguide.init_to_median(num_samples=1001))
    # the median of 1001 draws of N(0, 1) is within 0.16 of 0
    assert held_out(model, auto, y) == pytest.approx(wanted, abs=0.2)
