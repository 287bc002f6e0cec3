"""Factor analysis, item response, survival, Gaussian processes, time series."""

from __future__ import annotations

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroSample
from torch import nn
from torch.distributions import constraints

from corpus.form import NO_LATENTS_OF_ROWS, Pair, program


@program(quick=False)
def factor_analysis() -> Pair:
    """Bayesian factor analysis: loadings shared, scores in the plate of the data, by AutoNormal."""
    x = torch.randn(20, 4)

    def model(x):
        W = pyro.sample("W", dist.Normal(torch.zeros(2, 4), 1.0).to_event(2))
        noise = pyro.sample("noise", dist.Gamma(2.0 * torch.ones(4), 2.0).to_event(1))
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, noise.sqrt()).to_event(1), obs=x)

    return Pair(model, AutoNormal(model), (x,))


@program(declines=NO_LATENTS_OF_ROWS)
def item_response() -> Pair:
    """A two-parameter item response model from triples, persons and items in plates of their own."""
    person, item = torch.arange(60) % 10, torch.arange(60) % 6
    correct = torch.bernoulli(0.5 * torch.ones(60))

    def model(person, item, correct):
        with pyro.plate("persons", 10):
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 6):
            difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
            slope = pyro.sample("slope", dist.LogNormal(0.0, 0.3))
        with pyro.plate("answers", len(correct)):
            logits = slope[item] * (ability[person] - difficulty[item])
            pyro.sample("correct", dist.Bernoulli(logits=logits), obs=correct)

    return Pair(model, AutoNormal(model), (person, item, correct), objective=TraceMeanField_ELBO)


@program(declines=NO_LATENTS_OF_ROWS)
def survival_with_censoring() -> Pair:
    """Weibull survival: events observed under a mask, censored times by a Bernoulli of the survival function."""
    x = torch.randn(30)
    time = dist.Weibull(torch.exp(0.3 * x), 1.5).sample()
    censored = time > 1.5
    time = time.clamp(max=1.5)

    def model(x, time, censored):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.LogNormal(0.0, 0.5))
        law = dist.Weibull(torch.exp(a + b * x), k)
        with pyro.plate("patients", len(x)):
            with pyro.poutine.mask(mask=~censored):
                pyro.sample("time", law, obs=time)
            with pyro.poutine.mask(mask=censored):
                survives = torch.exp(-((time / law.scale) ** k))
                pyro.sample("alive", dist.Bernoulli(survives), obs=torch.ones(len(x)))

    return Pair(model, AutoDiagonalNormal(model), (x, time, censored))


@program(declines=NO_LATENTS_OF_ROWS)
def gaussian_process() -> Pair:
    """Exact Gaussian process regression of pyro.contrib.gp with priors on its kernel, data inside the model."""
    x = torch.linspace(0, 3, 20)
    y = torch.sin(2 * x) + 0.1 * torch.randn(20)
    kernel = gp.kernels.RBF(input_dim=1)
    regression = gp.models.GPRegression(x, y, kernel, noise=torch.tensor(0.1))
    regression.kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 1.0))
    regression.kernel.variance = PyroSample(dist.LogNormal(0.0, 1.0))
    return Pair(regression.model, regression.guide)


@program(declines=NO_LATENTS_OF_ROWS)
def sparse_gaussian_process() -> Pair:
    """A variational sparse Gaussian process for classes of two, under TraceMeanField_ELBO."""
    x = torch.linspace(-1, 1, 24)
    y = (x > 0).float()
    process = gp.models.VariationalSparseGP(
        x,
        y,
        gp.kernels.RBF(input_dim=1),
        torch.linspace(-1, 1, 5),
        gp.likelihoods.Binary(),
        whiten=True,
        jitter=1e-4,
    )
    return Pair(process.model, process.guide, objective=TraceMeanField_ELBO)


@program(declines=NO_LATENTS_OF_ROWS)
def deep_kernel() -> Pair:
    """Regression whose features are a network's, weights with a Gaussian prior and a posterior of full rank."""
    x, y = torch.randn(25, 3), torch.randn(25)
    features = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))

    def model(x, y):
        pyro.module("features", features)
        with pyro.plate("weights", 4):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        noise = pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(features(x) @ w, noise), obs=y)

    return Pair(model, AutoLowRankMultivariateNormal(model, rank=2), (x, y))


@program(declines=NO_LATENTS_OF_ROWS)
def random_walk() -> Pair:
    """A local level by a loop over time, all levels by AutoNormal, in pyro.markov."""
    y = torch.randn(8).cumsum(0)

    def model(y):
        drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        level = torch.tensor(0.0)
        for t in pyro.markov(range(len(y))):
            level = pyro.sample(f"level_{t}", dist.Normal(level + drift, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(level, 0.5), obs=y[t])

    return Pair(model, AutoNormal(model), (y,))


@program(declines=NO_LATENTS_OF_ROWS)
def gaussian_hmm() -> Pair:
    """A linear-Gaussian state space model by GaussianHMM, its noises at points of a guide of AutoDiagonalNormal."""
    y = torch.randn(12, 2)

    def model(y):
        q = pyro.sample("q", dist.LogNormal(-1.0, 0.5))
        r = pyro.sample("r", dist.LogNormal(-1.0, 0.5))
        eye = torch.eye(2)
        law = dist.GaussianHMM(
            dist.MultivariateNormal(torch.zeros(2), eye),
            0.9 * eye,
            dist.MultivariateNormal(torch.zeros(2), q * eye),
            eye,
            dist.MultivariateNormal(torch.zeros(2), r * eye),
            duration=12,
        )
        pyro.sample("y", law, obs=y)

    return Pair(model, AutoDiagonalNormal(model), (y,))


@program(declines=NO_LATENTS_OF_ROWS)
def discrete_hmm() -> Pair:
    """A hidden Markov model as one site, DiscreteHMM, for several sequences, its parameters by AutoNormal."""
    y = torch.randn(5, 9)

    def model(y):
        probs = pyro.sample("probs", dist.Dirichlet(torch.eye(2) + 0.5).to_event(1))
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        with pyro.plate("sequences", len(y)):
            law = dist.DiscreteHMM(torch.zeros(2), probs.log(), dist.Normal(locs, 1.0), duration=9)
            pyro.sample("y", law, obs=y)

    return Pair(model, AutoNormal(model), (y,))


@program(
    missing={"k-hat per datum": "is enumerated", "collapse": "is enumerated"},
    gaps=("encode",),
)
def hidden_markov_enumerated() -> Pair:
    """Sequences of different lengths under masks, hidden states summed out by enumeration in pyro.markov."""
    data, lengths = torch.randn(4, 5), torch.tensor([5, 4, 3, 5])

    @config_enumerate
    def model(data, lengths):
        probs = pyro.sample("probs", dist.Dirichlet(torch.eye(2) + 0.5).to_event(1))
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        with pyro.plate("sequences", len(data), dim=-1):
            state = 0
            for t in pyro.markov(range(data.shape[1])):
                with pyro.poutine.mask(mask=t < lengths):
                    state = pyro.sample(f"state_{t}", dist.Categorical(probs[state]))
                    pyro.sample(f"y_{t}", dist.Normal(locs[state], 1.0), obs=data[:, t])

    guide = AutoNormal(pyro.poutine.block(model, expose=["probs", "locs"]))
    return Pair(model, guide, (data, lengths), objective=lambda: TraceEnum_ELBO(max_plate_nesting=1))


@program(declines=NO_LATENTS_OF_ROWS)
def ordinal() -> Pair:
    """Ordered logistic regression with ordered cutpoints."""
    x = torch.randn(30)
    y = torch.bucketize(x + 0.5 * torch.randn(30), torch.tensor([-0.5, 0.5]))

    def model(x, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        cuts = pyro.sample(
            "cuts",
            dist.TransformedDistribution(
                dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.transforms.OrderedTransform()
            ),
        )
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.OrderedLogistic(slope * x, cuts), obs=y)

    return Pair(model, AutoNormal(model), (x, y))
