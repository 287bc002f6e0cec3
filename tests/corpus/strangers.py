"""Programs in the manner of Pyro's forum that brought up a fault, or are built like no other here."""

from __future__ import annotations

from typing import ClassVar

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import nn

from corpus.form import NO_LATENTS_OF_ROWS, Pair, program

NO_SAMPLE = "has no sample()"


@program(
    declines={
        **NO_LATENTS_OF_ROWS,
        "predict": NO_SAMPLE,
        "reconstruct": "neither a mean nor sample()",
        "sample": NO_SAMPLE,
    },
    missing={"predictive check": NO_SAMPLE},
)
def a_likelihood_without_draws() -> Pair:
    """A likelihood written as a distribution that has a density alone."""

    class Lik(dist.TorchDistribution):
        arg_constraints: ClassVar[dict] = {}
        support = dist.constraints.real

        def __init__(self, mean):
            self.mu = mean
            super().__init__(mean.shape, validate_args=False)

        def log_prob(self, value):
            return -((value - self.mu) ** 2) / 2

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", Lik(mu.expand(len(x))), obs=x)

    return Pair(model, "AutoNormal", (torch.randn(20),))


@program(declines=NO_LATENTS_OF_ROWS)
def deep_kernel_by_warping() -> Pair:
    """A variational sparse Gaussian process whose inputs go through a network first."""
    x = torch.randn(20, 3)
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    kernel = gp.kernels.Warping(gp.kernels.RBF(2), iwarping_fn=network)
    likelihood = gp.likelihoods.Gaussian()
    process = gp.models.VariationalSparseGP(x, x[:, 0].sin(), kernel, x[:5].clone(), likelihood, jitter=1e-4)
    return Pair(process.model, process.guide, objective=TraceMeanField_ELBO)


@program(declines=NO_LATENTS_OF_ROWS)
def two_processes_deep() -> Pair:
    """A deep Gaussian process: the first one's draws are the inputs of the second."""
    x = torch.randn(15, 2)

    class Deep(gp.parameterized.Parameterized):
        def __init__(self):
            super().__init__()
            common = {"whiten": True, "jitter": 1e-4}
            first, second = x[:4].clone(), torch.randn(4, 2)
            two = torch.Size([2])
            self.one = gp.models.VariationalSparseGP(
                x, None, gp.kernels.RBF(2), first, None, latent_shape=two, **common
            )
            self.two = gp.models.VariationalSparseGP(
                torch.zeros(15, 2), x.prod(-1), gp.kernels.RBF(2), second, gp.likelihoods.Gaussian(), **common
            )

        def model(self, x, y):
            self.one.set_data(x, None)
            loc, variance = self.one.model()
            h = pyro.sample("h", dist.Normal(loc, variance.clamp(min=1e-6).sqrt()).to_event(2))
            self.two.set_data(h.T, y)
            self.two.model()

        def guide(self, x, y):
            self.one.guide()
            self.two.guide()
            loc, variance = self.one(x)
            pyro.sample("h", dist.Normal(loc, variance.clamp(min=1e-6).sqrt()).to_event(2))

    deep = Deep()
    return Pair(deep.model, deep.guide, (x, x.prod(-1)))


@program(declines=NO_LATENTS_OF_ROWS)
def covariates_imputed_in_place() -> Pair:
    """Missing covariates as latents that are put into their places of the table."""
    x, y = torch.randn(20), torch.randn(20)
    gaps = torch.tensor([3, 7, 11])

    def model(x, y, gaps):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("missing", len(gaps)):
            filling = pyro.sample("filling", dist.Normal(mu, 1.0))
        filled = x.index_put((gaps,), filling.reshape(-1)[-len(gaps) :])
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=filled)
            pyro.sample("y", dist.Normal(slope * filled, 1.0), obs=y)

    return Pair(model, "AutoNormal", (x.index_fill(0, gaps, 0.0), y, gaps))


@program(declines=NO_LATENTS_OF_ROWS)
def counts_of_areas() -> Pair:
    """Counts of nine areas whose effects have a conditional autoregression over neighbours as prior."""
    places = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    near = ((places[:, None] - places).abs().sum(-1) == 1).float()

    def model(counts, near):
        strength = pyro.sample("strength", dist.Uniform(0.0, 0.99))
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        precision = tau * (torch.diag(near.sum(-1)) - strength * near)
        effect = pyro.sample("effect", dist.MultivariateNormal(torch.zeros(9), precision_matrix=precision))
        with pyro.plate("areas", 9):
            pyro.sample("counts", dist.Poisson((1.0 + effect).exp()), obs=counts)

    return Pair(model, AutoMultivariateNormal(model), (dist.Poisson(4.0).sample([9]), near))


@program(missing={"k-hat per datum": "is enumerated", "collapse": "is enumerated"})
def animals_seen_again() -> Pair:
    """Capture and recapture: whether an animal lives is summed out along pyro.markov, survival is shared."""
    seen = (torch.rand(8, 3) < 0.5).float()
    seen[:, 0] = 1.0

    def model(seen):
        survival = pyro.sample("survival", dist.Uniform(0.0, 1.0))
        sight = pyro.sample("sight", dist.Uniform(0.0, 1.0))
        with pyro.plate("animals", len(seen)):
            alive = torch.ones(len(seen))
            for t in pyro.markov(range(seen.shape[1])):
                chance = survival * alive if t else torch.ones(len(seen))
                alive = pyro.sample(f"alive_{t}", dist.Bernoulli(chance), infer={"enumerate": "parallel"})
                pyro.sample(f"seen_{t}", dist.Bernoulli(sight * alive), obs=seen[:, t])

    guide = AutoNormal(poutine.block(model, expose=["survival", "sight"]))
    return Pair(model, guide, (seen,), objective=lambda: TraceEnum_ELBO(max_plate_nesting=1))


@program(declines=NO_LATENTS_OF_ROWS)
def guides_within_guides() -> Pair:
    """An AutoGuideList within another."""

    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Gamma(2.0, 2.0))
        c = pyro.sample("c", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + c, b), obs=x)

    inner = AutoGuideList(poutine.block(model, hide=["a"]))
    inner.append(AutoNormal(poutine.block(model, expose=["b"])))
    inner.append(AutoDelta(poutine.block(model, expose=["c"])))
    outer = AutoGuideList(model)
    outer.append(AutoDiagonalNormal(poutine.block(model, expose=["a"])))
    outer.append(inner)
    return Pair(model, outer, (torch.randn(20),))


@program(declines=NO_LATENTS_OF_ROWS)
def censored_times() -> Pair:
    """Exponential times, as many observed as the data say, the others by the factor of their survival."""
    x, times, censored = torch.randn(25, 2), dist.Exponential(1.0).sample([25]), torch.arange(25) % 4 == 0

    def model(x, times, censored):
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        rate = (x @ slopes).exp()
        with pyro.plate("seen", int((~censored).sum())):
            pyro.sample("times", dist.Exponential(rate[~censored]), obs=times[~censored])
        with pyro.plate("censored", int(censored.sum())):
            pyro.factor("survival", -(rate * times)[censored])

    return Pair(model, AutoMultivariateNormal(model), (x, times, censored))


@program
def recurrent_both_ways() -> Pair:
    """A VAE of sequences by LSTMs with the batch first, in encoder and decoder."""

    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.reads, self.writes = nn.LSTM(2, 6, batch_first=True), nn.LSTM(2, 6, batch_first=True)
            self.head, self.out = nn.Linear(6, 4), nn.Linear(6, 2)

        def model(self, x):
            pyro.module("vae", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
                h, _ = self.writes(z.unsqueeze(-2).expand(*x.shape[:2], 2))
                pyro.sample("x", dist.Normal(self.out(h), 0.5).to_event(2), obs=x)

        def guide(self, x):
            pyro.module("vae", self)
            _, (h, _) = self.reads(x)
            loc, log_scale = self.head(h[-1]).chunk(2, -1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    vae = Sequences()
    return Pair(vae.model, vae.guide, (torch.randn(8, 4, 2),))


@program(compiled="depends on 'slope'")
def a_hand_written_elbo() -> Pair:
    """A subclass of Trace_ELBO that weighs the latents' terms by a half, particle by particle."""

    class Annealed(Trace_ELBO):
        def _differentiable_loss_particle(self, model_trace, guide_trace):
            loss = 0.0
            for trace, sign in ((model_trace, -1), (guide_trace, 1)):
                for site in trace.nodes.values():
                    if site["type"] == "sample":
                        loss = loss + sign * (1.0 if site["is_observed"] else 0.5) * site["log_prob_sum"]
            return loss.item(), loss

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.7))

    return Pair(model, guide, (torch.randn(15),), objective=Annealed)
