"""The posterior over a mixture against scikit-learn's coordinate ascent, closed forms and NUTS."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, TraceEnum_ELBO
from pyro.infer.autoguide.initialization import init_to_value
from pyro.ops.stats import effective_sample_size
from sklearn.mixture import BayesianGaussianMixture as SklearnMixture

import pyrolvm
from pyrolvm.data import load_dataset
from pyrolvm.errors import DataError, SettingError
from pyrolvm.models.bayesian_mixture import BayesianGaussianMixture

COVARIANCES = ("full", "diagonal", "spherical")
PRIORS = {
    "dirichlet": "dirichlet_distribution",
    "stick_breaking": "dirichlet_process",
}  # ours, scikit-learn's


def data(name):
    return torch.tensor(load_dataset(name).values)  # float64


def started(x, num_components, **options):
    mixture = BayesianGaussianMixture(x.shape[1], num_components, **options).double()
    mixture.initialise_from(x, num_updates=3000)
    return mixture


def sklearn_twin(mixture, x, **options):
    """scikit-learn's coordinate ascent under the same priors, on the standardised data."""
    D = mixture.data_dim
    twin = SklearnMixture(
        n_components=mixture.num_components,
        weight_concentration_prior_type=PRIORS[mixture.weights_prior],
        weight_concentration_prior=mixture.concentration,
        mean_precision_prior=mixture.mean_precision,
        mean_prior=np.zeros(D),
        degrees_of_freedom_prior=D + 2,
        covariance_prior=mixture.spread**2 * np.eye(D),
        max_iter=5000,
        tol=1e-12,
        random_state=0,
        **options,
    )
    return twin.fit(((x - mixture.location) / mixture.unit).numpy())


def mean_field(mixture):
    """The guide of coordinate ascent: q(z) is independent of the parameters, and best given theirs."""

    def guide(x):
        mixture.guide(x)
        with mixture.data_plate(x):
            logits = mixture.expected_log_joint(x).detach()
            pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    return guide


def bounds(mixture, x, guide, repeats=1, num_particles=200):
    elbo = TraceEnum_ELBO(num_particles, max_plate_nesting=1, vectorize_particles=True)
    return torch.stack([-elbo.differentiable_loss(mixture.model, guide, x) for _ in range(repeats)])


# ------------------------------------------------------------------ closed forms


def normal_inverse_wishart(mixture, mean, tril):
    """log p(mu, L) of one component, by scipy and the Jacobian of L -> L L'."""
    D, s = mixture.data_dim, mixture.unit
    covariance = (tril @ tril.mT).numpy()
    scale = mixture.spread**2 * torch.diag(s**2).numpy()
    jacobian = D * np.log(2) + (torch.arange(D, 0, -1) * tril.diagonal().log()).sum()
    normal = scipy.stats.multivariate_normal(mixture.location.numpy(), covariance / mixture.mean_precision)
    return normal.logpdf(mean) + scipy.stats.invwishart(D + 2, scale).logpdf(covariance) + float(jacobian)


def test_the_joint_density_is_the_one_in_the_docstring():
    x = data("faithful")[:20]
    mixture = started(x, 3, concentration=0.7, mean_precision=0.3, spread=0.5)
    sites = poutine.trace(mixture.guide).get_trace(x).nodes
    values = {name: sites[name]["value"].detach() for name in ("log_weights", "scale", "means")}
    with torch.no_grad():
        trace = poutine.trace(poutine.condition(mixture.model, values)).get_trace(x)
    trace.compute_log_prob()
    weights = values["log_weights"].exp()
    wanted = scipy.stats.dirichlet([0.7] * 3).logpdf(weights / weights.sum()) + values["log_weights"].sum()
    wanted += sum(
        normal_inverse_wishart(mixture, m, L) for m, L in zip(values["means"], values["scale"], strict=True)
    )
    found = sum(trace.nodes[name]["log_prob_sum"] for name in values)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("weights_prior", PRIORS)
def test_expectations_are_those_of_the_guides_draws(covariance, weights_prior):
    """E[log pi_k N(x)], log E[pi_k N(x)] and the means: closed forms against 4000 draws."""
    x = data("iris")
    mixture = started(x, 3, covariance=covariance, weights_prior=weights_prior)
    with torch.no_grad():
        mixture.log_precision.add_(
            -2
        )  # wider than the posterior of 150 rows, so that the spread of q matters
        mixture.log_counts.add_(-1)
        elbo_guide = pyro.plate("draws", 4000, dim=-2)(mixture.guide)
        nodes = poutine.trace(elbo_guide).get_trace().nodes
        log_weights, scale, means = (nodes[n]["value"].squeeze(1) for n in ("log_weights", "scale", "means"))
        rows = x[[0, 60, 120]]
        if covariance == "full":
            normal = dist.MultivariateNormal(means.unsqueeze(1), scale_tril=scale.unsqueeze(1))
        else:
            normal = dist.Normal(means.unsqueeze(1), scale.unsqueeze(1)).to_event(1)
        joint = log_weights.unsqueeze(1) + normal.log_prob(rows.unsqueeze(1))  # [draws, rows, K]
        error = joint.std(0) / 4000**0.5
        assert ((joint.mean(0) - mixture.expected_log_joint(rows)).abs() < 4 * error).all()
        density = joint.exp().sum(-1)
        error = density.std(0) / 4000**0.5
        assert ((density.mean(0) - mixture.log_predictive(rows).exp()).abs() < 4 * error).all()
        found = mixture.scale_posterior().mean
        assert ((scale.mean(0) - found).abs() <= 4 * scale.std(0) / 4000**0.5 + 1e-12).all()
        assert ((means.mean(0) - mixture.means).abs() < 4 * means.std(0) / 4000**0.5).all()


# ------------------------------------------------------------------ coordinate ascent


@pytest.mark.parametrize("name", ["faithful", "galaxies", "iris"])
@pytest.mark.parametrize("weights_prior", PRIORS)
def test_coordinate_ascent_ends_where_scikit_learns_does(name, weights_prior):
    """From the responsibilities that its own ended with. Its last stick leaves a rest, ours none: left out."""
    x = data(name)
    mixture = started(x, 4, weights_prior=weights_prior)
    twin = sklearn_twin(mixture, x)
    r = torch.tensor(twin.predict_proba(((x - mixture.location) / mixture.unit).numpy()))
    for _ in range(400):
        mixture.coordinate_update(x, r)
        r = mixture.expected_log_joint(x).softmax(-1).detach()
    tril = mixture.scale_tril.detach() / mixture.unit.unsqueeze(-1)
    pairs = {
        "means": (mixture.raw_means, twin.means_),
        "counts": (mixture.log_precision.exp(), twin.mean_precision_),
        "df": (mixture.scale_posterior().base_dist.df, twin.degrees_of_freedom_),
        "covariances": (tril @ tril.mT, twin.covariances_),
    }
    compared = slice(4 if weights_prior == "dirichlet" else 3)
    for what, (ours, theirs) in pairs.items():
        found, wanted = ours.detach().numpy()[compared], theirs[compared]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4, err_msg=what)
    if weights_prior == "dirichlet":
        np.testing.assert_allclose(mixture.weights.detach(), twin.weights_, rtol=1e-4)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("weights_prior", PRIORS)
def test_the_bound_is_level_where_coordinate_ascent_ends(covariance, weights_prior):
    """With q(z) of coordinate ascent: the gradient is zero there, and is not elsewhere."""
    x = data("iris")[::3]
    mixture = started(x, 3, covariance=covariance, weights_prior=weights_prior)
    parameters = list(mixture.parameters())

    def gradients():
        each = (bounds(mixture, x, mean_field(mixture)).squeeze() for _ in range(20))
        found = torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(b, parameters)]) for b in each]
        )
        error = found.std(0) / len(found) ** 0.5
        return (found.mean(0) / error.clamp(min=1e-12)).abs()  # in standard errors of 20 repeats

    at = gradients()
    free = at > 0  # a triangle's upper half is no parameter
    assert at[free].max() < 5
    assert at[free].square().mean() < 1.8
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    assert gradients().max() > 10


@pytest.mark.parametrize("weights_prior", PRIORS)
def test_the_bound_is_highest_where_coordinate_ascent_ends(weights_prior):
    """No step in a random direction raises it by more than the noise, here that of 2000 draws."""
    x = data("iris")[::3]
    mixture = started(x, 3, weights_prior=weights_prior)
    best = {k: v.clone() for k, v in mixture.state_dict().items()}
    top = bounds(mixture, x, mean_field(mixture), repeats=10).detach()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        for parameter in mixture.parameters():
            step = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.add_(step, alpha=0.1)
        moved = bounds(mixture, x, mean_field(mixture), repeats=10).detach()
        error = (top.var() / 10 + moved.var() / 10).sqrt()
        assert moved.mean() < top.mean() + 3 * error
        mixture.load_state_dict(best)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_summing_out_the_assignments_raises_the_bound(covariance):
    """Draw by draw: log sum_k p(x, k) is no less than E_q(z)[log p(x, z) - log q(z)]."""
    x = data("faithful")
    mixture = started(x, 3, covariance=covariance)
    for seed in range(5):
        torch.manual_seed(seed)
        summed = bounds(mixture, x, mixture.guide, num_particles=3)
        torch.manual_seed(seed)
        assert summed > bounds(mixture, x, mean_field(mixture), num_particles=3)


# ------------------------------------------------------------------ fits


@pytest.mark.parametrize(
    ("name", "weights_prior", "wanted"),
    [("faithful", "dirichlet", 2), ("faithful", "stick_breaking", 2), ("galaxies", "dirichlet", 3)],
)
def test_superfluous_components_stay_empty_and_held_out_density_is_sklearns(name, weights_prior, wanted):
    """Six components, trained from coordinate ascent by SVI: effective components and held-out nats per datum."""
    x = data(name)[torch.randperm(len(data(name)), generator=torch.Generator().manual_seed(1))]
    cut = 3 * len(x) // 4
    mixture = BayesianGaussianMixture(x.shape[1], 6, weights_prior=weights_prior)
    options = {"num_steps": 120, "learning_rate": 0.01, "progress": False, "engine": "eager"}
    fitted = pyrolvm.fit(mixture, x[:cut], dtype=torch.float64, **options)
    twin = sklearn_twin(mixture, x[:cut], n_init=3)
    standard = ((x - mixture.location) / mixture.unit).numpy()
    assert (
        mixture.effective_components(x[:cut])
        == (twin.predict_proba(standard[:cut]).sum(0) >= 1).sum()
        == wanted
    )
    theirs = twin.score_samples(standard[cut:]).mean() - float(mixture.unit.log().sum())
    held_out = mixture.log_predictive(x[cut:]).detach()
    assert abs(held_out.mean() - theirs) < 0.05
    estimate = torch.as_tensor(fitted.log_evidence(x[cut:], "importance", 500, progress=False))
    assert (estimate - held_out).abs().mean() < 0.02


def test_a_small_concentration_leaves_fewer_components():
    x = data("galaxies")
    few, many = (started(x, 8, concentration=c, spread=0.2) for c in (0.001, 10.0))
    assert few.effective_components(x) < many.effective_components(x)
    empty = few.weights_posterior().mean.detach().amin()
    assert empty < -500  # E[log pi] of an empty component: no float holds that weight
    fitted = pyrolvm.fit(few, x, num_steps=20, progress=False, engine="eager")
    assert np.isfinite(fitted.history["elbo"]).all()


def test_start_is_reproducible_in_any_unit_and_on_some_of_many_rows():
    x = data("faithful")
    first, again, scaled = started(x, 4), started(x, 4), started(x * 1000 - 7, 4)
    for name, value in first.named_parameters():
        torch.testing.assert_close(dict(again.named_parameters())[name], value)
        torch.testing.assert_close(dict(scaled.named_parameters())[name], value, atol=1e-4, rtol=1e-4)
    many = started(x.repeat(70, 1), 4)  # 19040 rows, of which every third is looked at
    counts = many.log_precision.exp().sum() - 4 * many.mean_precision
    torch.testing.assert_close(counts, torch.tensor(19040.0, dtype=torch.double))


def test_draws_of_any_order_are_brought_to_the_guides():
    x = data("iris")
    for covariance in COVARIANCES:
        mixture = started(x, 3, covariance=covariance)
        with torch.no_grad():
            nodes = poutine.trace(pyro.plate("draws", 20, dim=-2)(mixture.guide)).get_trace().nodes
        draws = {n: nodes[n]["value"].squeeze(1) for n in ("log_weights", "scale", "means")}
        orders = torch.stack([torch.randperm(3) for _ in range(20)])
        mixed = {n: torch.stack([d[o] for d, o in zip(v, orders, strict=True)]) for n, v in draws.items()}
        for name, value in mixture.aligned(mixed).items():
            torch.testing.assert_close(value, draws[name])


def test_bad_options_and_data_are_refused():
    with pytest.raises(SettingError, match="weights_prior='finite' is not known"):
        BayesianGaussianMixture(2, 3, weights_prior="finite")
    for name in ("concentration", "mean_precision", "spread"):
        with pytest.raises(SettingError, match=f"{name} must be a positive number, not 0"):
            BayesianGaussianMixture(2, 3, **{name: 0})
    with pytest.raises(DataError, match="num_components=2 or fewer"):
        BayesianGaussianMixture(1, 3).initialise_from(torch.tensor([0.0, 1, 1, 0]))
    assert BayesianGaussianMixture(1, 2).check_data(torch.arange(5)).dtype is torch.float32


# ------------------------------------------------------------------ NUTS


@pytest.mark.slow
def test_the_posterior_is_that_of_nuts():
    """Two components in one dimension, 40 data: means within 0.25 posterior deviations, deviations 0.7 to 1 times."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(25, generator=generator) * 0.6 - 2, torch.randn(15, generator=generator) + 2
    x = torch.cat(parts).double().unsqueeze(-1)
    mixture = BayesianGaussianMixture(1, 2)
    falling = {"schedule": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 2000)}
    fitted = pyrolvm.fit(
        mixture, x, num_steps=2000, learning_rate=0.02, dtype=torch.float64, progress=False, **falling
    )
    q = fitted.posterior(x, 8000)
    p = mixture.aligned(chain(mixture, x))
    for name in ("log_weights", "means", "scale"):
        ours, theirs = (draws[name].detach().double().flatten(1) for draws in (q, p))
        ess = effective_sample_size(theirs.unsqueeze(0), 0, 1)
        assert ess.min() > 200
        off = (ours.mean(0) - theirs.mean(0)) / theirs.std(0)
        assert off.abs().max() < 0.25
        ratio = ours.std(0) / theirs.std(0)
        error = (2 * ess) ** -0.5
        assert (ratio > 0.7 - 3 * error).all()
        assert (ratio < 1 + 3 * error).all()


def chain(mixture, x):
    """Draws of NUTS from the mixture's own priors, with z summed out."""
    names = ("log_weights", "scale", "means")

    def program(x):
        sites = poutine.trace(poutine.block(mixture.model, hide=["z", "x", "data"])).get_trace(None).nodes
        log_weights, scale, means = (sites[name]["value"] for name in names)
        normal = dist.Normal(means[:, 0], scale[:, 0, 0])
        pyro.factor("likelihood", (log_weights + normal.log_prob(x)).logsumexp(-1).sum())

    torch.manual_seed(0)
    with torch.no_grad():
        nodes = poutine.trace(mixture.guide).get_trace().nodes
    start = init_to_value(values={name: nodes[name]["value"] for name in names})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel = NUTS(program, jit_compile=True, init_strategy=start)
        mcmc = MCMC(kernel, 1000, 300, disable_progbar=True)
        mcmc.run(x)
    return mcmc.get_samples()
