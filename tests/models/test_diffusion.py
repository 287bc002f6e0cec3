"""Diffusion against closed forms: on Gaussian data every term of the bound is known."""

import math

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from scipy import stats
from torch import nn
from torch.distributions import Normal, kl_divergence

import pyrolvm
from pyrolvm.errors import DataError, ProgramError, SettingError
from pyrolvm.inference.objectives import RenyiELBO
from pyrolvm.models import DiffusionVAE
from pyrolvm.models.coordinates import Coordinates
from pyrolvm.models.discretised import DiscretisedNormal
from pyrolvm.models.noise_schedule import NoiseSchedule, betas_of
from pyrolvm.models.unet import TimeMLP, UNet

MEAN, SPREAD = 0.7, 1.6
QUIET = {"progress": False, "engine": "eager"}


class Optimal(nn.Module):
    """E[x_0 | x_t] for x_0 ~ N(MEAN, SPREAD^2 I), as whatever is to be predicted."""

    def __init__(self, chain, parameterisation):
        super().__init__()
        self.chain, self.parameterisation = chain, parameterisation
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_t, t):
        signal, noise = self.chain.at(self.chain.signal, t), self.chain.at(self.chain.noise, t)
        gain = signal * SPREAD**2 / (signal**2 * SPREAD**2 + noise**2)
        x0 = MEAN + gain * (x_t - signal * MEAN) + self.shift
        epsilon = (x_t - signal * x0) / noise
        return {"x0": x0, "epsilon": epsilon, "v": signal * epsilon - noise * x0}[self.parameterisation]


def optimal(data_dim=1, parameterisation="v", chain_length=12, **settings):
    """The best model of Gaussian data, in float64 and in the data's own coordinates."""
    settings = {"schedule": "cosine", "scaling": "none"} | settings
    vae = DiffusionVAE(
        data_dim, chain_length=chain_length, parameterisation=parameterisation, hidden=(4,), **settings
    ).double()
    vae.network = Optimal(vae.chain, parameterisation)
    return vae


def expected_terms(vae, x):
    """L_0, ..., L_T of x, exact: each is quadratic in the noise, so that its mean over +1 and -1 is its expectation."""
    ones = torch.ones(len(x), vae.latent_dim, dtype=x.dtype)
    each = [
        torch.stack([vae.term(x, t, sign * ones) for sign in (1, -1)]) for t in range(vae.chain_length + 1)
    ]
    return torch.stack(each).mean(1)  # [T + 1, rows]


def backwards(vae, t):
    """p(x_{t-1} | x_t) as a function of x_t: Normal over the numbers of a row."""
    law = vae.likelihood_dist if t == 1 else lambda x_t: vae.reverse_dist(x_t, t)
    return lambda x_t: law(x_t).base_dist


def bound_by_linear_algebra(vae):
    """E_q log p(x_0, ..., x_T) - E_q log q(x_1, ..., x_T | x_0) of a chain of Gaussians in one dimension."""
    T = vae.chain_length
    beta = np.array([0, *vae.chain.betas])
    covariance, mean = np.zeros((T + 1, T + 1)), np.zeros(T + 1)
    mean[0], covariance[0, 0] = MEAN, SPREAD**2
    for t in range(1, T + 1):
        keep = math.sqrt(1 - beta[t])
        mean[t] = keep * mean[t - 1]
        covariance[t, :t] = covariance[:t, t] = keep * covariance[t - 1, :t]
        covariance[t, t] = keep**2 * covariance[t - 1, t - 1] + beta[t]
    bound = sum(0.5 * math.log(2 * math.pi * math.e * b) for b in beta[1:])  # the entropy of q
    bound += -0.5 * math.log(2 * math.pi) - 0.5 * (covariance[T, T] + mean[T] ** 2)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for t in range(1, T + 1):
        law = backwards(vae, t)
        offset = law(zero).mean.item()
        slope = law(zero + 1).mean.item() - offset
        variance = law(zero).variance.item()
        error = covariance[t - 1, t - 1] - 2 * slope * covariance[t, t - 1] + slope**2 * covariance[t, t]
        error += (mean[t - 1] - slope * mean[t] - offset) ** 2
        bound -= 0.5 * math.log(2 * math.pi * variance) + 0.5 * error / variance
    return bound


# ------------------------------------------------------------------ the terms


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_on_gaussian_data_the_terms_sum_to_the_bound_by_linear_algebra(variance, schedule):
    vae = optimal(variance=variance, schedule=schedule)
    x = torch.tensor([[MEAN - SPREAD], [MEAN + SPREAD]], dtype=torch.float64)  # their moments are the law's
    bound = -expected_terms(vae, x).sum(0).mean().item()
    assert bound == pytest.approx(bound_by_linear_algebra(vae), abs=1e-6)
    exact = -0.5 * math.log(2 * math.pi * math.e * SPREAD**2)  # E log p(x) under the law itself
    assert bound < exact + 1e-9


def test_the_bound_of_a_long_chain_reaches_the_evidence():
    vae = optimal(chain_length=1000, schedule="linear")
    x = torch.tensor([[MEAN - SPREAD], [MEAN + SPREAD]], dtype=torch.float64)
    exact = -0.5 * math.log(2 * math.pi * math.e * SPREAD**2)
    assert 0 < exact + expected_terms(vae, x).sum(0).mean().item() < 0.01


@pytest.mark.parametrize("t", [2, 5, 12])
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_each_term_is_the_kl_divergence_of_two_gaussians(t, variance):
    vae = optimal(3, variance=variance)
    x, epsilon = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    x_t = vae.chain.noisy(x, torch.full((4,), t), epsilon)
    chain, beta = vae.chain, vae.chain.betas[t - 1]
    alpha_bar, before = chain.signal[t] ** 2, chain.signal[t - 1] ** 2
    # Bayes' rule on q(x_t | x_{t-1}) q(x_{t-1} | x_0)
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = (math.sqrt(1 - beta) * x_t / beta + before.sqrt() * x / (1 - before)) / precision
    q = Normal(mean, precision**-0.5)
    wanted = kl_divergence(q, vae.reverse_dist(x_t, t).base_dist).sum(-1)
    torch.testing.assert_close(vae.term(x, t - 1, epsilon), wanted, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(alpha_bar + chain.noise[t] ** 2, torch.ones(()).double())


def test_the_last_term_is_the_kl_divergence_from_the_prior():
    vae = optimal(3, chain_length=4)
    x = torch.randn(5, 3).double()
    q = vae.forward_dist(x, 4).base_dist
    wanted = kl_divergence(q, Normal(torch.zeros(3).double(), 1.0)).sum(-1)
    torch.testing.assert_close(vae.term(x, 4), wanted, rtol=1e-9, atol=1e-12)


def test_the_first_term_is_minus_the_log_likelihood():
    vae = optimal(3)
    x, epsilon = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    z = vae.chain.signal[1] * x + vae.chain.noise[1] * epsilon
    wanted = -Normal(vae.predict(z, 1), math.sqrt(vae.chain.betas[0])).log_prob(x).sum(-1)
    torch.testing.assert_close(vae.term(x, 0, epsilon), wanted)


def test_parameterisations_are_the_same_model_when_converted():
    x = torch.randn(5, 3).double()
    every = [expected_terms(optimal(3, p), x) for p in ("v", "epsilon", "x0")]
    torch.testing.assert_close(every[1], every[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(every[2], every[0], rtol=1e-9, atol=1e-9)
    made = []
    for p in ("v", "epsilon", "x0"):
        torch.manual_seed(3)
        made.append(optimal(3, p).generate(4, num_steps=6))
    torch.testing.assert_close(made[1], made[0])
    torch.testing.assert_close(made[2], made[0])


# ------------------------------------------------------------------ the chain, site by site


def networked(data_dim=2, chain_length=5, **settings):
    """A model with a random network, in float64."""
    vae = DiffusionVAE(data_dim, chain_length=chain_length, hidden=(6,), **settings).double()
    with torch.no_grad():
        for p in vae.network.parameters():
            p.normal_(0, 0.3)
    return vae


def test_the_chain_forwards_is_the_chain_backwards():
    """q(x_1, ..., x_T | x_0) = q(x_T | x_0) times the product of q(x_{t-1} | x_t, x_0), draw by draw."""
    vae, x = networked(), torch.randn(7, 2).double()
    trace = poutine.trace(vae.chain_guide).get_trace(x)
    drawn = {t: trace.nodes[f"x_{t}"]["value"] for t in range(1, 6)}
    trace.compute_log_prob()
    forwards = sum(trace.nodes[f"x_{t}"]["log_prob"] for t in range(1, 6))
    chain = vae.chain
    backwards = vae.forward_dist(x, 5).log_prob(drawn[5])
    for t in range(2, 6):
        q = Normal(chain.clean[t] * x + chain.noised[t] * drawn[t], chain.bridge[t])
        backwards = backwards + q.log_prob(drawn[t - 1]).sum(-1)
    torch.testing.assert_close(forwards, backwards)


OTHERWISE = {"parameterisation": "epsilon", "variance": "posterior", "schedule": [0.1, 0.2, 0.3, 0.3, 0.5]}


@pytest.mark.parametrize("settings", [{}, OTHERWISE])
def test_the_terms_sum_to_pyros_elbo_of_the_same_chain(settings):
    vae, x = networked(**settings), torch.randn(1, 2).double()
    many = x.expand(20_000, 2)
    with torch.no_grad():
        guide = poutine.trace(vae.chain_guide).get_trace(many)
        model = poutine.trace(poutine.replay(vae.chain_model, guide)).get_trace(many)
        weights = torch.zeros(20_000).double()
        for trace, sign in ((model, 1), (guide, -1)):
            trace.compute_log_prob()
            sites = [s for s in trace.nodes.values() if s["type"] == "sample" and s["name"] != "data"]
            weights = weights + sign * sum(s["log_prob"] for s in sites)
        assert -Trace_ELBO().loss(vae.chain_model, vae.chain_guide, many) == pytest.approx(
            weights.sum().item(), rel=0.05
        )
    terms = vae.log_bound(many)
    error = math.hypot(weights.std().item(), terms.std().item()) / math.sqrt(20_000)
    assert abs(weights.mean() - terms.mean()) < 4 * error
    assert error < 0.02 * abs(terms.mean())


def test_the_chain_has_importance_weights_that_rise_to_the_evidence():
    vae, x = optimal(chain_length=6), torch.tensor([[0.1], [1.5], [-2.0]], dtype=torch.float64)
    once = {"num_steps": 1, "learning_rate": 1e-12, "dtype": torch.float64, "initialise": False}
    fitted = pyrolvm.fit(vae.chain_model, x, guide=vae.chain_guide, **once, **QUIET)
    evidence = fitted.log_evidence(x, "importance", 20_000, progress=False)
    # p(x) is Gaussian, its moments from the chain of linear steps
    mean, variance = 0.0, 1.0
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for t in range(6, 0, -1):
        law = backwards(vae, t)
        slope = (law(zero + 1).mean - law(zero).mean).item()
        mean, variance = slope * mean + law(zero).mean.item(), slope**2 * variance + law(zero).variance.item()
    wanted = Normal(mean, math.sqrt(variance)).log_prob(x[:, 0])
    torch.testing.assert_close(evidence, wanted, rtol=0, atol=0.03)
    assert (-expected_terms(vae, x).sum(0) < wanted).all()


# ------------------------------------------------------------------ few t instead of all


@pytest.mark.parametrize("times", ["importance", "uniform"])
@pytest.mark.parametrize("num_times", [1, 3])
def test_a_few_t_estimate_the_whole_sum_without_bias(times, num_times):
    vae = networked(times=times, num_times=num_times, chain_length=8)
    x = torch.randn(1, 2).double().expand(4000, 2)
    with torch.no_grad():
        sampled = torch.stack([vae.chain_kl(x).mean() for _ in range(20)])  # rows of one call share a draw
        whole = vae.terms(x, 3)[1:].sum(0)
    error = math.hypot(sampled.std() / math.sqrt(20), whole.std() / math.sqrt(4000))
    assert abs(sampled.mean() - whole.mean()) < 4 * error
    assert error < 0.05 * whole.mean()


def test_the_laws_of_t_are_what_their_weights_say():
    for times in ("importance", "uniform"):
        law = networked(times=times, chain_length=6).time_law
        t, weight = law(torch.Size([100_000]))
        shares = torch.bincount(t.reshape(-1), minlength=7) / 100_000
        probability = networked(chain_length=6).chain.weight[2:] / law.weight
        torch.testing.assert_close(shares[2:].double(), probability, rtol=1e-3, atol=2e-5)
        assert probability.sum() == pytest.approx(1)
        assert weight.shape == t.shape == (1, 100_000)
        if times == "uniform":
            torch.testing.assert_close(probability, torch.full((5,), 0.2).double())


def test_importance_sampling_of_t_has_less_noise_near_gaussian_data():
    x = torch.randn(300, 32)
    errors = {
        times: DiffusionVAE(32, hidden=(8,), times=times).sampled_bound(x, 20)["standard_error"].mean()
        for times in ("importance", "uniform")
    }
    assert errors["importance"] < 0.25 * errors["uniform"]


def test_the_standard_error_is_that_of_the_estimates():
    vae, x = DiffusionVAE(3, chain_length=50, hidden=(8,)), torch.randn(400, 3)
    table = vae.sampled_bound(x, 30)
    apart = (
        table["bound"] - vae.log_bound(x, 30, seed=1).numpy()
    )  # whose own noise is small beside the first's
    assert abs(apart.mean()) < 4 * apart.std() / math.sqrt(400)
    assert 0.85 < (apart / table["standard_error"]).std() < 1.3


def gradients(vae, loss):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(vae.network.parameters()))])


def test_gradients_of_few_t_are_unbiased_for_those_of_all():
    vae = networked(chain_length=4)
    x = torch.randn(1, 2).double().expand(500, 2)
    sampled, whole = [], []
    for _ in range(60):
        sampled.append(gradients(vae, vae.chain_kl(x).mean()))
        parts = []
        for t in (2, 3, 4):
            error = vae.squared_error(x, torch.full((500,), t), torch.randn(500, 2).double())
            parts.append((vae.chain.weight[t] * error).mean())
        whole.append(gradients(vae, sum(parts)))
    a, b = torch.stack(sampled), torch.stack(whole)
    error = (a.var(0) / 60 + b.var(0) / 60).sqrt()
    z = (a.mean(0) - b.mean(0)) / error
    assert z.abs().max() < 4.5  # of some fifty parameters
    assert z.square().mean() < 1.6


def test_l_simple_is_the_gradient_and_the_bound_is_what_is_reported():
    plain, simple = networked(), networked(loss="simple")
    simple.load_state_dict(plain.state_dict())
    x, epsilon = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    for t in range(1, 6):
        steps = torch.full((6,), t)
        x_t = plain.chain.noisy(x, steps, epsilon)
        v = plain.network(x_t, steps)
        predicted = plain.chain.noise[t] * x_t + plain.chain.signal[t] * v
        wanted = gradients(plain, (epsilon - predicted).square().sum() / plain.chain_length)
        if t == 1:
            value = -simple.likelihood_dist(x_t).log_prob(x).sum()
        else:
            value = (simple.chain.weight[t] * simple.squared_error(x, steps, epsilon)).sum()
        torch.testing.assert_close(gradients(simple, value), wanted)
        torch.testing.assert_close(simple.term(x, t - 1, epsilon), plain.term(x, t - 1, epsilon))


def test_training_reports_the_bound_of_all_terms():
    x = torch.randn(300, 3) * 2 + 1
    vae = DiffusionVAE(3, chain_length=30, hidden=(16,), loss="simple")
    fitted = pyrolvm.fit(vae, x, num_steps=120, learning_rate=1e-6, **QUIET)  # so small that nothing moves
    elbo, kl, table = fitted.history["elbo"], fitted.history["kl"], vae.bound_table(x, 20)["nats"]
    assert abs(elbo.mean() + table.sum()) < 4 * elbo.std() / math.sqrt(120) + 0.02
    assert abs(kl.mean() - table[1:].sum()) < 4 * kl.std() / math.sqrt(120) + 0.02


# ------------------------------------------------------------------ generation


def test_all_steps_at_eta_one_are_the_ancestral_chain():
    for variance in ("beta", "posterior"):
        vae = networked(chain_length=6, variance=variance)
        x_T = torch.randn(5, 2).double()
        torch.manual_seed(7)
        short = vae.back_to_one(x_T, 6)
        torch.manual_seed(7)
        x_t = x_T
        with torch.no_grad():
            for t in range(6, 1, -1):
                x_t = vae.reverse_dist(x_t, t).base_dist.mean + vae.chain.scale[t] * torch.randn_like(x_t)
        torch.testing.assert_close(short, x_t)


@pytest.mark.parametrize(("num_steps", "eta"), [(None, 1.0), (100, 1.0), (100, 0.0), (100, 0.5)])
def test_samples_of_the_optimal_model_have_the_law_of_the_data(num_steps, eta):
    vae = optimal(chain_length=400, schedule="linear", variance="posterior")
    x = vae.generate(20_000, num_steps, eta)[:, 0]
    assert abs(x.mean() - MEAN) < 4 * SPREAD / math.sqrt(20_000) + 0.01
    tolerance = 4 * SPREAD / math.sqrt(40_000)
    assert abs(x.std() - SPREAD) < tolerance + (0.01 if num_steps is None else 0.08)


def test_without_noise_a_sample_is_a_function_of_where_it_starts():
    vae, x_T = networked(chain_length=9), torch.randn(4, 2).double()
    first, second = (vae.generate(4, 5, eta=0.0, x_T=x_T) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(vae.generate(4, 5, x_T=x_T), vae.generate(4, 5, x_T=x_T))


def test_the_model_generates_by_its_reverse_chain():
    vae = optimal(2, chain_length=50, sampling_steps=50)
    with pyrolvm.plates.data_rows(4000, torch.arange(4000)):
        trace = poutine.trace(vae.model).get_trace(None)
    x = trace.nodes["x"]["value"]
    assert x.shape == (4000, 2)
    assert (x.mean(0) - MEAN).abs().max() < 0.12
    assert (x.std(0) - SPREAD).abs().max() < 0.12
    assert DiffusionVAE(2, chain_length=1, hidden=(3,)).generate(3).shape == (3, 2)


# ------------------------------------------------------------------ schedules and units


def test_schedules_are_those_of_the_papers():
    linear = betas_of("linear", 1000)
    assert linear[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    torch.testing.assert_close(linear.diff(), torch.full((999,), (0.02 - 1e-4) / 999).double())
    chain = NoiseSchedule(betas_of("cosine", 1000)).double()
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 300, 990)]
    assert (chain.signal[[300, 990]] ** 2).tolist() == pytest.approx([f[1] / f[0], f[2] / f[0]])
    assert max(betas_of("linear", 5)) < 1
    own = DiffusionVAE(2, chain_length=3, schedule=[0.1, 0.2, 0.5], hidden=(3,))
    assert own.chain.betas == (0.1, 0.2, 0.5)


def test_the_chain_of_the_paper_ends_in_noise():
    """L_T of about 1e-5 bits/dim for CIFAR-10 in [-1, 1], of mean square 0.25 (Ho et al. 2020, section 4.3)."""
    vae = DiffusionVAE(3072, hidden=(2,)).double()
    bits = vae.bits_per_dim(-vae.chain.prior_kl(torch.full((1, 3072), 0.5).double()))
    assert 0.5e-5 < bits.item() < 1.5e-5


def test_tables_do_not_lose_digits_on_the_way_through_float32():
    direct = NoiseSchedule(betas_of("linear", 1000)).double()
    moved = NoiseSchedule(betas_of("linear", 1000)).double().float().half().double()
    for name, table in direct.named_buffers():
        assert torch.equal(table, dict(moved.named_buffers())[name])
    assert direct.noise[1].item() == pytest.approx(0.01, rel=1e-12)


def test_units_of_the_data_enter_by_the_volume_only():
    x = torch.randn(200, 3).double() @ torch.randn(3, 3).double()
    for settings in ({}, {"scaling": "whole"}, {"latent_dim": 2}):
        vae = networked(3, **settings)
        vae.initialise_from(x)
        standard = vae.log_bound(x)
        vae.initialise_from(100 * x + 1000)
        torch.testing.assert_close(
            vae.log_bound(100 * x + 1000), standard - 3 * math.log(100), rtol=1e-6, atol=1e-6
        )


def test_a_strangers_units_are_no_hindrance():
    x = torch.randn(200, 2) * torch.tensor([1e4, 1e-3]) + torch.tensor([5e4, 0])
    fitted = pyrolvm.fit(DiffusionVAE(2, chain_length=100, hidden=(16,)), x, num_steps=50, **QUIET)
    made = fitted.sample(500)
    assert torch.allclose(made.std(0), x.std(0), rtol=0.3)
    assert math.isfinite(fitted.history["elbo"].iloc[-1])


def test_bits_per_dimension():
    vae, x = networked(4), torch.randn(9, 4).double()
    table = vae.bound_table(x)
    assert list(table.index) == [0, 1, 2, 3, 4, 5]
    bound = vae.log_bound(x).mean()
    assert table["nats"].sum() == pytest.approx(-bound.item())
    assert table["bits_per_dim"].sum() == pytest.approx(-bound.item() / (4 * math.log(2)))
    assert vae.bits_per_dim(-4 * math.log(2)) == pytest.approx(1)


def test_principal_coordinates_are_a_change_of_variables():
    x = torch.randn(300, 4).double() @ torch.randn(4, 4).double() + 3
    coordinates = Coordinates(4, 2, "column", 0.3).double()
    coordinates.fit(x)
    code = coordinates(x)
    torch.testing.assert_close(code.mean(0), torch.zeros(2).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(torch.cov(code.T, correction=0), torch.eye(2).double())
    # log p(x) = log p(code) + log p(rest) + log |d(code, rest) / dx|
    y = (x - coordinates.loc) / coordinates.scale
    rest = y - (y @ coordinates.basis) @ coordinates.basis.T
    noise = rest.square().sum(-1).mean() / 2
    mean = torch.randn(300, 2).double()
    wanted = Normal(mean, 0.3).log_prob(code).sum(-1) - rest.square().sum(-1) / (2 * noise)
    wanted = (
        wanted
        - torch.log(2 * math.pi * noise)
        - coordinates.spread.log().sum()
        - coordinates.scale.log().sum()
    )
    torch.testing.assert_close(coordinates.law(mean).log_prob(x), wanted)
    whole = Coordinates(4, 4, "column", 0.3).double()
    whole.fit(x)
    torch.testing.assert_close(whole.decode(whole(x)), x)


def test_constant_columns_and_too_many_directions_are_survived():
    x = torch.randn(50, 1).expand(50, 3) * torch.tensor([1.0, 2.0, 0.0]) + 1
    for settings in ({}, {"latent_dim": 2}, {"scaling": "whole"}):
        vae = DiffusionVAE(3, chain_length=10, hidden=(4,), **settings)
        vae.initialise_from(x)
        assert torch.isfinite(vae.log_bound(x)).all()


# ------------------------------------------------------------------ levels


@pytest.mark.parametrize("scale", [0.05, 0.7, 5.0])
def test_a_discretised_gaussian_is_the_probability_of_rounding_to_a_level(scale):
    loc = torch.tensor([-2.0, 0.2, 3.4, 9.0]).double()
    law = DiscretisedNormal(loc, torch.tensor(scale, dtype=torch.float64), 6)
    levels = torch.arange(6).double().unsqueeze(-1)
    log_prob = law.log_prob(levels)  # [6, 4]
    torch.testing.assert_close(log_prob.exp().sum(0), torch.ones(4).double())
    exact = stats.norm(loc.numpy(), scale)
    inner = exact.cdf(levels.numpy() + 0.5) - exact.cdf(levels.numpy() - 0.5)
    np.testing.assert_allclose(log_prob[1:-1].exp(), inner[1:-1], rtol=1e-6, atol=1e-14)
    np.testing.assert_allclose(log_prob[-1], exact.logsf(4.5), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(log_prob[0], exact.logcdf(0.5), rtol=1e-9)
    assert torch.isfinite(log_prob).all()
    drawn = law.sample((2000,))
    assert set(drawn.unique().tolist()) <= set(range(6))


def test_far_levels_have_finite_gradients():
    loc = torch.tensor([0.0, 5.0, 2.5], requires_grad=True)
    DiscretisedNormal(loc, torch.tensor(0.01), 6).log_prob(torch.tensor([5.0, 0.0, 3.0])).sum().backward()
    assert torch.isfinite(loc.grad).all()
    assert loc.grad[0] > 0 > loc.grad[1]


def test_levels_are_probabilities_and_other_numbers_are_refused():
    x = torch.randint(0, 5, (100, 3))
    vae = DiffusionVAE(3, chain_length=20, levels=5, hidden=(16,))
    fitted = pyrolvm.fit(vae, x, num_steps=30, **QUIET)
    assert (vae.log_bound(x) < 0).all()
    assert set(fitted.sample(50).unique().tolist()) <= set(range(5))
    with pytest.raises(
        DataError, match=r"levels=5 needs whole numbers from 0 to 4, but row 1, column 0 is 0.5"
    ):
        vae.check_data(torch.tensor([[0.0, 1, 2], [0.5, 1, 2]]))
    with pytest.raises(DataError, match="row 0, column 2 is 5"):
        vae.check_data(torch.tensor([[0, 1, 5]]))


# ------------------------------------------------------------------ networks


@pytest.mark.parametrize(
    ("shape", "channels"), [((1, 8, 8), (8, 16)), ((3, 5, 7), (6, 8, 10)), ((1, 1, 1), (4,))]
)
def test_a_unet_takes_images_of_any_size_under_any_plates(shape, channels):
    net, size = UNet(shape, 10, channels), math.prod(shape)
    x, t = torch.randn(2, 3, size), torch.randint(1, 11, (2, 3))
    assert torch.equal(net(x, t), torch.zeros(2, 3, size))  # it starts at 0
    nn.init.normal_(net.leave[-1].weight)
    torch.testing.assert_close(net(x, t)[1, 2], net(x[1, 2:3], t[1, 2:3])[0], rtol=1e-4, atol=1e-4)
    net(x, t).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_mlp_knows_the_step():
    net = TimeMLP(3, 1000, (8,))
    nn.init.normal_(net.last.weight)
    x = torch.randn(4, 3)
    assert not torch.allclose(net(x, torch.ones(4).long()), net(x, torch.full((4,), 500)))


class Own(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.linear, self.times = nn.Linear(3, out), nn.Embedding(11, out)

    def forward(self, x_t, t):
        return self.linear(x_t) + self.times(t)


def test_a_users_network_is_taken_or_refused_at_construction():
    x = torch.randn(60, 3)
    fitted = pyrolvm.fit(DiffusionVAE(3, chain_length=10, network=Own(3)), x, num_steps=3, **QUIET)
    assert fitted.sample(4).shape == (4, 3)
    with pytest.raises(ProgramError, match=r"Own returned a tensor \[1, 2\]: it must map x_t \[\.\.\., 3\]"):
        DiffusionVAE(3, chain_length=10, network=Own(2))
    with pytest.raises(ProgramError, match="network Linear does not take a row"):
        DiffusionVAE(3, chain_length=10, network=nn.Linear(3, 3))


# ------------------------------------------------------------------ what it is not


def test_what_needs_a_density_is_refused_by_name():
    x = torch.randn(60, 3)
    fitted = pyrolvm.fit(DiffusionVAE(3, chain_length=10, hidden=(8,)), x, num_steps=3, **QUIET)
    for method in ("importance", "iwae", "ais", "exact"):
        with pytest.raises(
            SettingError, match=f"method='{method}' needs densities, and the model has none for 'z'"
        ):
            fitted.log_evidence(x, method, 10, num_particles=5 if method == "iwae" else None)
    for objective in (RenyiELBO(num_particles=3), "iwae"):
        vae = DiffusionVAE(3, chain_length=10, hidden=(8,))
        with pytest.raises(SettingError, match=r"(RenyiELBO|ImportanceWeighted) needs densities"):
            pyrolvm.fit(vae, x, objective=objective, num_steps=2, **QUIET)
    with pytest.raises(ProgramError, match="a bound that holds under its own guide only"):
        pyrolvm.fit(
            DiffusionVAE(3, chain_length=10, hidden=(8,)), x, guide="AutoNormal", num_steps=2, **QUIET
        )
    diagnosis = pyrolvm.diagnose(fitted, x[:20], 20, reference="nuts", progress=False)
    assert {"k-hat per datum", "log p(x)", "collapse", "reference"} <= set(diagnosis.not_done)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "quadratic"}, "choose from linear, cosine"),
        ({"schedule": [0.1, 0.2], "chain_length": 3}, "2 betas for a chain of 3 steps"),
        ({"schedule": [0.1, 1.0], "chain_length": 2}, "beta_2 = 1: each must lie between 0 and 1"),
        ({"chain_length": 0}, "chain_length must be a positive whole number"),
        ({"parameterisation": "score"}, "choose from epsilon, x0, v"),
        ({"loss": "hybrid"}, "choose from bound, simple"),
        ({"variance": "learned"}, "choose from beta, posterior"),
        ({"times": "sorted"}, "choose from importance, uniform"),
        ({"num_times": 0}, "num_times must be a positive whole number"),
        ({"scaling": "rank"}, "choose from column, whole, none"),
        ({"latent_dim": 5}, "latent_dim=5 must lie between 1 and data_dim=4"),
        ({"latent_dim": 2, "levels": 4}, "principal coordinates, which levels= has no meaning for"),
        ({"levels": 1}, "levels must be a whole number of at least 2"),
        ({"network": "transformer"}, "choose from mlp, unet"),
        ({"image_shape": (1, 3, 3)}, "9 pixels, but data_dim=4"),
        ({"image_shape": (1, 2, 2), "channels": (4, 4, 4)}, "between 1 and 2 entries for images of 2 by 2"),
        ({"sampling_steps": 1}, "sampling_steps must be a whole number of at least 2"),
        ({"activation": "step"}, "activation='step' is not known"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(SettingError, match=words):
        DiffusionVAE(4, **settings)


def test_sampling_settings_that_mean_nothing_are_refused():
    vae = networked()
    with pytest.raises(SettingError, match="eta=2 must lie between 0"):
        vae.generate(3, eta=2)
    with pytest.raises(SettingError, match="num_steps must be a whole number of at least 2"):
        vae.generate(3, 1)
    with pytest.raises(DataError, match=r"call guide\(x\)"):
        vae.guide(None)
