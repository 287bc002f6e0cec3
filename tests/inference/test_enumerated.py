"""Latents that the model sums out: drawn from their exact posterior, and out of the likelihood."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrolvm
from pyrolvm import GaussianMixture, ProgramError, data_plate
from pyrolvm.diagnostics import to_inference_data

STILL = {"progress": False, "engine": "eager", "num_steps": 1, "learning_rate": 1e-12}
X = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))


def dims(idata, group, name):
    return idata[group][name].dims


@pytest.fixture(scope="module")
def mixture():
    model = GaussianMixture(5, 3, prior="conjugate")
    model.initialise_from(X)
    return pyrolvm.fit(model, X, **STILL)


def test_summed_out_assignments_are_drawn_from_their_posterior(mixture):
    idata = to_inference_data(mixture, X, num_samples=2000, groups=["posterior"])
    z = idata["posterior"]["z"].values[0]
    expected = mixture.model.responsibilities(X).detach().numpy()
    frequencies = np.stack([(z == k).mean(0) for k in range(3)], -1)
    np.testing.assert_allclose(frequencies, expected, atol=4.5 * 0.5 / math.sqrt(2000))
    assert dims(idata, "posterior", "z") == ("chain", "draw", "data")
    assert dims(idata, "posterior", "means") == ("chain", "draw", "means_dim_0", "means_dim_1")
    assert dims(idata, "posterior", "scale")[-2:] == ("scale_dim_1", "scale_dim_2")


def test_summed_out_assignments_leave_the_marginal_likelihood(mixture, monkeypatch):
    import pyrolvm.inference.program.pair as module

    monkeypatch.setattr(module, "BUDGET", 5 * 4 * 3 * 7)  # chunks of seven rows
    idata = to_inference_data(mixture, X, num_samples=4)
    log_p = np.broadcast_to(mixture.model.log_marginal(X).detach().numpy(), (4, 30))
    np.testing.assert_allclose(idata["log_likelihood"]["x"].values[0], log_p, atol=1e-4)
    np.testing.assert_allclose(idata["sample_stats"]["log_p_row"].values[0], log_p, atol=1e-4)
    means = idata["posterior"]["means"].values[0]
    np.testing.assert_allclose(means, np.broadcast_to(mixture.model.means.detach(), (4, 3, 5)), rtol=1e-5)
    # predictions go on from the assignment drawn, so that they are near its mean
    z, x = idata["posterior"]["z"].values[0], idata["posterior_predictive"]["x"].values[0]
    deviation = mixture.model.scale_tril.detach().norm(dim=-1).numpy()
    assert (np.abs(x - means[0][z]) / deviation[z]).mean() < 1.2


def test_several_summed_out_latents_and_an_inner_plate():
    """x_n1, x_n2 ~ N(k_n + 3 j_n, 1) with k_n, j_n enumerated by hand; s_n does not depend on them."""

    def model(x, s):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with data_plate(x, dim=-2):
            k = pyro.sample(
                "k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), infer={"enumerate": "parallel"}
            )
            j = pyro.sample("j", dist.Bernoulli(0.3 + 0.1 * k), infer={"enumerate": "parallel"})
            pyro.sample("s", dist.Normal(shift, 1.0), obs=s)
            with pyro.plate("item", 2, dim=-1):
                pyro.sample("x", dist.Normal(k + 3 * j, 1.0), obs=x)

    def guide(x, s):
        pyro.sample("shift", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 0.1))

    x, s = 2 * X[:6, :2], X[:6, :1]
    fitted = pyrolvm.fit(model, (x, s), guide=guide, **STILL)
    idata = to_inference_data(fitted, (x, s), num_samples=3000)
    states = [(k, j) for k in range(3) for j in range(2)]
    prior = torch.tensor([[0.2, 0.3, 0.5][k] * (0.3 + 0.1 * k if j else 0.7 - 0.1 * k) for k, j in states])
    means = torch.tensor([k + 3.0 * j for k, j in states])
    joint = prior.log() + dist.Normal(means, 1.0).log_prob(x.unsqueeze(-1)).sum(1)  # [rows, states]
    likelihood = idata["log_likelihood"]["x"]
    assert likelihood.dims == ("chain", "draw", "data")
    np.testing.assert_allclose(likelihood.values[0, 0], joint.logsumexp(-1), rtol=1e-4)
    posterior = idata["posterior"]
    code = posterior["k"].values[0] * 2 + posterior["j"].values[0]
    frequencies = np.stack([(code == i).mean(0) for i in range(6)], -1)
    np.testing.assert_allclose(frequencies, joint.softmax(-1), atol=4.5 * 0.5 / math.sqrt(3000))
    shift = torch.from_numpy(posterior["shift"].values[0])
    of_s = dist.Normal(shift.unsqueeze(-1), 1.0).log_prob(s[:, 0])
    np.testing.assert_allclose(idata["log_likelihood"]["s"].values[0], of_s, rtol=1e-4, atol=1e-5)
    rows = idata["sample_stats"]["log_p_row"].values[0]
    np.testing.assert_allclose(rows, joint.logsumexp(-1) + of_s, rtol=1e-4)
    assert dims(idata, "posterior_predictive", "x") == ("chain", "draw", "data", "item")


def test_a_latent_summed_out_for_all_data_at_once_is_refused():
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, pyro.param("scale", torch.tensor(1.0))))

    fitted = pyrolvm.fit(model, X[:, 0], guide=guide, **STILL)
    with pytest.raises(ProgramError, match="'k', which is summed out"):
        to_inference_data(fitted, X[:, 0], num_samples=2)


def test_a_mixture_is_drawn_at_once(mixture):
    assert mixture.vectorized
    draws = mixture.draws(X, 5, prior=True)
    assert draws.values["z"].shape == (5, 30)
    assert draws.predictive["x"].shape == (5, 30, 5)


def test_a_mixture_that_is_indexed_plainly_is_drawn_one_by_one():
    """`locs[z]` knows no dimension of draws; the assignments are still those of the exact posterior."""
    x, locs, scales = (
        torch.tensor([-2.0, -0.3, 0.4, 2.5]),
        torch.tensor([-1.0, 1.0]),
        torch.tensor([0.8, 1.2]),
    )

    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            centres = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(centres[z], scales[z]), obs=x)

    def guide(x):
        share = pyro.param("share", torch.tensor([0.3, 0.7]), constraint=dist.constraints.simplex)
        pyro.sample("weights", dist.Delta(share, event_dim=1))
        with pyro.plate("components", 2):
            pyro.sample("locs", dist.Delta(pyro.param("locs_at", locs)))

    fitted = pyrolvm.fit(model, x, guide=guide, **STILL)
    assert not fitted.vectorized
    draws = fitted.draws(x, 2000)
    joint = dist.Normal(locs, scales).log_prob(x[:, None]) + torch.tensor([0.3, 0.7]).log()
    exact = joint.softmax(-1)[:, 1]
    error = (draws.values["z"].float().mean(0) - exact).abs()
    assert (error < 4.5 * (exact * (1 - exact) / 2000).sqrt()).all()
    torch.testing.assert_close(draws.log_likelihood[7], joint.logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_a_scale_around_all_that_has_states_stands_outside_of_their_sum():
    """Beside a site without states that has another scale."""
    x = X[:, 0]

    def model(x):
        far = pyro.param("far", torch.tensor(2.0))
        with data_plate(x):
            pyro.sample("w", dist.Normal(0.0, 1.0), obs=x)
            with pyro.poutine.scale(scale=0.5):
                k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(far * k, 1.0), obs=x)

    fitted = pyrolvm.fit(model, x, guide=lambda x: None, objective="enum", **STILL)
    joint = torch.stack(
        [math.log(p) + dist.Normal(m, 1.0).log_prob(x) for p, m in ((0.7, 0.0), (0.3, 2.0))], -1
    )
    torch.testing.assert_close(fitted.encode(x), joint.softmax(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [2.0, 1 / 30])
def test_a_scale_around_the_program_stands_outside_of_the_sum(scale):
    """As in Pyro's own bound, scale x log sum_k p(x, k): evidence, probabilities and draws are those without it."""
    x = X[:, 0]

    def model(x):
        far = pyro.param("far", torch.tensor(2.0))
        with data_plate(x), pyro.poutine.scale(scale=scale):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(far * k, 1.0), obs=x)

    fitted = pyrolvm.fit(model, x, guide=lambda x: None, objective="enum", **STILL)
    joint = torch.stack(
        [math.log(p) + dist.Normal(m, 1.0).log_prob(x) for p, m in ((0.7, 0.0), (0.3, 2.0))], -1
    )
    exact = joint.logsumexp(-1)
    assert fitted.elbo == pytest.approx(scale * exact.mean().item(), rel=1e-5)
    for method in ("exact", "importance"):
        found = fitted.log_evidence(x, method, 2 if method == "importance" else None, progress=False)
        torch.testing.assert_close(found.float(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fitted.encode(x), joint.softmax(-1), atol=1e-5, rtol=1e-4)
    draws = fitted.draws(x, 2000)
    torch.testing.assert_close(draws.log_weight, exact.expand(2000, -1), atol=1e-5, rtol=1e-5)
    share = joint.softmax(-1)[:, 1]
    error = (draws.values["k"].float().mean(0) - share).abs()
    assert (error < 4.5 * (share * (1 - share) / 2000).sqrt()).all()
