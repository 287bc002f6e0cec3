"""Losses beside the usual ones."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.gp.kernels import RBF
from pyro.infer import (
    EnergyDistance,
    ReweightedWakeSleep,
    Trace_MMD,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
)

from corpus.form import Pair, program

ENUMERATED = {"k-hat per datum": "'k' is enumerated", "collapse": "'k' is enumerated"}


def rows() -> torch.Tensor:
    """Data [12]."""
    return torch.randn(12) + 0.5


def model(x, observations=None):
    scale = pyro.param("scale", torch.tensor(1.5), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def guide(x, observations=None):
    loc = pyro.param("loc", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc * x, 0.7))


@program
def closed_form_kl() -> Pair:
    """TraceMeanField_ELBO."""
    return Pair(model, guide, (rows(),), objective=TraceMeanField_ELBO)


@program
def energy_distance() -> Pair:
    """A likelihood-free loss."""
    return Pair(
        model, guide, (rows(),), objective=lambda: EnergyDistance(num_particles=3, max_plate_nesting=2)
    )


@program
def maximum_mean_discrepancy() -> Pair:
    """Trace_MMD with a kernel of pyro.contrib.gp."""
    return Pair(model, guide, (rows(),), objective=lambda: Trace_MMD(RBF(1), num_particles=3))


@program
def wake_phases() -> Pair:
    """Reweighted wake-sleep without its sleep phase."""
    return Pair(model, guide, (rows(),), objective=lambda: ReweightedWakeSleep(num_particles=3, insomnia=1.0))


def weighted(model, guide, *args, **kwargs):
    """A negative ELBO with a KL of half weight, written by hand."""
    drawn = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
    run = pyro.poutine.trace(pyro.poutine.replay(model, drawn)).get_trace(*args, **kwargs)
    run.compute_log_prob()
    likelihood = run.nodes["x"]["log_prob_sum"]
    return 0.5 * (drawn.log_prob_sum() - run.nodes["z"]["log_prob_sum"]) - likelihood


@program
def a_loss_of_ones_own() -> Pair:
    """A function as loss."""
    return Pair(model, guide, (rows(),), objective=lambda: weighted)


@program(missing=ENUMERATED)
def tensor_monte_carlo() -> Pair:
    """TraceTMC_ELBO over a discrete latent."""

    def chosen(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(pyro.param("step", torch.tensor(2.0)) * k, 1.0), obs=x)

    return Pair(chosen, lambda x: None, (rows(),), objective=TraceTMC_ELBO)


@program
def a_decaying_average_baseline() -> Pair:
    """TraceGraph_ELBO with the baseline of Pyro's tutorial."""

    def switched(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(pyro.param("step", torch.tensor(2.0)) * k, 1.0), obs=x)

    def switches(x):
        rate = pyro.param("rate", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
        baseline = {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}}
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(rate), infer=baseline)

    return Pair(switched, switches, (rows(),), objective=TraceGraph_ELBO)
