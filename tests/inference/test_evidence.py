"""log p(x) by sampling and summing: against closed forms, in standard errors, and in constant memory."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean, LocalNormal
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyrolvm
from pyrolvm import PPCA, VAE, BayesianFactorAnalysis, GaussianMixture, ProgramError, SettingError, data_plate
from pyrolvm.inference.posterior.evidence import chunks, evidence_table
from pyrolvm.inference.posterior.evidence.streams import StreamingBound

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)) @ torch.randn(
    5, 5, generator=torch.Generator().manual_seed(2)
)
QUIET = {"progress": False, "engine": "eager"}
STILL = {"num_steps": 1, "learning_rate": 1e-12, **QUIET}


def spoilt_ppca():
    """PPCA whose guide is off centre and too wide."""
    model = PPCA.closed_form(X, 2, guide="full")
    with torch.no_grad():
        model.guide_loadings.mul_(0.8)
        model.guide_log_scale.add_(0.4)
    return pyrolvm.fit(model, X, **STILL)


@pytest.fixture(scope="module")
def ppca():
    return spoilt_ppca()


def assert_agrees(table, exact, sigmas=4.5):
    """Each value within its standard errors, and their mean within its own."""
    error = table.log_evidence.to_numpy() - exact.double().numpy()
    assert (abs(error) < sigmas * table.standard_error + 2e-4).all()
    assert abs(error.mean()) < 4 * (table.standard_error**2).sum() ** 0.5 / len(table) + 2e-3


@pytest.mark.parametrize(("method", "num_samples"), [("importance", 2000), ("prior", 20_000)])
def test_estimates_agree_with_the_exact_value(ppca, method, num_samples):
    exact = ppca.log_evidence(X, "exact")
    table = evidence_table(ppca.pair(X), method, num_samples)
    assert_agrees(table, exact)
    assert list(table) == [
        "log_evidence",
        "standard_error",
        "elbo",
        "effective_sample_size",
        "k_hat",
        "acceptance",
    ]
    assert table.effective_sample_size.between(1, num_samples).all()
    assert (table.standard_error < 0.2).all()
    below = table.elbo < table.log_evidence
    assert below.all() if method == "importance" else table.elbo.isna().all()
    values = ppca.log_evidence(X, method, num_samples)
    assert torch.equal(values, torch.tensor(table.log_evidence.to_numpy()))


def test_the_exact_table_has_no_error(ppca):
    table = evidence_table(ppca.pair(X), "exact")
    assert (table.standard_error == 0).all()
    assert table.k_hat.isna().all()
    torch.testing.assert_close(
        torch.tensor(table.log_evidence.to_numpy()).float(), ppca.model.log_marginal(X)
    )


def test_standard_errors_are_those_of_repetition(ppca):
    found = torch.stack([ppca.log_evidence(X[:10], num_samples=500, seed=s) for s in range(60)])
    claimed = torch.tensor(evidence_table(ppca.pair(X[:10]), num_samples=500).standard_error.to_numpy())
    ratio = found.std(0) / claimed
    assert ((ratio > 0.6) & (ratio < 1.6)).all()


def test_fixed_loadings_and_unequal_noise():
    """Factor analysis with everything but z known: N(b, W W' + Psi)."""
    W, b = torch.randn(5, 2), torch.randn(5)
    noise = torch.tensor([0.5, 1.0, 1.5, 0.7, 0.9])

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.T + b, noise).to_event(1), obs=x)

    def guide(x):
        with data_plate(x):
            loc = (x - b) @ pyro.param("A", torch.linalg.pinv(W).T)
            pyro.sample("z", dist.Normal(loc, pyro.param("s", torch.ones(2))).to_event(1))

    fitted = pyrolvm.fit(model, X, guide=guide, **STILL)
    exact = dist.LowRankMultivariateNormal(b, W, noise**2).log_prob(X)
    assert_agrees(evidence_table(fitted.pair(X), num_samples=4000), exact)


def test_factor_analysis_at_a_posterior_that_is_nearly_a_point():
    model = BayesianFactorAnalysis(5, 2)
    model.initialise_from(X)
    with torch.no_grad():
        for parameter in (model.loadings_log_sd, model.offset_log_sd, model.noise_log_sd):
            parameter.fill_(-12.0)
    fitted = pyrolvm.fit(model, X, **STILL)
    exact = model.log_marginal_given(X, **model.posterior_mean()).detach()
    assert_agrees(evidence_table(fitted.pair(X), num_samples=300), exact)
    assert_agrees(evidence_table(fitted.pair(X), "prior", num_samples=20_000), exact)


@pytest.mark.parametrize("method", ["importance", "prior"])
def test_global_latents_are_drawn_from_the_guide(method):
    """log E_q(m)[N(x; m, 1)] = log N(x; loc, 1 + scale^2), not what the prior of m would say."""
    program, x = GlobalMean(), torch.linspace(1, 3, 20)
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, **STILL)
    pyro_scale = 0.1
    fitted.program.parameters["loc"].data.fill_(2.0)
    fitted.program.parameters["scale"].data.fill_(math.log(pyro_scale))
    exact = dist.Normal(2.0, math.sqrt(1 + pyro_scale**2)).log_prob(x)
    assert_agrees(evidence_table(fitted.pair(x), method, num_samples=4000), exact)


def test_estimates_are_below_on_average_and_rise_with_the_draws():
    program, x = LocalNormal(shift=0.7), torch.linspace(-2, 2, 300)
    fitted = pyrolvm.fit(program.model, x, guide=program.guide, **STILL)
    exact = LocalNormal.log_evidence(x).mean().item()
    for method in ("iwae", "prior"):
        levels = []
        for K in (1, 5, 50):
            values = torch.stack(
                [
                    fitted.log_evidence(
                        x, method, num_samples=K, num_particles=K if method == "iwae" else None, seed=s
                    )
                    for s in range(10)
                ]
            )
            levels.append(values.mean().item())
        assert levels == sorted(levels)
        error = values.mean(0).std().item() / math.sqrt(300)
        assert levels[-1] < exact + 3 * error


def test_iwae_groups_are_those_of_the_draws_whatever_the_chunks():
    log_weight = torch.randn(600, 3, dtype=torch.float64)
    bound = StreamingBound.empty(log_weight, 50)
    for part in log_weight.split([1, 49, 120, 7, 423]):
        bound.add(part)
    groups = log_weight.reshape(12, 50, 3).logsumexp(1) - math.log(50)
    torch.testing.assert_close(bound.value, groups.mean(0))
    torch.testing.assert_close(bound.standard_error, groups.std(0) / math.sqrt(12))


def test_iwae_table_is_of_the_bound_and_one_group_has_no_error(ppca):
    table = evidence_table(ppca.pair(X), "iwae", 1000, num_particles=5)
    better = evidence_table(ppca.pair(X), "importance", 1000)
    assert (table.log_evidence < better.log_evidence + 3 * better.standard_error).all()
    assert (table.k_hat == better.k_hat).all()
    assert evidence_table(ppca.pair(X), "iwae", 100, num_particles=100).standard_error.isna().all()


# ---------------------------------------------------------------------- sums over discrete latents


WEIGHTS, MEANS = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([-3.0, 0.0, 2.0])


def gaussian_mixture(x):
    means = pyro.param("means", MEANS.clone())
    with data_plate(x):
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(means[k], 1.0), obs=x)


def mixture_evidence(x, scale=1.0):
    return (WEIGHTS.log() + dist.Normal(MEANS, scale).log_prob(x.unsqueeze(-1))).logsumexp(-1)


def fit_enumerated(model, x, guide=lambda x: None):
    objective = TraceEnum_ELBO(max_plate_nesting=2)
    return pyrolvm.fit(model, x, guide=guide, objective=objective, **STILL)


def test_a_plain_mixture_is_summed_out():
    x = torch.linspace(-5, 5, 30)
    fitted = fit_enumerated(gaussian_mixture, x)
    for rows in (x, x[:1], x.repeat(3)):
        torch.testing.assert_close(fitted.log_evidence(rows, "exact"), mixture_evidence(rows))
    # nothing is left to sample, so that one draw says it all
    torch.testing.assert_close(fitted.log_evidence(x, "importance", 1).float(), mixture_evidence(x))
    with pytest.raises(ProgramError, match="'k' is enumerated"):
        fitted.log_evidence(x, "prior")


def test_the_suites_mixture_agrees_with_its_own_sum():
    model = GaussianMixture(5, 3)
    model.initialise_from(X)
    fitted = fit_enumerated(model, X, None)
    closed = fitted.log_evidence(X, "exact")
    torch.testing.assert_close(fitted.log_evidence(X, "importance", 1).float(), closed, atol=1e-4, rtol=1e-5)


def test_an_assignment_that_the_guide_samples_is_weighed_and_can_be_summed():
    def model(x):
        with data_plate(x):
            k = pyro.sample("k", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(MEANS[k], 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("k", dist.Categorical(logits=pyro.param("logits", torch.zeros(3))))

    x = torch.linspace(-5, 5, 30)
    fitted = pyrolvm.fit(model, x, guide=guide, **STILL)
    torch.testing.assert_close(fitted.log_evidence(x, "exact"), mixture_evidence(x))
    assert_agrees(evidence_table(fitted.pair(x), num_samples=2000), mixture_evidence(x))


def test_a_sampled_latent_beside_a_summed_one():
    """x | k, z ~ N(mu_k + z, 1), z ~ N(0, 1): a mixture of variance 2."""

    def model(x):
        with data_plate(x):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(MEANS[k] + z, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.5))

    x = torch.linspace(-5, 5, 30)
    fitted = fit_enumerated(model, x, guide)
    assert_agrees(evidence_table(fitted.pair(x), num_samples=4000), mixture_evidence(x, math.sqrt(2)))
    with pytest.raises(SettingError, match=r"model has no exact log p.*'z' has too many values"):
        fitted.log_evidence(x, "exact")


def test_sums_inside_nested_plates_and_chains():
    """Latent classes with a mixture for each item, and a hidden Markov chain per row: by hand."""
    switch, items = torch.tensor([[0.7, 0.3], [0.2, 0.8]]), torch.tensor([[0.1, 0.9], [0.6, 0.4]])

    def classes(x):
        plate, inner = data_plate(x, dim=-2), pyro.plate("items", 3, dim=-1)
        shift = pyro.param("shift", torch.tensor(0.0))
        with plate:
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])), infer={"enumerate": "parallel"})
            with inner:
                j = pyro.sample("j", dist.Categorical(items[k]), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(j + shift, 0.5), obs=x)

    def chain(x):
        shift = pyro.param("shift", torch.tensor(0.0))
        with data_plate(x, dim=-1):
            k = torch.tensor(0)
            for t in pyro.markov(range(3)):
                k = pyro.sample(f"k{t}", dist.Categorical(switch[k]), infer={"enumerate": "parallel"})
                pyro.sample(f"x{t}", dist.Normal(k + shift, 0.5), obs=x[:, t])

    x = torch.randn(7, 3)
    emission = dist.Normal(torch.tensor([0.0, 1.0]), 0.5).log_prob(x.unsqueeze(-1))  # [7, 3, 2]
    per_item = (items.log() + emission.unsqueeze(-2)).logsumexp(-1).sum(1)  # [7, 2]
    expected = (torch.tensor([0.4, 0.6]).log() + per_item).logsumexp(-1)
    torch.testing.assert_close(fit_enumerated(classes, x).log_evidence(x, "exact"), expected)

    alpha = torch.zeros(7, 1)
    for t in range(3):
        alpha = (alpha.unsqueeze(-1) + (switch if t else switch[:1]).log()).logsumexp(1) + emission[:, t]
    torch.testing.assert_close(fit_enumerated(chain, x).log_evidence(x, "exact"), alpha.logsumexp(1))


def test_point_estimates_of_global_latents_are_held_and_posteriors_refused():
    def model(x):
        means = pyro.sample("means", dist.Normal(torch.zeros(3), 5.0).to_event(1))
        with data_plate(x):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(means[..., k], 1.0), obs=x)

    def posterior(x):
        pyro.sample("means", dist.Normal(pyro.param("loc", MEANS.clone()), 0.1).to_event(1))

    x = torch.linspace(-5, 5, 10)
    points = AutoDelta(pyro.poutine.block(model, hide=["k"]), init_loc_fn=lambda site: MEANS.clone())
    fitted = fit_enumerated(model, x, points)
    torch.testing.assert_close(fitted.log_evidence(x, "exact"), mixture_evidence(x), atol=1e-4, rtol=1e-4)
    with pytest.raises(SettingError, match="'means', which has a posterior"):
        fit_enumerated(model, x, posterior).log_evidence(x, "exact")


def test_a_summed_latent_that_all_data_share_is_refused():
    def model(x):
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        shift = pyro.param("shift", torch.tensor(0.0))
        with data_plate(x):
            pyro.sample("x", dist.Normal(MEANS[k] + shift, 1.0), obs=x)

    with pytest.raises(ProgramError, match="outside the data plate is summed out"):
        fit_enumerated(model, X[:, 0]).log_evidence(X[:, 0], "exact")


# ---------------------------------------------------------------------- plates, chunks, memory


def test_a_datum_of_several_cells_is_one_datum():
    """Each row has three independent cells under a plate of their own: log p(x_n) is their sum."""

    def model(x):
        with data_plate(x, dim=-1), pyro.plate("cells", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        with data_plate(x, dim=-1), pyro.plate("cells", 3, dim=-2):
            pyro.sample("z", dist.Normal(x.T / 2, pyro.param("scale", torch.tensor(0.8))))

    x = torch.randn(20, 3)
    fitted = pyrolvm.fit(model, x, guide=guide, **STILL)
    exact = LocalNormal.log_evidence(x).sum(1)
    assert_agrees(evidence_table(fitted.pair(x), num_samples=4000), exact)


class Image(nn.Module):
    """A network that knows one batch dimension only."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.calls = 0

    def forward(self, z):
        self.calls += 1
        return self.conv(z.reshape(len(z), 1, 2, 2)).reshape(len(z), 4)


def test_programs_that_know_no_further_plate_take_many_draws_at_once_as_rows():
    net = Image()

    def model(x):
        pyro.module("net", net)
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(0.2 * x, pyro.param("scale", torch.ones(4))).to_event(1))

    x = X[:, :4]
    fitted = pyrolvm.fit(model, x, guide=guide, **STILL)
    assert not fitted.vectorized
    with torch.no_grad():
        W = torch.stack([net(e.unsqueeze(0))[0] - net(torch.zeros(1, 4))[0] for e in torch.eye(4)], 1)
        b = net(torch.zeros(1, 4))[0]
    exact = dist.MultivariateNormal(b, W @ W.T + torch.eye(4)).log_prob(x)
    net.calls = 0
    assert_agrees(evidence_table(fitted.pair(x), num_samples=4000), exact)
    assert net.calls < 10


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("budget", [2**16, 2**18])
def test_memory_is_bounded_by_the_budget_whatever_the_draws_and_rows(monkeypatch, budget):
    x = (torch.rand(60, 100) > 0.5).float()
    fitted = pyrolvm.fit(VAE(100, 3, hidden=(20,)), x, num_steps=1, **QUIET)
    assert fitted.vectorized
    monkeypatch.setattr(chunks, "BUDGET", budget)
    largest = []
    for rows, draws in ((20, 1000), (60, 1000), (20, 5000)):
        with LargestTensor() as spy:
            fitted.log_evidence(x[:rows], num_samples=draws)
        largest.append(spy.numel)
    assert max(largest) <= budget


def test_a_large_global_latent_is_drawn_for_many_rows_at_once_within_the_budget(monkeypatch):
    x = torch.randn(400, 30)
    model = BayesianFactorAnalysis(30, 5)
    model.initialise_from(x)
    fitted = pyrolvm.fit(model, x, **STILL)
    assert fitted.vectorized
    monkeypatch.setattr(chunks, "BUDGET", 2**15)
    rows, _ = chunks.chunk_sizes(fitted.pair(x), 400, 1000)
    assert rows > 1
    with LargestTensor() as spy:
        fitted.log_evidence(x[:20], num_samples=1000)
    assert spy.numel <= 2**15


def test_the_same_seed_gives_the_same_values_and_leaves_the_generators(ppca):
    before = torch.get_rng_state()
    first = ppca.log_evidence(X, num_samples=20, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(ppca.log_evidence(X, num_samples=20, seed=3), first)
    assert not torch.equal(ppca.log_evidence(X, num_samples=20, seed=4), first)


def test_a_minibatch_fit_has_the_evidence_of_the_whole(ppca):
    fitted = pyrolvm.fit(ppca.model, X, batch_size=8, **STILL)
    exact = fitted.log_evidence(X, "exact")
    assert_agrees(evidence_table(fitted.pair(X[:7]), num_samples=2000), exact[:7])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "choose from exact, importance, iwae, prior, ais"),
        ({"num_samples": 2.5}, "whole number"),
        ({"num_samples": 0}, "positive whole number"),
        ({"method": "iwae", "num_samples": 10, "num_particles": 3}, "multiple of num_particles"),
        ({"num_steps": 10}, "num_steps is for method='ais' only"),
        ({"method": "ais", "start": "posterior"}, "start='posterior' is not known: choose from prior, guide"),
        ({"method": "ais", "schedule": "cubic"}, "choose from sigmoid, geometric, linear"),
        ({"method": "ais", "num_steps": 0}, "num_steps must be a positive whole number"),
    ],
)
def test_settings_that_cannot_be_are_refused(ppca, options, message):
    with pytest.raises(SettingError, match=message):
        ppca.log_evidence(X, **options)
