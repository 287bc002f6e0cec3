"""Several fits of one model: equal, rotated, renamed, and stuck."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from programs import GlobalMean

import pyrolvm
from pyrolvm import PPCA, GaussianMixture, SettingError
from pyrolvm.diagnostics.restarts import _r_hat, _reconstruction_r_hat, compare_restarts
from pyrolvm.models.alignment import procrustes

FREEZE = {"num_steps": 1, "learning_rate": 1e-12, "initialise": False, "progress": False, "engine": "eager"}
X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) @ torch.randn(
    5, 5, generator=torch.Generator().manual_seed(1)
)


def rotated(model, angle):
    """W R, which makes the same data: the scores turn along, z R."""
    other, c, s = copy.deepcopy(model), math.cos(angle), math.sin(angle)
    with torch.no_grad():
        other.loadings.copy_(model.loadings @ torch.tensor([[c, -s], [s, c]]))
    other.solve_guide()
    return other


def fits(*models):
    return [pyrolvm.fit(m, X, **FREEZE) for m in models]


@pytest.fixture(scope="module")
def ppca():
    return PPCA.closed_form(X, 2, guide="full")


def test_fits_that_agree_are_said_to(ppca):
    found = compare_restarts(fits(ppca, copy.deepcopy(ppca), copy.deepcopy(ppca)), X)
    assert found.agree
    assert found.bounds["near_best"].all()
    # the guide is exact, so that the bound is log p(x) in every draw
    assert found.bounds["bound"].to_numpy() == pytest.approx(ppca.log_marginal(X).mean().item(), abs=1e-4)
    assert "3 of 3 fits" in found.sentence
    assert "their posteriors agree" in found.sentence


def test_a_rotation_shows_until_it_is_aligned(ppca):
    turned = rotated(ppca, 1.0)
    pair = fits(ppca, turned)
    raw = compare_restarts(pair, X)
    assert raw.bounds["near_best"].all()
    assert not raw.agree
    assert "align= takes them out" in raw.sentence
    # mean of the squared R-hats: 1 + B / W, with B of the two means and W the posterior's variance
    means = [m.exact_posterior(X)[0].detach() for m in (ppca, turned)]
    scale = [m.exact_posterior(X)[1].detach().square().sum(1) for m in (ppca, turned)]
    expected = 1 + torch.stack(means).var(0) / torch.stack(scale).mean(0)
    found = torch.tensor(raw.table["r_hat"].to_numpy()).square().mean()
    assert found.item() == pytest.approx(expected.mean().item(), rel=0.1)

    def align(draws, reference):
        scores, target = draws["z"].mean(0), reference["z"].mean(0)
        return {"z": draws["z"] @ procrustes(scores, target).rotation}

    aligned = compare_restarts(pair, X, align)
    assert aligned.agree


def test_a_worse_optimum_is_left_out(ppca):
    bad = copy.deepcopy(ppca)
    with torch.no_grad():
        bad.loadings[:, 1].zero_()
    bad.solve_guide()
    found = compare_restarts(fits(ppca, copy.deepcopy(ppca), bad), X)
    assert list(found.bounds["near_best"]) == [True, True, False]
    expected = (ppca.log_marginal(X) - bad.log_marginal(X)).mean().item()
    assert found.bounds["below_best"].iloc[2] == pytest.approx(expected, abs=1e-4)
    assert "2 of 3 fits" in found.sentence
    alone = compare_restarts(fits(ppca, bad), X)
    assert not alone.agree
    assert "more restarts" in alone.sentence


def test_latents_shared_by_all_data():
    x = X[:, 0] / X[:, 0].std()
    pair = []
    for loc in (0.0, 0.5):
        fitted = pyrolvm.fit(GlobalMean().model, x, guide=GlobalMean().guide, **FREEZE)
        with torch.no_grad():
            fitted.program.parameters["loc"].fill_(loc)
            fitted.program.parameters["scale"].fill_(-0.5 * math.log(61))
        pair.append(fitted)
    found = compare_restarts(pair, x, tolerance=10.0)
    # W = 1/61, B = 1/8
    assert found.table.loc[("m", 0), "r_hat"] == pytest.approx(math.sqrt(1 + 61 / 8), rel=0.1)
    # E_q log p(x, m) + H: a shift of the mean from m* to m* + d costs d^2 (n + 1) / 2n nats per datum
    best = x.sum().item() / 61
    cost = ((0.5 - best) ** 2 - best**2) * 61 / 120
    assert (found.bounds["bound"][0] - found.bounds["bound"][1]) == pytest.approx(cost, abs=0.01)


def test_mixtures_are_compared_by_their_exact_bound():
    models = [GaussianMixture(5, 2) for _ in range(2)]
    models[0].initialise_from(X)
    found = compare_restarts(fits(*models), X)
    expected = [m.log_marginal(X).mean().item() for m in models]
    assert found.bounds["bound"].to_numpy() == pytest.approx(expected, abs=1e-3)
    assert "more restarts" in found.sentence
    twice = compare_restarts(fits(models[0], copy.deepcopy(models[0])), X)
    assert "no sampled latents" in twice.sentence


def test_other_rows_carry_their_share_of_the_shared_latents_kl():
    """Of 10 of 60 rows, the KL of a shared mean counts by 1/60 per datum, as in training."""
    x = X[:, 0] / X[:, 0].std()
    fitted = pyrolvm.fit(GlobalMean().model, x, guide=GlobalMean().guide, **FREEZE)
    with torch.no_grad():
        fitted.program.parameters["loc"].fill_(0.5)
        fitted.program.parameters["scale"].fill_(math.log(0.3))
    found = compare_restarts([fitted, fitted], x[:10], num_samples=4000).bounds
    kl = 0.5 * (0.3**2 + 0.25 - 1) - math.log(0.3)
    likelihood = -0.5 * (math.log(2 * math.pi) + (x[:10] - 0.5).square().mean().item() + 0.3**2)
    assert found["standard_error"][0] > 0
    assert found["bound"][0] == pytest.approx(likelihood - kl / 60, abs=4 * found["standard_error"][0])


def test_bounds_with_summed_out_and_shared_latents_are_of_the_given_rows():
    """A mixture's mode: the bound of its rows, with the KL by N. A point has no noise."""
    fitted = pyrolvm.fit(GaussianMixture(5, 2, prior="conjugate"), X, **FREEZE)
    found = compare_restarts([fitted, fitted], X, num_samples=50).bounds
    draws = fitted.draws(X, 400)
    each = draws.log_weight.double().mean(1) + (draws.global_log_prior - draws.global_log_guide).double() / 60
    assert found["standard_error"][0] == pytest.approx(0, abs=1e-6)
    assert found["bound"][0] == pytest.approx(each.mean().item(), rel=1e-6)
    part = compare_restarts([fitted, fitted], X[:10], num_samples=50).bounds
    assert part["bound"][0] != found["bound"][0]


def test_bounds_within_their_noise_are_as_good():
    x, pair = X[:, 0] / X[:, 0].std(), []
    for loc in (0.5, 0.5001):
        fitted = pyrolvm.fit(GlobalMean().model, x, guide=GlobalMean().guide, **FREEZE)
        with torch.no_grad():
            fitted.program.parameters["loc"].fill_(loc)
        pair.append(fitted)
    bounds = compare_restarts(pair, x, tolerance=0.0).bounds
    assert bounds["below_best"].max() > 0
    assert bounds["near_best"].all()


def test_the_same_point_agrees_and_another_does_not():
    points = torch.tensor([[1.0, 1.0], [1.0, 2.0]]).unsqueeze(1).expand(2, 10, 2)  # [fits, draws, elements]
    assert list(_r_hat("z", points)["r_hat"]) == [pytest.approx(0.9**0.5), math.inf]


def test_few_elements_that_differ_are_seen_in_the_data_that_are_made():
    """Three of a hundred, by two sds: R-hat sqrt(1 + 2) of these."""

    def fake(shift):
        def predict(x, num_samples, seed):
            made = torch.randn(num_samples, 100, generator=torch.Generator().manual_seed(seed % 2**31))
            made[:, :3] += shift
            return {"x": made}

        return SimpleNamespace(predict=predict, structure=SimpleNamespace(sites=[]))

    found = _reconstruction_r_hat([fake(0.0), fake(2.0)], None, 4000, 0)
    assert found == pytest.approx(3**0.5, abs=0.05)


def test_what_cannot_be_compared_is_refused_in_one_line(ppca):
    [one] = fits(ppca)
    with pytest.raises(SettingError, match="two or more"):
        compare_restarts([one], X)
    other = pyrolvm.fit(GlobalMean().model, X[:, 0], guide=GlobalMean().guide, **FREEZE)
    with pytest.raises(SettingError, match="different latents"):
        compare_restarts([one, other], X)
