"""The InfoVAE's objective: its divergence against closed forms, its special cases, its refusals."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean, LocalNormal
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

import pyrolvm
from pyrolvm import VAE, Autoencoder, GaussianMixture, InfoELBO, PowerVAE, SettingError, data_plate
from pyrolvm.data.arrays import as_batch
from pyrolvm.inference.objectives import estimate, info, mmd, named
from pyrolvm.inference.training.evaluation import bound_of
from pyrolvm.plates import data_rows

QUIET = {"progress": False, "engine": "eager"}
MEAN, COVARIANCE = torch.tensor([0.6, -0.3]).double(), torch.tensor([[0.5, 0.2], [0.2, 0.8]]).double()


@pytest.fixture(autouse=True)
def parameters_of_their_own():
    with pyro.get_param_store().scope():
        yield


# ------------------------------------------------------------------ the divergence


def expected_rbf(mean, covariance, scale):
    """E exp(-|a - b|^2 / scale) of a - b ~ N(mean, covariance)."""
    inner = torch.eye(len(mean)).double() + 2 * covariance / scale
    return inner.det() ** -0.5 * torch.exp(-(mean @ torch.linalg.solve(inner, mean)) / scale)


def expected(kernel, mean, covariance, scale):
    """The same of either kernel: 1 / (1 + h) is the integral of exp(-t) exp(-t h) over t > 0."""
    if kernel == "rbf":
        return expected_rbf(mean, covariance, scale)
    nodes, weights = np.polynomial.laguerre.laggauss(60)
    return sum(w * expected_rbf(mean, covariance, scale / t) for t, w in zip(nodes, weights, strict=True))


def exact(kernel, bandwidth):
    """MMD^2 of N(MEAN, COVARIANCE) and N(0, I), and E k within each of them."""
    scale, nothing, eye = 2 * bandwidth**2, torch.zeros(2).double(), torch.eye(2).double()
    of_q = expected(kernel, nothing, 2 * COVARIANCE, scale)
    of_p = expected(kernel, nothing, 2 * eye, scale)
    return of_q + of_p - 2 * expected(kernel, MEAN, COVARIANCE + eye, scale), of_q, of_p


def draws(replicates, n, m):
    z = torch.distributions.MultivariateNormal(MEAN, COVARIANCE).sample((replicates, n))
    return z, torch.randn(replicates, m, 2).double()


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
@pytest.mark.parametrize("bandwidth", [0.7, 2.0])
def test_the_statistics_have_the_closed_form_mean_of_gaussians(kernel, bandwidth):
    torch.manual_seed(0)
    n, m = 12, 20
    z, u = draws(5_000, n, m)
    value, of_q, of_p = exact(kernel, bandwidth)
    unbiased = mmd(z, u, kernel, bandwidth)
    assert abs(unbiased.mean() - value) < 4 * unbiased.std() / math.sqrt(len(unbiased))
    too_large = (1 - of_q) / n + (1 - of_p) / m
    v = mmd(z, u, kernel, bandwidth, "v")
    assert abs(v.mean() - value - too_large) < 4 * v.std() / math.sqrt(len(v))
    assert too_large > 10 * v.std() / math.sqrt(len(v)), "the bias shows"
    assert v.min() > 0 > unbiased.min()


def test_the_statistic_is_the_sums_of_the_paper():
    z, u = draws(1, 5, 4)
    z, u = z[0], u[0]

    def k(a, b):
        return torch.exp(-(a - b).square().sum() / 8)

    own = sum(k(z[i], z[j]) for i in range(5) for j in range(5) if i != j) / 20
    own = own + sum(k(u[i], u[j]) for i in range(4) for j in range(4) if i != j) / 12
    wanted = own - 2 * sum(k(a, b) for a in z for b in u) / 20
    torch.testing.assert_close(mmd(z, u, "rbf", 2.0), wanted)


def test_bandwidths_by_name():
    z, u = draws(1, 30, 30)
    z, u = torch.cat([z, z], -1), torch.cat([u, u], -1)  # four dimensions
    torch.testing.assert_close(mmd(z, u), mmd(z, u, bandwidth=2.0))
    torch.testing.assert_close(mmd(z, u, bandwidth="authors"), mmd(z, u, bandwidth=4 / math.sqrt(2)))
    middle = (z[0][:, None] - u[0]).square().sum(-1).median()
    torch.testing.assert_close(mmd(z, u, bandwidth="median"), mmd(z, u, bandwidth=(middle / 2).sqrt().item()))
    several = (mmd(z, u, bandwidth=0.5) + mmd(z, u, bandwidth=3)) / 2
    torch.testing.assert_close(mmd(z, u, bandwidth=[0.5, 3]), several)


def test_large_batches_are_compared_in_parts_that_hold_every_row(monkeypatch):
    monkeypatch.setattr(info, "LARGEST", 10)
    values = torch.arange(70.0).reshape(2, 35, 1)
    parts = info._in_parts(values)
    assert parts.shape == (8, 8, 1)
    assert sorted(parts[:4].flatten().tolist()) == [float(i) for i in range(32)]
    assert parts[0, :, 0].tolist() == [0, 4, 8, 12, 16, 20, 24, 28]


# ------------------------------------------------------------------ the objective


def gradients(objective, vae, x, seed=3):
    torch.manual_seed(seed)
    found = estimate(objective, vae.model, vae.guide, (x,))
    return found, torch.autograd.grad(found.surrogate, list(vae.parameters()))


def vae_and_bits(cls=VAE, **options):
    torch.manual_seed(1)
    vae = cls(6, 2, hidden=(5,), **options).double()
    return vae, torch.randint(2, (16, 6)).double()


def test_alpha_zero_and_lambda_one_is_the_elbo():
    vae, x = vae_and_bits()
    elbo, wanted = gradients(named("trace"), vae, x)
    found, ours = gradients(InfoELBO(alpha=0.0, lambda_=1.0), vae, x)
    torch.testing.assert_close(found.bound, elbo.bound, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.terms["info"], elbo.bound, rtol=1e-13, atol=0)
    assert found.terms["mmd"] != 0
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("beta", [0.5, 4.0])
def test_alpha_one_minus_lambda_is_the_beta_vae(beta):
    power, x = vae_and_bits(PowerVAE, beta=beta)
    vae, _ = vae_and_bits()
    vae.load_state_dict(power.state_dict())
    tempered, theirs = gradients(named("trace"), power, x)
    found, ours = gradients(InfoELBO(alpha=1 - beta, lambda_=beta), vae, x)
    torch.testing.assert_close(found.terms["info"], power.beta_objective(tempered.bound), rtol=1e-12, atol=0)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, beta * other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("alpha", [-1.0, 0.3, 1.0])
def test_the_objective_is_its_formula(alpha):
    """J from the parts of the program, and the ELBO as the bound, whatever alpha and lambda are."""
    vae, x = vae_and_bits()
    objective = InfoELBO(alpha, 30.0, "imq", 1.3, "v")
    found, ours = gradients(objective, vae, x)
    torch.manual_seed(3)
    q = vae.posterior_dist(x)
    z = q.rsample()
    u = vae.prior().expand([16]).sample()
    log_likelihood, kl = (
        vae.likelihood_dist(z).log_prob(x).sum(),
        (q.log_prob(z) - vae.prior().log_prob(z)).sum(),
    )
    wanted = log_likelihood - (1 - alpha) * kl - (alpha + 29) * 16 * mmd(z, u, "imq", 1.3, "v")
    torch.testing.assert_close(found.terms["info"], wanted.detach())
    torch.testing.assert_close(found.bound, (log_likelihood - kl).detach())
    torch.testing.assert_close(found.terms["kl"], kl.detach())
    for one, other in zip(ours, torch.autograd.grad(-wanted, list(vae.parameters())), strict=True):
        torch.testing.assert_close(one, other)


def shifted(shift):
    """An encoder of N(shift, 1) for every datum, and a decoder that does not look."""

    def model(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(shift, 1.0))

    return model, guide


def test_a_larger_mismatch_is_punished():
    """At alpha = 1 a shift of q costs (lambda - 0) D and nothing else: J falls as it grows, and pulls it back."""
    x = torch.zeros(400)
    values = []
    for start in (0.0, 0.5, 1.0, 2.0):
        torch.manual_seed(0)
        shift = torch.tensor(start, requires_grad=True)
        found = estimate(InfoELBO(1.0, 50.0), *shifted(shift), (x,))
        values.append(found.terms["info"].item())
        (slope,) = torch.autograd.grad(found.surrogate, shift)
        assert slope > 0 or start == 0
    assert values == sorted(values, reverse=True)
    assert values[0] - values[-1] > 400 * 5


def test_a_minibatch_weighs_the_divergence_as_all_data_do():
    program, x = LocalNormal(), torch.randn(60, generator=torch.Generator().manual_seed(2))
    objective = InfoELBO(0.5, 10.0)

    def divergence(rows):
        with data_rows(60, rows):
            return estimate(objective, program.model, program.guide, (x[rows],)).terms["mmd"].item() / 60

    torch.manual_seed(0)
    with torch.no_grad():
        full = [divergence(torch.arange(60)) for _ in range(200)]
        parts = [divergence(torch.randperm(60)[:12]) for _ in range(200)]
    error = math.hypot(np.std(full), np.std(parts)) / math.sqrt(200)
    assert abs(np.mean(full) - np.mean(parts)) < 4 * error
    assert np.mean(full) > 4 * np.std(full) / math.sqrt(200)


def ladder(x):
    """z2 ~ N(0, 1), z1 | z2 ~ N(z2, 0.1): what is compared is the pair, whose prior is correlated."""
    with data_plate(x):
        z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
        z1 = pyro.sample("z1", dist.Normal(z2, 0.1))
        pyro.sample("x", dist.Normal(z1, 1.0), obs=x)


@pytest.mark.parametrize("matched", [True, False])
def test_several_latents_are_compared_together(matched):
    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with data_plate(x):
            z2 = pyro.sample("z2", dist.Normal(loc, 1.0))
            pyro.sample("z1", dist.Normal(z2 if matched else loc, 0.1 if matched else 1.01**0.5))

    x = torch.zeros(50)
    torch.manual_seed(0)
    objective = InfoELBO(0.5, 10.0)
    found = [estimate(objective, ladder, guide, (x,)).terms["mmd"].item() / 50 for _ in range(200)]
    error = np.std(found) / math.sqrt(200)
    if matched:
        assert abs(np.mean(found)) < 4 * error
    else:  # the same marginals, without the correlation
        assert np.mean(found) > 10 * error


@pytest.mark.parametrize("at_once", [False, True])
def test_particles_are_averaged(at_once):
    vae, x = vae_and_bits()
    one, many = InfoELBO(0.5, 20.0), InfoELBO(0.5, 20.0, num_particles=4, vectorize_particles=at_once)
    torch.manual_seed(0)
    with torch.no_grad():
        single, several = (
            torch.tensor([[*estimate(o, vae.model, vae.guide, (x,)).terms.values()] for _ in range(120)])
            for o in (one, many)
        )
    error = torch.hypot(single.std(0), several.std(0)) / math.sqrt(120)
    assert ((single.mean(0) - several.mean(0)).abs() < 4 * error).all()
    assert (several.std(0) < 0.7 * single.std(0)).all()


def test_what_is_held_out_is_the_elbo():
    x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    vae = VAE(4, 2, "gaussian", hidden=(8,))
    options = {"num_steps": 20, "validation": x[:30], **QUIET}
    fitted = pyrolvm.fit(vae, x[30:], objective=InfoELBO(1.0, 20.0), **options)
    wanted = bound_of(fitted, as_batch(x[:30], torch.float32, torch.device("cpu")), objective="trace")
    assert fitted.held_out_elbo == pytest.approx(wanted, rel=1e-6)
    assert {"mmd", "info"} <= set(fitted.history)
    row = fitted.history.iloc[-1]
    assert row["elbo"] == pytest.approx(row["log_likelihood"] - row["kl"], rel=1e-5)
    assert row["info"] == pytest.approx(row["log_likelihood"] - 20 * row["mmd"], rel=1e-4)


def test_it_runs_under_plain_svi_and_with_autoguides():
    x = torch.randn(40, generator=torch.Generator().manual_seed(0))
    program = LocalNormal(shift=2.0)
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.02}), InfoELBO(1.0, 50.0))
    for _ in range(150):
        svi.step(x)
    assert pyro.param("shift").abs() < 0.5
    fitted = pyrolvm.fit(program.model, x, guide=AutoNormal, objective="info", num_steps=5, **QUIET)
    row = fitted.history.iloc[-1]
    wanted = row["log_likelihood"] - 0.5 * row["kl"] - 99.5 * row["mmd"]
    assert row["info"] == pytest.approx(wanted, rel=1e-4)


def test_of_a_point_guide_it_is_the_wasserstein_autoencoder():
    """No KL at alpha = 1: the codes spread out to fill the prior."""
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0, 0.1])
    torch.manual_seed(0)
    model = Autoencoder(3, 1, encoder="linear", decoder="linear", noise_scale=1.0)
    options = {"num_steps": 400, "learning_rate": 0.03, **QUIET}
    codes = pyrolvm.fit(model, x, objective=InfoELBO(1.0, 100.0), **options).encode(x)
    assert 0.7 < codes.std() < 1.3
    assert abs(codes.mean()) < 0.2


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 1.5}, "alpha=1.5 must be a number of at most 1"),
        ({"alpha": 0.0, "lambda_": 1e-3}, "at least 1 - alpha = 1: below, the weight"),
        ({"alpha": 1.0, "lambda_": 0.0}, "lambda_=0.0 must be positive"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"kernel": "laplace"}, "kernel='laplace' is not known: choose from rbf, imq"),
        ({"bandwidth": "mean"}, "bandwidth='mean' is not known: choose from dimension"),
        ({"bandwidth": -1.0}, "bandwidth=-1.0 must be a positive number"),
        ({"bandwidth": []}, "must be a positive number, several of them"),
        ({"statistic": "u"}, "statistic='u' is not known: choose from unbiased, v"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(SettingError, match=words.replace("[", r"\[")):
        InfoELBO(**settings)


def test_programs_without_what_it_compares_are_refused():
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    one, local = GlobalMean(), LocalNormal()
    with pytest.raises(SettingError, match="none inside its data plate"):
        pyrolvm.fit(one.model, x[:, 0], guide=one.guide, objective="info", num_steps=1, **QUIET)
    with pytest.raises(SettingError, match="draws the latents of all data at once"):
        pyrolvm.fit(
            local.model, x[:, 0], guide=AutoMultivariateNormal, objective="info", num_steps=1, **QUIET
        )
    sampled = GaussianMixture(2, 2, assignments="sampled", covariance="diagonal")
    with pytest.raises(SettingError, match="none inside its data plate"):
        pyrolvm.fit(sampled, x, objective="info", num_steps=1, **QUIET)
    with pytest.raises(SettingError, match="single row: give a batch_size of at least 2"):
        pyrolvm.fit(VAE(2, 1, "gaussian"), x, objective="info", batch_size=1, num_steps=1, **QUIET)


def test_draws_without_a_path_derivative_are_refused():
    def model(x):
        with data_plate(x):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with data_plate(x):
            pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("z", dist.Normal(loc, 1.0))

    with pytest.raises(SettingError, match=r"'c' \(Bernoulli\) is not reparameterised"):
        pyrolvm.fit(model, torch.randn(20), guide=guide, objective="info", num_steps=1, **QUIET)


# ------------------------------------------------------------------ what it is for


class Chain(nn.Module):
    """Bits of which each is predicted from those before it, and from z: a decoder that can do without z."""

    def __init__(self, data_dim=8, latent_dim=2):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(nn.Linear(data_dim, 32), nn.Tanh(), nn.Linear(32, 2 * latent_dim))
        self.decoder = nn.Linear(latent_dim, data_dim)
        self.weights = nn.Parameter(torch.diag(torch.full((data_dim - 1,), 2.2), 1))  # logit 0.9

    def model(self, x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            logits = self.decoder(z) + (2 * x - 1) @ self.weights.triu(1)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x):
        with data_plate(x):
            loc, raw = self.encoder(x).chunk(2, -1)
            scale = 1e-3 + nn.functional.softplus(raw)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def markov(rows=8000):
    """Each bit is the one before it with probability 0.9."""
    generator = torch.Generator().manual_seed(0)
    flips = (torch.rand(rows, 8, generator=generator) < 0.1).float()
    flips[:, 0] = (torch.rand(rows, generator=generator) < 0.5).float()
    return flips.cumsum(1) % 2


def test_a_decoder_that_can_do_without_latents_collapses_the_vae_and_not_the_infovae():
    x, reports, options = markov(), {}, {"num_steps": 400, "batch_size": 200, "learning_rate": 0.02, **QUIET}
    for name, objective in (("vae", "trace"), ("info", InfoELBO(1.0, 30.0))):
        torch.manual_seed(0)
        chain = Chain()
        fitted = pyrolvm.fit(chain.model, x, guide=chain.guide, objective=objective, **options)
        reports[name] = pyrolvm.diagnostics.collapse_report(fitted, x[:500], progress=False)
    vae, kept = reports["vae"], reports["info"]
    assert vae.average_kl < 0.02
    assert vae.active_units == 0
    assert not vae.decoder_uses_latents
    assert kept.mutual_information > 1.0
    assert kept.active_units == 2
    assert kept.decoder_uses_latents
    assert kept.average_kl == kept.mutual_information + kept.marginal_kl


def test_parts_of_the_rows_have_the_v_statistic_of_all_on_average():
    """Over all pairs of parts, exactly: which rows a process has is chance."""
    generator = torch.Generator().manual_seed(0)
    z, u = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    for size in (2, 3):
        parts = [list(part) for part in itertools.combinations(range(5), size)]
        found = [mmd(z[a], u[b], "imq", 1.3, "v", 5) for a in parts for b in parts]
        assert torch.stack(found).mean().item() == pytest.approx(mmd(z, u, "imq", 1.3, "v").item(), rel=1e-12)
    assert mmd(z, u, "imq", 1.3, "unbiased", 9) == mmd(z, u, "imq", 1.3, "unbiased")
