import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.special import expit

import pyrolvm
from pyrolvm import VAE, DataError, SettingError
from pyrolvm.diagnostics import predictive_check
from pyrolvm.models.likelihoods import LIKELIHOODS, Categorical, Gaussian, make_likelihood
from pyrolvm.models.likelihoods.counts import log_rising

QUIET = {"progress": False, "engine": "eager"}
NAMES = ["categorical:5" if name == "categorical" else name for name in LIKELIHOODS]
COUNTS = np.arange(0.0, 40)


def drawn(likelihood, out, rows=4000):
    """Data of `likelihood` [rows, data_dim] at one decoder output."""
    torch.manual_seed(0)
    return likelihood(torch.as_tensor(out).expand(rows, -1)).sample()


# ---------------------------------------------------------------- densities


def test_counts_have_scipys_densities():
    x, out = torch.tensor(COUNTS)[:, None], torch.tensor([0.7, -0.4], dtype=torch.float64)
    mean, gate = math.exp(0.7), expit(-0.4)
    poisson = make_likelihood("poisson", 1)(out[:1]).log_prob(x)
    np.testing.assert_allclose(poisson, scipy.stats.poisson.logpmf(COUNTS, mean), rtol=1e-12)
    for r in (0.0625, 2.5, 99.0, 101.0, 1e4):
        binomial = scipy.stats.nbinom(r, r / (r + mean))
        of_r = make_likelihood(f"negative_binomial:{r}", 1).double()(out[:1])
        np.testing.assert_allclose(of_r.log_prob(x), binomial.logpmf(COUNTS), rtol=1e-9)
        assert of_r.variance.item() == pytest.approx(mean + mean**2 / r)
        inflated = make_likelihood(f"zero_inflated_negative_binomial:{r}", 1).double()(out)
        expected = np.log((1 - gate) * binomial.pmf(COUNTS) + gate * (COUNTS == 0))
        np.testing.assert_allclose(inflated.log_prob(x), expected, rtol=1e-9)
    inflated = make_likelihood("zero_inflated_poisson", 1)(out)
    expected = np.log((1 - gate) * scipy.stats.poisson.pmf(COUNTS, mean) + gate * (COUNTS == 0))
    np.testing.assert_allclose(inflated.log_prob(x), expected, rtol=1e-9)
    assert inflated.mean.item() == pytest.approx((1 - gate) * mean)


def test_a_negative_binomial_is_a_poisson_of_gamma_rates():
    r, mean = 1.75, 4.0
    levels = (np.arange(4000) + 0.5) / 4000
    rates = mean * scipy.stats.gamma.ppf(levels, r) / r
    mixed = scipy.stats.poisson.pmf(COUNTS[:, None], rates).mean(1)
    out = torch.tensor([math.log(mean)], dtype=torch.float64)
    found = make_likelihood(f"negative_binomial:{r}", 1).double()(out).log_prob(torch.tensor(COUNTS)[:, None])
    np.testing.assert_allclose(found.exp(), mixed, atol=2e-5)


@pytest.mark.parametrize("df", [0.5, 3.0, 150.0, 250.0, 1e8])
def test_students_t_has_scipys_density(df):
    likelihood = make_likelihood(f"student_t:{df}", 1, noise_scale=2.0).double()
    x = torch.linspace(-50, 50, 101, dtype=torch.float64)[:, None]
    found = likelihood(torch.ones(1, dtype=torch.float64))
    np.testing.assert_allclose(found.log_prob(x), scipy.stats.t.logpdf(x[:, 0], df, 1, 2), rtol=1e-10)
    assert found.mean.item() == 1  # also of df < 1, which has no mean


def test_categories_have_the_probabilities_of_a_softmax():
    likelihood = Categorical(2, 3)
    out = torch.tensor([0.1, 0.2, 0.5, -1.0, 0.3, 4.0])  # category by category, features side by side
    p = likelihood(out)
    logits = out.reshape(3, 2).T
    torch.testing.assert_close(p.base_dist.probs, logits.softmax(-1))
    x = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    expected = torch.stack([logits.log_softmax(-1)[d, x[:, d].long()] for d in range(2)]).sum(0)
    torch.testing.assert_close(p.log_prob(x), expected)
    assert p.mean.tolist() == [1.0, 2.0]
    assert p.sample().dtype is torch.float32


def test_the_ratio_of_gamma_functions_keeps_its_digits():
    base = torch.tensor([0.01, 1, 99.9, 100.1, 1e3, 1e6])
    exact = (base.double() + 3).lgamma() - base.double().lgamma()  # of 7 further digits
    torch.testing.assert_close(log_rising(base, torch.tensor(3.0)).double(), exact, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_outputs_and_data_have_finite_densities_and_gradients(name):
    likelihood = make_likelihood(name, 4)
    top = {"bernoulli": 1.0, "categorical:5": 4.0}.get(name, 1e6)
    for size in (0.0, 1.0, 30.0, 200.0, 1e4):
        for sign in (-1, 1):
            out = torch.full((likelihood.parts * 4,), sign * size, requires_grad=True)
            p = likelihood(out)
            log_prob = p.log_prob(torch.tensor([[0.0, 0, 1, top]]))
            inputs = [out, *likelihood.parameters()]
            gradients = torch.autograd.grad(log_prob.sum(), inputs, allow_unused=True)
            assert torch.isfinite(log_prob).all()
            assert all(torch.isfinite(g).all() for g in gradients if g is not None)
            assert torch.isfinite(p.mean).all()
            assert torch.isfinite(p.sample()).all()


def test_counts_of_large_mean_are_drawn_towards_the_data_and_not_lost():
    """Beyond the linear limit the gradient is still there: exp would overflow, a clamp would have none."""
    out = torch.full((1,), 60.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(make_likelihood("poisson", 1)(out).log_prob(torch.ones(1)), out)
    assert torch.isfinite(gradient)
    assert gradient.item() < -1e6


# ---------------------------------------------------------------- names and data


def test_settings_stand_after_a_colon():
    assert make_likelihood("categorical:6", 2).parts == 6
    assert make_likelihood("student_t:4", 2).df.item() == 4
    assert make_likelihood("negative_binomial:2.5", 2).concentration.item() == 2.5
    assert make_likelihood("student_t", 2, "network").parts == 2
    vae = VAE(3, 1, "categorical:4", hidden=(5,))
    again = VAE(**vae.constructor)
    again.load_state_dict(vae.state_dict())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("categorical", "categorical:6"),
        ("categorical:1", "at least 2"),
        ("categorical:many", "num_categories must be"),
        ("student_t:-1", "df must be a positive number, not -1"),
        ("negative_binomial:0", "concentration must be a positive number"),
        ("poisson:3", "poisson takes no setting"),
        ("poison", "choose from .*negative_binomial"),
        (3, "choose from"),
    ],
)
def test_wrong_names_and_settings_are_refused(name, sentence):
    with pytest.raises(SettingError, match=sentence):
        make_likelihood(name, 2)
    with pytest.raises(SettingError, match="no meaning"):
        make_likelihood("poisson", 2, "shared")


@pytest.mark.parametrize("name", [n for n in NAMES if "poisson" in n or "binomial" in n])
def test_what_is_no_count_is_refused_by_row_and_column(name):
    vae = VAE(3, 1, name, hidden=(4,))
    vae.check_data(torch.tensor([[0.0, 1e7, 3]]))
    assert vae.check_data(torch.tensor([[0, 1, 3]])).is_floating_point()
    x = torch.ones(9, 3)
    x[4, 2] = 0.5
    with pytest.raises(
        DataError, match=r"whole numbers from 0, but row 4, column 2 is 0\.5.*before any scaling"
    ):
        vae.check_data(x)
    x[4, 2] = -2
    with pytest.raises(DataError, match="row 4, column 2 is -2: counts are not negative"):
        vae.check_data(x)


def test_codes_outside_are_refused_by_row_and_column():
    vae = VAE(3, 1, "categorical:4", hidden=(4,))
    vae.check_data(torch.tensor([[0.0, 3, 1]]))
    for value, sentence in (
        (6.0, r"codes 0 to 3, but row 1, column 2 is 6: write .*'categorical:7'"),
        (-1.0, "from 0"),
    ):
        x = torch.zeros(3, 3)
        x[1, 2] = value
        with pytest.raises(DataError, match=sentence):
            vae.check_data(x)
    x[1, 2] = 1.5
    with pytest.raises(DataError, match=r"row 1, column 2 is 1\.5"):
        vae.check_data(x)


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("gaussian", "student_t")])
def test_a_decoder_starts_at_the_columns_own_distribution(name):
    likelihood = make_likelihood(name, 2)
    out = torch.linspace(-0.5, 1.2, likelihood.parts * 2)
    x = drawn(likelihood, out)
    x[::3, 1] = float("nan")
    likelihood = make_likelihood(name, 2)
    p, seen = likelihood(likelihood.start(x)[None]), x.nan_to_num()
    if name == "categorical:5":
        shares = torch.stack([(x[:, 1] == k).float().sum() for k in range(5)]) / (~x[:, 1].isnan()).sum()
        torch.testing.assert_close(p.base_dist.probs[0, 1], shares, atol=2e-3, rtol=0)
    else:
        mean = seen.sum(0) / (~x.isnan()).sum(0) * (0.9 if "zero" in name else 1)
        torch.testing.assert_close(p.mean[0], mean, rtol=0.01, atol=1e-3)


def test_convolutional_decoders_start_at_the_mean_of_each_channel():
    vae = VAE(32, 2, "poisson", encoder="conv", decoder="conv", image_shape=(2, 4, 4))
    x = torch.cat([torch.full((50, 16), 2.0), torch.full((50, 16), 9.0)], 1)
    vae.initialise_from(x)
    torch.testing.assert_close(vae.decoder.net.net[-1].bias, torch.tensor([2.01, 9.01]).log())


def test_a_users_decoder_is_left_alone():
    decoder = torch.nn.Linear(1, 2)
    before = decoder.bias.detach().clone()
    VAE(2, 1, "poisson", decoder=decoder).initialise_from(torch.ones(9, 2))
    assert torch.equal(decoder.bias, before)


# ---------------------------------------------------------------- fits


def factor_log_likelihood(weight, bias, log_r, x):
    """log p(x) [rows] of one factor with gamma-Poisson counts, z integrated out by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z, log_w = torch.tensor(nodes), torch.tensor(np.log(weights) - 0.5 * math.log(2 * math.pi))
    log_mean = z[:, None] * weight + bias  # [nodes, data_dim]
    r = log_r.exp()
    law = torch.distributions.NegativeBinomial(r, logits=log_mean - log_r)
    return (law.log_prob(x[:, None]).sum(-1) + log_w).logsumexp(-1)


def test_a_gamma_poisson_factor_is_recovered():
    """Weights, means and dispersions, to 4 standard errors by the information of the exact likelihood."""
    torch.manual_seed(0)
    weight = torch.tensor([0.8, -0.6, 0.5, 0.7, -0.4, 0.6]).double()
    bias = torch.tensor([1.0, 2.0, 0.5, 1.5, 2.5, 1.0]).double()
    log_r = torch.tensor([2.0, 3.0, 1.5, 4.0, 3.0, 8.0]).double().log()
    rows = 1500
    z = torch.randn(rows, 1).double()
    x = torch.distributions.NegativeBinomial(log_r.exp(), logits=z * weight + bias - log_r).sample()
    vae = VAE(6, 1, "negative_binomial", decoder="linear", hidden=(32,), activation="tanh")
    pyrolvm.fit(vae, x, num_steps=1200, learning_rate=0.02, schedule=cosine(1200), batch_size=300, **QUIET)
    (layer,) = vae.decoder.layers
    found = [layer.weight[:, 0], layer.bias, vae.likelihood.log_concentration]
    found = torch.stack([p.detach().double() for p in found])
    found[0] *= torch.sign(found[0] @ weight)
    truth = torch.stack([weight, bias, log_r])

    def total(parameters):
        return factor_log_likelihood(*parameters.reshape(3, 6), x).sum()

    information = -torch.autograd.functional.hessian(total, truth.flatten())
    error = torch.linalg.inv(information).diagonal().sqrt().reshape(3, 6)
    assert ((found - truth).abs() < 4 * error).all()
    # no less likely than the truth, and no more than a fit of 18 numbers can be
    gain = 2 * (total(found) - total(truth)).item()
    assert -1 < gain < scipy.stats.chi2.ppf(0.9999, 18)


def cosine(steps):
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def test_a_student_t_decoder_ignores_outliers():
    torch.manual_seed(0)
    z, x = torch.randn(600, 1), torch.empty(600, 4)
    truth = z * torch.tensor([1.0, -1, 2, 0.5])
    x = truth + 0.2 * torch.randn(600, 4)
    x[::20] += 30 * torch.randn(30, 4)
    errors = {}
    for name in ("gaussian", "student_t"):
        vae = VAE(4, 1, name, decoder="linear", hidden=(32,))
        fitted = pyrolvm.fit(vae, x, num_steps=500, learning_rate=0.02, batch_size=100, **QUIET)
        errors[name] = (fitted.reconstruct(x) - truth)[torch.arange(600) % 20 != 0].square().mean().item()
    assert errors["student_t"] < 0.5 * errors["gaussian"]
    assert vae.likelihood.df < 3


@pytest.mark.parametrize("name", NAMES)
def test_every_likelihood_goes_through_the_house(name, tmp_path):
    likelihood = make_likelihood(name, 5)
    x = drawn(likelihood, torch.linspace(-1, 1, 5 * likelihood.parts), 40)
    fitted = pyrolvm.fit(
        VAE(5, 2, name, hidden=(8,)), x, num_steps=5, batch_size=20, dtype="float64", **QUIET
    )
    x = x.double()
    assert fitted.sample(3).dtype is torch.float64
    decoded = fitted.model.decode(fitted.encode(x)).detach()
    torch.testing.assert_close(fitted.reconstruct(x), decoded)
    assert torch.isfinite(fitted.log_evidence(x, num_samples=20, progress=False)).all()
    check = predictive_check(fitted, x, num_samples=20, progress=False)
    assert np.isfinite(check.table["observed"]).all()
    again = pyrolvm.load(fitted.save(tmp_path / "run"))
    torch.testing.assert_close(again.reconstruct(x), decoded)


def test_what_is_made_of_codes_are_codes():
    x = drawn(Categorical(3, 4), torch.linspace(-1, 1, 12), 30)
    fitted = pyrolvm.fit(VAE(3, 1, "categorical:4", hidden=(8,)), x, num_steps=5, **QUIET)
    codes = {0.0, 1.0, 2.0, 3.0}
    for made in (
        fitted.reconstruct(x),
        fitted.sample(20),
        fitted.sample(5, mean=True),
        fitted.predict(x, 3)["x"],
    ):
        assert set(made.unique().tolist()) <= codes
    idata = pyrolvm.to_inference_data(fitted, x, num_samples=10, progress=False)
    assert set(np.unique(idata["posterior_predictive"]["x"])) <= codes
    assert np.isfinite(idata["log_likelihood"]["x"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_engine_gives_the_eager_numbers(name):
    likelihood = make_likelihood(name, 5)
    x = drawn(likelihood, torch.linspace(-1, 1, 5 * likelihood.parts), 100)
    histories = []
    for engine in ("eager", "compiled"):
        torch.manual_seed(1)
        model = VAE(5, 2, name, hidden=(8,))
        options = {"num_steps": 50, "batch_size": 32, "learning_rate": 0.01, "progress": False}
        fitted = pyrolvm.fit(model, x, engine=engine, **options)
        histories.append(fitted.history["elbo"])
    assert fitted.engine.startswith("compiled engine")
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-4, atol=1e-4)


def test_an_instance_is_taken():
    vae = VAE(3, 1, Gaussian(3, "per_feature", noise_floor=0.5), hidden=(4,))
    assert (vae.noise_scale > 0.5).all()
    with pytest.raises(SettingError, match="built for 3 features"):
        VAE(4, 1, Gaussian(3))
