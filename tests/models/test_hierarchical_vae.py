"""The hierarchical VAE: its linear form has an exact marginal and posterior; layers are reported apart."""

import math

import numpy as np
import pyro
import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.nn.functional import softplus

import pyrolvm
from pyrolvm import HierarchicalVAE, SettingError
from pyrolvm.inference.objectives import estimate, named
from pyrolvm.inference.posterior.evidence import iwae_bounds
from pyrolvm.models.networks import SCALE_FLOOR

QUIET = {"progress": False, "engine": "eager"}
W, B, S1, NOISE = torch.tensor([1.5, 0.8]), torch.tensor([0.9, 0.4]), torch.tensor([0.5, 0.7]), 0.5
V1 = B**2 + S1**2  # of z1
GAIN2, VAR2 = B / V1, 1 - B**2 / V1  # of z2 given z1
PRECISION = 1 / V1 + W**2 / NOISE**2  # of z1 given x
AXES = torch.linalg.qr(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))[0]
OFFSET = torch.tensor([1.0, -1.0, 0.5, 0.0])


@pytest.fixture(autouse=True)
def parameters_of_their_own():
    with pyro.get_param_store().scope():
        yield


def put(layer, weight, bias, scale=None):
    """A linear map, with a constant scale below it if it is of a Gaussian."""
    with torch.no_grad():
        if scale is None:
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
            return
        raw = (scale - SCALE_FLOOR).expm1().log()
        layer.weight.copy_(torch.cat([weight, torch.zeros_like(weight)]))
        layer.bias.copy_(torch.cat([bias, raw]))
        torch.testing.assert_close(SCALE_FLOOR + softplus(raw), scale)


def linear(wrong=1.0):
    """A model of two linear layers whose guide is the exact posterior, if its scales are not `wrong`."""
    nets = {"encoder": "linear", "decoder": "linear", "hidden": ()}
    model = HierarchicalVAE(4, (2, 2), "gaussian", noise_scale=NOISE, **nets)
    zero, loadings = torch.zeros(2), AXES * W
    put(model.decoder.layers[0], loadings, OFFSET)
    put(model.descents[0].net.layers[0], B.diag(), zero, S1)
    up = loadings.T / NOISE**2 / PRECISION[:, None]
    put(model.encoders[0].net.layers[0], up, -up @ OFFSET, wrong * PRECISION**-0.5)
    put(model.encoders[1].net.layers[0], GAIN2.diag(), zero, wrong * VAR2.sqrt())
    return model


def marginal():
    return MultivariateNormal(OFFSET, (AXES * (W**2 * V1)) @ AXES.T + NOISE**2 * torch.eye(4))


def rows(count=60):
    torch.manual_seed(5)
    return marginal().sample((count,))


def barely(model, x, **options):
    """Fitted by one step that moves nothing."""
    return pyrolvm.fit(model, x, num_steps=1, learning_rate=1e-12, **options, **QUIET)


def test_the_bound_touches_the_exact_evidence_of_the_linear_model():
    """With the exact posterior as guide every draw gives log p(x), the mean of a datum's bounds too."""
    x, model = rows(), linear()
    wanted = marginal().log_prob(x)
    found = estimate(named("trace"), model.model, model.guide, (x,))
    assert found.bound.item() == pytest.approx(wanted.sum().item(), rel=1e-5)
    fitted = barely(model, x)
    for num_samples in (1, 20):
        evidence = fitted.log_evidence(x, "importance", num_samples, progress=False)
        torch.testing.assert_close(evidence.float(), wanted, rtol=1e-4, atol=1e-4)


def test_the_closed_form_of_the_kl_is_not_used_where_the_prior_was_drawn_knowing_the_site():
    """TraceMeanField's KL of z1 given z2 would be that of independent draws: the bound would lie off log p(x)."""
    x, model = rows(), linear()
    torch.manual_seed(0)
    with torch.no_grad():
        found = [
            estimate(named("meanfield"), model.model, model.guide, (x,)).bound.item() for _ in range(200)
        ]
    error = np.std(found) / math.sqrt(200)
    assert abs(np.mean(found) - marginal().log_prob(x).sum().item()) < 4 * error + 1e-3


def kl_of_layers(x):
    """E_q[log q(z1 | x) - log p(z1 | z2)] and E_q KL(q(z2 | z1) || p(z2)) of each dimension, over the rows."""
    mean = (x - OFFSET) @ (AXES * W) / NOISE**2 / PRECISION
    second = mean**2 + 1 / PRECISION  # E z1^2
    apart = (1 - B * GAIN2) ** 2 * second + B**2 * VAR2  # E (z1 - B z2)^2
    first = 0.5 * (PRECISION.log() - 1) + S1.log() + apart / (2 * S1**2)
    return first.mean(0), 0.5 * (GAIN2**2 * second + VAR2 - 1 - VAR2.log()).mean(0)


def test_the_kl_of_each_layer_is_that_of_the_closed_form():
    x, model = rows(400), linear()
    wanted = torch.stack(kl_of_layers(x))
    fitted = barely(model, x)
    report = pyrolvm.diagnostics.collapse_report(fitted, x, num_samples=100, progress=False)
    found = torch.tensor([[report.dimensions.loc[(site, d), "kl"] for d in (0, 1)] for site in ("z1", "z2")])
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.02)
    assert set(report.dimensions.loc["z1", "kl_kind"]) == {"monte carlo"}
    assert set(report.dimensions.loc["z2", "kl_kind"]) == {"exact"}
    assert report.average_kl == pytest.approx(wanted.sum().item(), abs=0.05)
    assert report.active_by_site == {"z1": (2, 2), "z2": (2, 2)}
    assert "active, z2 2 of 2 and z1 2 of 2 (" in report.sentence


@pytest.mark.parametrize("objective", ["trace", "meanfield", "free_bits"])
def test_the_history_has_the_kl_of_each_layer(objective):
    x = rows(400)
    row = barely(linear(), x, objective=objective).history.iloc[0]
    assert row["kl_z1"] + row["kl_z2"] == pytest.approx(row["kl"], rel=1e-4)
    for name, wanted in zip(("kl_z1", "kl_z2"), kl_of_layers(x), strict=True):
        assert row[name] == pytest.approx(wanted.sum().item(), abs=0.2)
    warmed = (
        barely(linear(), x, objective=objective, controls={"kl_weight": 0.5})
        if objective == "trace"
        else None
    )
    if warmed is not None:
        assert warmed.history["kl_z2"][0] == pytest.approx(row["kl_z2"], rel=1e-4)


def test_a_program_of_one_latent_has_no_columns_of_sites():
    fitted = barely(pyrolvm.VAE(4, 2, "gaussian", hidden=(4,)), rows())
    assert not [name for name in fitted.history if name.startswith("kl_") and name != "kl_weight"]


def test_l_k_rises_with_k_towards_the_exact_evidence():
    x = rows(200)
    fitted = barely(linear(wrong=1.6), x)
    bounds = iwae_bounds(fitted.pair(x), 2000, (1, 5, 50, 500), progress=False).drop(columns="k_hat").mean()
    exact = marginal().log_prob(x).mean().item()
    assert list(bounds) == sorted(bounds)
    assert bounds["L_1"] < exact - 0.3
    assert bounds["L_500"] == pytest.approx(exact, abs=0.01)


def test_ancestral_samples_have_the_marginal_moments():
    fitted = barely(linear(), rows())
    made, law = fitted.sample(20_000), marginal()
    torch.testing.assert_close(made.mean(0), law.mean, rtol=0, atol=4 * law.stddev.max().item() / 20_000**0.5)
    torch.testing.assert_close(made.T.cov(), law.covariance_matrix, rtol=0, atol=0.12)


def test_it_reaches_the_exact_likelihood_when_trained():
    """Linear layers can be factor analysis: the held-in bound comes close to the likelihood that made the data."""
    x = rows(500)
    torch.manual_seed(0)
    model = HierarchicalVAE(4, (2, 2), "gaussian", encoder="linear", decoder="linear", hidden=())
    fitted = pyrolvm.fit(model, x, num_steps=800, learning_rate=0.02, **QUIET)
    assert fitted.elbo > marginal().log_prob(x).mean().item() - 0.1


def test_sizes():
    paper = HierarchicalVAE(784, (100, 50))
    assert [n.in_features for n in paper.encoders[0].net.layers if hasattr(n, "in_features")] == [
        784,
        200,
        200,
    ]
    assert [n.in_features for n in paper.encoders[1].net.layers if hasattr(n, "in_features")] == [
        100,
        100,
        100,
    ]
    assert [n.in_features for n in paper.descents[0].net.layers if hasattr(n, "in_features")] == [
        50,
        100,
        100,
    ]
    assert HierarchicalVAE(4, 3).sizes == (6, 3)
    three = HierarchicalVAE(4, [5, 3, 2], hidden=((9,), (7, 8), (6,)))
    assert [len(e.net.layers) for e in three.encoders] == [3, 5, 3]
    x = torch.zeros(7, 4)
    fitted = pyrolvm.fit(three, x, num_steps=2, **QUIET)
    assert [code.shape[1] for code in fitted.encode(x).values()] == [5, 3, 2]
    assert {"kl_z1", "kl_z2", "kl_z3"} <= set(fitted.history)


def test_the_top_layer_is_decoded_through_the_means_of_those_below():
    model = linear()
    z2 = torch.randn(5, 2)
    torch.testing.assert_close(model.decode(z2), (z2 * B * W) @ AXES.T + OFFSET)
    torch.testing.assert_close(model.decode({"z2": z2, "z1": z2 * B}), model.decode(z2))


def test_it_begins_at_the_columns_own_distribution_and_takes_missing_entries():
    x = (rows(200) > 0).float()
    model = HierarchicalVAE(4, 1, hidden=(8,), missing="mask")
    x[::3, 1] = float("nan")
    fitted = pyrolvm.fit(model, x, num_steps=1, learning_rate=1e-9, **QUIET)
    torch.testing.assert_close(model.decoder.layers[-1].bias.sigmoid(), x.nanmean(0), rtol=0, atol=0.01)
    assert torch.isfinite(fitted.encode(x)["z1"]).all()


@pytest.mark.parametrize("guide", ["full", "iaf"])
def test_other_guides_by_name(guide):
    model = HierarchicalVAE(4, (3, 2), "gaussian", hidden=(8,), guide=guide, free_bits=0.1)
    assert np.isfinite(pyrolvm.fit(model, rows(), num_steps=3, **QUIET).elbo)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"latent_dim": (3,)}, "dimensions of two layers at least"),
        ({"latent_dim": 0}, "latent_dim must be a positive whole number"),
        ({"latent_dim": (3, 0)}, "a size in latent_dim must be"),
        ({"latent_dim": "50"}, "a size in latent_dim must be"),
        ({"latent_dim": 2, "hidden": ((5,),)}, "those of each of the 2 layers"),
        ({"latent_dim": 2, "hidden": (5, (5,))}, "those of each of the 2 layers"),
    ],
)
def test_bad_sizes_are_refused(settings, words):
    with pytest.raises(SettingError, match=words):
        HierarchicalVAE(4, **settings)
