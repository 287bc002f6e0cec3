"""Everything that `pyro.infer.SVI` takes as its loss gives under `fit` the same bounds and gradients, from one seed."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.contrib.gp.kernels import RBF
from pyro.infer import SVI, EnergyDistance, ReweightedWakeSleep, Trace_ELBO, Trace_MMD, TraceGraph_ELBO

import pyrolvm
from pyrolvm.inference.program.noise import noise_state

X = torch.randn(30, generator=torch.Generator().manual_seed(0)) + 1.0
STEPS = 5
QUIET = {"progress": False, "num_steps": STEPS, "learning_rate": 0.05}


def model(x, observations=None):
    scale = pyro.param("scale", torch.tensor(1.5), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def guide(x, observations=None):
    loc = pyro.param("loc", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc * x, 0.7))


def chosen(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(pyro.param("step", torch.tensor(2.0)) * k, 1.0), obs=x)


def nothing(x):
    pass


def average(**options):
    def switched(x):
        rate = pyro.param("rate", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", len(x)):
            pyro.sample(
                "k", dist.Bernoulli(rate), infer={"baseline": {"use_decaying_avg_baseline": True, **options}}
            )

    return switched


def plain(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(pyro.param("step", torch.tensor(2.0)) * k, 1.0), obs=x)


def svi_bounds(model, guide, loss):
    """-loss of each of `SVI`'s steps, in nats for all data."""
    before = torch.get_rng_state()
    with pyro.get_param_store().scope():
        if getattr(loss, "max_plate_nesting", 0) == math.inf:
            loss.max_plate_nesting = 1 + int(loss.vectorize_particles and loss.num_particles > 1)
        torch.set_rng_state(noise_state(0, torch.device("cpu"))["cpu"])
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss)
        found = [svi.step(X) for _ in range(STEPS)]
        parameters = {k: v.detach().clone() for k, v in pyro.get_param_store()._params.items()}
    torch.set_rng_state(before)
    return torch.tensor([-(f[0] if isinstance(f, tuple) else float(f)) for f in found]), parameters


def own_loss(model, guide, *args):
    guide_trace = pyro.poutine.trace(guide).get_trace(*args)
    model_trace = pyro.poutine.trace(pyro.poutine.replay(model, guide_trace)).get_trace(*args)
    return guide_trace.log_prob_sum() - model_trace.log_prob_sum()


class Half(Trace_ELBO):
    """An ELBO of a user's own."""

    def loss_and_grads(self, model, guide, *args, **kwargs):
        loss = 0.5 * own_loss(model, guide, *args)
        loss.backward()
        return loss.item()


def ignored(kind, **options):
    return lambda: kind(ignore_jit_warnings=True, **options)


LOSSES = {
    "Trace": (model, guide, Trace_ELBO),
    "Trace, 3 particles": (model, guide, lambda: Trace_ELBO(num_particles=3, vectorize_particles=True)),
    "TraceGraph": (plain, average(), TraceGraph_ELBO),
    "TraceGraph, beta": (plain, average(baseline_beta=0.5), TraceGraph_ELBO),
    "TraceEnum": (chosen, nothing, infer.TraceEnum_ELBO),
    "TraceMeanField": (model, guide, infer.TraceMeanField_ELBO),
    "TraceTMC": (chosen, nothing, infer.TraceTMC_ELBO),
    "Renyi": (model, guide, lambda: infer.RenyiELBO(alpha=0.5, num_particles=4, vectorize_particles=False)),
    "ReweightedWakeSleep": (model, guide, lambda: ReweightedWakeSleep(num_particles=3, insomnia=1.0)),
    "wake and sleep": (
        model,
        guide,
        lambda: ReweightedWakeSleep(num_particles=2, insomnia=0.5, vectorize_particles=False),
    ),
    "Trace_MMD": (model, guide, lambda: Trace_MMD(RBF(1), num_particles=4)),
    "EnergyDistance": (model, guide, lambda: EnergyDistance(num_particles=4)),
    "JitTraceEnum": (chosen, nothing, ignored(infer.JitTraceEnum_ELBO)),
    "a function": (model, guide, lambda: own_loss),
    "a bound method": (model, guide, lambda: Trace_ELBO().differentiable_loss),
    "a class of one's own": (model, guide, Half),
}
COMPILED = ("TraceGraph", "TraceTMC", "ReweightedWakeSleep", "Trace_MMD", "EnergyDistance", "a function")


def fitted(name, **options):
    own_model, own_guide, loss = LOSSES[name]
    return pyrolvm.fit(
        own_model, X, guide=own_guide, objective=loss(), **{**QUIET, "engine": "eager", **options}
    )


def bounds(fit):
    return torch.tensor(fit.history["elbo"].to_numpy()).float() * 30


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOSSES)
def test_bounds_and_parameters_are_those_of_svi(name):
    own_model, own_guide, loss = LOSSES[name]
    expected, parameters = svi_bounds(own_model, own_guide, loss())
    fit = fitted(name)
    if name != "Renyi":  # per datum here, over all data in Pyro
        torch.testing.assert_close(bounds(fit), expected, rtol=2e-4, atol=2e-3)
        for key, value in fit.program.parameters.items():
            torch.testing.assert_close(value.detach(), parameters[key], rtol=2e-3, atol=2e-3)
    assert fit.elbo == fit.elbo


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_bounds_are_the_eager_ones(name):
    torch.testing.assert_close(
        bounds(fitted(name, engine="compiled")), bounds(fitted(name)), rtol=1e-4, atol=1e-3
    )


def test_the_jit_forms_are_their_plain_ones():
    """Under SVI the first of their runs draws noise for the tracer: only the plain form has the same numbers."""
    jit = pyrolvm.fit(model, X, guide=guide, objective=infer.JitTrace_ELBO(), engine="eager", **QUIET)
    assert torch.equal(bounds(jit), bounds(fitted("Trace")))


def test_tail_adaptive_reports_the_elbo_of_its_draws():
    def loss():
        return infer.TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True)

    _, parameters = svi_bounds(model, guide, loss())
    fit = pyrolvm.fit(model, X, guide=guide, objective=loss(), engine="eager", **QUIET)
    assert math.isfinite(fit.elbo)
    for key, value in fit.program.parameters.items():
        torch.testing.assert_close(value.detach(), parameters[key], rtol=2e-3, atol=2e-3)


def test_the_decaying_average_is_in_checkpoints(tmp_path):
    whole = fitted("TraceGraph", num_steps=8)
    fitted("TraceGraph", num_steps=4, checkpoint=tmp_path)
    resumed = fitted("TraceGraph", num_steps=8, checkpoint=tmp_path, resume=True)
    (name,) = [k for k in resumed.program.buffers if "averages" in k]
    assert torch.equal(resumed.program.buffers[name], whole.program.buffers[name])
    assert torch.equal(resumed.program.parameters["rate"], whole.program.parameters["rate"])
    whole.save(tmp_path / "run")
    again = pyrolvm.load(tmp_path / "run", model=plain, guide=average())
    assert torch.equal(again.program.parameters["rate"], whole.program.parameters["rate"])


def test_a_loss_without_gradient_is_refused():
    with pytest.raises(pyrolvm.ProgramError, match="returns float, through which no gradient passes"):
        pyrolvm.fit(model, X, guide=guide, objective=Trace_ELBO().loss, engine="eager", **QUIET)
    with pytest.raises(pyrolvm.SettingError, match="or a function loss"):
        pyrolvm.fit(model, X, guide=guide, objective=3, engine="eager", **QUIET)
