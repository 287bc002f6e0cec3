"""Latents that the guide leaves to the prior, draws through auxiliary sites, and guides that are points."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyrolvm
from pyrolvm import ProgramError, SettingError, data_plate
from pyrolvm.data import Batch
from pyrolvm.inference.objectives import as_objective, estimate
from pyrolvm.inference.program.checks import inspect_program
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import Program
from pyrolvm.plates import data_rows

X = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 1.5
QUIET = {"progress": False, "engine": "eager"}


class LeftToPrior:
    """z, b ~ N(0, 1), N(0, s); x ~ N(z + b, 1): q(z) = N(loc, scale) and b is left to its prior.

    Given z, x ~ N(z, 1 + s^2), and with one draw of b the bound is E_q E_p(b) log N(x; z + b, 1) - KL(q(z) || p(z)).
    """

    def __init__(self, s: float, learn: bool = False) -> None:
        self.s, self.learn = s, learn

    def model(self, x):
        s = self.s
        if self.learn:
            s = pyro.param("s", torch.tensor(self.s), constraint=dist.constraints.positive)
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, s), infer={"left_to_prior": True})
            pyro.sample("x", dist.Normal(z + b, 1.0), obs=x)

    def guide(self, x):
        slope = pyro.param("slope", torch.tensor(0.4))
        with data_plate(x):
            pyro.sample("z", dist.Normal(slope * x, 0.6))

    def bound(self, slope=0.4):
        loc, var = slope * X, 0.36
        likelihood = dist.Normal(0.0, 1.0).log_prob(X - loc) - (var + self.s**2) / 2
        kl = (var + loc**2 - 1 - math.log(var)) / 2
        return (likelihood - kl).mean().item()

    def log_evidence(self):
        return dist.Normal(0.0, math.sqrt(2 + self.s**2)).log_prob(X)


@pytest.mark.parametrize("s", [0.1, 1.0])
@pytest.mark.parametrize("objective", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
def test_a_latent_left_to_the_prior_costs_nothing(s, objective):
    program = LeftToPrior(s)
    options = {"num_steps": 400, "learning_rate": 1e-12, "objective": objective()}
    fitted = pyrolvm.fit(program.model, X, guide=program.guide, **options, **QUIET)
    elbo = fitted.history["elbo"]
    assert abs(elbo.mean() - program.bound()) < 4 * elbo.std() / math.sqrt(len(elbo))


@pytest.mark.parametrize("s", [0.1, 1.0])
def test_its_evidence_is_exact(s):
    program = LeftToPrior(s)
    fitted = pyrolvm.fit(program.model, X, guide=program.guide, num_steps=1, **QUIET)
    exact = program.log_evidence().double()
    for method in ("importance", "prior"):
        estimate = fitted.log_evidence(X, method, 4000).double()
        error = (estimate - exact).std() / math.sqrt(len(X))
        assert abs((estimate - exact).mean()) < 4 * error
        assert (estimate - exact).abs().max() < 0.6
    draws = fitted.posterior(X, 500)
    assert draws["b"].shape == (500, 200)
    assert abs(draws["b"].std().item() - s) < 4 * s / math.sqrt(2 * 500 * 200)


def test_a_learned_scale_of_it_does_not_collapse():
    """E_p(b) log N(x; z + b, 1) has -s^2 / 2, so the optimum is s = 0 at a finite bound: no pull beyond that."""
    program = LeftToPrior(1.0, learn=True)
    fitted = pyrolvm.fit(program.model, X, guide=program.guide, num_steps=600, learning_rate=0.01, **QUIET)
    assert fitted.elbo < program.log_evidence().mean().item() + 1.5
    noise_free = LeftToPrior(0.0)
    slope = fitted.program.parameters["slope"].item()
    assert fitted.elbo < noise_free.bound(slope) + 0.05


def test_it_is_left_to_the_prior_after_loading_too(tmp_path):
    program = LeftToPrior(1.0)
    fitted = pyrolvm.fit(program.model, X, guide=program.guide, num_steps=1, **QUIET)
    again = pyrolvm.load(fitted.save(tmp_path / "run"), model=program.model, guide=program.guide)
    torch.testing.assert_close(again.log_evidence(X, num_samples=50), fitted.log_evidence(X, num_samples=50))


# ---------------------------------------------------------------- auxiliary draws


def local(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_mixture_over_an_auxiliary_draw_is_no_bound_and_refused():
    def guide(x):
        width = pyro.param("width", torch.tensor(0.5))
        with data_plate(x):
            psi = pyro.sample("psi", dist.Normal(x / 2, 0.5), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(psi, width))

    with pytest.raises(ProgramError, match=r"'psi'.*no bound"):
        pyrolvm.fit(local, X, guide=guide, num_steps=1, **QUIET)


def test_a_latent_computed_from_an_auxiliary_draw_is_a_bound():
    def guide(x):
        width = pyro.param("width", torch.tensor(0.7), constraint=dist.constraints.positive)
        with data_plate(x):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            z = x / 2 + width * u
            pyro.sample("z", dist.Delta(z, log_density=-width.log().expand(z.shape)))

    fitted = pyrolvm.fit(local, X, guide=guide, num_steps=1, **QUIET)
    assert not fitted.structure.sites[0].point
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(X)
    assert (fitted.log_evidence(X, num_samples=2000) - exact).abs().max() < 0.05


def test_a_model_with_a_density_of_the_auxiliary_draw_is_a_bound():
    """With r(psi | z) in the model the bound is below log p(x), and the weights give it."""

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("psi", dist.Normal(z, 0.5))

    def guide(x):
        width = pyro.param("width", torch.tensor(0.5))
        with data_plate(x):
            psi = pyro.sample("psi", dist.Normal(x / 2, 0.5))
            pyro.sample("z", dist.Normal(psi, width))

    fitted = pyrolvm.fit(model, X, guide=guide, num_steps=1, **QUIET)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(X)
    difference = fitted.log_evidence(X, num_samples=4000) - exact
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(X))
    assert fitted.log_evidence(X, "iwae", 4000, num_particles=1).mean() < exact.mean()


# ---------------------------------------------------------------- points


@pytest.fixture(name="point", scope="module")
def _point():
    def guide(x):
        weight = pyro.param("weight", torch.tensor(0.4))
        with data_plate(x):
            pyro.sample("z", dist.Delta(weight * x))

    return pyrolvm.fit(local, X, guide=guide, num_steps=2, **QUIET)


@pytest.mark.parametrize("method", ["importance", "iwae"])
def test_a_point_guide_has_no_importance_weights(point, method):
    assert point.structure.sites[0].point
    with pytest.raises(SettingError, match="point estimate of 'z'"):
        point.log_evidence(X, method, 10)


def test_a_point_guide_encodes_reconstructs_and_leaves_evidence_to_the_prior(point):
    code = point.encode(X)
    torch.testing.assert_close(code, point.program.parameters["weight"].detach() * X)
    torch.testing.assert_close(point.reconstruct(X), code)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(X)
    assert abs(point.log_evidence(X, "prior", 5000).mean() - exact.mean()) < 0.02


# ---------------------------------------------------------------- weights of rows


def weighted(weights):
    """The same program, its rows weighted: under a tensor or a number around model and guide alike."""

    def model(x):
        with (
            data_plate(x) as rows,
            pyro.poutine.scale(scale=weights[rows] if weights.dim() else weights.item()),
        ):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        width = pyro.param("width", torch.tensor(0.8))
        with (
            data_plate(x) as rows,
            pyro.poutine.scale(scale=weights[rows] if weights.dim() else weights.item()),
        ):
            pyro.sample("z", dist.Normal(x / 2, width))

    return model, guide


def test_weights_of_rows_stand_outside_the_logarithm():
    """Weights all 2, as a tensor or as a number: the same bound, below 2 log p(x)."""
    bounds = []
    for weights in (torch.tensor(2.0), torch.full((200,), 2.0)):
        model, guide = weighted(weights)
        options = {"objective": RenyiELBO(alpha=0, num_particles=200), "num_steps": 1}
        bounds.append(pyrolvm.fit(model, X, guide=guide, **options, **QUIET).elbo)
    exact = 2 * dist.Normal(0.0, math.sqrt(2)).log_prob(X).mean().item()
    assert bounds[0] == pytest.approx(bounds[1], abs=1e-5)
    assert abs(bounds[1] - exact) < 0.01


def test_the_evidence_of_a_datum_knows_no_weight():
    weights = torch.linspace(0.1, 3.0, 200)
    model, guide = weighted(weights)
    fitted = pyrolvm.fit(model, X, guide=guide, num_steps=1, **QUIET)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(X)
    assert (fitted.log_evidence(X, num_samples=3000) - exact).abs().max() < 0.1
    assert not fitted.structure.tempered  # rows count more or less, but no likelihood has a power


def test_weights_of_rows_in_minibatches_are_those_of_the_whole():
    """sum_n w_n log p(x_n) / N, whole and as the mean over a partition with N/B outside the logarithm."""
    weights = torch.linspace(0.1, 3.0, 200)
    model, guide = weighted(weights)
    objective = RenyiELBO(alpha=0, num_particles=400)
    exact = (weights * dist.Normal(0.0, math.sqrt(2)).log_prob(X)).sum().item()

    def bound(rows):
        with pyro.get_param_store().scope(), data_rows(len(X), rows), torch.no_grad():
            return estimate(objective, model, guide, (X[rows],)).bound.item()

    whole = bound(torch.arange(200))
    parts = [bound(rows) for rows in torch.arange(200).split(40)]
    assert abs(whole - exact) < 0.01 * 200
    assert abs(sum(parts) / len(parts) - exact) < 0.01 * 200


def test_weights_of_rows_reach_all_cells_of_two_plates():
    """Two columns as a plate of their own share the weight of their row."""
    weights, data = torch.linspace(0.5, 2.0, 50), X[:100].reshape(50, 2)

    def both(sample):
        with pyro.plate("columns", 2, dim=-2), data_plate(data, dim=-1), pyro.poutine.scale(scale=weights):
            sample()

    def model(x):
        def sample():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

        both(sample)

    def guide(x):
        both(lambda: pyro.sample("z", dist.Normal(x.T / 2, 0.8)))

    objective = RenyiELBO(alpha=0, num_particles=400)
    with torch.no_grad():
        bound = estimate(objective, model, guide, (data,)).bound.item()
    exact = (weights[:, None] * dist.Normal(0.0, math.sqrt(2)).log_prob(data)).sum().item()
    assert abs(bound - exact) < 0.01 * 100


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceGraph_ELBO])
def test_a_discrete_latent_left_to_the_prior_has_the_enumerated_gradient(objective):
    """b ~ Bernoulli(p) left to the prior, x ~ N(b, 1): d/dlogit sum_n [p log N(x; 1, 1) + (1 - p) log N(x; 0, 1)]."""
    x = X[:5]

    def model(x):
        logit = pyro.param("logit", torch.tensor(0.3))
        with data_plate(x):
            b = pyro.sample("b", dist.Bernoulli(logits=logit.expand(len(x))), infer={"left_to_prior": True})
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    program = Program(model, lambda x: None)
    batch = Batch((x,))
    program.initialise(batch, seed=0)
    structure = inspect_program(program, batch)
    pair = Pair(program, structure, batch, "train")
    reading, gradients = as_objective(objective(max_plate_nesting=1)), []
    with program.scope(batch):
        for _ in range(4000):
            surrogate = reading.estimate(pair, {}).surrogate
            gradients.append(-torch.autograd.grad(surrogate, [*program.parameters.values()])[0])
    p = torch.tensor(0.3).sigmoid()
    exact = (p * (1 - p) * (dist.Normal(1.0, 1.0).log_prob(x) - dist.Normal(0.0, 1.0).log_prob(x))).sum()
    found = torch.stack(gradients)
    assert abs(found.mean() - exact) < 4 * found.std() / math.sqrt(len(found))


def test_a_mixture_through_an_untracked_operation_is_refused_too():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            if type(value) is not torch.Tensor:
                raise TypeError("plain tensors only")
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def guide(x):
        width = pyro.param("width", torch.tensor(0.5))
        with data_plate(x):
            psi = pyro.sample("psi", dist.Normal(x / 2, 0.5), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(Opaque.apply(psi), width))

    with pytest.raises(ProgramError, match="'psi'"):
        pyrolvm.fit(local, X, guide=guide, num_steps=1, **QUIET)
