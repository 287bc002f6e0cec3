"""k-hat: per datum, so that it does not grow with their number, and one for what all share."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean, LocalNormal, eight_schools
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
)

import pyrolvm
from pyrolvm import PPCA, BayesianFactorAnalysis, ProgramError, SettingError, data_plate
from pyrolvm.diagnostics.tails import global_khat, local_khat

FREEZE = {"num_steps": 1, "learning_rate": 1e-12, "initialise": False, "progress": False, "engine": "eager"}


def local(ratio, num_rows):
    """A guide centred at the posterior, N(x/2, 1/2), of `ratio` times its deviation."""

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2, ratio * math.sqrt(0.5)))

    return pyrolvm.fit(LocalNormal().model, torch.linspace(-2, 2, num_rows), guide=guide, **FREEZE)


@pytest.mark.parametrize(("ratio", "low", "high"), [(0.5, 0.65, 0.85), (0.95, 0.0, 0.25)])
def test_khat_of_each_datum_is_that_of_its_guide(ratio, low, high):
    # 1 - ratio^2 in the limit, shrunk towards 1/2; the intervals of Pyro's own test of psis_diagnostic
    x = torch.linspace(-2, 2, 100)
    table = local_khat(local(ratio, 100), x, 20_000)
    assert len(table) == 100
    assert low < table["k_hat"].mean() < high


def test_khat_does_not_grow_with_the_number_of_data():
    few = local_khat(local(0.9, 10), torch.linspace(-2, 2, 10))
    many = local_khat(local(0.9, 3000), torch.linspace(-2, 2, 3000))
    error = many["k_hat"].std() * math.sqrt(1 / 10 + 1 / 3000)
    assert few["k_hat"].mean() == pytest.approx(many["k_hat"].mean(), abs=4 * error)
    assert many["k_hat"].mean() < 0.7


def test_the_exact_guide_has_the_exact_evidence_and_equal_weights():
    x = torch.linspace(-2, 2, 40)
    table = local_khat(local(1.0, 40), x, 200)
    exact = LocalNormal.log_evidence(x).numpy()
    assert table["log_evidence"].to_numpy() == pytest.approx(exact, abs=1e-5)
    assert table["elbo"].to_numpy() == pytest.approx(exact, abs=1e-5)
    assert table["effective_sample_size"].to_numpy() == pytest.approx(200.0, rel=1e-5)


def test_chunks_and_loops_agree(monkeypatch):
    x = torch.randn(60, 4) @ torch.randn(4, 4)
    fitted = pyrolvm.fit(PPCA.closed_form(x, 2), x, **FREEZE)
    whole = local_khat(fitted, x, 100)
    monkeypatch.setattr("pyrolvm.inference.posterior.evidence.chunks.BUDGET", 100 * 4 * 7)
    chunked = local_khat(fitted, x, 100)
    fitted.program.vectorized = False
    looped = local_khat(fitted, x, 100)
    for other in (chunked, looped):
        assert other["log_evidence"].to_numpy() == pytest.approx(whole["log_evidence"].to_numpy(), abs=1e-3)


def mean_fit(x, ratio):
    program = GlobalMean()
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, **FREEZE)
    n, store = len(x), fitted.program.parameters
    with torch.no_grad():
        store["loc"].fill_(x.sum() / (n + 1))
        store["scale"].fill_(math.log(ratio / math.sqrt(n + 1)))
    return fitted


def test_latents_shared_by_all_data_have_one_khat_whatever_their_number():
    found = []
    for n in (10, 1000):
        x = torch.randn(n, generator=torch.Generator().manual_seed(0))
        narrow = global_khat(mean_fit(x, 0.5), x, 20_000)
        assert narrow.names == ("m",)
        assert 0.6 < narrow.k_hat < 0.9
        assert global_khat(mean_fit(x, 0.95), x, 2000).k_hat < 0.35
        found.append(narrow.k_hat)
    # the same noise, scaled to each posterior, has the same weights
    assert found[0] == pytest.approx(found[1], abs=0.01)


def both(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of_both(ratio, n, mean):
    # p(m | x): precision 1 + n / 2; p(z | x, m) = N((x + m) / 2, 1 / 2)
    def guide(x):
        loc = pyro.param("loc", torch.tensor(float(mean)))
        m = pyro.sample("m", dist.Normal(loc, ratio / math.sqrt(1 + n / 2)))
        with data_plate(x):
            pyro.sample("z", dist.Normal((x + m) / 2, math.sqrt(0.5)))

    return guide


def test_the_latents_of_each_datum_are_integrated_out():
    x = torch.randn(30, generator=torch.Generator().manual_seed(1))
    mean = x.sum() / 2 / (1 + 30 / 2)
    narrow = pyrolvm.fit(both, x, guide=guide_of_both(0.5, 30, mean), **FREEZE)
    assert 0.6 < global_khat(narrow, x, 20_000, 2).k_hat < 0.9  # the guide of z is exact: two draws suffice
    assert local_khat(narrow, x, 200)["effective_sample_size"].min() > 199
    good = pyrolvm.fit(both, x, guide=guide_of_both(1.0, 30, mean), **FREEZE)
    assert global_khat(good, x, 500, 2).k_hat < 0.5


def test_there_is_no_khat_where_it_would_be_that_of_noise_and_it_says_why():
    x = torch.randn(40, 5)
    factors = pyrolvm.fit(BayesianFactorAnalysis(5, 2), x, **FREEZE)
    noisy = global_khat(factors, x, 50, 3)
    assert noisy.k_hat is None
    assert "nats of noise" in noisy.reason
    assert "the 20 given are others" in global_khat(factors, x[:20]).reason
    other = global_khat(factors, torch.randn(x.shape, generator=torch.Generator().manual_seed(5)))
    assert f"the {len(x)} given are others" in other.reason
    ppca = pyrolvm.fit(PPCA(5, 2), x, **FREEZE)
    assert "no latents are shared" in global_khat(ppca, x).reason


def test_a_guide_of_all_data_at_once_has_one_khat_of_all_latents_and_none_per_datum():
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    joint = pyrolvm.fit(eight_schools, y, guide=AutoMultivariateNormal, **FREEZE)
    found = global_khat(joint, y)
    assert found.joint
    assert found.names == ("mu", "tau", "theta")
    assert found.k_hat > found.threshold
    assert "the latents of all data together (mu, tau, theta)" in found.sentence
    with pytest.raises(ProgramError, match="AutoNormal"):
        local_khat(joint, y)


def set_normal(fitted, mean, tril):
    """Let an AutoGuide of one Gaussian auxiliary be N(mean, tril tril')."""
    scale, store = tril.diagonal(), fitted.program.parameters
    with torch.no_grad():
        store["loc"].copy_(mean)
        store["scale_unconstrained"].copy_(scale.expm1().log())  # the inverse of softplus
        if "scale_tril_unconstrained" in store:
            store["scale_tril_unconstrained"].copy_(tril / scale[:, None])
        if "cov_factor" in store:
            store["cov_factor"].zero_()


@pytest.mark.parametrize("kind", [AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal])
def test_an_autoguide_of_one_auxiliary_has_a_khat_and_it_is_right(kind):
    """q = N(posterior mean, (ratio posterior sd)^2): equal weights for 1, 1 - ratio^2 in the limit below it."""
    x = torch.randn(20, generator=torch.Generator().manual_seed(0))
    fitted = pyrolvm.fit(GlobalMean().model, x, guide=kind, **FREEZE)
    found = {}
    for ratio in (1.0, 0.5):
        set_normal(fitted, x.sum() / 21, torch.full((1, 1), ratio / math.sqrt(21)))
        found[ratio] = global_khat(fitted, x, 20_000)
    assert found[1.0].names == ("m",)
    assert found[1.0].k_hat == -math.inf
    assert 0.6 < found[0.5].k_hat < 0.9


def test_a_joint_khat_is_that_of_the_product_of_the_weights():
    """z, m and x jointly Gaussian: AutoMultivariateNormal at the exact posterior has equal weights."""
    x = torch.randn(6, generator=torch.Generator().manual_seed(1))
    fitted = pyrolvm.fit(both, x, guide=AutoMultivariateNormal, **FREEZE)
    precision = torch.eye(7)
    precision[0, 0] = 1 + 6  # of m: its prior and six z
    precision[1:, 1:] = 2 * torch.eye(6)
    precision[0, 1:] = precision[1:, 0] = -1
    covariance = precision.inverse()
    mean = covariance @ torch.cat([torch.zeros(1), x])
    set_normal(fitted, mean, torch.linalg.cholesky(covariance))
    found = global_khat(fitted, x, 500)
    assert found.k_hat == -math.inf
    assert "the guide is the posterior" in found.sentence


def test_a_guide_with_a_flow_has_a_khat():
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    fitted = pyrolvm.fit(eight_schools, y, guide=AutoIAFNormal, **FREEZE)
    assert global_khat(fitted, y, 200).k_hat > 0


def test_the_likelihood_counts_without_a_data_plate():
    """m ~ N(0, 1), x ~ N(m, 1) as one vector: a guide at the prior is too wide, not exact."""

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(m, 1.0).expand([len(x)]).to_event(1), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    x = 3 + torch.randn(30, generator=torch.Generator().manual_seed(0))
    found = global_khat(pyrolvm.fit(model, x, guide=guide, **FREEZE), x, 1000)
    assert found.k_hat > found.threshold


def test_a_point_of_each_datum_has_no_khat():
    x = torch.randn(20)
    fitted = pyrolvm.fit(LocalNormal().model, x, guide=pyro.infer.autoguide.AutoDelta, **FREEZE)
    with pytest.raises(ProgramError, match="point estimate: it holds 'z'"):
        local_khat(fitted, x)


def test_points_have_no_khat():
    x = torch.randn(20)
    fitted = pyrolvm.fit(GlobalMean().model, x, guide=pyro.infer.autoguide.AutoDelta, **FREEZE)
    assert "at points" in global_khat(fitted, x).reason


def test_too_few_draws_are_refused():
    with pytest.raises(SettingError, match="at least 25"):
        local_khat(local(1.0, 5), torch.zeros(5), 10)


def test_shared_latents_in_a_plate_of_the_data_plates_dimension_all_count():
    """Levels of two groups with their exact posterior as the guide: all weights are the same."""
    group, y = torch.arange(12) % 2, torch.randn(12, generator=torch.Generator().manual_seed(0))
    each = torch.stack([y[group == g].sum() for g in range(2)]) / 7

    def model(group, y):
        with pyro.plate("groups", 2):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(level[..., group], 1.0), obs=y)

    def guide(group, y):
        offset = pyro.param("offset", torch.tensor(0.0))
        with pyro.plate("groups", 2):
            pyro.sample("level", dist.Normal(each + offset, 7**-0.5))

    options = {
        "num_steps": 1,
        "learning_rate": 1e-12,
        "progress": False,
        "engine": "eager",
        "dtype": "float64",
    }
    fitted = pyrolvm.fit(model, (group, y), guide=guide, **options)
    assert pyrolvm.diagnostics.global_khat(fitted, (group, y), 100, progress=False).k_hat == -math.inf
