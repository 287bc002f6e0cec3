import copy

import numpy as np
import pytest
import torch
from pyro.infer import Predictive, TraceEnum_ELBO, TraceGraph_ELBO
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch.distributions import Dirichlet, Normal

from pyrolvm.data import load_dataset
from pyrolvm.errors import DataError, DivergenceError, SettingError
from pyrolvm.models.gmm import FLOOR, GaussianMixture
from pyrolvm.models.priors import InverseWishartCholesky, inverse_chi
from pyrolvm.plates import data_rows

COVARIANCES = {"full": "full", "diagonal": "diag", "spherical": "spherical"}  # ours, scikit-learn's


def random_mixture(data_dim=4, num_components=3, **options):
    mixture = GaussianMixture(data_dim, num_components, **options).double()
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_()
        mixture.location.normal_()
        # a spherical mixture has one unit for all features
        unit = torch.rand(1 if mixture.covariance == "spherical" else data_dim, dtype=torch.double) + 0.5
        mixture.unit.copy_(unit)
    return mixture


def sklearn_twin(mixture):
    K, scale = mixture.num_components, mixture.scale.detach().numpy()
    twin = SklearnMixture(K, covariance_type=COVARIANCES[mixture.covariance])
    twin.weights_, twin.means_ = mixture.weights.detach().numpy(), mixture.means.detach().numpy()
    if mixture.covariance == "full":
        twin.precisions_cholesky_ = np.stack([np.linalg.inv(L).T for L in scale])
    else:
        twin.precisions_cholesky_ = 1 / (scale if mixture.covariance == "diagonal" else scale[:, 0])
    return twin


def train(mixture, x, steps, elbo=None, lr=0.02):
    elbo = elbo or TraceEnum_ELBO(max_plate_nesting=1)
    optimiser = torch.optim.Adam(mixture.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        (elbo.differentiable_loss(mixture.model, mixture.guide, x) / len(x)).backward()
        optimiser.step()


# ------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_densities_and_responsibilities_are_sklearns(covariance):
    mixture, x = random_mixture(covariance=covariance), torch.randn(50, 4, dtype=torch.double)
    twin = sklearn_twin(mixture)
    np.testing.assert_allclose(mixture.log_marginal(x).detach(), twin.score_samples(x.numpy()), rtol=1e-10)
    np.testing.assert_allclose(
        mixture.responsibilities(x).detach(), twin.predict_proba(x.numpy()), atol=1e-10
    )


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_set_components_is_undone_by_the_properties(covariance):
    source, target = random_mixture(covariance=covariance), random_mixture(covariance=covariance)
    target.unit.copy_(torch.tensor(3.0))
    target.set_components(source.weights, source.means, source.scale_tril)
    x = torch.randn(20, 4, dtype=torch.double)
    torch.testing.assert_close(target.log_marginal(x), source.log_marginal(x))


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("particles", [1, 3])
def test_enumerated_bound_is_the_likelihood(iris, covariance, particles):
    mixture = random_mixture(covariance=covariance)
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=particles, vectorize_particles=True)
    wanted = -mixture.log_marginal(iris).sum()
    torch.testing.assert_close(elbo.differentiable_loss(mixture.model, mixture.guide, iris), wanted)


def test_minibatch_bounds_average_to_the_full_bound(iris):
    mixture, elbo = random_mixture(), TraceEnum_ELBO(max_plate_nesting=1)
    losses = []
    for rows in torch.randperm(150).split(30):
        with data_rows(150, rows):
            losses.append(elbo.differentiable_loss(mixture.model, mixture.guide, iris[rows]))
        torch.testing.assert_close(losses[-1], -5 * mixture.log_marginal(iris[rows]).sum())
    torch.testing.assert_close(torch.stack(losses).mean(), -mixture.log_marginal(iris).sum())


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_prior_terms_of_the_bound(iris, covariance):
    """The bound under the prior: log p(x) + log p(weights, means, scale), written out by hand."""
    mixture = random_mixture(covariance=covariance, prior="conjugate")
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(mixture.model, mixture.guide, iris)
    spread = mixture.unit / 3 ** (1 / 4)
    if covariance == "full":
        scale = InverseWishartCholesky(6, torch.diag(spread)).log_prob(mixture.scale)
    else:
        columns = mixture.scale.shape[1]
        scale = inverse_chi(3, (spread / 3**0.5)[:columns]).log_prob(mixture.scale)
    means = Normal(mixture.location, 10 * mixture.unit).log_prob(mixture.means)
    weights = Dirichlet(torch.full((3,), 2.0, dtype=torch.double)).log_prob(mixture.weights)
    wanted = mixture.log_marginal(iris).sum() + scale.sum() + means.sum() + weights
    torch.testing.assert_close(-loss, wanted)


def test_prior_of_one_dimension_does_not_depend_on_the_covariance_type():
    x, losses = torch.randn(40, dtype=torch.double), []
    for covariance in COVARIANCES:
        mixture = GaussianMixture(1, 2, covariance, prior="conjugate").double()
        mixture.initialise_from(x)
        losses.append(
            TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(mixture.model, mixture.guide, x)
        )
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(3))


# ------------------------------------------------------------------ fitting


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("data", ["iris", "faithful"])
def test_fit_reaches_the_best_of_sklearns_restarts(iris, covariance, data):
    x, K = (iris, 3) if data == "iris" else (torch.tensor(load_dataset("faithful").values), 2)
    best = SklearnMixture(K, covariance_type=COVARIANCES[covariance], n_init=10, random_state=0, tol=1e-6)
    mixture = GaussianMixture(x.shape[1], K, covariance).double()
    mixture.initialise_from(x)
    train(mixture, x, steps=100)
    assert mixture.log_marginal(x).mean() > best.fit(x.numpy()).score(x.numpy()) - 0.01
    assert mixture.check_health(x) == []


def test_start_is_reproducible_and_leaves_the_generator_alone(iris):
    state = torch.get_rng_state()
    starts = [GaussianMixture(4, 3) for _ in range(2)]
    torch.set_rng_state(state)
    for mixture in starts:
        mixture.double().initialise_from(iris, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    for first, second in zip(starts[0].parameters(), starts[1].parameters(), strict=True):
        assert torch.equal(first, second)


# ------------------------------------------------------------------ names of components


@pytest.mark.parametrize("unit", [1e-29, 1e29])
def test_data_of_any_unit_have_the_same_start(iris, unit):
    """In float32 their variances are 1e-58 and 1e58, which are 0 and infinity."""
    mixtures = [GaussianMixture(4, 3), GaussianMixture(4, 3)]
    for mixture, scale in zip(mixtures, (1.0, unit), strict=True):
        mixture.initialise_from(iris.float() * scale)
    plain, scaled = mixtures
    torch.testing.assert_close(scaled.raw_means, plain.raw_means, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scaled.raw_scale, plain.raw_scale, rtol=1e-3, atol=1e-3)


def test_relabelling_changes_names_only(iris):
    mixture = random_mixture(assignments="sampled", baseline="input")
    mixture.match_guide()
    twin = mixture.relabelled()
    assert (twin.weights.diff() <= 0).all()
    torch.testing.assert_close(twin.log_marginal(iris), mixture.log_marginal(iris))
    loss = TraceGraph_ELBO(max_plate_nesting=1).loss(twin.model, twin.guide, iris)  # the guide went along
    assert loss == pytest.approx(-mixture.log_marginal(iris).sum().item())


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_runs_are_matched_to_a_reference(iris, covariance):
    mixture = random_mixture(num_components=5, covariance=covariance)
    shuffled = copy.deepcopy(mixture)
    order = torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        for parameter in shuffled.parameters():
            parameter.copy_(parameter[order] + 0.01 * torch.randn_like(parameter))
        shuffled.raw_means[0] = shuffled.raw_means[1]  # one mean, two spreads
        mixture.raw_means[3] = mixture.raw_means[0]
    matched = shuffled.relabelled(mixture)
    difference = matched.responsibilities(iris) - mixture.responsibilities(iris)
    assert difference.abs().mean() < 0.02
    assert copy.deepcopy(shuffled).relabelled(mixture).relabelled(mixture).constructor == mixture.constructor


def test_mixtures_of_different_size_cannot_be_matched():
    with pytest.raises(DataError, match="same num_components"):
        random_mixture(num_components=2).relabelled(random_mixture(num_components=3))


# ------------------------------------------------------------------ degenerate mixtures and bad input


def with_outlier(covariance, prior):
    """80 data in one cloud and a lone one, which a second component takes for itself."""
    x = torch.cat([torch.randn(80, 2, dtype=torch.double), torch.tensor([[30.0, 30.0]], dtype=torch.double)])
    mixture = GaussianMixture(2, 2, covariance, prior=prior).double()
    mixture.initialise_from(x)
    train(mixture, x, steps=200, lr=0.05)
    return mixture.relabelled(), x


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_collapsed_component_is_named(covariance):
    mixture, x = with_outlier(covariance, "none")
    assert mixture.scale[1].square().sum() < 0.02
    messages = mixture.check_health(x)
    assert len(messages) == 1
    assert "component 1 holds 1 of 81 data" in messages[0]
    assert "prior='conjugate'" in messages[0]


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_collapsed_fit_is_refused_and_one_under_a_prior_never(covariance):
    mixture, x = with_outlier(covariance, "none")
    with pytest.raises(DivergenceError, match=r"the fit is degenerate: component \d holds 1 of 81 data"):
        mixture.check_fit(x)
    mixture, x = with_outlier(covariance, "conjugate")
    mixture.check_fit(x)


def test_a_refused_fit_names_the_component_at_the_floor_and_not_another():
    """Component 0 holds little, which is no reason to refuse; component 2 is at the floor."""
    x = torch.cat([torch.randn(60, 1) - 20, torch.randn(1, 1) + 50, 1e-4 * torch.randn(60, 1)]).double()
    mixture = GaussianMixture(1, 3).double()
    mixture.initialise_from(x)
    tril = torch.tensor([1.0, 1.0, 1e-9], dtype=torch.double)[:, None, None]
    means = torch.tensor([[50.0], [-20.0], [0.0]], dtype=torch.double)
    mixture.set_components(torch.tensor([1.0, 60, 60], dtype=torch.double) / 121, means, tril)
    health = mixture.check_health(x)
    assert [message.split(" holds")[0] for message in health] == ["component 0", "component 2"]
    with pytest.raises(DivergenceError) as error:
        mixture.check_fit(x)
    assert str(error.value) == f"the fit is degenerate: {health[1]}"


def test_health_of_many_rows_is_that_of_their_parts(iris):
    mixture = random_mixture(covariance="diagonal").double()
    with torch.no_grad():
        mixture.raw_scale[0].fill_(-1000.0)
    many = iris.repeat(500, 1)  # more than one part
    whole, small = mixture.check_health(many), mixture.check_health(iris)
    assert len(whole) == len(small) >= 1
    assert "of 75000 data" in whole[0]


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_prior_keeps_variances_from_collapsing(covariance):
    mixture, _ = with_outlier(covariance, "conjugate")
    assert mixture.scale[1].square().sum() > 0.5  # without the prior: below 0.02


def test_variances_stop_at_the_floor():
    mixture = random_mixture(1, 1, covariance="diagonal")
    with torch.no_grad():
        mixture.raw_scale.fill_(-1000.0)
    torch.testing.assert_close(mixture.scale, FLOOR * mixture.unit.expand(1, 1))


def test_vectors_are_data_of_one_dimension():
    x = torch.cat([torch.randn(30), 8 + torch.randn(60)])
    losses = []
    for data in (x, x.unsqueeze(-1)):
        mixture = GaussianMixture(1, 2, assignments="sampled")
        mixture.initialise_from(data)
        torch.manual_seed(0)
        losses.append(TraceGraph_ELBO(max_plate_nesting=1).loss(mixture.model, mixture.guide, data))
    assert losses[0] == losses[1]
    assert mixture.log_marginal(x).shape == (90,)


@pytest.mark.parametrize("assignments", ["enumerated", "sampled"])
@pytest.mark.parametrize("prior", ["none", "conjugate"])
def test_generates_as_many_rows_as_the_plate_says(assignments, prior):
    mixture = random_mixture(assignments=assignments, prior=prior)
    assert mixture.model().shape == (1, 4)
    with data_rows(5000, torch.arange(5000)):
        (x,) = Predictive(mixture.model, guide=mixture.guide, num_samples=1)(None)["x"].detach()
    assert x.shape == (5000, 4)
    # the guide without data holds the parameters under a prior too: the draws are this mixture's
    shares = mixture.responsibilities(x).mean(0)
    assert ((shares - mixture.weights).abs() < 4.5 * (mixture.weights / len(x)).sqrt()).all()


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_generated_data_have_the_mixtures_mean(covariance):
    mixture = random_mixture(covariance=covariance)
    with data_rows(20_000, torch.arange(20_000)), torch.no_grad():
        x = mixture.model()
    wanted = mixture.weights @ mixture.means
    assert ((x.mean(0) - wanted).abs() < 4 * x.std(0) / len(x) ** 0.5).all()


def test_bad_options_and_data_are_refused():
    for option in ("covariance", "assignments", "prior", "baseline"):
        with pytest.raises(SettingError, match=f"{option}='tied'"):
            GaussianMixture(2, 2, **{option: "tied"})
    mixture = GaussianMixture(2, 3)
    with pytest.raises(DataError, match="data_dim=5"):
        mixture.check_data(torch.zeros(10, 5))
    with pytest.raises(DataError, match="row 4, column 1"):
        mixture.check_data(
            torch.zeros(10, 2).index_put((torch.tensor(4), torch.tensor(1)), torch.tensor(np.nan))
        )
    with pytest.raises(DataError, match="2 different rows"):
        mixture.initialise_from(torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(5, 1))
