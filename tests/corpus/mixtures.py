"""Mixtures, topic models and other discrete latents."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiscreteParallel, AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import init_to_sample
from torch import nn
from torch.distributions import constraints

from corpus.form import NO_LATENTS_OF_ROWS, Pair, program

SUMMED_OUT = {"k-hat per datum": "is enumerated", "collapse": "is enumerated"}
"""What `diagnose` has not where latents of each datum are summed out of the model."""


def two_heaps() -> torch.Tensor:
    """Thirty numbers in two heaps."""
    return torch.cat([torch.randn(15) - 2, torch.randn(15) + 2])


@program(quick_compiled=True, missing=SUMMED_OUT)
def gaussian_mixture() -> Pair:
    """A mixture of two with the assignments summed out, all else at points by AutoDelta."""

    @config_enumerate
    def model(data):
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    blocked = pyro.poutine.block(model, expose=["weights", "locs", "scale"])
    return Pair(
        model,
        AutoDelta(blocked, init_loc_fn=init_to_sample),
        (two_heaps(),),
        objective=lambda: TraceEnum_ELBO(max_plate_nesting=1),
    )


@program(missing=SUMMED_OUT)
def mixture_with_normal_guide() -> Pair:
    """A mixture with the assignments summed out, its parameters by AutoNormal."""

    @config_enumerate
    def model(data):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(data)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[k], 1.0), obs=data)

    guide = AutoNormal(pyro.poutine.block(model, hide=["k"]))
    return Pair(model, guide, (two_heaps(),), objective=lambda: TraceEnum_ELBO(max_plate_nesting=1))


@program
def guide_side_enumeration() -> Pair:
    """A mixture whose guide has the assignments' probabilities as parameters, enumerated in the guide."""

    def model(data):
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(data)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("obs", dist.Normal(locs[k], 1.0), obs=data)

    @config_enumerate
    def guide(data):
        probs = pyro.param("probs", torch.ones(30, 2) / 2, constraint=constraints.simplex)
        with pyro.plate("data", len(data)):
            pyro.sample("k", dist.Categorical(probs))

    return Pair(model, guide, (two_heaps(),), objective=TraceEnum_ELBO)


@program(quick=False)
def auto_discrete_parallel() -> Pair:
    """AutoGuideList of AutoNormal and AutoDiscreteParallel."""

    def model(data):
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(data)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("obs", dist.Normal(locs[k], 1.0), obs=data)

    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["locs"])))
    guide.append(AutoDiscreteParallel(pyro.poutine.block(model, expose=["k"])))
    return Pair(model, guide, (two_heaps(),), objective=lambda: TraceEnum_ELBO(max_plate_nesting=1))


@program
def discrete_latents_drawn() -> Pair:
    """Bernoulli switches drawn by an amortised guide, under TraceGraph_ELBO with a decaying-average baseline."""
    x = two_heaps()

    def model(x):
        loc = pyro.param("loc", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(loc * (2 * on - 1), 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample(
                "on",
                dist.Bernoulli(logits=slope * x),
                infer={"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}},
            )

    return Pair(model, guide, (x,), objective=TraceGraph_ELBO)


@program(missing=SUMMED_OUT)
def topic_model() -> Pair:
    """Latent Dirichlet allocation: words by documents in nested plates, topics of words summed out, amortised guide."""
    data = torch.randint(0, 12, (8, 6))  # [words, documents]

    @config_enumerate
    def model(data):
        with pyro.plate("topics", 3):
            topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(12) / 3))
        with pyro.plate("documents", data.shape[1]) as index:
            doc_topics = pyro.sample("doc_topics", dist.Dirichlet(torch.ones(3)))
            with pyro.plate("words", data.shape[0]):
                topic = pyro.sample("word_topics", dist.Categorical(doc_topics))
                pyro.sample("doc_words", dist.Categorical(topic_words[topic]), obs=data)
        return index

    predictor = nn.Sequential(nn.Linear(12, 8), nn.Sigmoid(), nn.Linear(8, 3), nn.Softmax(dim=-1))

    def guide(data):
        pyro.module("predictor", predictor)
        posterior = pyro.param(
            "topic_words_posterior", torch.ones(3, 12), constraint=constraints.greater_than(0.5)
        )
        with pyro.plate("topics", 3):
            pyro.sample("topic_words", dist.Dirichlet(posterior))
        counts = torch.zeros(12, data.shape[1]).scatter_add(0, data, torch.ones(data.shape))
        with pyro.plate("documents", data.shape[1]):
            pyro.sample("doc_topics", dist.Delta(predictor(counts.T), event_dim=1))

    return Pair(model, guide, (data,), objective=lambda: TraceEnum_ELBO(max_plate_nesting=2))


@program(quick=False)
def dirichlet_process() -> Pair:
    """A truncated Dirichlet process by its sticks, assignments in the guide and enumerated there."""
    data = two_heaps()

    def sticks(beta):
        rest = (1 - beta).cumprod(-1)
        return torch.nn.functional.pad(beta, (0, 1), value=1) * torch.nn.functional.pad(rest, (1, 0), value=1)

    def model(data):
        with pyro.plate("sticks", 4):
            beta = pyro.sample("beta", dist.Beta(1.0, 1.5))
        with pyro.plate("components", 5):
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Categorical(sticks(beta)))
            pyro.sample("obs", dist.Normal(mu[z], 1.0), obs=data)

    @config_enumerate
    def guide(data):
        kappa = pyro.param("kappa", torch.ones(4), constraint=constraints.positive)
        tau = pyro.param("tau", lambda: torch.randn(5))
        phi = pyro.param("phi", lambda: torch.ones(30, 5) / 5, constraint=constraints.simplex)
        with pyro.plate("sticks", 4):
            pyro.sample("beta", dist.Beta(torch.ones(4), kappa))
        with pyro.plate("components", 5):
            pyro.sample("mu", dist.Normal(tau, 0.5))
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Categorical(phi))

    return Pair(model, guide, (data,), objective=lambda: TraceEnum_ELBO(max_plate_nesting=1))


@program(
    declines={
        **NO_LATENTS_OF_ROWS,
        **dict.fromkeys(("predict", "reconstruct", "sample"), "observes no data"),
    },
    missing={"predictive check": "observes no data"},
)
def zero_inflated() -> Pair:
    """Zero-inflated counts as a mixture through log-densities and pyro.factor."""
    y = torch.poisson(2 * torch.ones(25)) * torch.bernoulli(0.6 * torch.ones(25))

    def model(y):
        gate = pyro.sample("gate", dist.Beta(2.0, 2.0))
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        inflated = dist.Poisson(rate).log_prob(y) + (1 - gate).log()
        at_zero = torch.where(y == 0, gate.log(), torch.full_like(y, -1e30))
        pyro.factor("likelihood", torch.logaddexp(at_zero, inflated).sum())

    return Pair(model, AutoNormal(model), (y,))
