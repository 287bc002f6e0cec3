"""Fits without settings, against closed forms: the log joint, modes, fixed draws, linear response, weights, paths."""

import math
import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide, config_enumerate
from pyro.infer.mcmc.util import initialize_model
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyrolvm
from pyrolvm.errors import ProgramError, SettingError
from pyrolvm.inference.log_joint import declined, declined_or_start, find_start, judge, solve
from pyrolvm.inference.log_joint.climbing import climb
from pyrolvm.inference.log_joint.draws import fixed_normals
from pyrolvm.inference.log_joint.families import FULL, KINDS, LOW_RANK, POINT, Family, Gaussian
from pyrolvm.inference.log_joint.fixed import GRADIENT, maximise
from pyrolvm.inference.log_joint.fixed_bound import FixedBound
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.low_rank import free, own_share
from pyrolvm.inference.log_joint.modes import find_modes
from pyrolvm.inference.log_joint.pathfinder import find_paths
from pyrolvm.inference.log_joint.resampling import smoothed
from pyrolvm.inference.log_joint.response import respond
from pyrolvm.inference.log_joint.walks import drift
from pyrolvm.inference.posterior.suiting import suited
from pyrolvm.inference.program.checks import inspect_program
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import Program

RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(40, 3, generator=RANDOM) * torch.tensor([0.01, 1.0, 100.0])
Y = X @ torch.tensor([50.0, -1.0, 0.02]) + torch.randn(40, generator=RANDOM)


def regression(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 100.0).expand([3]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=y)


def exact():
    """Mean and covariance of the regression's coefficients."""
    x, y = X.double(), Y.double()
    covariance = torch.linalg.inv(x.T @ x + torch.eye(3) / 1e4)
    return covariance @ (x.T @ y), covariance


EFFECTS, ERRORS = (
    torch.tensor(v) for v in ([28.0, 8, -3, 7, -1, 1, 18, 12], [15.0, 10, 16, 11, 9, 11, 10, 18])
)


def schools(y, error):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, error), obs=y)


def constrained():
    pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    L = pyro.sample("L", dist.LKJCholesky(3, torch.tensor(2.0)))
    pyro.sample(
        "y", dist.MultivariateNormal(torch.zeros(3), scale_tril=L), obs=torch.tensor([0.3, 1.0, -0.5])
    )
    rising = [dist.transforms.OrderedTransform()]
    pyro.sample("rising", dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), rising))


def mixture(x):
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    means = pyro.sample("means", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        side = pyro.sample(
            "side", dist.Categorical(torch.stack([weight, 1 - weight])), infer={"enumerate": "parallel"}
        )
        pyro.sample("x", dist.Normal(means[side], 1.0), obs=x)


POINTS = torch.tensor([-2.0, -1.5, 0.3, 2.2, 1.9])


def two_sides():
    """0.3 N(-4, 1) + 0.7 N(4, 0.5^2), as a prior and a factor."""
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    parts = dist.Normal(torch.tensor([-4.0, 4.0]), torch.tensor([1.0, 0.5]))
    density = (parts.log_prob(x) + torch.tensor([0.3, 0.7]).log()).logsumexp(-1)
    pyro.factor("density", density - dist.Normal(0.0, 10.0).log_prob(x))


def centred(y, error):
    """A funnel whose density rises without end as tau falls."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, error), obs=y)


def pair_of(model, data=(), guide=autoguide.AutoNormal, dtype=torch.float32):
    program = Program(model, guide, dtype=dtype)
    batch = suited(program, data)
    program.initialise(batch, 0)
    return Pair(program, inspect_program(program, batch), batch)


def hidden(model):
    return autoguide.AutoNormal(pyro.poutine.block(model, hide=["side"]))


PROGRAMS = {
    "regression": (regression, (X, Y), autoguide.AutoNormal),
    "schools": (schools, (EFFECTS, ERRORS), autoguide.AutoNormal),
    "constrained": (constrained, (), autoguide.AutoNormal),
    "enumerated": (mixture, (POINTS,), hidden(mixture)),
}


# ---------------------------------------------------------------------- the function


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_log_joint_is_pyros_own_potential(name):
    model, data, guide = PROGRAMS[name]
    log_joint = LogJoint(pair_of(model, data, guide))
    assert log_joint.recorded
    torch.set_default_dtype(torch.float64)
    try:
        nesting = 1 if name == "enumerated" else None
        _, potential, _, _ = initialize_model(
            model, tuple(d.double() for d in data), max_plate_nesting=nesting
        )
        u = torch.randn(5, log_joint.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        wanted = [
            -potential({s.name: row[s.start : s.stop].reshape(s.shape) for s in log_joint.sites}) for row in u
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    found = log_joint(u)
    assert found.dtype == torch.float64
    # a float32 program's own constants (0.3) are float32 numbers, widened
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PROGRAMS)
def test_derivatives_are_differences(name):
    log_joint = LogJoint(pair_of(*PROGRAMS[name]))
    u = torch.randn(log_joint.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 2
    steps = 1e-5 * torch.eye(log_joint.dim, dtype=torch.float64)
    _, slope = log_joint.slope(u)
    differences = (log_joint(u + steps) - log_joint(u - steps)) / 2e-5
    torch.testing.assert_close(slope, differences, rtol=1e-5, atol=1e-5)
    H = (log_joint.slope(u + steps)[1] - log_joint.slope(u - steps)[1]) / 2e-5
    torch.testing.assert_close(log_joint.hessian(u), H, rtol=1e-4, atol=1e-4)


def network():
    """A layer whose priors were made with Pyro's validation on, as in any script: they look at their values."""
    layer = PyroModule[nn.Linear](1, 3)
    layer.weight = PyroSample(dist.Normal(0.0, 1.0, validate_args=True).expand([3, 1]).to_event(2))
    layer.bias = PyroSample(dist.Normal(0.0, 1.0, validate_args=True).expand([3]).to_event(1))

    def model(x, y):
        mean = layer(x).sin().sum(-1)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return model, (X[:, 1:2], Y)


def counted():
    """A program that reads its data: how many of them are positive."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("positive", int((x > 0).sum())):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[x > 0])

    return model, (Y,)


def topics():
    """What torch makes of nothing (Pyro's concentrations of one) is of the type of the program."""
    words = torch.randint(0, 5, (4, 6), generator=torch.Generator().manual_seed(0))

    @config_enumerate
    def model(words):
        with pyro.plate("topics", 2):
            phi = pyro.sample("phi", dist.Dirichlet(torch.ones(5) / 3))
        with pyro.plate("documents", 6):
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2) / 3))
            with pyro.plate("words", 4):
                z = pyro.sample("z", dist.Categorical(theta))
                pyro.sample("w", dist.Categorical(phi[z]), obs=words)

    return model, (words,), autoguide.AutoNormal(pyro.poutine.block(model, hide=["z"]))


def sticks():
    """An index that is a number: memory that another tensor had before."""

    @config_enumerate
    def model(y):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        x = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            x = pyro.sample(f"x_{t}", dist.Categorical(p[x]))
            pyro.sample(f"y_{t}", dist.Normal(x.to(y.dtype), 1.0), obs=y[t])

    return model, (Y[:4],), autoguide.AutoNormal(pyro.poutine.block(model, expose=["p"]))


@pytest.mark.parametrize("program", [network, counted, topics, sticks])
def test_programs_of_all_kinds_are_evaluated_at_many_points_at_once(program):
    log_joint = LogJoint(pair_of(*program()))
    u = torch.randn(3, log_joint.dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert log_joint.batched
    wanted = torch.stack([log_joint.at(row) for row in u])
    torch.testing.assert_close(log_joint(u), wanted, rtol=1e-10, atol=1e-10)


def test_a_program_that_cannot_be_recorded_is_run_for_every_point():
    def branching():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z if z > 0 else 2 * z, 1.0), obs=torch.tensor(1.0))

    log_joint = LogJoint(pair_of(branching))
    assert not log_joint.recorded
    normal = torch.distributions.Normal(0.0, 1.0)
    wanted = [
        normal.log_prob(torch.tensor(z)) + normal.log_prob(torch.tensor(1 - f))
        for z, f in ((0.5, 0.5), (-0.5, -1.0))
    ]
    torch.testing.assert_close(
        log_joint(torch.tensor([[0.5], [-0.5]]).double()), torch.stack(wanted).double()
    )


def test_a_density_that_is_random_or_discrete_is_refused_by_name():
    def noisy():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + torch.randn(()), 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ProgramError, match="random"):
        LogJoint(pair_of(noisy))

    def counted():
        n = pyro.sample("n", dist.Poisson(3.0))
        z = pyro.sample("z", dist.Normal(n, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("n", dist.Poisson(pyro.param("rate", torch.tensor(3.0))))
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    pair = pair_of(counted, (), guide)
    assert "Gaussian AutoGuide" in declined(pair)
    with pytest.raises(ProgramError, match="'n' is discrete"):
        LogJoint(pair)


def test_a_model_that_learns_is_declined_by_the_name_of_what_it_learns():
    def learning(x):
        spread = pyro.param("spread", torch.tensor(1.0), constraint=dist.constraints.positive)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, spread).expand([len(x)]).to_event(1), obs=x)

    assert "spread" in declined(pair_of(learning, (POINTS,)))
    assert isinstance(declined_or_start(pair_of(learning, (POINTS,))), str)


# ---------------------------------------------------------------------- modes


def test_the_mode_of_a_regression_is_its_posterior_whatever_the_units():
    place = find_modes(LogJoint(pair_of(regression, (X, Y))), 0)
    assert len(place) == 1
    mean, covariance = exact()
    sd = covariance.diagonal().sqrt()
    torch.testing.assert_close(place[0].location / sd, mean / sd, rtol=1e-6, atol=1e-5)
    found = place[0].scale_tril @ place[0].scale_tril.T
    torch.testing.assert_close(found / sd / sd[:, None], covariance / sd / sd[:, None], rtol=1e-6, atol=1e-6)
    x, y = X.double(), Y.double()
    marginal = torch.distributions.MultivariateNormal(torch.zeros(40).double(), torch.eye(40) + 1e4 * x @ x.T)
    assert place[0].log_evidence == pytest.approx(marginal.log_prob(y).item(), abs=1e-5)


@pytest.mark.slow
def test_centred_effects_have_no_mode():
    start = find_start(pair_of(centred, (EFFECTS, ERRORS)))
    assert start.modes == 0
    assert "no mode" in start.sentence


def test_two_sides_have_two_modes():
    both = find_start(pair_of(two_sides))
    assert both.modes == 2
    assert sorted(round(float(p.location), 1) for p in both.places) == [-4.0, 4.0]


# ---------------------------------------------------------------------- fixed draws


def test_fixed_normals_have_exact_moments_and_fresh_sets_differ():
    z = fixed_normals(64, 10, 0)
    torch.testing.assert_close(z.mean(0), torch.zeros(10).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(z.T @ z / 64, torch.eye(10).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(fixed_normals(64, 30, 0).square().mean(0), torch.ones(30).double())
    assert not torch.allclose(z, fixed_normals(64, 10, 1))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["regression", "schools", "constrained"])
def test_a_guide_reads_what_was_written_and_its_draws_are_of_it(kind, name):
    model, data, _ = PROGRAMS[name]
    pair = pair_of(model, data, kind, torch.float64)
    log_joint = LogJoint(pair)
    family = Family(pair.program, log_joint)
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(log_joint.dim, log_joint.dim, generator=generator, dtype=torch.float64) / 4
    root = torch.linalg.cholesky(root @ root.T + torch.eye(log_joint.dim) / 4)
    location = torch.randn(log_joint.dim, generator=generator, dtype=torch.float64)
    q = Gaussian.around(location, root, family.kind, family.rank)
    family.write(q)
    again = family.read()
    torch.testing.assert_close(again.location, location)
    if family.kind == POINT:
        drawn = pair.guide()
        values = log_joint.values(location)
        for site, value in values.items():
            torch.testing.assert_close(drawn.nodes[site]["value"], value)
        return
    torch.testing.assert_close(again.covariance, q.covariance)
    torch.manual_seed(0)
    with torch.no_grad(), pair.program.scope(pair.batch):  # Pyro's own density of Pyro's own draw
        trace = pyro.poutine.trace(pair.program.guide).get_trace(*pair.batch.args)
        reported = trace.log_prob_sum()
    drawn = {s: trace.nodes[s]["value"] for s in log_joint.values(location)}
    u = log_joint.coordinates(drawn)
    jacobian = sum(
        s.transform.log_abs_det_jacobian(u[s.start : s.stop].reshape(s.shape), drawn[s.name]).sum()
        for s in log_joint.sites
    )
    torch.testing.assert_close(reported, q.log_prob(u) - jacobian)


def test_a_full_covariance_is_exact_on_a_regression():
    pair = pair_of(regression, (X, Y), autoguide.AutoMultivariateNormal, torch.float64)
    solution = solve(pair)
    mean, covariance = exact()
    sd = covariance.diagonal().sqrt()
    q = Family(pair.program, solution.start.log_joint).read()
    torch.testing.assert_close(q.location / sd, mean / sd, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        q.covariance / sd / sd[:, None], covariance / sd / sd[:, None], rtol=1e-3, atol=1e-3
    )
    assert solution.converged
    assert solution.numbers["gradient_norm"] <= GRADIENT
    assert judge(pair, solution).converged is True


def test_a_point_is_the_mode_in_its_own_space():
    def scale():
        pyro.sample("s", dist.Gamma(3.0, 2.0))

    pair = pair_of(scale, (), autoguide.AutoDelta, torch.float64)
    solve(pair)
    assert pair.guide().nodes["s"]["value"].item() == pytest.approx(1.0, abs=1e-5)  # (shape - 1) / rate


@pytest.mark.parametrize(
    "kind", ["diagonal", FULL]
)  # a low rank has several optima, a hundredth of a nat apart
def test_ten_starts_end_at_the_same_optimum(kind):
    log_joint = LogJoint(pair_of(schools, (EFFECTS, ERRORS)))
    place = find_modes(log_joint, 0)[0]
    bound = FixedBound(log_joint, place, Gaussian.around(place.location, place.scale_tril, kind))
    normals = fixed_normals(64, log_joint.dim, 0)
    ends = []
    for seed in range(10):
        noise = 0.3 * torch.randn(
            len(bound.initial), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        found = climb(lambda p: bound(p, normals), bound.initial + noise, gradient_tolerance=1e-5)
        assert float(found.end.slope.abs().max()) < 1e-4
        ends.append(found.end.value)
    assert max(ends) - min(ends) < 1e-5


def test_the_bound_on_fixed_draws_has_the_gradient_that_it_says():
    log_joint = LogJoint(pair_of(schools, (EFFECTS, ERRORS)))
    place = find_modes(log_joint, 0)[0]
    for kind, rank in (("diagonal", 0), (FULL, 0), ("low_rank", 3)):
        bound = FixedBound(log_joint, place, Gaussian.around(place.location, place.scale_tril, kind, rank))
        normals = fixed_normals(64, log_joint.dim, 0)
        at = bound.initial + 0.1 * torch.randn(len(bound.initial), generator=torch.Generator().manual_seed(0))
        _, gradient = bound(at, normals)
        along = torch.randn(len(at), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        difference = (bound(at + 1e-5 * along, normals)[0] - bound(at - 1e-5 * along, normals)[0]) / 2e-5
        assert float(gradient @ along) == pytest.approx(difference, rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diagonal", FULL])
def test_the_monte_carlo_error_covers_the_difference_to_a_hundred_times_the_draws(kind):
    log_joint = LogJoint(pair_of(schools, (EFFECTS, ERRORS)))
    place = find_modes(log_joint, 0)[0]
    far = maximise(log_joint, place, kind, 0, 10_000, num_draws=6400).q
    inside = []
    for seed in range(12):
        found = maximise(log_joint, place, kind, 0, seed, num_draws=64)
        apart = [(found.q.location - far.location).abs(), (found.q.scale / far.scale).log().abs()]
        for distance, error in zip(apart, (found.errors, found.log_sd_errors), strict=True):
            inside.append((distance <= 1.645 * error.clamp_min(1e-6)).double())
    # of 240 repetitions of a location or log-sd 90% should be covered; coordinates move together
    assert torch.stack(inside).mean() >= 0.85


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_alone_need_no_record(name):
    model, data, guide = PROGRAMS[name]
    pair = pair_of(model, data, guide)
    once, often = LogJoint(pair, derivatives=False), LogJoint(pair)
    u = torch.randn(7, often.dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.testing.assert_close(once(u), often(u))
    assert once.batched


def test_a_program_that_looks_at_its_values_is_evaluated_all_the_same():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z if float(z.detach()) > 0 else -2 * z, 1.0), obs=torch.tensor(0.3))

    log_joint = LogJoint(pair_of(model), derivatives=False)
    u = torch.tensor([[-1.5], [0.7]], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(log_joint(u), torch.stack([log_joint.at(v) for v in u]))


# ---------------------------------------------------------------------- low ranks


def test_a_low_rank_covariance_is_found_again():
    """Where the normal is of a low rank itself, the nearest one is it."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    sd = torch.tensor([0.01, 1.0, 100.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    wanted = Gaussian(LOW_RANK, torch.zeros(7, dtype=torch.float64), sd=sd, factor=factor)
    root = torch.linalg.cholesky(wanted.covariance)
    found = Gaussian.around(wanted.location, root, LOW_RANK, 2)
    unit = wanted.scale[:, None] * wanted.scale
    torch.testing.assert_close(found.covariance / unit, wanted.covariance / unit, atol=1e-4, rtol=0)


def test_own_shares_of_any_size_have_their_parameters_and_slopes():
    shares = torch.tensor([0.2, 1.0, 50.0, 1e9], dtype=torch.float64)
    parameters = free(shares).requires_grad_()
    torch.testing.assert_close(own_share(parameters), shares, rtol=1e-4, atol=0)
    assert torch.autograd.gradcheck(own_share, parameters[:3].detach().requires_grad_())
    assert float(parameters.detach().max()) < 25  # far ones are a few steps away


def test_the_optima_of_a_low_rank_satisfy_its_conditions():
    """Correlations that no rank of 1 has: the factor takes one coordinate whole, or another."""
    R = torch.tensor([[1.0, 0.9, -0.2], [0.9, 1.0, 0.2], [-0.2, 0.2, 1.0]], dtype=torch.float64)
    found = Gaussian.all_around(torch.zeros(3).double(), torch.linalg.cholesky(R), LOW_RANK, 1)
    precision = torch.linalg.inv(R)
    for q in found:
        gap = torch.linalg.inv(q.covariance) - precision  # the bound's slope in the covariance
        B = q.sd[:, None] * q.factor
        assert float((gap @ B).abs().max()) < 1e-4
        own = q.sd * precision.diagonal().sqrt() > 1.01e-2
        assert float(gap.diagonal()[own].abs().max()) < 1e-4
        assert bool((gap.diagonal()[~own] < 0).all())  # where there is least of its own, less were better
    nearness = [float(torch.logdet(q.covariance) - (precision @ q.covariance).trace()) for q in found]
    assert len(found) > 1
    assert nearness[0] == pytest.approx(nearness[1])  # by symmetry


def test_draws_of_a_low_rank_stay_where_its_factor_turns():
    generator = torch.Generator().manual_seed(0)
    factor, sd = torch.randn(5, 2, generator=generator).double(), torch.rand(5, generator=generator).double()
    turn = torch.linalg.qr(torch.randn(2, 2, generator=generator).double()).Q
    one, other = (
        Gaussian(LOW_RANK, torch.ones(5).double(), sd=sd, factor=f) for f in (factor, factor @ turn)
    )
    normals = fixed_normals(64, 5, 0)
    torch.testing.assert_close(one.at(normals), other.at(normals))


def test_a_turn_of_the_factor_is_no_direction_of_the_bound():
    log_joint = LogJoint(pair_of(schools, (EFFECTS, ERRORS)))
    place = find_modes(log_joint, 0)[0]
    bound = FixedBound(log_joint, place, Gaussian.around(place.location, place.scale_tril, LOW_RANK, 3))
    turns = bound.turns(bound.initial)
    assert turns.shape[1] == 3
    torch.testing.assert_close(turns.T @ turns, torch.eye(3).double())
    slope = bound(bound.initial, fixed_normals(64, 10, 0))[1]
    assert float((turns.T @ slope).abs().max()) < 1e-10 < float(slope.abs().max())


def test_the_monte_carlo_error_counts_the_log_sds():
    """64 draws leave an sd of eight schools off by more than a tenth, and the means by less."""
    log_joint = LogJoint(pair_of(schools, (EFFECTS, ERRORS)))
    place = find_modes(log_joint, 0)[0]
    found = maximise(log_joint, place, FULL, 0, 0, num_draws=64)
    assert float((found.errors / found.q.scale).max()) < 0.1
    assert found.monte_carlo_error == float(found.log_sd_errors.max()) > 0.1
    assert maximise(log_joint, place, "point", 0, 0).monte_carlo_error == 0.0


def test_the_error_of_a_log_sd_is_relative():
    """The same posterior in units a thousand times smaller: errors of the location scale, those of log-sds do not."""

    def found(unit):
        def model():
            z = pyro.sample("z", dist.Normal(0.0, unit))
            pyro.sample("y", dist.StudentT(3.0, z / unit, 0.3), obs=torch.tensor(1.0))

        log_joint = LogJoint(pair_of(model, ()))
        return maximise(log_joint, find_modes(log_joint, 0)[0], FULL, 0, 0, num_draws=64)

    one, thousand = found(1.0), found(1000.0)
    torch.testing.assert_close(thousand.errors, 1000 * one.errors, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(thousand.log_sd_errors, one.log_sd_errors, rtol=1e-3, atol=0.0)
    assert one.log_sd_errors > 1e-4


# ---------------------------------------------------------------------- linear response


def test_linear_response_is_the_covariance_of_a_regression():
    pair = pair_of(regression, (X, Y), autoguide.AutoNormal, torch.float64)
    response = respond(solve(pair).optimum)
    _, covariance = exact()
    sd = covariance.diagonal().sqrt()
    assert response.kept
    torch.testing.assert_close(
        response.q.covariance / sd / sd[:, None], covariance / sd / sd[:, None], rtol=1e-3, atol=1e-3
    )


def test_levels_in_order_have_derivatives():
    """Pyro's OrderedLogistic writes into a tensor: recorded as it is, it has values alone."""
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()

    def ordinal(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        rising = [dist.transforms.OrderedTransform()]
        cut = pyro.sample("cut", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 2.0), rising))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.OrderedLogistic(x @ b, cut), obs=y)

    log_joint = LogJoint(pair_of(ordinal, (x, y)))
    assert log_joint.batched
    u = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)
    steps = 1e-5 * torch.eye(4, dtype=torch.float64)
    differences = (log_joint(u + steps) - log_joint(u - steps)) / 2e-5
    torch.testing.assert_close(log_joint.slope(u)[1], differences, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------- weights


def test_smoothed_weights_are_arvizs():
    log_weight = 2 * torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = smoothed(log_weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted, khat = az.psislw(log_weight.numpy())
    assert found.khat == pytest.approx(float(khat), abs=1e-6)
    # the scale of the tail is fitted in another way: the same to a few percent
    np.testing.assert_allclose(found.normalised.numpy(), np.exp(wanted), rtol=0.1)


def test_draws_are_put_right():
    q, p = torch.distributions.Normal(0.0, 1.2), torch.distributions.Normal(0.5, 1.0)
    z = 1.2 * torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = smoothed(p.log_prob(z) - q.log_prob(z))
    again = z[weights.resample(4000, torch.Generator().manual_seed(1))]
    error = 1 / math.sqrt(4000 * weights.effective_share)
    assert abs(float(again.mean()) - 0.5) < 4 * error
    assert abs(float(again.std()) - 1.0) < 4 * error


def test_the_verdict_passes_the_right_guide_and_flags_a_narrow_or_shifted_one():
    pair = pair_of(regression, (X, Y), autoguide.AutoMultivariateNormal, torch.float64)
    solution = solve(pair)
    assert judge(pair).flags == ()
    family = Family(pair.program, solution.start.log_joint)
    q = solution.optimum.q
    family.write(Gaussian(FULL, q.location, scale_tril=q.scale_tril / 2))
    assert "shift" in judge(pair).flags
    family.write(Gaussian(FULL, q.location + q.scale, scale_tril=q.scale_tril))
    wrong = judge(pair)
    assert wrong.converged is None
    assert "importance weights would move" in wrong.sentence


def test_two_modes_are_flagged_although_no_weight_sees_them():
    pair = pair_of(two_sides, (), autoguide.AutoMultivariateNormal, torch.float64)
    solution = solve(pair)
    assert judge(pair).flags == ()  # the weights alone
    verdict = judge(pair, solution)
    assert verdict.flags == ("modes",)
    assert "2 modes" in verdict.sentence


# ---------------------------------------------------------------------- Pathfinder


LOCATION = torch.tensor([3.0, -1.0, 10.0])
COVARIANCE = torch.tensor([[4.0, 1.8, 0.0], [1.8, 1.0, 0.1], [0.0, 0.1, 0.09]])


def correlated():
    pyro.sample("z", dist.MultivariateNormal(LOCATION, COVARIANCE))


def test_a_path_to_a_normal_ends_in_it():
    log_joint = LogJoint(pair_of(correlated, (), dtype=torch.float64))
    best = find_paths(log_joint, 0)[0]
    wanted = torch.tensor([3.0, -1.0, 10.0], dtype=torch.float64)
    torch.testing.assert_close(best.location, wanted, atol=1e-4, rtol=0)
    assert best.elbo == pytest.approx(0.0, abs=0.05)  # log evidence of a normalised density
    u = best.at(torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    place = best.place(log_joint)
    torch.testing.assert_close(
        best.log_prob(u), Gaussian(FULL, place.location, scale_tril=place.scale_tril).log_prob(u)
    )


def test_pathfinder_draws_a_normal_exactly():
    found = pyrolvm.pathfinder(correlated, num_samples=4000)
    z = found.draws["z"]
    assert found.reliable
    assert "8 paths" in repr(found)
    sd = torch.tensor([2.0, 1.0, 0.3], dtype=torch.float64)
    mean = torch.tensor([3.0, -1.0, 10.0], dtype=torch.float64)
    assert float(((z.mean(0) - mean) / sd).abs().max()) < 4 / math.sqrt(4000)
    assert float((z.std(0) / sd).log().abs().max()) < 4 / math.sqrt(2 * 4000)
    assert float(torch.corrcoef(z.T)[0, 1]) == pytest.approx(0.9, abs=0.02)
    assert torch.equal(z, pyrolvm.pathfinder(correlated, num_samples=4000).draws["z"])


def test_walks_leave_a_posterior_and_leave_a_half_of_it():
    log_joint = LogJoint(pair_of(correlated, ()))
    torch.manual_seed(0)
    u = dist.MultivariateNormal(LOCATION.double(), COVARIANCE.double()).sample((2000,))
    assert drift(log_joint, u, 0)[0] < 0.15
    half = u[u[:, 1] < LOCATION[1]]
    moved, where = drift(log_joint, half, 0)
    assert moved > 0.4  # the sd of half a normal is 0.60 of it
    assert where == "z[1]"


def test_pathfinder_refuses_a_pair_by_name():
    with pytest.raises(SettingError, match="Pyro function"):
        pyrolvm.pathfinder(pyrolvm.PPCA(4, 2), X)


# ---------------------------------------------------------------------- questions to a fitted model


@pytest.fixture(scope="module")
def fitted():
    found = pyrolvm.fit(
        regression, (X, Y), guide=autoguide.AutoNormal, num_steps=1, dtype="float64", progress=False
    )
    solve(found.pair((X, Y)))
    return found


def test_covariance_of_a_fitted_mean_field(fitted):
    table = fitted.covariance((X, Y))
    _, covariance = exact()
    sd = covariance.diagonal().sqrt().numpy()
    assert list(table.columns) == ["b[0]", "b[1]", "b[2]"]
    np.testing.assert_allclose(
        table.to_numpy() / sd / sd[:, None], covariance.numpy() / sd / sd[:, None], atol=1e-3
    )
    own = fitted.covariance((X, Y), ["b"], method="guide").to_numpy()
    np.testing.assert_allclose(own, np.diag(np.diag(own)), atol=1e-12)
    with pytest.raises(SettingError, match="names none of the latents"):
        fitted.covariance((X, Y), ["c"])


def test_corrected_draws_of_a_fitted_mean_field(fitted):
    found = fitted.posterior((X, Y), 1000, corrected=True)
    mean, covariance = exact()
    assert found["b"].shape == (1000, 3)
    assert found.khat < 0.7
    error = ((found["b"].mean(0) - mean) / covariance.diagonal().sqrt()).abs().max()
    assert float(error) < 4 / math.sqrt(1000)


def test_corrected_draws_of_rows_have_weights_of_their_own():
    model = pyrolvm.PPCA(3, 1)
    found = pyrolvm.fit(model, X, num_steps=5, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = found.posterior(X[:5], 20, corrected=True)
    assert draws["z"].shape == (20, 5, 1)


def test_rows_that_are_not_the_fits_do_not_weigh_what_all_rows_share():
    """Ten of a hundred rows would give the posterior of these ten, and not that of the fit."""
    x = torch.randn(100, generator=torch.Generator().manual_seed(3)) + 2.0

    def location(x):
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyrolvm.data_plate(x):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    found = pyrolvm.fit(location, x, guide="AutoNormal", progress=False)
    sd = (100 + 0.01) ** -0.5
    assert abs(found.posterior(x, 4000, corrected=True)["m"].std().item() / sd - 1) < 4 / math.sqrt(2 * 4000)
    for ask in (
        lambda: found.posterior(x[:10], 10, corrected=True),
        lambda: found.covariance(x[:10], method="guide"),
    ):
        with pytest.raises(SettingError, match="pass the 100 rows"):
            ask()


def test_a_point_has_no_corrected_draws():
    found = pyrolvm.fit(regression, (X, Y), guide=autoguide.AutoDelta, num_steps=1, progress=False)
    with pytest.raises(SettingError, match="none for 'b'"):
        found.posterior((X, Y), 10, corrected=True)
