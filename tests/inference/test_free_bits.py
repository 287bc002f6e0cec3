"""Free bits: the formula, its gradient, its scale, and what it is refused for."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean, LocalNormal
from pyro.infer.autoguide import AutoNormal

import pyrolvm
from pyrolvm import VAE, FreeBits, GaussianMixture, HierarchicalVAE, SettingError, data_plate
from pyrolvm.inference.objectives import estimate, named
from pyrolvm.plates import data_rows

QUIET = {"progress": False, "engine": "eager", "num_steps": 1}
X = torch.randint(2, (20, 6), generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture(autouse=True)
def parameters_of_their_own():
    with pyro.get_param_store().scope():
        yield


def small():
    torch.manual_seed(1)
    return VAE(6, 3, hidden=(5,)).double()


def of(objective, vae, x=X):
    torch.manual_seed(3)
    found = estimate(objective, vae.model, vae.guide, (x,))
    return found, torch.autograd.grad(found.surrogate, list(vae.parameters()))


def by_hand(vae, x=X):
    """E log p(x | z) and the KL of each dimension, summed over the rows, on the noise of `of`."""
    torch.manual_seed(3)
    loc, scale = vae.encoder(x)
    z = loc + scale * torch.randn_like(loc)
    kl = 0.5 * (loc**2 + scale**2 - 1) - scale.log()
    return vae.likelihood_dist(z).log_prob(x).sum(), kl.sum(0)


def test_without_free_bits_it_is_the_elbo():
    vae = small()
    elbo, wanted = of(named("meanfield"), vae)
    found, ours = of(FreeBits(0.0), vae)
    torch.testing.assert_close(found.terms["free_bits"], elbo.bound)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("per", ["site", "dimension"])
def test_value_and_gradient_are_the_formulas(per):
    vae = small()
    log_likelihood, kl = by_hand(vae)
    groups = kl if per == "dimension" else kl.sum().reshape(1)
    bits = (groups.sort().values[len(groups) // 2].item() + 1e-6) / len(X)  # some of the groups are below
    wanted = log_likelihood - groups.clamp(min=bits * len(X)).sum()
    found, ours = of(FreeBits(bits, per), vae)
    torch.testing.assert_close(found.terms["free_bits"], wanted.detach())
    for one, other in zip(ours, torch.autograd.grad(-wanted, list(vae.parameters())), strict=True):
        torch.testing.assert_close(one, other)
    assert found.bound < found.terms["log_likelihood"]
    elbo, _ = of(named("trace"), vae)
    torch.testing.assert_close(found.bound, elbo.bound)  # what is reported stays the ELBO


@pytest.mark.parametrize("per", ["site", "dimension"])
def test_a_minibatch_weighs_n_over_b_and_the_bits_count_for_all_data(per):
    vae = small()
    log_likelihood, kl = by_hand(vae)
    groups = kl if per == "dimension" else kl.sum().reshape(1)
    wanted = 5 * log_likelihood - (5 * groups).clamp(min=0.02 * 100).sum()
    with data_rows(100, torch.arange(20)):
        found, _ = of(FreeBits(0.02, per), vae)
    torch.testing.assert_close(found.terms["free_bits"], wanted.detach())


def test_particles_are_averaged_within_the_maximum():
    vae = small()
    with torch.no_grad():
        several = estimate(FreeBits(0.1, num_particles=3), vae.model, vae.guide, (X,))
        at_once = estimate(
            FreeBits(0.1, num_particles=3, vectorize_particles=True), vae.model, vae.guide, (X,)
        )
    _, kl = by_hand(vae)
    paid = max(2.0, kl.sum().item())  # the closed form does not depend on the draw
    for found in (several, at_once):
        assert (found.terms["log_likelihood"] - found.terms["free_bits"]).item() == pytest.approx(paid)


def test_the_top_of_a_hierarchy_stays_in_use():
    """Its KL is paid from the first nat on by the ELBO; with free bits nothing is gained by leaving it unused."""
    x = (torch.randn(300, 2, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 1) > 0).float()
    kl = {}
    for bits in (0.0, 0.5):
        torch.manual_seed(0)
        model = HierarchicalVAE(8, (4, 2), hidden=(16,), free_bits=bits)
        options = QUIET | {"num_steps": 400, "learning_rate": 0.01}
        fitted = pyrolvm.fit(model, x, **options)
        kl[bits] = fitted.history["kl_z2"].tail(100).mean()
        assert fitted.settings["objective"] == ("FreeBits" if bits else "Trace_ELBO")
    assert kl[0.5] > 0.45
    assert kl[0.0] < kl[0.5] - 0.1


def correlated(x):
    loc = pyro.param("loc", torch.zeros(2))
    with data_plate(x):
        pyro.sample("z", dist.MultivariateNormal(loc.expand(len(x), 2), scale_tril=torch.eye(2)))


def plane(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def test_dimensions_that_depend_on_each_other_are_refused_and_their_site_is_not():
    x = torch.randn(20)
    with pytest.raises(SettingError, match=r"'z' is no sum over dimensions.*per='site'"):
        pyrolvm.fit(plane, x, guide=correlated, objective=FreeBits(0.1, "dimension"), **QUIET)
    row = pyrolvm.fit(plane, x, guide=correlated, objective=FreeBits(0.1), **QUIET).history.iloc[0]
    wanted = row["log_likelihood"] - max(0.1, row["kl"])
    assert row["free_bits"] == pytest.approx(wanted, rel=1e-5)


def test_what_it_cannot_be_used_for_is_refused_in_a_sentence():
    x, one, local = torch.randn(20), GlobalMean(), LocalNormal()
    options = {"objective": "free_bits", **QUIET}
    with pytest.raises(SettingError, match="none in its data plate"):
        pyrolvm.fit(one.model, x, guide=one.guide, **options)
    with pytest.raises(SettingError, match="auxiliary 'z_unconstrained'"):
        pyrolvm.fit(local.model, x, guide=AutoNormal, **options)
    with pytest.raises(SettingError, match="exclude each other"):
        pyrolvm.fit(local.model, x, guide=local.guide, kl_warmup=0.5, **options)
    sampled = GaussianMixture(2, 2, assignments="sampled", covariance="diagonal")
    with pytest.raises(SettingError, match="is not reparameterised"):
        pyrolvm.fit(sampled, torch.randn(20, 2), **options)


@pytest.mark.parametrize("settings", [{"free_bits": -1.0}, {"free_bits": float("inf")}, {"per": "layer"}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(SettingError, match=r"free_bits=|per='layer' is not known"):
        FreeBits(**settings)
