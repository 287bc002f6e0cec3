import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.distributions import MultivariateNormal

from pyrolvm.errors import SettingError
from pyrolvm.models.networks import SCALE_FLOOR
from pyrolvm.models.power_vae import PowerVAE, tempered_log_marginal, tempered_posterior
from pyrolvm.models.ppca import PPCA
from pyrolvm.models.vae import VAE
from pyrolvm.plates import data_rows


def bound(vae, x, seed=3):
    """One-sample ELBO in nats per datum, on the noise of `seed`, with its gradients."""
    torch.manual_seed(seed)
    vae.zero_grad()
    loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x) / len(x)
    loss.backward()
    return -loss.detach(), [p.grad for p in vae.parameters()]


def terms(vae, x, seed=3):
    """E log p(x | z) and KL, in nats per datum, on the same noise as `bound`."""
    torch.manual_seed(seed)
    q = vae.posterior_dist(x)
    z = q.rsample()
    kl = q.log_prob(z) - vae.prior().log_prob(z)
    return vae.likelihood_dist(z).log_prob(x).mean(), kl.mean()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("eta", [0.1, 1.0, 2.5])
def test_bound_is_eta_times_the_beta_objective_at_one_over_eta(likelihood, eta):
    vae = PowerVAE(6, 2, eta=eta, likelihood=likelihood, hidden=(5,)).double()
    x = torch.randint(2, (10, 6)).double()
    L_eta, gradients = bound(vae, x)
    log_likelihood, kl = terms(vae, x)
    L_beta = log_likelihood - kl / eta
    torch.testing.assert_close(L_eta, eta * L_beta.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(L_eta, (eta * log_likelihood - kl).detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(vae.beta_objective(L_eta), L_beta.detach(), rtol=1e-13, atol=0)
    for ours, theirs in zip(gradients, torch.autograd.grad(L_beta, list(vae.parameters())), strict=True):
        torch.testing.assert_close(-ours, eta * theirs, rtol=1e-11, atol=1e-12)


def test_eta_of_one_is_the_vae_exactly():
    power, vae = PowerVAE(6, 2, eta=1, hidden=(5,)), VAE(6, 2, hidden=(5,))
    vae.load_state_dict(power.state_dict())
    x = torch.randint(2, (10, 6)).float()
    (ours, our_gradients), (theirs, their_gradients) = bound(power, x), bound(vae, x)
    assert ours == theirs
    assert all(torch.equal(a, b) for a, b in zip(our_gradients, their_gradients, strict=True))


def test_beta_is_another_word_for_one_over_eta():
    power, beta = PowerVAE(6, 2, eta=0.25, hidden=(5,)), PowerVAE(6, 2, beta=4, hidden=(5,))
    beta.load_state_dict(power.state_dict())
    x = torch.randint(2, (10, 6)).float()
    assert (beta.eta, beta.beta, power.beta) == (0.25, 4.0, 4.0)
    assert bound(power, x)[0] == bound(beta, x)[0]
    assert PowerVAE(**beta.constructor).eta == 0.25


def linear_pair(eta, data_dim=5, latent_dim=2):
    """A PPCA and the PowerVAE with the same joint."""
    ppca = PPCA(data_dim, latent_dim).double()
    vae = PowerVAE(data_dim, latent_dim, eta=eta, likelihood="gaussian", decoder="linear").double()
    with torch.no_grad():
        ppca.loadings.normal_()
        ppca.log_noise_scale.fill_(-0.4)
        (decoder,) = vae.decoder.layers
        decoder.weight.copy_(ppca.loadings)
        decoder.bias.copy_(ppca.offset)
        vae.likelihood.log_noise_scale.copy_((ppca.noise_scale - SCALE_FLOOR).log())
    return ppca, vae


@pytest.mark.parametrize("eta", [0.2, 1.0, 3.0])
def test_program_over_the_tempered_posterior_is_the_tempered_evidence_without_variance(eta):
    ppca, vae = linear_pair(eta)
    x = torch.randn(7, 5).double()
    mean, scale_tril = tempered_posterior(ppca, x, eta)

    def exact_guide(x):
        with vae.data_plate(x):
            pyro.sample("z", pyro.distributions.MultivariateNormal(mean, scale_tril=scale_tril))

    evidence = tempered_log_marginal(ppca, x, eta)
    for _ in range(3):
        guide = poutine.trace(exact_guide).get_trace(x)
        model = poutine.trace(poutine.replay(vae.model, guide)).get_trace(x)
        for trace in (model, guide):
            trace.compute_log_prob()
        weights = model.nodes["z"]["log_prob"] + model.nodes["x"]["log_prob"] - guide.nodes["z"]["log_prob"]
        torch.testing.assert_close(weights, evidence, rtol=0, atol=1e-9)


@pytest.mark.parametrize("eta", [0.2, 3.0])
def test_tempered_evidence_equals_quadrature(eta):
    ppca, _ = linear_pair(eta, data_dim=3, latent_dim=1)
    x = torch.randn(4, 3).double()
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.double)  # [points]
    z = grid[:, None, None]
    log_integrand = eta * ppca.likelihood_dist(z).log_prob(x) + ppca.prior().log_prob(z)  # [points, batch]
    integral = torch.trapezoid(log_integrand.exp(), grid, dim=0).log()
    torch.testing.assert_close(tempered_log_marginal(ppca, x, eta), integral, rtol=0, atol=1e-9)
    mean, scale_tril = tempered_posterior(ppca, x, eta)
    weights = torch.softmax(log_integrand, 0)
    torch.testing.assert_close((weights * grid[:, None]).sum(0), mean[:, 0])
    spread = (weights * (grid[:, None] - mean[:, 0]) ** 2).sum(0)
    torch.testing.assert_close(spread, scale_tril.square()[0].expand(4))


def test_power_of_one_is_the_plain_evidence_and_posterior():
    ppca, _ = linear_pair(1.0)
    x = torch.randn(7, 5).double()
    torch.testing.assert_close(tempered_log_marginal(ppca, x, 1.0), ppca.log_marginal(x))
    for ours, theirs in zip(tempered_posterior(ppca, x, 1.0), ppca.exact_posterior(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bound_lies_below_the_tempered_evidence():
    ppca, vae = linear_pair(0.3)
    x = torch.randn(7, 5).double()
    bounds = torch.stack([bound(vae, x, seed)[0] for seed in range(200)])
    error = bounds.std() / math.sqrt(len(bounds))
    assert bounds.mean() + 3 * error < tempered_log_marginal(ppca, x, 0.3).mean()


def test_minibatch_scale_multiplies_the_power():
    vae = PowerVAE(6, 2, eta=0.5, hidden=(5,)).double()
    x = torch.randint(2, (10, 6)).double()
    alone, _ = bound(vae, x)
    with data_rows(40, torch.arange(10)):
        scaled, _ = bound(vae, x)
    torch.testing.assert_close(scaled, 4 * alone)


def test_generates_from_the_untempered_likelihood():
    vae = PowerVAE(4, 2, eta=0.1, likelihood="gaussian", noise_scale=0.5, decoder="linear")
    n = 20_000
    with data_rows(n, torch.arange(n)), torch.no_grad():
        x = vae.model(None)
    (decoder,) = vae.decoder.layers
    covariance = decoder.weight @ decoder.weight.T + 0.25 * torch.eye(4)
    exact = MultivariateNormal(decoder.bias.detach(), covariance.detach())
    spread = (x - exact.loc).square()
    assert ((spread.mean(0) - exact.variance).abs() < 4.5 * spread.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize(
    ("power", "said"),
    [
        ({}, "exactly one"),
        ({"eta": 1.0, "beta": 1.0}, "exactly one"),
        ({"eta": 0.0}, "eta=0.0 must be a positive"),
        ({"beta": -2.0}, "beta=-2.0 must be a positive"),
        ({"beta": math.inf}, "beta=inf"),
        ({"eta": math.nan}, "eta=nan"),
    ],
)
def test_impossible_powers_are_refused(power, said):
    with pytest.raises(SettingError, match=said):
        PowerVAE(4, 2, **power)
