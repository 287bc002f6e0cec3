import warnings

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from sklearn.decomposition import FactorAnalysis
from torch.distributions import Gamma, InverseGamma, LowRankMultivariateNormal, MultivariateNormal, Normal

from pyrolvm.errors import DataError, SettingError
from pyrolvm.models.factor_analysis import BayesianFactorAnalysis
from pyrolvm.plates import data_rows

PRIORS = ["normal", "ard"]


def simulated(rows=400, data_dim=6, latent_dim=2):
    """Data whose features have very different units, and the truth behind them."""
    units = torch.logspace(-1, 2, data_dim, dtype=torch.double)
    W = torch.randn(data_dim, latent_dim, dtype=torch.double) * units.unsqueeze(-1)
    noise = 0.5 * units
    z = torch.randn(rows, latent_dim, dtype=torch.double)
    return 3 * units + z @ W.T + noise * torch.randn(rows, data_dim, dtype=torch.double), W, noise


def random_globals(data_dim=5, latent_dim=2):
    return {
        "loadings": torch.randn(data_dim, latent_dim, dtype=torch.double),
        "noise_scale": torch.rand(data_dim, dtype=torch.double) + 0.3,
        "offset": torch.randn(data_dim, dtype=torch.double),
    }


def train(analysis, x, steps, lr=0.03):
    elbo = Trace_ELBO(max_plate_nesting=1)
    optimiser = torch.optim.Adam(analysis.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = elbo.differentiable_loss(analysis.model, analysis.guide, x) / len(x)
        loss.backward()
        optimiser.step()
        schedule.step()
    return loss


def plug_in(analysis, x):
    return analysis.log_marginal_given(x, **analysis.posterior_mean()).mean().item()


def maximum_likelihood(x, latent_dim):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its tolerance is on the total, not per datum
        return FactorAnalysis(latent_dim, tol=1e-6, max_iter=3000).fit(x.numpy()).score(x.numpy())


# ------------------------------------------------------------------ closed forms


def test_marginal_is_sklearns_and_the_dense_normal():
    given, x = random_globals(), torch.randn(20, 5, dtype=torch.double)
    twin = FactorAnalysis(2)
    twin.components_, twin.mean_ = given["loadings"].T.numpy(), given["offset"].numpy()
    twin.noise_variance_ = given["noise_scale"].square().numpy()
    ours = BayesianFactorAnalysis(5, 2).log_marginal_given(x, **given)
    np.testing.assert_allclose(ours, twin.score_samples(x.numpy()), rtol=1e-10)
    covariance = given["loadings"] @ given["loadings"].T + given["noise_scale"].square().diag()
    torch.testing.assert_close(ours, MultivariateNormal(given["offset"], covariance).log_prob(x))


def test_exact_posterior_is_the_dense_conditional():
    """z given x from the joint normal of (z, x), with D x D algebra."""
    given, x = random_globals(), torch.randn(20, 5, dtype=torch.double)
    W = given["loadings"]
    gain = W.T @ torch.linalg.inv(W @ W.T + given["noise_scale"].square().diag())
    posterior = BayesianFactorAnalysis(5, 2).exact_posterior(x, **given)
    torch.testing.assert_close(posterior.mean, (x - given["offset"]) @ gain.T)
    wanted = torch.eye(2, dtype=torch.double) - gain @ W
    torch.testing.assert_close(posterior.covariance_matrix, wanted.expand(20, 2, 2))


def test_exact_forms_take_draws_of_the_parameters():
    draws = [random_globals() for _ in range(3)]
    stacked = {k: torch.stack([d[k] for d in draws]).unsqueeze(1) for k in draws[0]}  # [3, 1, ...]
    x, analysis = torch.randn(20, 5, dtype=torch.double), BayesianFactorAnalysis(5, 2)
    each = torch.stack([analysis.log_marginal_given(x, **d) for d in draws])
    torch.testing.assert_close(analysis.log_marginal_given(x, **stacked), each)
    means = torch.stack([analysis.exact_posterior(x, **d).mean for d in draws])
    torch.testing.assert_close(analysis.exact_posterior(x, **stacked).mean, means)


@pytest.mark.parametrize("prior", PRIORS)
def test_the_joint_density_is_the_one_in_the_docstring(iris, prior):
    analysis = BayesianFactorAnalysis(4, 2, prior).double()
    analysis.initialise_from(iris)
    draw = poutine.trace(analysis.guide).get_trace(iris)
    trace = poutine.trace(poutine.replay(analysis.model, draw)).get_trace(iris)
    W, sigma, b, z = (draw.nodes[n]["value"] for n in ("loadings", "noise_scale", "offset", "z"))
    alpha = draw.nodes["relevance"]["value"] if prior == "ard" else torch.ones(2, dtype=torch.double)
    s = iris.std(0, correction=0)
    wanted = (
        Normal(0, s[:, None] / alpha.sqrt()).log_prob(W).sum() + Normal(iris.mean(0), s).log_prob(b).sum()
    )
    wanted += (InverseGamma(torch.full_like(s, 0.5), s**2 / 4).log_prob(sigma**2) + (2 * sigma).log()).sum()
    wanted += Normal(0, 1).log_prob(z).sum() + Normal(z @ W.T + b, sigma).log_prob(iris).sum()
    if prior == "ard":
        wanted += Gamma(0.01, 0.01).log_prob(alpha).sum()
    torch.testing.assert_close(trace.log_prob_sum(), wanted)


@pytest.mark.parametrize("prior", PRIORS)
def test_minibatch_bounds_average_to_the_full_bound(iris, prior):
    """With the same draws, batches of N/B = 5: each global term is counted once, each datum N/B times."""
    analysis = BayesianFactorAnalysis(4, 2, prior).double()
    analysis.initialise_from(iris)
    trace = poutine.trace(analysis.guide).get_trace(iris)
    draws = {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample" and n != "data"}

    def bound(rows):
        values = {**draws, "z": draws["z"][rows]}
        with data_rows(150, rows):
            model, guide = (
                poutine.trace(poutine.condition(program, values)).get_trace(iris[rows])
                for program in (analysis.model, analysis.guide)
            )
        return model.log_prob_sum() - guide.log_prob_sum()

    batches = torch.stack([bound(rows) for rows in torch.randperm(150).split(30)])
    assert batches.std() > 1
    torch.testing.assert_close(batches.mean(), bound(torch.arange(150)))


def test_particles_in_a_plate_agree_with_particles_in_a_loop(iris):
    analysis = BayesianFactorAnalysis(4, 2, "ard").double()
    analysis.initialise_from(iris)
    means, errors = [], []
    for vectorised in (True, False):
        elbo = Trace_ELBO(num_particles=50, vectorize_particles=vectorised, max_plate_nesting=1)
        losses = torch.tensor(
            [elbo.loss(analysis.model, analysis.guide, iris) for _ in range(4 + 20 * vectorised)]
        )
        means.append(losses.mean())
        errors.append(losses.var() / len(losses))
    assert (means[0] - means[1]).abs() < 4 * sum(errors).sqrt()


# ------------------------------------------------------------------ fitting


@pytest.mark.parametrize("prior", PRIORS)
def test_fit_reaches_the_maximum_likelihood(prior):
    x, W, noise = simulated()
    analysis = BayesianFactorAnalysis(6, 2, prior).double()
    analysis.initialise_from(x)
    train(analysis, x, steps=300)
    best = maximum_likelihood(x, 2)
    assert best - 0.05 < plug_in(analysis, x) <= best + 1e-6
    # the uniquenesses and the common part of the covariance are identified whatever the rotation
    found = analysis.posterior_mean()
    assert ((found["noise_scale"] / noise).log().abs() < 0.3).all()
    share = (found["loadings"] @ found["loadings"].T) / (W @ W.T).diagonal().sqrt().outer(
        (W @ W.T).diagonal().sqrt()
    )
    truth = (W @ W.T) / (W @ W.T).diagonal().sqrt().outer((W @ W.T).diagonal().sqrt())
    assert (share - truth).abs().max() < 0.3


@pytest.mark.parametrize("prior", PRIORS)
def test_held_out_likelihood_is_that_of_maximum_likelihood(prior):
    """On 300 rows that neither saw, within 0.05 nats per datum of scikit-learn's."""
    x, _, _ = simulated(rows=600)
    analysis = BayesianFactorAnalysis(6, 2, prior).double()
    analysis.initialise_from(x[:300])
    train(analysis, x[:300], steps=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its tolerance is on the total, not per datum
        theirs = FactorAnalysis(2, tol=1e-6, max_iter=3000).fit(x[:300].numpy()).score(x[300:].numpy())
    assert plug_in(analysis, x[300:]) == pytest.approx(theirs, abs=0.05)


def test_fitted_guide_of_z_is_near_the_exact_posterior():
    x, _, _ = simulated()
    analysis = BayesianFactorAnalysis(6, 2).double()
    analysis.initialise_from(x)
    train(analysis, x, steps=300)
    exact = analysis.exact_posterior(x, **analysis.posterior_mean())
    q = poutine.trace(analysis.guide).get_trace(x).nodes["z"]["fn"]
    assert torch.distributions.kl_divergence(q, exact).mean() < 0.1  # nats per datum


def test_ard_switches_off_the_factors_too_many():
    x, _, _ = simulated(rows=600)
    analysis = BayesianFactorAnalysis(6, 4, "ard").double()
    analysis.initialise_from(x)
    train(analysis, x, steps=500, lr=0.05)
    strength = (analysis.loadings_loc.detach() ** 2).mean(0).sort(descending=True).values
    assert strength[1] > 0.05
    assert strength[2] < 0.02


def test_start_is_exact_ppca_where_the_noise_is_equal():
    """Equal uniquenesses in standardised units: the start is already near the maximum of the likelihood."""
    z, W = torch.randn(500, 2, dtype=torch.double), torch.randn(6, 2, dtype=torch.double)
    W = W / W.norm(dim=1, keepdim=True)
    x = z @ W.T + 0.5 * torch.randn(500, 6, dtype=torch.double)
    analysis = BayesianFactorAnalysis(6, 2).double()
    analysis.initialise_from(x)
    assert plug_in(analysis, x) > maximum_likelihood(x, 2) - 0.03
    q = poutine.trace(analysis.guide).get_trace(x).nodes["z"]["fn"]
    # posterior_mean's noise is the mean of a log-normal, not its median: equal up to 1/N
    exact = analysis.exact_posterior(x, **analysis.posterior_mean())
    torch.testing.assert_close(q.mean, exact.mean, atol=1e-2, rtol=0)
    torch.testing.assert_close(q.covariance_matrix, exact.covariance_matrix, atol=1e-2, rtol=0)


@pytest.mark.parametrize("prior", PRIORS)
def test_heywood_case_stays_finite(iris, prior):
    """Iris with one factor: maximum likelihood sends one noise variance to 1e-5 of nothing."""
    analysis = BayesianFactorAnalysis(4, 1, prior).double()
    analysis.initialise_from(iris)
    assert torch.isfinite(train(analysis, iris, steps=200))
    assert (analysis.posterior_mean()["noise_scale"] / iris.std(0) > 0.03).all()
    assert plug_in(analysis, iris) > -2.9158  # within 0.1 of the boundary maximum


def test_collapsed_noise_is_pulled_back(iris):
    analysis = BayesianFactorAnalysis(4, 1).double()
    analysis.initialise_from(iris)
    with torch.no_grad():
        analysis.noise_loc[2] = -8.0
    elbo = Trace_ELBO(max_plate_nesting=1, num_particles=10)
    loss = elbo.differentiable_loss(analysis.model, analysis.guide, iris)
    assert torch.autograd.grad(loss, analysis.noise_loc)[0][2] < -1e3  # descent raises the noise


def test_as_many_factors_as_features_is_a_start_too(iris):
    analysis = BayesianFactorAnalysis(4, 4).double()
    analysis.initialise_from(iris)
    train(analysis, iris, steps=100)
    # with as many factors any covariance can be had: the maximum is that of a Gaussian without constraints
    best = MultivariateNormal(iris.mean(0), torch.cov(iris.T, correction=0)).log_prob(iris).mean().item()
    assert best - 0.2 < plug_in(analysis, iris) <= best


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_plain_svi_trains_every_parameter(iris, elbo):
    analysis = BayesianFactorAnalysis(4, 2, "ard").double()
    before = {n: p.detach().clone() for n, p in analysis.named_parameters()}
    svi = SVI(analysis.model, analysis.guide, Adam({"lr": 0.01}), elbo(max_plate_nesting=1))
    for _ in range(2):
        svi.step(iris)
    assert [n for n, p in analysis.named_parameters() if torch.equal(p, before[n])] == []


# ------------------------------------------------------------------ generation and bad input


@pytest.mark.parametrize("prior", PRIORS)
def test_generates_data_of_the_marginal(iris, prior):
    analysis = BayesianFactorAnalysis(4, 2, prior).double()
    analysis.initialise_from(iris)
    assert analysis.model().shape == (1, 4)
    with data_rows(3000, torch.arange(3000)):
        x = Predictive(analysis.model, guide=analysis.guide, num_samples=1)(None)["x"][0]
    given = analysis.posterior_mean()
    law = LowRankMultivariateNormal(given["offset"], given["loadings"], given["noise_scale"] ** 2)
    # one draw of the globals moves the covariance by about 1 / sqrt(150)
    torch.testing.assert_close(torch.cov(x.T), law.covariance_matrix, atol=0.6, rtol=0.3)


def test_bad_options_and_data_are_refused():
    with pytest.raises(SettingError, match="loadings_prior='horseshoe'"):
        BayesianFactorAnalysis(4, 2, "horseshoe")
    with pytest.raises(SettingError, match="latent_dim=5 must lie between 1 and data_dim=4"):
        BayesianFactorAnalysis(4, 5)
    analysis = BayesianFactorAnalysis(4, 2)
    with pytest.raises(DataError, match="data_dim=3"):
        analysis.check_data(torch.zeros(10, 3))
    with pytest.raises(SettingError, match="4 features"):
        analysis.loadings_table(10, columns=["a"])
