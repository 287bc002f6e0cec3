"""k-hat: ArviZ's own numbers, tails of known index, and streams that keep only the largest weights."""

import math
import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from programs import LocalNormal

import pyrolvm
from pyrolvm.inference.log_joint.psis import generalized_pareto_shape, khat_of_largest, tail_length
from pyrolvm.inference.posterior.evidence import evidence_table, khat_threshold, pareto_khat
from pyrolvm.inference.posterior.evidence.streams import LargestWeights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz


def normal_weights(scale, draws, rows, seed=0):
    """log weights [draws, rows] of p = N(0, 1) for draws of q = N(0, scale^2): tail index 1 - scale^2."""
    z = scale * torch.randn(draws, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.0, scale).log_prob(z)


@pytest.mark.parametrize("draws", [30, 100, 1000, 5000])
@pytest.mark.parametrize("scale", [0.5, 0.95, 1.5])
def test_k_hat_is_arvizs(draws, scale):
    log_weight = normal_weights(scale, draws, 12) - 80.0
    _, expected = arviz.psislw(log_weight.T.numpy())
    np.testing.assert_allclose(pareto_khat(log_weight).numpy(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [0.5, 0.7, 0.85, 0.95])
def test_the_index_of_a_normal_proposal_is_the_analytic_one(scale):
    """k = 1 - scale^2, reached from below: the tail has a factor 1 / sqrt(log t) besides its power."""
    k = pareto_khat(normal_weights(scale, 200_000, 8)).mean()
    assert k == pytest.approx(1 - scale**2, abs=0.1)


def test_a_wider_proposal_has_no_tail():
    assert (pareto_khat(normal_weights(2.0, 5000, 20)) < 0).all()


@pytest.mark.parametrize("k", [-0.3, 0.2, 0.7, 1.5])
def test_the_fit_finds_the_shape_of_pareto_draws(k):
    u = torch.rand(40, 4000, dtype=torch.float64)
    x = ((1 - u).pow(-k) - 1) / k
    found = generalized_pareto_shape(x.sort(1).values)
    error = max(1 + k, 0.5) / math.sqrt(4000 * 40)  # the maximum likelihood fit's
    assert found.mean() == pytest.approx(k, abs=6 * error + 0.005)


def test_scale_and_shift_change_nothing():
    log_weight = normal_weights(0.6, 2000, 5)
    torch.testing.assert_close(pareto_khat(log_weight + 1e3), pareto_khat(log_weight), rtol=1e-6, atol=1e-6)
    assert torch.isfinite(pareto_khat(50 * log_weight)).all()


def test_a_stream_of_chunks_keeps_what_all_weights_say():
    log_weight = normal_weights(0.6, 3000, 7)
    M = tail_length(3000)
    largest = LargestWeights(M + 1)
    for part in log_weight.split([1, 20, 979, 2000]):
        largest.add(part)
    assert largest.values.shape == (M + 1, 7)
    torch.testing.assert_close(khat_of_largest(largest.values, M), pareto_khat(log_weight))


def test_few_draws_and_equal_weights():
    assert pareto_khat(normal_weights(0.5, 20, 3)).isnan().all()
    assert not pareto_khat(normal_weights(0.5, 21, 3)).isnan().any()
    assert (pareto_khat(torch.full((100, 3), -7.0)) == -math.inf).all()


def test_the_threshold():
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(1000) == pytest.approx(1 - 1 / 3)
    assert khat_threshold(5000) == khat_threshold(10**6) == 0.7


class Narrow(LocalNormal):
    """The exact posterior of z is N(x / 2, 1 / 2); this guide is narrower by `factor`."""

    def guide(self, x):
        import pyro

        scale = pyro.param("scale", torch.tensor(0.5 * math.sqrt(0.5)))
        with self.plate(x):
            pyro.sample("z", dist.Normal(x / 2, scale))


def test_the_table_finds_the_guide_that_is_too_narrow():
    x = torch.linspace(-2, 2, 30)
    for program, low, high in ((Narrow(), 0.6, 0.9), (LocalNormal(shift=0.0), -2.0, 0.2)):
        fitted = pyrolvm.fit(
            program.model,
            x,
            guide=program.guide,
            num_steps=1,
            learning_rate=1e-12,
            progress=False,
            engine="eager",
        )
        table = evidence_table(fitted.pair(x), num_samples=5000)
        assert low < table.k_hat.mean() < high


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_weights_of_discrete_latents_have_no_heavy_tail(dtype):
    """Three states whose weights are 1, 1.2 and 1.5: bounded, and the guide almost the posterior."""
    generator = torch.Generator().manual_seed(0)
    states = torch.rand(2000, 6, generator=generator) * torch.tensor([1.0, 2.0, 5.0, 20.0, 60.0, 400.0])
    log_weight = torch.tensor([1.5, 1.2, 1.0], dtype=dtype).log()[states.long().clamp(max=2)] - 50.0
    assert (pareto_khat(log_weight) < 0).all()


def test_above_equal_weights_the_shape_is_of_those_above():
    """Most of the tail at one value, and forty draws of a Pareto distribution of index 1.5 above it."""
    u = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    above = (1 - u).pow(-1.5)
    log_weight = torch.cat([torch.zeros(1960, dtype=torch.float64), (1 + above).log()]).unsqueeze(1)
    expected = generalized_pareto_shape(above.unsqueeze(0))[0].item()
    assert pareto_khat(log_weight)[0].item() == pytest.approx(expected, abs=1e-9)
    assert expected > khat_threshold(2000)


@pytest.mark.parametrize(("weight", "expected"), [(1e6, math.inf), (1.5, -math.inf)])
def test_of_few_weights_above_equal_ones_their_share_decides(weight, expected):
    log_weight = torch.zeros(1000, 1)
    log_weight[[3, 500]] = math.log(weight)
    assert pareto_khat(log_weight)[0] == expected


def test_weights_equal_up_to_the_rounding_of_their_size_are_equal():
    """Log-weights of -1e5 in float32 stand on a grid of 0.008, and an exact guide's are a few of its steps apart."""
    log_weight = -1e5 + 0.05 * torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    assert (pareto_khat(log_weight) == -math.inf).all()
    assert (pareto_khat(log_weight.double()) > -math.inf).all()


def test_a_few_equal_weights_at_the_cutoff_are_part_of_the_tail():
    """Below a quarter of the tail the shape is that of the whole of it."""
    M = tail_length(1000)
    excess = torch.cat([torch.zeros(M // 8), torch.arange(1.0, M - M // 8 + 1) / M]).double()
    log_weight = torch.cat([torch.zeros(1000 - M).double(), excess.log1p()]).unsqueeze(1)
    expected = generalized_pareto_shape(excess.unsqueeze(0))
    assert pareto_khat(log_weight)[0].item() == pytest.approx(expected.item(), abs=1e-9)
