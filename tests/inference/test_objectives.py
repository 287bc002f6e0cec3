"""Objectives against closed forms: values, gradients, scales."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import GlobalMean, LocalNormal
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyrolvm
from pyrolvm import SettingError, data_plate
from pyrolvm.inference.objectives import estimate
from pyrolvm.plates import data_rows

X = torch.linspace(-2.0, 2.5, 60)
EXACT = LocalNormal.log_evidence(X).mean().item()


def bounds(objective, program, x, *, total, indices, repeats, scale=1.0):
    """Estimates of the bound per datum of the whole data, [repeats]."""
    found = []
    with pyro.get_param_store().scope(), data_rows(total, indices), pyro.validation_enabled(True):
        for _ in range(repeats):
            with pyro.poutine.scale(scale=scale):
                found.append(
                    estimate(objective, program.model, program.guide, (x,)).bound.item() / total / scale
                )
    return torch.tensor(found, dtype=torch.float64)


def standard_error(values):
    return values.std().item() / math.sqrt(len(values))


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("plate", ["full", "subsampled", "scaled", "plain"])
def test_importance_weighted_bounds_rise_to_the_evidence_whatever_the_scale(plate, vectorize):
    """L_1 <= L_5 <= L_50 <= exact; subsampling and scaling change the noise, not the expectation."""
    rows = torch.arange(len(X)) if plate != "subsampled" else torch.arange(0, len(X), 10)
    x = X[rows]
    exact = LocalNormal.log_evidence(x).mean().item()
    program = LocalNormal(plate=(lambda x: pyro.plate("data", len(x))) if plate == "plain" else data_plate)
    total = len(X) if plate == "subsampled" else len(x)
    levels, errors = [], []
    for particles, repeats in ((1, 300), (5, 100), (50, 40)):
        objective = RenyiELBO(
            alpha=0, num_particles=particles, vectorize_particles=vectorize, max_plate_nesting=1
        )
        if not vectorize:
            repeats //= 4
        scale = 0.1 if plate == "scaled" else 1.0
        values = bounds(objective, program, x, total=total, indices=rows, repeats=repeats, scale=scale)
        levels.append(values.mean().item())
        errors.append(standard_error(values))
    # two standard errors of the difference: the true steps are 0.2, 0.05 and 0.006 nats
    assert levels[0] < levels[1] - 2 * math.hypot(errors[0], errors[1])
    assert levels[1] < levels[2] + 2 * math.hypot(errors[1], errors[2])
    assert levels[2] < exact + 3 * errors[2]
    assert levels[2] > exact - 0.05


def test_the_importance_weighted_bound_has_its_exact_value():
    """L_K of a guide that is N(x/2, 1) by quadrature over one datum, K = 2."""
    program, x = LocalNormal(shift=0.0), torch.tensor([0.7])
    grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
    q = dist.Normal(0.35, 1.0).log_prob(grid)
    log_w = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid, 1.0).log_prob(torch.tensor(0.7)) - q
    pair = torch.logaddexp(log_w[:, None], log_w[None, :]) - math.log(2)
    step = (grid[1] - grid[0]).item()
    exact = (pair * (q[:, None] + q[None, :]).exp()).sum().item() * step**2
    objective = RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    x = x.expand(4000)
    values = bounds(objective, program, x, total=4000, indices=torch.arange(4000), repeats=10)
    assert abs(values.mean().item() - exact) < 4 * standard_error(values)


@pytest.mark.parametrize(("alpha", "order"), [(0.5, -1), (-1.0, 1)])
def test_renyi_bounds_are_ordered_in_alpha(alpha, order):
    """L_alpha falls with alpha (Li & Turner 2016, theorem 1): at the same draws, by Jensen."""
    log_weight = torch.randn(50, 20, generator=torch.Generator().manual_seed(1))
    from pyrolvm.inference.objectives.renyi import renyi_bound

    difference = renyi_bound(log_weight, alpha) - renyi_bound(log_weight, 0.0)
    assert ((difference * order) > 0).all()
    near_one = renyi_bound(log_weight.double(), 1 - 1e-6)
    torch.testing.assert_close(near_one, renyi_bound(log_weight.double(), 1.0), rtol=0, atol=1e-5)


def gradient(objective, program, x, repeats, name):
    """The mean gradient of the surrogate in a parameter, and its standard error."""
    found = []
    rows = torch.arange(len(x))
    with pyro.get_param_store().scope(), data_rows(len(x), rows):
        for _ in range(repeats):
            surrogate = estimate(objective, program.model, program.guide, (x,)).surrogate
            parameter = pyro.get_param_store()._params[name]
            found.append(torch.autograd.grad(surrogate, parameter)[0].item() / len(x))
    values = torch.tensor(found, dtype=torch.float64)
    return values.mean().item(), standard_error(values)


@pytest.mark.parametrize("objective", [Trace_ELBO(), TraceGraph_ELBO(), TraceMeanField_ELBO()])
def test_elbo_gradients_are_the_closed_forms(objective):
    """ELBO(s, o) per datum has d/ds = -2 s - o, d/do = x/2 - s - o at guide N(x/2 + s, 1), offset o = 0."""
    program = LocalNormal(shift=0.3)
    for name, exact in (("shift", 2 * 0.3), ("offset", -(X.mean().item() / 2 - 0.3))):
        value, error = gradient(objective, program, X, 300, name)
        assert abs(value - exact) < 4 * error + 1e-6


@pytest.mark.parametrize("objective", [Trace_ELBO(), TraceGraph_ELBO(), TraceEnum_ELBO()])
def test_score_function_gradients_are_the_enumerated_ones(objective):
    """Bernoulli latent: the exact gradient in the guide's logit by summing over both values."""

    class Coin:
        def model(self, x):
            with data_plate(x):
                z = pyro.sample("z", dist.Bernoulli(0.3))
                pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

        def guide(self, x):
            logit = pyro.param("logit", torch.tensor(0.4))
            enumerate_it = isinstance(objective, TraceEnum_ELBO)
            with data_plate(x):
                pyro.sample(
                    "z",
                    dist.Bernoulli(logits=logit),
                    infer={"enumerate": "parallel"} if enumerate_it else {},
                )

    x, logit = X[:10], torch.tensor(0.4, requires_grad=True)
    q = torch.sigmoid(logit)
    elbo = 0.0
    for value, weight in ((0.0, 1 - q), (1.0, q)):
        log_p = dist.Bernoulli(0.3).log_prob(torch.tensor(value)) + dist.Normal(2 * value, 1.0).log_prob(x)
        elbo = elbo + (weight * (log_p - weight.log())).mean()
    exact = -torch.autograd.grad(elbo, logit)[0].item()
    objective.max_plate_nesting = 1
    repeats = 2 if isinstance(objective, TraceEnum_ELBO) else 600
    value, error = gradient(objective, Coin(), x, repeats, "logit")
    assert abs(value - exact) < 4 * error + 1e-6


def test_renyi_gradient_with_a_score_function_is_unbiased():
    """d/dlogit E[L_2] by enumerating both draws of a Bernoulli latent."""

    class Coin:
        def model(self, x):
            with data_plate(x):
                z = pyro.sample("z", dist.Bernoulli(0.3))
                pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

        def guide(self, x):
            with data_plate(x):
                pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.4))))

    x, logit = torch.tensor([0.5, 1.5]), torch.tensor(0.4, requires_grad=True)
    q = torch.sigmoid(logit)
    weights = [(1 - q), q]
    log_w = [
        dist.Bernoulli(0.3).log_prob(torch.tensor(v)) + dist.Normal(2 * v, 1.0).log_prob(x) - w.log()
        for v, w in zip((0.0, 1.0), weights, strict=True)
    ]
    bound = sum(
        weights[i] * weights[j] * (torch.logaddexp(log_w[i], log_w[j]) - math.log(2))
        for i in range(2)
        for j in range(2)
    ).mean()
    exact = -torch.autograd.grad(bound, logit)[0].item()
    objective = RenyiELBO(alpha=0, num_particles=2, vectorize_particles=True, max_plate_nesting=2)
    value, error = gradient(objective, Coin(), x, 1500, "logit")
    assert abs(value - exact) < 4 * error


def test_terms_add_up_and_the_mean_field_kl_is_exact():
    """bound = log-likelihood - KL, and KL(N(x/2 + 0.3, 1) || N(0, 1)) = (x/2 + 0.3)^2 / 2."""
    program, rows = LocalNormal(), torch.arange(len(X))
    for objective in (Trace_ELBO(num_particles=3), TraceMeanField_ELBO()):
        with pyro.get_param_store().scope(), data_rows(len(X), rows):
            result = estimate(objective, program.model, program.guide, (X,))
        torch.testing.assert_close(result.bound, result.terms["log_likelihood"] - result.terms["kl"])
    torch.testing.assert_close(result.terms["kl"], ((X / 2 + 0.3) ** 2 / 2).sum())


def test_minibatch_bounds_are_unbiased_for_the_full_one_with_a_global_latent():
    """The mean over all minibatches of a partition equals the full bound at the same draw of the latent."""
    program = GlobalMean()
    objective = Trace_ELBO()

    def bound(rows):
        torch.manual_seed(3)
        with data_rows(len(X), rows):
            return estimate(objective, program.model, program.guide, (X[rows],)).bound

    with pyro.get_param_store().scope():
        parts = [bound(rows) for rows in torch.randperm(len(X)).split(10)]
        torch.testing.assert_close(torch.stack(parts).mean(), bound(torch.arange(len(X))))


def test_a_subsampled_plate_with_a_global_latent_is_refused_by_renyi():
    with pytest.raises(SettingError, match="'m' is outside the subsampled plate 'data'"):
        pyrolvm.fit(
            GlobalMean().model, X, guide=GlobalMean().guide, objective=RenyiELBO(alpha=0, num_particles=3),
            batch_size=10, num_steps=2, progress=False,
        )  # fmt: skip


def test_ours_runs_under_pyros_svi_and_reports_the_same_bound():
    program = LocalNormal(plate=lambda x: pyro.plate("data", len(x)))
    objective = pyrolvm.RenyiELBO(alpha=0, num_particles=4)
    svi = pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.02}), objective)
    with pyro.get_param_store().scope():
        first = sum(svi.step(X) for _ in range(20)) / 20
        for _ in range(150):
            svi.step(X)
        last = sum(svi.step(X) for _ in range(20)) / 20
        assert last < first
        assert -last / len(X) == pytest.approx(LocalNormal.log_evidence(X).mean().item(), abs=0.1)


def test_a_site_to_be_summed_out_needs_the_objective_that_does_it():
    mixture = pyrolvm.GaussianMixture(1, 2)
    for objective in (Trace_ELBO(), TraceMeanField_ELBO(), RenyiELBO(alpha=0, num_particles=2)):
        with pytest.raises(SettingError, match=r"'z' to be summed out.*use TraceEnum_ELBO"):
            pyrolvm.fit(mixture, X.unsqueeze(-1), objective=objective, num_steps=1, progress=False)


def test_an_objective_of_another_kind_is_refused():
    with pytest.raises(SettingError, match="must be a Pyro ELBO object"):
        pyrolvm.fit(LocalNormal().model, X, guide=LocalNormal().guide, objective=3.0, num_steps=2)
    with pytest.raises(SettingError, match="pass Trace_ELBO"):
        pyrolvm.fit(LocalNormal().model, X, guide=LocalNormal().guide, objective=Trace_ELBO, num_steps=2)
