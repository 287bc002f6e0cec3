"""Learned priors: densities, draws, starts, gains in evidence, and what stands on a model that has one."""

import math

import pyro.distributions as dist
import pytest
import torch

import pyrolvm
from pyrolvm import VAE, PowerVAE, SettingError
from pyrolvm.diagnostics import collapse_report
from pyrolvm.models.latent_priors import PRIORS, FlowPrior, MixturePrior, VampPrior, make_prior
from pyrolvm.models.mixtures import Mixture

QUIET = {"progress": False, "engine": "eager"}
NAMES = ("normal", "learned", "mixture:3", "vamp:5", "flow")


def encode(x):
    """Some q(z | x) of x [..., 4]."""
    return dist.Normal(x[..., :2], 0.3 + x[..., 2:].abs()).to_event(1)


def some(name):
    torch.manual_seed(0)
    prior = make_prior(name, 2, 4).double()
    for parameter in prior.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return lambda: prior(encode)


@pytest.mark.parametrize("name", NAMES)
def test_densities_integrate_to_one_and_draws_have_their_moments(name):
    p = some(name)()
    side = torch.linspace(-12, 12, 501, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    mass = p.log_prob(grid).exp() * (side[1] - side[0]) ** 2
    # a spline's density has kinks, which a grid of step h misses by O(h^2)
    assert mass.sum().item() == pytest.approx(1, abs=1e-3 if name == "flow" else 1e-6)
    draws = p.sample((20_000,))
    for f in (
        lambda z: z,
        lambda z: z**2,
        lambda z: z.prod(-1, keepdim=True),
        lambda z: torch.sigmoid(5 * z),
    ):
        error = f(draws).std(0) / math.sqrt(len(draws))
        assert ((f(draws).mean(0) - mass @ f(grid)).abs() < 4 * error + 1e-4).all()
    wide = p.expand(torch.Size([3, 7]))
    z = wide.sample()
    assert z.shape == (3, 7, 2)
    torch.testing.assert_close(wide.log_prob(z), some(name)().log_prob(z.clone()), rtol=0, atol=1e-9)


def test_the_density_of_a_flow_prior_is_the_change_of_variables():
    p = some("flow")()
    for z in torch.randn(4, 2).double():

        def back(z):
            for transform in reversed(p.transforms):
                z = transform.inv(z)
            return z

        jacobian = torch.autograd.functional.jacobian(back, z)
        expected = dist.Normal(0.0, 1.0).log_prob(back(z)).sum() + jacobian.slogdet().logabsdet
        torch.testing.assert_close(some("flow")().log_prob(z.clone()), expected, rtol=0, atol=1e-8)


def test_a_vamp_prior_is_the_mixture_of_the_guide_at_its_pseudo_data():
    torch.manual_seed(0)
    prior = VampPrior(2, 4, 5).double()
    z = torch.randn(6, 2).double()
    by_hand = torch.stack([encode(u).log_prob(z) for u in prior.pseudo_data]).logsumexp(0) - math.log(5)
    torch.testing.assert_close(prior(encode).log_prob(z), by_hand)
    assert isinstance(prior(encode), Mixture)


def test_pseudo_data_start_near_the_data_and_are_no_rows_of_them():
    x = torch.cat([torch.zeros(30, 4), 5 + torch.zeros(30, 4), torch.full((1, 4), -9.0)])
    prior = VampPrior(2, 4, 3)
    prior.initialise_from(x)
    start = prior.pseudo_data.detach()
    apart = torch.cdist(start, torch.tensor([[0.0] * 4, [5.0] * 4]))
    assert (apart.min(0).values < 0.5).all()
    assert torch.cdist(start, x).min() > 1e-3
    x[5, 2] = x[40, 0] = float("nan")  # a row with a missing entry
    prior.initialise_from(x)
    torch.testing.assert_close(prior.pseudo_data.detach(), start, atol=0.5, rtol=0)
    x = x.nan_to_num(0.0)
    few = VampPrior(2, 4, 9)
    few.initialise_from(x[28:33])
    assert torch.isfinite(few.pseudo_data).all()
    model = VAE(4, 2, "gaussian", hidden=(8,), prior="vamp:3")
    before = model.latent_prior.pseudo_data.clone()
    pyrolvm.fit(model, x, num_steps=1, learning_rate=1e-9, **QUIET)
    assert not torch.allclose(model.latent_prior.pseudo_data, before, atol=1e-3)


def test_a_prior_that_can_be_the_aggregated_posterior_raises_the_bound():
    """Codes in two far clusters: the best normal prior loses what the mixture gains."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(150, 3) * 0.1 - 2, torch.randn(150, 3) * 0.1 + 2])
    bounds = {}
    for name in ("normal", "mixture:3", "vamp:5", "flow"):
        torch.manual_seed(0)
        model = VAE(3, 2, "gaussian", noise_scale=0.1, hidden=(16,), prior=name)
        fitted = pyrolvm.fit(model, x, num_steps=300, batch_size=100, learning_rate=0.02, **QUIET)
        bounds[name] = fitted.log_evidence(x, "iwae", 50, num_particles=1, progress=False)
    for better in ("mixture:3", "vamp:5", "flow"):
        gain = bounds[better] - bounds["normal"]
        assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain)), better


@pytest.mark.parametrize("name", NAMES[1:])
def test_what_stands_on_a_model_with_a_learned_prior(name, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(50, 4)
    fitted = pyrolvm.fit(
        VAE(4, 2, "gaussian", hidden=(8,), prior=name, guide="iaf"), x, num_steps=20, **QUIET
    )
    assert fitted.sample(9).shape == (9, 4)
    report = collapse_report(fitted, x, progress=False)
    assert list(report.dimensions["kl_kind"]) == ["moments"] * 2
    assert report.dimensions.notna().all(axis=None)
    assert report.average_kl == pytest.approx(-fitted.history["kl"].iloc[-1], abs=10)
    evidence = [
        fitted.log_evidence(x[:4], method, draws, progress=False, **more)
        for method, draws, more in (
            ("importance", 4000, {}),
            ("prior", 20_000, {}),
            ("ais", 8, {"num_steps": 40, "num_leapfrog": 3}),
        )
    ]
    for other in evidence[1:]:
        torch.testing.assert_close(other, evidence[0], rtol=0, atol=0.15)
    again = pyrolvm.load(fitted.save(tmp_path / "run"))
    assert torch.equal(again.sample(5), fitted.sample(5))


def test_a_power_vae_takes_pieces_too():
    model = PowerVAE(4, 2, eta=0.5, likelihood="gaussian", hidden=(8,), guide="full", prior="mixture:2")
    assert pyrolvm.fit(model, torch.randn(30, 4), num_steps=3, **QUIET).structure.tempered


def test_words_and_instances_are_the_same():
    model = VAE(4, 2, "gaussian", prior=MixturePrior(2, 4, num_components=3))
    assert model.constructor["prior"] == "mixture:num_components=3"
    assert make_prior("flow:3", 2, 4).num_flows == 3
    assert make_prior("flow:hidden=8,num_bins=4", 2, 4).text == "flow:num_bins=4,hidden=8"
    assert FlowPrior(2, 4).text == "flow"
    assert set(PRIORS) == {"normal", "learned", "mixture", "vamp", "flow"}


@pytest.mark.parametrize(
    ("prior", "words"),
    [
        ("gaussian", "choose from normal, learned, mixture, vamp, flow"),
        ("mixture:0", "num_components must be a positive whole number"),
        ("normal:3", "has no settings"),
        ("vamp:50,50", "was given '50'"),
        (VampPrior(2, 5), "give it data_dim=4"),
    ],
)
def test_bad_settings_are_one_sentence(prior, words):
    with pytest.raises(SettingError, match=words):
        VAE(4, 2, prior=prior)


@pytest.mark.slow
def test_splines_are_compiled_to_the_eager_numbers():
    """In float64: in float32 Adam makes the rounding of two spline flows visible within fifty steps."""
    x = torch.randn(150, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    curves = []
    for engine in ("eager", "compiled"):
        torch.manual_seed(1)
        model = VAE(4, 2, "gaussian", hidden=(16,), guide="spline", prior="flow")
        options = {"num_steps": 50, "batch_size": 32, "learning_rate": 0.01, "dtype": torch.float64}
        curves.append(pyrolvm.fit(model, x, engine=engine, progress=False, **options).history["elbo"])
    assert (curves[0] - curves[1]).abs().max() < 1e-8
