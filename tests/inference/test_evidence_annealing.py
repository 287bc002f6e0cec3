"""Annealed importance sampling and its reversal, against exact answers and with guides that mislead."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyrolvm
from pyrolvm import PPCA, VAE, PowerVAE, ProgramError, SettingError, data_plate
from pyrolvm.inference.posterior.evidence import Annealing, bidirectional, evidence_table
from pyrolvm.inference.posterior.evidence.bdmc import _simulated
from pyrolvm.inference.posterior.evidence.hmc import TARGET_ACCEPTANCE, State, adapted, hmc_move, slope_of
from pyrolvm.models.power_vae import tempered_log_marginal

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)) @ torch.randn(
    5, 5, generator=torch.Generator().manual_seed(2)
)
QUIET = {"progress": False, "engine": "eager"}
STILL = {"num_steps": 1, "learning_rate": 1e-12, **QUIET}


@pytest.fixture(scope="module")
def misled():
    """PPCA with a guide that is off by deviations: importance sampling from it fails."""
    model = PPCA.closed_form(X, 2, guide="full")
    with torch.no_grad():
        model.guide_loadings.mul_(-0.5)
        model.guide_log_scale.sub_(0.7)
    return pyrolvm.fit(model, X, **STILL)


def errors(table, exact):
    """Differences [rows], and the standard error of their mean."""
    difference = torch.tensor(table.log_evidence.to_numpy()) - exact.double()
    return difference, math.sqrt((table.standard_error**2).sum()) / len(table)


# ---------------------------------------------------------------------- the moves


def anisotropic(u):
    """Start N(0, I), joint N(0, diag(1, 4)): ratio log N(0, diag(1, 4)) - log N(0, I)."""
    scales = torch.tensor([1.0, 2.0], dtype=u.dtype)
    start = dist.Normal(torch.zeros_like(scales), 1.0).log_prob(u).sum(-1)
    return start, dist.Normal(torch.zeros_like(scales), scales).log_prob(u).sum(-1) - start


@pytest.mark.parametrize("step", [0.3, 1.2])
def test_hmc_leaves_its_target_as_it_is(step):
    scales = torch.tensor([1.0, 2.0])
    state = State.at(anisotropic, torch.randn(500, 20, 2) * scales)
    for _ in range(10):
        state, _ = hmc_move(slope_of(anisotropic), state, 1.0, torch.full((20,), step), 5)
    u = state.u.reshape(-1, 2) / scales
    error = 1 / math.sqrt(len(u))
    assert u.mean(0).abs().max() < 4.5 * error
    assert (u.square().mean(0) - 1).abs().max() < 4.5 * math.sqrt(2) * error
    assert (u.pow(4).mean(0) - 3).abs().max() < 4.5 * math.sqrt(96) * error
    log_start, log_ratio = anisotropic(state.u)
    torch.testing.assert_close(state.log_start, log_start)
    torch.testing.assert_close(state.log_ratio, log_ratio)


def test_hmc_reaches_its_target_from_elsewhere_at_the_acceptance_that_is_asked():
    state, step = State.at(anisotropic, torch.full((200, 3, 2), 3.0)), torch.tensor([1e-2, 0.5, 20.0])
    seen = []
    for move in range(200):
        state, acceptance = hmc_move(slope_of(anisotropic), state, 1.0, step, 5)
        step = adapted(step, acceptance)
        seen.append(acceptance.mean(0)) if move >= 100 else None
    assert (torch.stack(seen).mean(0) - TARGET_ACCEPTANCE).abs().max() < 0.03
    assert step.log().std() < 0.2
    deviations = state.u.std(0)  # [rows, 2]
    torch.testing.assert_close(deviations.mean(0), torch.tensor([1.0, 2.0]), atol=0, rtol=0.12)


def test_a_path_out_of_the_support_is_rejected():
    def bounded(u):
        log_start = torch.where(u[..., 0] < 1.0, -0.5 * u[..., 0] ** 2, torch.nan)
        return log_start, torch.zeros_like(log_start)

    state = State.at(bounded, torch.zeros(50, 4, 1))
    for _ in range(20):
        state, _ = hmc_move(slope_of(bounded), state, 1.0, torch.full((4,), 0.8), 3)
    assert (state.u < 1.0).all()
    assert torch.isfinite(state.log_start).all()


@pytest.mark.parametrize("schedule", ["sigmoid", "geometric", "linear"])
@pytest.mark.parametrize("num_steps", [1, 2, 100])
def test_schedules_rise_from_zero_to_one(schedule, num_steps):
    betas = Annealing(num_steps, schedule=schedule).betas
    assert len(betas) == num_steps + 1
    assert betas[0] == 0
    assert betas[-1] == 1
    assert betas == sorted(set(betas))


# ---------------------------------------------------------------------- the estimate


@pytest.mark.parametrize(("start", "num_steps"), [("prior", 150), ("guide", 300)])
def test_ais_finds_the_evidence_where_the_guide_misleads(misled, start, num_steps):
    exact = misled.log_evidence(X, "exact").detach()
    trusting = evidence_table(misled.pair(X), num_samples=1000)
    assert (trusting.k_hat > 0.7).mean() > 0.9
    assert errors(trusting, exact)[0].mean() < -1
    table = evidence_table(misled.pair(X), "ais", 32, num_steps=num_steps, num_leapfrog=5, start=start)
    difference, error = errors(table, exact)
    assert abs(difference.mean()) < 0.05
    assert difference.mean() < 3 * error  # a lower bound
    assert (difference.abs() < 4.5 * torch.tensor(table.standard_error.to_numpy()) + 0.05).all()
    assert table.acceptance.between(0.5, 0.8).all()
    assert table.k_hat.isna().all()


def test_more_steps_lose_less(misled):
    exact = misled.log_evidence(X, "exact").detach()
    lost = [
        -errors(evidence_table(misled.pair(X), "ais", 4, num_steps=steps), exact)[0].mean().item()
        for steps in (2, 8, 30)
    ]
    assert lost[0] > lost[1] > lost[2]


def test_one_step_is_importance_sampling_from_the_start(misled):
    exact = misled.log_evidence(X, "exact").detach()
    table = evidence_table(misled.pair(X), "ais", 20_000, num_steps=1)
    difference, error = errors(table, exact)
    assert abs(difference.mean()) < 4 * error + 0.02


def counts(num_rows=12):
    return torch.arange(num_rows).float()


def poisson_gamma(x):
    """rate ~ Gamma(2, 0.5), x ~ Poisson(rate): negative binomial, P(x) of 2 successes at odds 0.5 : 1."""
    shape = pyro.param("shape", torch.tensor(2.0))
    with data_plate(x):
        rate = pyro.sample("rate", dist.Gamma(shape, 0.5))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def negative_binomial(x):
    return dist.NegativeBinomial(2.0, probs=torch.tensor(1 / 1.5)).log_prob(x)


def rate_guide(x):
    with data_plate(x):
        loc = (x + 1).log() + pyro.param("loc", torch.tensor(0.3))
        pyro.sample("rate", dist.LogNormal(loc, pyro.param("scale", torch.tensor(1.0))))


def test_constrained_latents_bring_their_jacobian():
    x = counts()
    fitted = pyrolvm.fit(poisson_gamma, x, guide=rate_guide, **STILL)
    exact = negative_binomial(x)
    for options in ({"start": "prior"}, {"start": "guide", "schedule": "linear", "num_leapfrog": 4}):
        difference, error = errors(evidence_table(fitted.pair(x), "ais", 64, num_steps=40, **options), exact)
        assert abs(difference.mean()) < 4 * error + 0.01
    difference, error = errors(evidence_table(fitted.pair(x), "importance", 5000), exact)
    assert abs(difference.mean()) < 4 * error + 0.002


def test_an_autoguide_is_a_start_and_a_point_is_not():
    x = counts()
    fitted = pyrolvm.fit(poisson_gamma, x, guide=AutoNormal, num_steps=300, learning_rate=0.05, **QUIET)
    exact = dist.NegativeBinomial(
        fitted.program.parameters["shape"].detach(), probs=torch.tensor(1 / 1.5)
    ).log_prob(x)
    difference, error = errors(
        evidence_table(fitted.pair(x), "ais", 64, num_steps=30, num_leapfrog=4, start="guide"), exact
    )
    assert abs(difference.mean()) < 4 * error + 0.01
    point = pyrolvm.fit(poisson_gamma, x, guide=AutoDelta, **STILL)
    with pytest.raises(SettingError, match="point estimate of 'rate'"):
        point.log_evidence(x, "ais", num_steps=2, start="guide")
    difference, error = errors(
        evidence_table(point.pair(x), "ais", 64, num_steps=40, num_leapfrog=5), negative_binomial(x)
    )
    assert abs(difference.mean()) < 4 * error + 0.01


def test_latents_on_a_simplex_and_several_sites_at_once():
    """Dirichlet-multinomial beside an unrelated z ~ N(0, 1), y ~ N(z, 1): the evidence is their sum."""

    def model(x):
        offset = pyro.param("offset", torch.tensor(0.0))
        with data_plate(x):
            p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            z = pyro.sample("z", dist.Normal(offset, 1.0))
            pyro.sample("x", dist.Multinomial(10, p), obs=x[:, :3])
            pyro.sample("y", dist.Normal(z, 1.0), obs=x[:, 3])

    def guide(x):
        with data_plate(x):
            pyro.sample("p", dist.Dirichlet(1 + x[:, :3] / 2))
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    x = torch.cat([dist.Multinomial(10, torch.tensor([0.2, 0.3, 0.5])).sample((8,)), torch.randn(8, 1)], 1)
    fitted = pyrolvm.fit(model, x, guide=guide, **STILL)
    exact = dist.DirichletMultinomial(torch.tensor([1.0, 2.0, 3.0]), 10).log_prob(x[:, :3])
    exact = exact + dist.Normal(0.0, math.sqrt(2)).log_prob(x[:, 3])
    for start in ("prior", "guide"):
        options = {"num_steps": 40, "num_leapfrog": 5, "start": start}
        difference, error = errors(evidence_table(fitted.pair(x), "ais", 64, **options), exact)
        assert abs(difference.mean()) < 4 * error + 0.01


def test_a_latent_whose_support_another_decides_in_nested_plates():
    """top ~ U(1, 2); z_j ~ U(0, top) for three cells of each row; x_j = z_j + noise: quadrature over top and z."""

    def model(x):
        noise = pyro.param("noise", torch.tensor(0.5))
        with data_plate(x, dim=-2):
            top = pyro.sample("top", dist.Uniform(1.0, 2.0))
            with pyro.plate("cells", 3, dim=-1):
                z = pyro.sample("z", dist.Uniform(torch.zeros_like(top), top))
                pyro.sample("x", dist.Normal(z, noise), obs=x)

    def guide(x):
        with data_plate(x, dim=-2):
            top = pyro.sample("top", dist.Uniform(1.0, 2.0))
            with pyro.plate("cells", 3, dim=-1):
                pyro.sample("z", dist.Uniform(torch.zeros_like(top), top))

    x = torch.rand(6, 3) * 1.5
    fitted = pyrolvm.fit(model, x, guide=guide, **STILL)
    top = (torch.linspace(1, 2, 2001)[:-1] + 0.00025).double().reshape(-1, 1, 1)
    standard = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    cell = (standard.cdf((top - x) / 0.5) - standard.cdf(-x / 0.5)) / top  # [grid, rows, cells]
    exact = cell.log().sum(-1).exp().mean(0).log()
    difference, error = errors(evidence_table(fitted.pair(x), "ais", 64, num_steps=40, num_leapfrog=5), exact)
    assert abs(difference.mean()) < 4 * error + 0.01


def test_the_power_posterior_has_its_own_normaliser():
    ppca = PPCA.closed_form(X, 2)
    vae = PowerVAE(5, 2, eta=0.5, likelihood="gaussian", decoder="linear", noise_scale=1.0, hidden=(4,))
    fitted = pyrolvm.fit(vae, X, **STILL)
    with torch.no_grad():
        layer = next(m for m in vae.decoder.modules() if isinstance(m, torch.nn.Linear))
        layer.weight.copy_(ppca.loadings)
        layer.bias.copy_(ppca.offset)
        ppca.log_noise_scale.zero_()
    exact = tempered_log_marginal(ppca, X, 0.5).detach()
    difference, error = errors(evidence_table(fitted.pair(X), "ais", 32, num_steps=40, num_leapfrog=5), exact)
    assert abs(difference.mean()) < 4 * error + 0.01
    with pytest.raises(SettingError, match="'x' is raised to a power"):
        bidirectional(fitted.pair(fitted.example), 4, num_steps=2)


def test_global_latents_are_held_at_draws_of_the_guide():
    """m from q = N(0, 0.3^2), z ~ N(m, 1), x ~ N(z, 1): log N(x; 0, 2 + 0.3^2)."""

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.3))
        with data_plate(x):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.linspace(-1, 1, 10)
    fitted = pyrolvm.fit(model, x, guide=guide, **STILL)
    exact = dist.Normal(0.0, math.sqrt(2.09)).log_prob(x)
    for start in ("prior", "guide"):
        options = {"num_steps": 20, "num_leapfrog": 5, "start": start}
        difference, _ = errors(evidence_table(fitted.pair(x), "ais", 500, **options), exact)
        assert abs(difference.mean()) < 0.05
    table = bidirectional(fitted.pair(fitted.example), 10, num_chains=50, num_steps=40, num_leapfrog=5)
    assert abs(table.gap.mean()) < 0.1


# ---------------------------------------------------------------------- both sides


def test_bidirectional_sandwiches_the_exact_value(misled):
    exact = misled.log_evidence(X, "exact").detach().double()
    mean, scale_tril = misled.model.exact_posterior(X)
    z = dist.MultivariateNormal(mean.detach(), scale_tril=scale_tril.detach()).sample((16,))
    gaps = []
    for steps in (4, 20, 60):
        table = bidirectional(
            misled.pair(X), exact_draws={"z": z}, num_chains=16, num_steps=steps, num_leapfrog=5
        )
        lower, upper = (torch.tensor(table[name].to_numpy()) - exact for name in ("lower", "upper"))
        below, above = (
            math.sqrt((table[name] ** 2).sum()) / len(table) for name in ("lower_error", "upper_error")
        )
        assert lower.mean() < 3 * below
        assert upper.mean() > -3 * above
        gaps.append(table.gap.mean())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.15


def test_bidirectional_closes_on_simulated_data():
    fitted = pyrolvm.fit(VAE(12, 2, hidden=(8,)), (X.repeat(1, 3)[:, :12] > 0).float(), num_steps=20, **QUIET)
    coarse, fine = (
        bidirectional(fitted.pair(fitted.example), 96, num_steps=steps, num_leapfrog=5) for steps in (2, 40)
    )
    assert list(fine) == ["lower", "upper", "gap", "lower_error", "upper_error", "acceptance"]
    assert len(fine) == 96
    # the gap of a datum is noisy where the chains are short: the tolerance is three standard errors of the mean
    error = math.hypot(coarse.gap.std(), fine.gap.std()) / math.sqrt(96)
    assert coarse.gap.mean() > fine.gap.mean() - 3 * error
    assert abs(fine.gap.mean()) < 0.1
    assert fine.gap.std() < coarse.gap.std()
    assert (fine.upper < 0).all()


def test_what_is_simulated_is_an_exact_posterior_draw(misled):
    """(z* - E[z | x]) / sd is standard normal, over data simulated with it."""
    ((run, held, exact),) = _simulated(misled.pair(X), 4000, 1, seed=0)
    (x,) = run.batch.args
    mean, scale_tril = misled.model.exact_posterior(x)
    standard = torch.linalg.solve_triangular(scale_tril, (exact["z"][0] - mean).unsqueeze(-1), upper=False)
    error = 1 / math.sqrt(4000)
    assert held == {}
    assert standard.mean(0).abs().max() < 4.5 * error
    assert (torch.cov(standard.squeeze(-1).T) - torch.eye(2)).abs().max() < 4.5 * math.sqrt(2) * error
    W, noise = misled.model.loadings.detach(), misled.model.noise_scale.detach()
    covariance = W @ W.T + noise**2 * torch.eye(5)
    torch.testing.assert_close(torch.cov(x.T), covariance, atol=0.1 * covariance.max().item(), rtol=0.1)


def test_bidirectional_of_a_constrained_latent():
    fitted = pyrolvm.fit(poisson_gamma, counts(), guide=rate_guide, **STILL)
    table = bidirectional(fitted.pair(fitted.example), 50, num_steps=40, num_leapfrog=5)
    error = math.sqrt((table.lower_error**2 + table.upper_error**2).sum()) / 50
    assert -3 * error < table.gap.mean() < 0.3


def test_bidirectional_of_the_guide_and_in_parts(misled, monkeypatch):
    from pyrolvm.inference.posterior.evidence import chunks

    monkeypatch.setattr(chunks, "BUDGET", 16 * 7 * 15)
    mean, scale_tril = misled.model.exact_posterior(X)
    z = dist.MultivariateNormal(mean.detach(), scale_tril=scale_tril.detach()).sample((16,))
    exact = misled.log_evidence(X, "exact").detach().numpy()
    table = bidirectional(misled.pair(X), exact_draws={"z": z}, num_steps=10, num_leapfrog=5, start="guide")
    assert ((table.lower - exact) < 4 * table.lower_error).all()
    assert ((table.upper - exact) > -4 * table.upper_error).all()
    assert table.gap.mean() < 5
    assert len(bidirectional(misled.pair(misled.example), 31, num_steps=2)) == 31


# ---------------------------------------------------------------------- what cannot be


def fit_ppca_style(model, guide, x):
    return pyrolvm.fit(model, x, guide=guide, **STILL)


def test_discrete_latents_no_latents_and_unvectorised_programs_are_refused(misled):
    def discrete(x):
        with data_plate(x):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def discrete_guide(x):
        with data_plate(x):
            pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))

    fitted = fit_ppca_style(discrete, discrete_guide, X[:, 0])
    with pytest.raises(SettingError, match="'k' is discrete"):
        fitted.log_evidence(X[:, 0], "ais")
    marginal = pyrolvm.fit(misled.model.marginal_model, X, guide=lambda x: None, **STILL)
    with pytest.raises(SettingError, match="this program has none: use 'exact'"):
        marginal.log_evidence(X, "ais")
    summed = pyrolvm.fit(discrete_enumerated, X[:, 0], guide=lambda x: None, objective=enumerating(), **STILL)
    with pytest.raises(ProgramError, match="'k' is enumerated"):
        summed.log_evidence(X[:, 0], "ais")
    misled.program.vectorized = False
    with pytest.raises(SettingError, match="cannot be taken under a further plate"):
        misled.log_evidence(X, "ais")
    misled.program.vectorized = None


def discrete_enumerated(x):
    shift = pyro.param("shift", torch.tensor(0.0))
    with data_plate(x):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(k + shift, 1.0), obs=x)


def enumerating():
    from pyro.infer import TraceEnum_ELBO

    return TraceEnum_ELBO(max_plate_nesting=1)


def test_parameters_of_training_rows_are_no_start_for_simulated_ones():
    fitted = pyrolvm.fit(poisson_gamma, counts(), guide=AutoNormal, **STILL)
    with pytest.raises(SettingError, match="none for simulated ones: use start='prior'"):
        bidirectional(fitted.pair(fitted.example), 5, num_steps=2, start="guide")
    assert len(bidirectional(fitted.pair(fitted.example), 5, num_steps=2)) == 5


def test_what_cannot_be_simulated_or_does_not_fit_is_refused(misled):
    with pytest.raises(SettingError, match="must hold"):
        bidirectional(misled.pair(X), exact_draws={})
    with pytest.raises(SettingError, match=r"must hold \[num_chains=16, rows=40"):
        bidirectional(misled.pair(X), exact_draws={"z": torch.zeros(3, 40, 2)})
    with pytest.raises(SettingError, match="num_rows must be a positive"):
        bidirectional(misled.pair(misled.example), 0)

    def computed(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, pyro.param("scale", torch.tensor(1.0))))

    with pytest.raises(SettingError, match="computed from it"):
        bidirectional(fit_ppca_style(computed, guide, X[:, 0]).pair(X[:, 0]), 5, num_steps=2)
