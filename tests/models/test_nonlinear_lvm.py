import itertools
import math

import pytest
import torch

import pyrolvm
from pyrolvm import PPCA, DataError, NonlinearLVM, SettingError
from pyrolvm.inference.posterior.evidence import evidence_table
from pyrolvm.models.likelihoods import StudentT

QUIET = {"progress": False, "engine": "eager"}


def wave(rows, seed=0):
    """Points along a wave [rows, 2], whose noise grows from left to right."""
    generator = torch.Generator().manual_seed(seed)
    t = 4 * torch.rand(rows, generator=generator) - 2
    noise = torch.randn(rows, 2, generator=generator) * (0.02 + 0.06 * (t + 2)).unsqueeze(-1)
    return torch.stack([t, torch.sin(2 * t)], -1) + noise


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    model = NonlinearLVM(2, 1, hidden=(32,))
    return pyrolvm.fit(model, wave(800), num_steps=1500, learning_rate=0.01, batch_size=200, **QUIET)


def test_the_likelihood_is_the_full_form():
    model = NonlinearLVM(3, 2, noise_floor=0.2).double()
    z, x = torch.randn(5, 2).double(), torch.randn(5, 3).double()
    mean, raw = model.decoder(z).split(3, -1)
    scale = 0.2 + torch.nn.functional.softplus(raw)
    expected = torch.distributions.Normal(mean, scale).log_prob(x).sum(-1)
    torch.testing.assert_close(model.likelihood_dist(z).log_prob(x), expected)


def test_a_linear_model_has_the_closed_form_of_ppca():
    """The quadrature's own check: one dimension, and two."""
    for latent_dim in (1, 2):
        torch.manual_seed(0)
        ppca = PPCA(4, latent_dim).double()
        model = NonlinearLVM(4, latent_dim, decoder="linear", noise_scale=0.6).double()
        (layer,) = model.decoder.layers
        with torch.no_grad():
            ppca.loadings.copy_(layer.weight)
            ppca.offset.copy_(layer.bias)
            ppca.log_noise_scale.copy_(model.noise_scale.log())
        x = torch.randn(9, 4).double()
        torch.testing.assert_close(
            model.quadrature_log_marginal(x, 100), ppca.log_marginal(x).detach(), rtol=1e-7, atol=1e-7
        )


def test_a_binary_model_is_normalised_over_all_data():
    model = NonlinearLVM(6, 2, "bernoulli").double()
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6))).double()
    assert model.quadrature_log_marginal(every, 80).exp().sum().item() == pytest.approx(1, abs=1e-7)


def test_the_evidence_is_that_of_quadrature(fitted):
    """Importance sampling, the importance-weighted bound and the ELBO against the integral over z."""
    x = wave(200, seed=1)
    exact = fitted.model.quadrature_log_marginal(x, 2000).double()
    torch.testing.assert_close(
        fitted.model.quadrature_log_marginal(x, 4000).double(), exact, rtol=0, atol=1e-3
    )
    table = evidence_table(fitted.pair(x), "importance", 2000, progress=False)
    error = math.sqrt((table["standard_error"] ** 2).sum()) / len(x)
    assert error < 0.02
    assert abs(table["log_evidence"].mean() - exact.mean().item()) < 4 * error
    iwae = fitted.log_evidence(x, "iwae", 2000, num_particles=100, progress=False)
    elbo = fitted.log_evidence(x, "iwae", 2000, num_particles=1, progress=False)
    assert elbo.mean() < iwae.mean() < exact.mean() + 4 * error


def test_the_density_of_the_plane_is_one_and_its_noise_is_found(fitted):
    axis = torch.linspace(-5, 5, 301)
    grid = torch.cartesian_prod(axis, axis)
    density = fitted.model.quadrature_log_marginal(grid, 300).exp()
    assert density.sum().item() * (10 / 300) ** 2 == pytest.approx(1, abs=0.02)
    narrow, wide = wave(4000, 2)[:, 0] < -1.5, wave(4000, 2)[:, 0] > 1.5
    z = fitted.encode(wave(4000, 2))
    scale = fitted.model.likelihood_dist(z).base_dist.scale.detach().mean(-1)
    assert scale[narrow].mean() < 0.1  # 0.02 to 0.05 in truth
    assert scale[wide].mean() > 3 * scale[narrow].mean()  # 0.23 to 0.26 in truth


def test_another_noise_for_each_z_is_better_than_one_for_all(fitted):
    torch.manual_seed(0)
    model = NonlinearLVM(2, 1, hidden=(32,), noise_scale="shared")
    shared = pyrolvm.fit(model, wave(800), num_steps=1500, learning_rate=0.01, batch_size=200, **QUIET)
    x = wave(1000, 3)
    gain = fitted.model.quadrature_log_marginal(x, 1000) - shared.model.quadrature_log_marginal(x, 1000)
    assert gain.mean() > 4 * gain.std() / math.sqrt(len(x))


def test_the_floor_keeps_repeated_data_from_infinite_density():
    x = torch.zeros(64, 2).index_fill(0, torch.arange(32), 1.0)
    model = NonlinearLVM(2, 1, hidden=(16,), noise_floor=0.05)
    fitted = pyrolvm.fit(model, x, num_steps=400, learning_rate=0.05, **QUIET)
    assert (model.likelihood_dist(torch.randn(500, 1)).base_dist.scale >= 0.05).all()
    assert fitted.elbo < 2 * math.log(1 / (0.05 * math.sqrt(2 * math.pi)))


def test_gaps_are_left_out_of_the_integral():
    model = NonlinearLVM(3, 1, missing="mask").double()
    x = torch.randn(4, 3).double()
    x[:, 1] = float("nan")
    z = torch.linspace(-6, 6, 400).double()[:, None]
    p = model.likelihood_dist(z).base_dist
    weight = model.prior().log_prob(z) + math.log(12 / 399)
    few = (
        torch.distributions.Normal(p.loc[:, [0, 2]], p.scale[:, [0, 2]]).log_prob(x[:, None, [0, 2]]).sum(-1)
    )
    torch.testing.assert_close(model.quadrature_log_marginal(x), (few + weight).logsumexp(-1).detach())


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(SettingError, match="noise_floor must be a positive number, not -1"):
        NonlinearLVM(2, 1, noise_floor=-1)
    with pytest.raises(SettingError, match="grid in 3 dimensions is too large"):
        NonlinearLVM(4, 3).quadrature_log_marginal(torch.zeros(1, 4))
    with pytest.raises(SettingError, match="no meaning"):
        NonlinearLVM(2, 1, "bernoulli", noise_scale="network")
    with pytest.raises(DataError, match=r'likelihood="gaussian"'):
        NonlinearLVM(2, 1, "poisson").check_data(torch.full((2, 2), -0.5))
    assert isinstance(NonlinearLVM(2, 1, "student_t", noise_scale="network").likelihood, StudentT)
    assert isinstance(NonlinearLVM(**NonlinearLVM(2, 1, "bernoulli").constructor), NonlinearLVM)
