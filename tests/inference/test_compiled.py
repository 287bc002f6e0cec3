"""The compiled engine takes the same steps as the eager one: same numbers, same noise, same state."""

import contextlib
import math
import re
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyrolvm
from pyrolvm import RenyiELBO, data_plate
from pyrolvm.data.arrays import as_batch
from pyrolvm.data.plan import BatchPlan
from pyrolvm.errors import ProgramError, SettingError
from pyrolvm.inference.engine import Problem, choose_engine, native
from pyrolvm.inference.engine import choose as choosing
from pyrolvm.inference.engine.compiled import CompiledEngine, probe
from pyrolvm.inference.engine.eager import EagerEngine
from pyrolvm.inference.engine.loops import StaticLoop
from pyrolvm.inference.engine.optimizers import OPTIMIZERS, OptimizerSpec
from pyrolvm.inference.engine.problem import schedules_of
from pyrolvm.inference.engine.untraceable import UntraceableError
from pyrolvm.inference.objectives import prepare
from pyrolvm.inference.program.checks import inspect_program
from pyrolvm.inference.program.noise import noise_state
from pyrolvm.inference.program.program import Program

CPU = torch.device("cpu")


# ---------------------------------------------------------------- programs


def ppca():
    """Plain functions and `pyro.param`, constrained ones among them."""

    def model(x):
        W = pyro.param("W", lambda: 0.1 * torch.randn(2, 5))
        noise = pyro.param("noise", lambda: torch.ones(()), constraint=dist.constraints.positive)
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, noise).to_event(1), obs=x)

    def guide(x):
        A = pyro.param("A", lambda: 0.1 * torch.randn(5, 2))
        scale = pyro.param("scale", lambda: torch.ones(2), constraint=dist.constraints.positive)
        with data_plate(x):
            pyro.sample("z", dist.Normal(x @ A, scale).to_event(1))

    return model, guide


class VAE(nn.Module):
    """Networks registered by `pyro.module`, batch normalisation among them."""

    def __init__(self, normalise=False):
        super().__init__()
        norm = nn.BatchNorm1d(8) if normalise else nn.Identity()
        self.encoder = nn.Sequential(nn.Linear(5, 8, bias=not normalise), norm, nn.ReLU(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 5))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with data_plate(x):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Regression(PyroModule):
    """A PyroModule with sampled and constrained attributes."""

    def __init__(self):
        super().__init__()
        # made now, with the validation of now
        self.weight = PyroSample(dist.Normal(torch.zeros(4), 1.0, validate_args=True).to_event(1))
        self.noise = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x):
        mean = x[:, :4] @ self.weight
        with data_plate(x):
            return pyro.sample("y", dist.Normal(mean, self.noise), obs=x[:, 4])


def schools(y):
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)


SCHOOLS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])


def hierarchical():
    """Global and local latents, the local ones with a parameter for each row."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.zeros(()))
        pyro.sample("mu", dist.Normal(loc, 0.1))
        locs = pyro.param("locs", lambda: torch.zeros(N))
        with data_plate(x) as rows:
            pyro.sample("z", dist.Normal(locs[rows], 0.5))

    return model, guide


def mixture(*, sampled, baseline=False):
    def prior(x):
        weights = pyro.param("weights", lambda: torch.ones(3) / 3, constraint=dist.constraints.simplex)
        return dist.Categorical(weights)

    def model(x):
        means = pyro.param("means", lambda: torch.randn(3, 5))
        with data_plate(x):
            z = pyro.sample("z", prior(x), infer={} if sampled else {"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(means[z], 1.0).to_event(1), obs=x)

    def empty_guide(x):
        pass

    network = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0))

    def guide(x):
        A = pyro.param("A", lambda: 0.1 * torch.randn(5, 3))
        infer = {}
        if baseline:
            pyro.module("baseline", network)
            infer = {"baseline": {"nn_baseline": network, "nn_baseline_input": x}}
        with data_plate(x):
            pyro.sample("z", dist.Categorical(logits=x @ A), infer=infer)

    return model, guide if sampled else empty_guide


def enumerated_in_guide():
    """The guide enumerates: Dice weighs costs, some by zero."""

    model, guide = mixture(sampled=True)
    return model, config_enumerate(guide)


def samplers():
    """Draws of several kinds, one of which inductor can only make through Python."""

    def model(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with data_plate(x):
            on = pyro.sample("on", dist.Bernoulli(0.5))
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Laplace((rate * on).unsqueeze(-1), scale.unsqueeze(-1)).to_event(1), obs=x)

    def guide(x):
        a = pyro.param("a", lambda: torch.zeros(5))
        pyro.sample("rate", dist.Gamma(a[0].exp(), 1.0))
        with data_plate(x):
            pyro.sample("on", dist.Bernoulli(logits=x @ a))
            pyro.sample("scale", dist.Weibull(1.0 + a[1].exp(), 1.0 + (x @ a).square()))

    return model, guide


def tempered():
    model, guide = ppca()
    return pyro.poutine.scale(model, 0.3), guide


N = 40
DATA = torch.randn(N, 5, generator=torch.Generator().manual_seed(1))

PROGRAMS = {
    "ppca": lambda: (ppca(), DATA, 16, None),
    "iwae": lambda: (ppca(), DATA, 16, RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True)),
    "renyi, looped": lambda: (ppca(), DATA, 16, RenyiELBO(alpha=0.5, num_particles=2)),
    "particles": lambda: (ppca(), DATA, 16, Trace_ELBO(num_particles=3, vectorize_particles=True)),
    "particles, looped": lambda: (ppca(), DATA, 16, Trace_ELBO(num_particles=3)),
    "tempered": lambda: (tempered(), DATA, 16, None),
    "vae": lambda: ((VAE(), None), DATA, 16, TraceMeanField_ELBO()),
    "vae, batch norm": lambda: ((VAE(normalise=True), None), DATA, 16, None),
    "pyro module": lambda: ((Regression(), AutoNormal), DATA, 16, None),
    "schools": lambda: ((schools, AutoNormal), SCHOOLS, None, None),
    "multivariate": lambda: ((schools, AutoMultivariateNormal), SCHOOLS, None, None),
    "low rank": lambda: (
        (schools, lambda m: AutoLowRankMultivariateNormal(m, rank=2)),
        SCHOOLS,
        None,
        None,
    ),
    "delta": lambda: ((schools, AutoDelta), SCHOOLS, None, None),
    "hierarchical": lambda: (hierarchical(), DATA, 16, None),
    "enumerated": lambda: (mixture(sampled=False), DATA, 16, TraceEnum_ELBO()),
    "enumerated guide": lambda: (enumerated_in_guide(), DATA, None, TraceEnum_ELBO()),
    "sampled": lambda: (mixture(sampled=True), DATA, 16, TraceGraph_ELBO()),
    "sampled, baseline": lambda: (mixture(sampled=True, baseline=True), DATA, 16, TraceGraph_ELBO()),
    "samplers": lambda: (samplers(), DATA, 16, None),
    "score function": lambda: (mixture(sampled=True), DATA, 16, Trace_ELBO()),
}


def make(name_or_parts, **options):
    """A step and its plan; equal for equal arguments."""
    torch.manual_seed(7)
    parts = PROGRAMS[name_or_parts]() if isinstance(name_or_parts, str) else name_or_parts
    (model, guide), data, batch_size, objective = parts
    if callable(guide) and getattr(guide, "__name__", "") == "<lambda>" and data is SCHOOLS:
        guide = guide(model)
    warmup, controls = options.pop("kl_warmup", 0.0), options.pop("controls", None)
    batch = as_batch(data)
    program = Program(model, guide)
    plan = BatchPlan(batch.num_rows, batch_size, 0)
    rows = plan.rows(0, 1)[0]
    first = batch.take(rows) if batch_size else batch
    program.initialise(first, 0)
    structure = inspect_program(program, first)
    spec = OptimizerSpec(**{"learning_rate": 0.01, **options})
    objective = prepare(objective, structure)
    schedules = schedules_of({}, objective, controls, warmup)
    minibatch = batch_size is not None
    problem = Problem(program, structure, objective, spec, batch, minibatch, batch.num_rows, schedules, 50)
    return problem, plan


def start(engine):
    return engine.initial_state(noise_state(3, CPU)).clone()


def assert_same(state, other, tolerance):
    for found, wanted in zip(*(list(s.flatten().items()) for s in (state, other)), strict=True):
        assert found[0] == wanted[0]
        if found[0].startswith("random/") or not found[1].is_floating_point():
            assert torch.equal(found[1], wanted[1]), found[0]
        else:
            torch.testing.assert_close(found[1], wanted[1], rtol=tolerance, atol=tolerance, msg=found[0])


def compare(step, plan, num_steps=50, tolerance=1e-4, **options):
    """Eager and compiled from one start; returns the compiled engine."""
    eager = EagerEngine(step)
    state = start(eager)
    wanted, terms = eager.run(state.clone(), plan.rows(0, num_steps))
    wanted = wanted.clone()
    engine = CompiledEngine(step, **options)
    found, own = engine.run(state.clone(), plan.rows(0, num_steps))
    torch.testing.assert_close(own, terms, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert_same(found, wanted, tolerance)
    assert engine.num_compilations == 1
    return engine


# ---------------------------------------------------------------- the traced step, without a compiler


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_traced_step_is_the_eager_step(name):
    compare(*make(name), num_steps=12, loop=StaticLoop)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["ppca", "schools"])
def test_every_optimizer_is_torchs_own(name, optimizer):
    compare(*make(name, optimizer=optimizer), num_steps=12, loop=StaticLoop)


@pytest.mark.parametrize("name", ["ppca", "sampled"])
def test_clipping_schedule_and_warm_up_follow_the_step(name):
    options = {
        "clip_norm": 0.05,
        "schedule": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
        "kl_warmup": 0.2,
    }
    compare(*make(name, **options), num_steps=15, loop=StaticLoop)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("adam", {"amsgrad": True, "weight_decay": 0.1}),
        ("adamw", {"betas": (0.5, 0.9), "foreach": True}),
        ("sgd", {"momentum": 0.9, "nesterov": True}),
        ("rmsprop", {"momentum": 0.5, "centered": True}),
        ("nadam", {"decoupled_weight_decay": True}),
        (torch.optim.Rprop, {}),
        (torch.optim.ASGD, {}),
    ],
)
def test_optimizer_options_are_torchs_own(optimizer, settings):
    compare(*make("ppca", optimizer=optimizer, options=settings), num_steps=12, loop=StaticLoop)


def test_a_parameter_that_the_bound_does_not_use_stays():
    class Spare(VAE):
        def __init__(self):
            super().__init__()
            self.decoder.spare = nn.Parameter(torch.ones(3))
            self.decoder.forward = lambda z: self.decoder[2](torch.tanh(self.decoder[0](z)))

    step, plan = make(((Spare(), None), DATA, 16, None), optimizer="adamw")
    engine = compare(step, plan, num_steps=5, loop=StaticLoop)
    assert torch.equal(step.program.parameters["decoder.spare"], torch.ones(3))
    assert not any("spare" in name for name in engine._slots)


@pytest.mark.filterwarnings("ignore:.*not registered in the param store because requires_grad=False")
def test_frozen_parameters_stay_frozen():
    vae = VAE()
    vae.decoder[0].weight.requires_grad_(False)
    before = vae.decoder[0].weight.clone()
    compare(*make(((vae, None), DATA, 16, None)), num_steps=5, loop=StaticLoop)
    assert torch.equal(vae.decoder[0].weight, before)
    assert not vae.decoder[0].weight.requires_grad


def test_an_engine_made_and_tried_leaves_the_program_as_it_was():
    step, _ = make("vae, batch norm")
    before = {k: v.detach().clone() for k, v in step.program.tensors().items()}
    noise = torch.get_rng_state()
    engine = CompiledEngine(step, loop=StaticLoop)
    assert all(torch.equal(v, before[k]) for k, v in step.program.tensors().items())
    assert torch.equal(torch.get_rng_state(), noise)
    assert engine.initial_state(noise_state(3, CPU)).optimizer == {}


# ---------------------------------------------------------------- compiled

ANNEALED = {
    "clip_norm": 1.0,
    "schedule": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50),
    "kl_warmup": 0.4,
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ppca", ANNEALED),
        ("vae, batch norm", {"optimizer": "adamw"}),
        ("multivariate", {"optimizer": "rmsprop"}),
        ("hierarchical", {}),
        ("enumerated", {"optimizer": "sgd", "options": {"momentum": 0.9}}),
        ("sampled, baseline", {}),
        ("samplers", {}),
    ],
)
def test_the_compiled_loop_is_the_eager_loop(name, options):
    compare(*make(name, **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_compiles(name):
    compare(*make(name))


@pytest.fixture(scope="module")
def fitted_in_one():
    """Fifty steps of one program: the engine, its start, and its end."""
    torch.manual_seed(0)
    step, plan = make("ppca")
    engine = CompiledEngine(step)
    before = start(engine)
    after, terms = engine.run(before.clone(), plan.rows(0, 50))
    return engine, plan, before, after.clone(), terms


@pytest.mark.parametrize("lengths", [(20, 30), (1, 1, 48), (7, 36, 7)])
def test_chunks_of_any_length_share_one_compilation_and_give_the_same_bits(fitted_in_one, lengths):
    engine, plan, before, after, terms = fitted_in_one
    state, found = before.clone(), []
    for length in lengths:
        state, part = engine.run(state, plan.rows(state.step, length))
        state = state.clone()  # as from a file
        found.append(part)
    assert torch.equal(torch.cat(found), terms)
    assert_same(state, after, 0.0)
    assert engine.num_compilations == 1


def test_a_chunk_may_be_longer_than_the_buffers(fitted_in_one):
    engine, plan, before, *_ = fitted_in_one
    steps = engine._loop.capacity + 100
    long, terms = engine.run(before.clone(), plan.rows(0, steps))
    long = long.clone()
    assert terms.shape == (steps, 3)
    state, _ = engine.run(before.clone(), plan.rows(0, 100))
    state, _ = engine.run(state, plan.rows(100, steps - 100))
    assert_same(state, long, 0.0)


def test_either_engine_goes_on_from_the_others_state(fitted_in_one):
    engine, plan, before, after, terms = fitted_in_one
    eager = EagerEngine(engine.problem)
    first, second = (eager, engine), (engine, eager)
    for one, other in (first, second):
        state, head = one.run(before.clone(), plan.rows(0, 20))
        state, tail = other.run(state.clone(), plan.rows(20, 30))
        torch.testing.assert_close(torch.cat([head, tail]), terms, rtol=1e-4, atol=1e-4)
        assert_same(state, after, 1e-4)


def test_parameters_of_other_numbers_of_steps_are_trained_by_their_own(fitted_in_one):
    engine, plan, _, after, _ = fitted_in_one
    state = after.clone()
    next(iter(state.optimizer.values()))["step"] += 100.0
    expected, _ = EagerEngine(engine.problem).run(state.clone(), plan.rows(50, 3))
    found, _ = engine.run(state.clone(), plan.rows(50, 3))
    assert_same(found, expected, 0.0)


def test_noise_is_fresh_in_every_step():
    step, plan = make(
        (ppca(), DATA, None, None), learning_rate=1e-12
    )  # all rows, parameters as good as fixed: only the noise differs
    engine = CompiledEngine(step)
    _, terms = engine.run(start(engine), plan.rows(0, 60))
    bounds = terms[:, 0]
    assert len(bounds.unique()) == 60
    assert abs(_autocorrelation(bounds)) < 3 / math.sqrt(60)  # 3 standard errors of white noise


def _autocorrelation(values):
    centred = values - values.mean()
    return float((centred[1:] * centred[:-1]).sum() / centred.square().sum())


def test_an_interrupted_compilation_leaves_the_state_whole(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    step, plan = make("ppca")
    engine = CompiledEngine(step, loop=interrupted)
    state, _ = engine.run(start(engine), plan.rows(0, 1))  # the first step is eager
    before = state.clone()
    with pytest.raises(KeyboardInterrupt):
        engine.run(state, plan.rows(1, 5))
    assert_same(state, before, 0.0)


def test_two_engines_stay_apart():
    (one, plan), (other, _) = make("ppca"), make("ppca", learning_rate=0.02)
    engines = [CompiledEngine(one), CompiledEngine(other)]
    states = [start(e) for e in engines]
    alone, _ = engines[0].run(states[0].clone(), plan.rows(0, 20))
    alone = alone.clone()
    for begin in (0, 10):
        states = [e.run(s, plan.rows(begin, 10))[0] for e, s in zip(engines, states, strict=True)]
    assert_same(states[0], alone, 0.0)
    assert not torch.equal(states[1].parameters["W"], alone.parameters["W"])


def test_everything_global_is_left_as_found():
    import torch._inductor.config as inductor

    step, plan = make("delta", learning_rate=0.0123)
    CompiledEngine(step, loop=StaticLoop)  # what torch loads on first use is loaded
    pyro.enable_validation(True)
    settings, compiling = dict(inductor.get_config_copy()), torch.compiler.is_compiling
    functions = (
        pyro.infer.util._fulldot,
        pyro.infer.trace_elbo.torch_item,
        pyro.infer.trace_elbo.warn_if_nan,
    )
    torch.manual_seed(11)
    noise = torch.get_rng_state()
    engine = CompiledEngine(step)
    engine.run(start(engine), plan.rows(0, 5))
    assert torch.equal(torch.get_rng_state(), noise)
    assert inductor.get_config_copy() == settings
    assert torch.compiler.is_compiling is compiling
    assert functions == (
        pyro.infer.util._fulldot,
        pyro.infer.trace_elbo.torch_item,
        pyro.infer.trace_elbo.warn_if_nan,
    )
    assert torch.distributions.Distribution._validate_args
    assert pyro.infer.util.is_validation_enabled()


# ---------------------------------------------------------------- what cannot be compiled


def branching():
    model, guide = ppca()

    def branching_model(x):
        if x.mean() > 0:  # a branch on values
            pass
        return model(x)

    return branching_model, guide


def test_a_branch_on_values_is_named():
    step, plan = make((branching(), DATA, 16, None))
    with pytest.raises(ProgramError, match=r"test_compiled.py, line \d+: `if x.mean\(\) > 0:"):
        choose_engine("compiled", step, 10)
    engine, note = choose_engine("auto", step, 10**7)
    assert engine.name == "eager"
    assert "if x.mean() > 0" in note
    engine.run(start(engine), plan.rows(0, 2))


def test_a_sampler_that_branches_is_named_by_its_site():
    def model(y):
        pyro.sample("angle", dist.VonMises(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0).expand([8]).to_event(1), obs=y)

    def guide(y):
        loc = pyro.param("loc", lambda: torch.zeros(()))
        pyro.sample("angle", dist.VonMises(loc, 1.0))

    step, _ = make(((model, guide), SCHOOLS, None, None))
    with pytest.raises(UntraceableError, match="angle"):
        CompiledEngine(step)


def test_a_tensor_changed_in_place_behind_our_back_is_refused():
    model, guide = ppca()
    calls = torch.zeros(())

    def counting(x):
        calls.add_(1)
        return model(x)

    step, _ = make(((counting, guide), DATA, 16, None))
    with pytest.raises(UntraceableError, match="in place"):
        CompiledEngine(step)


def lengths_of_packed():
    """The lengths that `pad_packed_sequence` returns mask the padding."""
    x = nn.utils.rnn.pack_padded_sequence(torch.randn(6, 4, 1), torch.tensor([4, 4, 3, 2, 2, 1]), True)

    def model(_):
        values, lengths = nn.utils.rnn.pad_packed_sequence(x, batch_first=True)
        scale = pyro.param("scale", torch.tensor(1.0))
        mask = torch.arange(4).unsqueeze(-1) < lengths
        with pyro.plate("rows", 6), pyro.plate("steps", 4, dim=-2), pyro.poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(scale, 1.0), obs=values.squeeze(-1).T)

    return (model, lambda x: None), torch.randn(6), None, None


def masked_weights():
    """Weights picked by a mask that is a buffer of the network, as in Pyro's flows."""

    class Triangle(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))
            self.register_buffer("mask", torch.tensor([[True, False], [True, True]]))

        def forward(self):
            return self.weight[self.mask].sum()

    net = Triangle()

    def model(x):
        pyro.module("net", net)
        with data_plate(x):
            pyro.sample("x", dist.Normal(net(), 1.0), obs=x)

    return (model, lambda x: None), torch.randn(6), None, None


@pytest.mark.parametrize("parts", [lengths_of_packed, masked_weights])
def test_what_is_constant_is_recorded_as_it_is(parts):
    compare(*make(parts()), num_steps=5, loop=StaticLoop)


def test_a_buffer_that_each_step_writes_to_may_not_be_read():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self):
            late = bool(self.calls > 3)
            self.calls += 1
            return self.weight * (2.0 if late else 1.0)

    net = Counting()

    def model(x):
        pyro.module("net", net)
        with data_plate(x):
            pyro.sample("x", dist.Normal(net(), 1.0), obs=x)

    step, _ = make(((model, lambda x: None), torch.randn(6), None, None))
    with pytest.raises(UntraceableError, match=r"'net.calls', to which each step writes"):
        CompiledEngine(step)


def test_a_mask_of_dropout_is_drawn_before_it_is_used():
    """Behind batch normalisation, whose loops inductor fits to those of the product with the mask."""
    encoder = nn.Sequential(
        nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4)
    )

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.repeat(1, 4), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with data_plate(x):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    compare(*make(((model, guide), torch.randn(20, 8), None, None)), num_steps=5)


@pytest.mark.parametrize("fall_back", [True, False])
def test_a_counter_in_python_does_not_go_unseen(fall_back):
    model, guide = ppca()
    calls = []

    def counting(x):
        calls.append(0)
        with pyro.poutine.scale(scale=1.0 + len(calls)):
            return model(x)

    step, plan = make(((counting, guide), DATA, 16, None))
    engine = CompiledEngine(step, loop=StaticLoop, fall_back=fall_back)
    state = start(engine)
    if not fall_back:
        with pytest.raises(ProgramError, match="differs from the eager one"):
            engine.run(state, plan.rows(0, 5))
        return
    state, terms = engine.run(state, plan.rows(0, 5))
    assert (engine.name, len(terms), state.step) == ("eager", 5, 5)
    assert "differs" in engine.note


def test_without_a_compiler_the_eager_engine_runs(monkeypatch):
    step, _ = make("ppca", learning_rate=0.0321)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.setattr(choosing, "is_compiled", lambda traced: False)
    engine, note = choose_engine("auto", step, 10**7)
    assert (engine.name, note) == (
        "eager",
        "eager engine: no C++ compiler was found (install g++ or clang++)",
    )
    with pytest.raises(SettingError, match="no C\\+\\+ compiler"):
        choose_engine("compiled", step, 10**7)


def test_a_compiler_that_fails_is_reported(monkeypatch):
    step, plan = make("particles, looped")
    monkeypatch.setattr(native.cache, "is_stored", lambda path: False)
    monkeypatch.setattr(native, "_precompile", lambda header: None)
    monkeypatch.setattr(native, "_parts", lambda steps, others, num_inputs: ["this is no C++"])
    engine = CompiledEngine(step, fall_back=True)
    state, terms = engine.run(start(engine), plan.rows(0, 5))
    assert (engine.name, state.step, len(terms)) == ("eager", 5, 5)
    assert "compiler" in engine.note


LONG = ["sh", "-c", "sleep 60 & wait"]
"""A compiler is a driver and the processes that it starts."""


def test_nothing_waits_for_a_compiler_that_is_not_needed():
    """Neither an interrupt, nor one part of a step for another that fails."""
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), native._compiler(LONG):
        raise KeyboardInterrupt
    with pytest.raises(native.CompilerError, match="part one"):
        native._call(["sh", "-c", "echo 'error: part one' >&2; exit 1"], LONG)
    assert time.perf_counter() - start < 20


def test_headers_are_precompiled_after_the_first_step_and_no_longer_than_the_run(monkeypatch, tmp_path):
    started = []

    def command(sources, target, header=None):
        started.append(target)
        return LONG if target.suffix == ".gch" else ["sh", "-c", f"echo > {target}"]

    monkeypatch.setattr(native, "_PRECOMPILED", set())
    monkeypatch.setattr(native.cache, "entry", lambda key, suffix: tmp_path / f"{key}{suffix}")
    monkeypatch.setattr(native.inductor, "compiler_command", command)
    header = native._header()
    with native.cache.storing(tmp_path / "step.so") as target:
        native._build(["one", "two"], target, header)
    assert [path.suffix for path in started] == [".gch", ".o", ".o", ".so"]
    native._precompile(header)
    (running,) = (t for t in threading.enumerate() if isinstance(t, native.Precompilation))
    running.stop()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".h", ".so"]


def test_seconds_of_steps_are_not_those_of_compiling(monkeypatch):
    class SlowLoop(StaticLoop):
        def __init__(self, *arguments):
            time.sleep(1.5)
            super().__init__(*arguments)

    monkeypatch.setattr("pyrolvm.inference.engine.compiled.NativeLoop", SlowLoop)
    options = {"num_steps": 30, "batch_size": 20, "engine": "compiled", "progress": False}
    fitted = pyrolvm.fit(pyrolvm.PPCA(5, 2), torch.randn(40, 5), **options)
    assert fitted.engine == "compiled engine"
    assert fitted.history["seconds"].iloc[-1] < 1.0


# ---------------------------------------------------------------- choosing


def test_a_busy_machine_does_not_make_compiling_pay(monkeypatch):
    """What delays eager steps would delay the compiler too."""
    run = EagerEngine.run

    def delayed(self, state, rows):
        time.sleep(0.1)
        return run(self, state, rows)

    monkeypatch.setattr(EagerEngine, "run", delayed)
    step, _ = make("ppca")
    assert probe(step)[2] < 0.04


def test_short_runs_stay_eager():
    step, _ = make("ppca")
    for steps, reason in ((5, "too few"), (60, "compiling them takes longer")):
        engine, note = choose_engine("auto", step, steps)
        assert engine.name == "eager"
        assert f"{steps} steps" in note
        assert reason in note
    assert choose_engine("eager", step, 10**9)[0].name == "eager"
    with pytest.raises(SettingError, match="auto, compiled, eager"):
        choose_engine("jit", step, 20)


def test_long_runs_are_compiled():
    step, _ = make("ppca")
    engine, note = choose_engine("auto", step, 10**7)
    assert engine.name == "compiled"
    assert note.startswith("compiled engine: 10000000 steps")


def test_other_devices_are_eager(monkeypatch):
    step, _ = make("ppca")
    monkeypatch.setattr(step.program, "device", torch.device("mps"))
    assert choosing._obstacle(step) == "there is no compiled engine for mps"


# ---------------------------------------------------------------- the cache


def test_another_process_finds_the_compiled_step():
    script = textwrap.dedent(
        """
        import sys
        from test_compiled import CompiledEngine, make, start
        step, plan = make("ppca")
        told = []
        engine = CompiledEngine(step, on_compile=told.append)
        engine.run(start(engine), plan.rows(0, 5))
        print(len(told), "torch._inductor.compile_fx" in sys.modules)
        """
    )
    path = [str(p) for p in (*sys.path, *map(str, [__file__.rpartition("/")[0]]))]
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}\n{script}"]
    step, plan = make("ppca")
    engine = CompiledEngine(step)
    engine.run(start(engine), plan.rows(0, 3))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]


def test_the_cache_is_the_users_alone(tmp_path, monkeypatch):
    cache = native.cache
    monkeypatch.setenv("PYROLVM_CACHE", str(tmp_path / "own"))
    cache.folder.cache_clear()
    try:
        folder = cache.folder()
        assert folder == tmp_path / "own"
        assert folder.stat().st_mode & 0o777 == 0o700
        library = cache.entry("key", ".so")
        with cache.storing(library) as temporary:
            temporary.write_bytes(b"code")
        assert cache.is_stored(library)
        library.chmod(0o777)
        assert not cache.is_stored(library)
        _store_half(cache)
        assert [p.name for p in folder.iterdir()] == ["key.so"]
    finally:
        cache.folder.cache_clear()


def _store_half(cache):
    with contextlib.suppress(KeyError), cache.storing(cache.entry("other", ".so")) as temporary:
        temporary.write_bytes(b"half")
        raise KeyError


def test_the_oldest_entries_go(tmp_path, monkeypatch):
    cache = native.cache
    monkeypatch.setattr(cache, "KEPT", 2)
    for i in range(4):
        with cache.storing(tmp_path / f"{i}.so") as temporary:
            temporary.write_bytes(b"code")
    assert len(list(tmp_path.glob("*.so"))) == 2
    assert (tmp_path / "3.so").exists()


def test_what_the_code_depends_on_is_in_the_key(monkeypatch):
    def key(name, **options):
        return native.key(CompiledEngine(make(name, **options)[0], loop=StaticLoop)._traced)

    first = key("ppca")
    assert key("ppca") == first
    assert key("ppca", learning_rate=0.5) == first
    assert key("ppca", clip_norm=0.5) != first
    assert key("ppca", optimizer="adam", options={"betas": (0.8, 0.9)}) != first
    assert key("tempered") != first
    monkeypatch.setattr(native.cache, "_surroundings", lambda: "another machine")
    assert key("ppca") != first


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0+cpu", "3.0.0a1"])
def test_another_torch_runs_eagerly_and_says_so(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    sentence = f"the compiled engine knows torch 2.11 to 2.13, and this is torch {version}"
    engine, note = choose_engine("auto", make("ppca")[0], 10**6)
    assert engine.name == "eager"
    assert note == f"eager engine: {sentence}"
    with pytest.raises(SettingError, match=re.escape(sentence)):
        choose_engine("compiled", make("ppca")[0], 100)


# ---------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["ppca", "vae", "hierarchical", "sampled"])
def test_the_captured_step_is_the_eager_step(name):
    device = torch.device("cuda")
    (model, guide), data, batch_size, objective = PROGRAMS[name]()
    batch = as_batch(data, device=device)
    program = Program(model, guide, device=device)
    plan = BatchPlan(batch.num_rows, batch_size, 0)
    rows = plan.rows(0, 1)[0].to(device)
    program.initialise(batch.take(rows), 0)
    structure = inspect_program(program, batch.take(rows))
    objective = prepare(objective, structure)
    step = Problem(program, structure, objective, OptimizerSpec(), batch, True, batch.num_rows)
    eager, engine = EagerEngine(step), CompiledEngine(step)
    state = eager.initial_state(noise_state(3, device)).clone()
    wanted, terms = eager.run(state.clone(), plan.rows(0, 30))
    wanted = wanted.clone()
    found, own = engine.run(state.clone(), plan.rows(0, 30))
    torch.testing.assert_close(own, terms, rtol=1e-3, atol=1e-3)
    assert_same(found, wanted, 1e-3)


def test_products_are_those_of_the_eager_engine():
    """In single and in double precision."""
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        fits = []
        for engine in ("eager", "compiled"):
            torch.manual_seed(2)
            model = pyrolvm.VAE(40, 3, "gaussian", hidden=(50,))
            options = {"engine": engine, "dtype": dtype, "num_steps": 20, "batch_size": 60, "progress": False}
            fits.append(pyrolvm.fit(model, x, **options))
        eager, compiled = fits
        assert compiled.engine.startswith("compiled engine")
        np.testing.assert_allclose(compiled.history["elbo"], eager.history["elbo"], rtol=1e-5)
