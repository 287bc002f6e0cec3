"""The autoencoder: its objective is the regularised reconstruction error, its linear form spans PCA's subspace."""

import math

import numpy as np
import pyro
import pytest
import torch
from torch import nn

import pyrolvm
from pyrolvm import PPCA, Autoencoder, ProgramError, SettingError
from pyrolvm.inference.objectives import estimate
from pyrolvm.inference.posterior.evidence import iwae_bounds

QUIET = {"progress": False, "engine": "eager"}


@pytest.fixture(autouse=True)
def parameters_of_their_own():
    with pyro.get_param_store().scope():
        yield


def plane(rows=300, seed=0):
    """Points near a plane in five dimensions, and the noise around it."""
    generator = torch.Generator().manual_seed(seed)
    loadings = torch.linalg.qr(torch.randn(5, 2, generator=generator))[0] * torch.tensor([3.0, 2.0])
    noise = 0.3 * torch.randn(rows, 5, generator=generator)
    return torch.randn(rows, 2, generator=generator) @ loadings.T + noise + 1.0


def linear(x, latent_dim=2, noise_scale=0.5):
    model = Autoencoder(
        x.shape[1], latent_dim, encoder="linear", decoder="linear", noise_scale=noise_scale
    ).to(x.dtype)
    return model, *model.encoder.layers, *model.decoder.layers


@pytest.mark.parametrize("objective", ["trace", "meanfield"])
def test_the_objective_is_the_regularised_reconstruction_error(objective):
    x = plane().double()
    model = Autoencoder(5, 2, noise_scale=0.5, hidden=(8,)).double()
    z = model.encoder(x)
    error = (x - model.decoder(z)).square().sum() / (2 * 0.25)
    constants = len(x) * (5 * math.log(0.5 * math.sqrt(2 * math.pi)) + math.log(2 * math.pi))
    wanted = -error - z.square().sum() / 2 - constants
    found = estimate(pyrolvm.inference.objectives.named(objective), model.model, model.guide, (x,))
    torch.testing.assert_close(found.bound, wanted.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        found.terms["kl"], (z.square().sum() / 2 + len(x) * math.log(2 * math.pi)).detach()
    )
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (found.surrogate, -wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_of_zeros_and_ones_it_is_the_cross_entropy():
    x = (plane() > 1).double()
    model = Autoencoder(5, 2, "bernoulli", hidden=(8,)).double()
    z = model.encoder(x)
    entropy = nn.functional.binary_cross_entropy_with_logits(model.decoder(z), x, reduction="sum")
    found = estimate(pyrolvm.inference.objectives.named("trace"), model.model, model.guide, (x,))
    prior = z.square().sum() / 2 + len(x) * math.log(2 * math.pi)
    torch.testing.assert_close(found.bound, -(entropy + prior).detach(), rtol=1e-12, atol=0)


def test_for_a_linear_decoder_the_best_code_is_the_posterior_mean_of_ppca():
    """(W' W + s^2 I)^-1 W' (x - b): the gradient of the encoder vanishes there, and only there."""
    x = plane().double()
    ppca = PPCA.closed_form(x, 2)
    model, encoder, decoder = linear(x, noise_scale=ppca.noise_scale.item())
    mean, _ = ppca.exact_posterior(x)
    with torch.no_grad():
        decoder.weight.copy_(ppca.loadings)
        decoder.bias.copy_(ppca.offset)
        gain = torch.linalg.lstsq(x - x.mean(0), mean - mean.mean(0)).solution
        encoder.weight.copy_(gain.T)
        encoder.bias.copy_(mean.mean(0) - x.mean(0) @ gain)
    torch.testing.assert_close(model.encoder(x), mean, rtol=1e-4, atol=1e-4)
    found = estimate(pyrolvm.inference.objectives.named("trace"), model.model, model.guide, (x,))
    gradients = torch.autograd.grad(found.surrogate / len(x), list(encoder.parameters()))
    assert max(g.abs().max().item() for g in gradients) < 1e-4


def test_a_linear_one_spans_the_principal_subspace():
    """And its error is PCA's: the mean of what the smallest eigenvalues leave."""
    x = plane()
    model, _, decoder = linear(x, noise_scale=0.1)
    fitted = pyrolvm.fit(model, x, num_steps=600, learning_rate=0.05, **QUIET)
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    angles = torch.linalg.svdvals(torch.linalg.qr(decoder.weight.detach())[0].T @ vectors[:, -2:])
    assert angles.min() > 1 - 1e-4
    error = (fitted.reconstruct(x) - x).square().sum(1).mean().item()
    least = values[:3].sum().item()
    assert least <= error < 1.01 * least


def test_free_weights_escape_the_prior_and_the_error_of_pca_bounds_the_objective():
    """Codes / c and weights * c: log p(x, z) rises as c does, to minus PCA's error and the densities' constants."""
    x = plane().double()
    model, encoder, decoder = linear(x)
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    limit = (
        -values[:3].sum().item() / (2 * 0.25)
        - 5 * math.log(0.5 * math.sqrt(2 * math.pi))
        - math.log(2 * math.pi)
    )
    for c in (1.0, 10.0, 100.0):
        with torch.no_grad():
            encoder.weight.copy_(vectors[:, -2:].T / c)
            encoder.bias.copy_(-vectors[:, -2:].T @ x.mean(0) / c)
            decoder.weight.copy_(c * vectors[:, -2:])
            decoder.bias.copy_(x.mean(0))
        found = estimate(pyrolvm.inference.objectives.named("trace"), model.model, model.guide, (x,))
        assert (found.bound / len(x)).item() == pytest.approx(
            limit - values[-2:].sum().item() / (2 * c**2), abs=1e-9
        )


@pytest.fixture(scope="module", name="fitted")
def _fitted():
    torch.manual_seed(0)
    x = plane()
    return pyrolvm.fit(Autoencoder(5, 2, hidden=(8,)), x, num_steps=20, **QUIET), x


def test_it_is_called_a_point_estimate_everywhere(fitted):
    fitted, x = fitted
    assert [s.point for s in fitted.structure.local_latents] == [True]
    assert "log p(x, z) at a point" in repr(fitted)
    assert "ELBO" not in repr(fitted)
    assert torch.equal(fitted.encode(x), fitted.posterior(x, 3)["z"][2])


@pytest.mark.parametrize(
    "ask",
    [
        lambda f, x: f.log_evidence(x, "importance", 20, progress=False),
        lambda f, x: f.log_evidence(x, "iwae", 20, progress=False),
        lambda f, x: f.log_evidence(x, "ais", 2, start="guide", progress=False),
        lambda f, x: iwae_bounds(f.pair(x), 10, (1, 5), progress=False),
        lambda f, x: pyrolvm.diagnostics.local_khat(f, x, 50, progress=False),
        lambda f, x: pyrolvm.diagnostics.collapse_report(f, x, progress=False),
        lambda f, x: pyrolvm.diagnostics.evidence_gaps(f, x, progress=False),
        lambda f, x: pyrolvm.diagnostics.calibrate(f, num_simulations=5, progress=False),
    ],
    ids=["importance", "iwae", "ais", "bounds", "k-hat", "collapse", "gaps", "calibration"],
)
def test_what_needs_a_density_is_declined_in_a_sentence(fitted, ask):
    fitted, x = fitted
    with pytest.raises((SettingError, ProgramError), match="point estimate") as error:
        ask(fitted, x[:20])
    assert "\n" not in str(error.value)


def test_the_model_has_an_evidence_though_the_guide_has_none(fitted):
    fitted, x = fitted
    by_prior = fitted.log_evidence(x[:10], "prior", 5000, progress=False).mean()
    annealed = fitted.log_evidence(x[:10], "ais", 8, num_steps=100, progress=False).mean()
    assert abs(by_prior - annealed) < 0.1


def test_exported_draws_have_no_density_of_the_guide(fitted):
    fitted, x = fitted
    idata = pyrolvm.to_inference_data(fitted, x[:10], num_samples=5, progress=False)
    assert list(idata["sample_stats"].data_vars) == ["log_p_row"]
    assert "point estimate of 'z'" in idata["sample_stats"].attrs["weights"]
    assert np.ptp(idata["posterior"]["z"].values, axis=1).max() == 0
    with pytest.raises(SettingError, match="no log_q"):
        pyrolvm.diagnostics.approximate_loo(idata)


def test_missing_entries_are_left_out_of_the_error():
    x = plane()
    x[::4, 2] = float("nan")
    fitted = pyrolvm.fit(Autoencoder(5, 2, hidden=(8,), missing="mask"), x, num_steps=5, **QUIET)
    assert torch.isfinite(fitted.encode(x)).all()
    assert np.isfinite(fitted.elbo)


def test_a_module_of_another_shape_is_refused():
    with pytest.raises(
        ProgramError, match=r"encoder Linear returned a tensor \[1, 3\].*one tensor \[..., 2\]"
    ):
        Autoencoder(5, 2, encoder=nn.Linear(5, 3))
    own = Autoencoder(5, 2, encoder=nn.Linear(5, 2), decoder=nn.Linear(2, 5))
    assert own.decode(own.encoder(plane())).shape == (300, 5)
