"""Programs of pyro.contrib and of Pyro's reparameterisers."""

from __future__ import annotations

import warnings

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro.contrib.autoname import scope
from pyro.contrib.forecast import ForecastingModel
from pyro.contrib.tracking.assignment import MarginalAssignmentPersistent
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_generated, init_to_sample, init_to_value
from pyro.infer.reparam import (
    AutoReparam,
    HaarReparam,
    LinearHMMReparam,
    LocScaleReparam,
    NeuTraReparam,
    ProjectedNormalReparam,
    StableReparam,
    StudentTReparam,
)
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn

from corpus.form import NO_LATENTS_OF_ROWS, Pair, program


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def latent_inputs_of_a_process() -> Pair:
    """A Gaussian process latent variable model: the inputs of a sparse regression get a prior and a guide."""
    y = torch.randn(3, 12)
    kernel = gp.kernels.RBF(input_dim=2, lengthscale=torch.ones(2))
    module = gp.models.SparseGPRegression(
        torch.zeros(12, 2), y, kernel, torch.randn(4, 2), noise=torch.tensor(0.1), jitter=1e-4
    )
    module.X = nn.Parameter(0.1 * torch.randn(12, 2))
    module.X = PyroSample(dist.Normal(torch.zeros(12, 2), 0.3).to_event())
    module.autoguide("X", dist.Normal)
    return Pair(module.model, module.guide)


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def classes_by_processes() -> Pair:
    """A variational Gaussian process with a latent function of each of three classes."""
    x = torch.randn(15, 2)
    process = gp.models.VariationalGP(
        x,
        (x[:, 0] > 0).long() + (x[:, 1] > 0).long(),
        gp.kernels.Matern32(input_dim=2),
        gp.likelihoods.MultiClass(3),
        latent_shape=torch.Size([3]),
        whiten=True,
        jitter=1e-4,
    )
    return Pair(process.model, process.guide, objective=TraceMeanField_ELBO)


@program(declines=NO_LATENTS_OF_ROWS)
def forecasting_with_season() -> Pair:
    """A forecasting model: a local level and a season of seven steps, the noise a Student t, levels decentred."""

    class Model(ForecastingModel):
        def model(self, zero_data, covariates):
            duration = zero_data.size(-2)
            drift_scale = pyro.sample("drift_scale", dist.LogNormal(-3.0, 1.0))
            with self.time_plate, pyro.poutine.reparam(config={"drift": LocScaleReparam()}):
                drift = pyro.sample("drift", dist.Normal(zero_data.new_zeros(()), drift_scale))
            with pyro.plate("day", 7, dim=-1):
                season = pyro.sample("season", dist.Normal(0.0, 1.0))
            days = torch.arange(duration) % 7
            level = (drift.cumsum(-1) + season[..., days]).unsqueeze(-1)
            weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
            nu = pyro.sample("nu", dist.Gamma(10.0, 2.0))
            scale = pyro.sample("scale", dist.LogNormal(-2.0, 1.0))
            self.predict(dist.StudentT(nu, 0.0, scale), level + weight * covariates)

    data, covariates = torch.randn(21, 1).cumsum(0), torch.linspace(-1, 1, 21).unsqueeze(-1)
    model = Model()
    return Pair(model, AutoNormal(model, init_loc_fn=init_to_sample), (data, covariates))


@program(
    quick=False,
    compiled="depends on 'locs.where_unconstrained'",
    declines={
        **NO_LATENTS_OF_ROWS,
        **dict.fromkeys(("predict", "reconstruct", "sample"), "observes no data"),
    },
    missing={"predictive check": "observes no data"},
)
def tracks_by_assignment() -> Pair:
    """Objects and detections, their assignment marginalised by belief propagation, as a factor."""
    observed = torch.cat([torch.randn(6) - 4, torch.randn(6) + 4]).view(2, 6).T

    def model(observed):
        with pyro.plate("objects", 2):
            where = pyro.sample("where", dist.Normal(torch.tensor([-3.0, 3.0]), 2.0))
        exists = torch.zeros(2)
        assign = dist.Normal(where, 1.0).log_prob(observed.unsqueeze(-1)) + 2.0
        found = MarginalAssignmentPersistent(exists, assign, bp_iters=5)
        pyro.factor("matching", -found.exists_dist.entropy().sum() + assign.logsumexp(-1).sum())

    return Pair(model, AutoNormal(model), (observed,))


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def scopes_of_names() -> Pair:
    """Sites named by the scopes they stand in, the same function called twice."""

    @scope
    def effect(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        return slope * x

    def model(x, y):
        with scope(prefix="first"):
            a = effect(x)
        with scope(prefix="second"):
            b = effect(x**2)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a + b, 0.5), obs=y)

    return Pair(model, AutoNormal(model), (torch.randn(15), torch.randn(15)))


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def a_network_made_bayesian() -> Pair:
    """A torch network changed in place by to_pyro_module_, its weights given priors one by one."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    to_pyro_module_(net)
    for module in net.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, PyroSample(dist.Normal(torch.zeros(value.shape), 1.0).to_event()))

    def model(x, y=None):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, scale), obs=y)

    return Pair(model, AutoNormal(model, init_scale=0.05), (torch.randn(12, 2), torch.randn(12)))


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def warped_by_neutra() -> Pair:
    """NeuTraReparam by a trained AutoMultivariateNormal, then AutoNormal in the warped space."""
    x = torch.randn(12)

    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a, b), obs=x)

    first = AutoMultivariateNormal(model)
    first(x)
    first.requires_grad_(False)
    warped = pyro.poutine.reparam(model, config=lambda _: NeuTraReparam(first))
    return Pair(warped, AutoNormal(warped), (x,))


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def learned_centring() -> Pair:
    """Effects of groups whose centring is learned by LocScaleReparam."""
    group = torch.arange(18) % 6

    @pyro.poutine.reparam(config={"effect": LocScaleReparam(), "noise": StudentTReparam()})
    def model(group, y):
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        with pyro.plate("groups", 6):
            effect = pyro.sample("effect", dist.Normal(0.0, spread))
        noise = pyro.sample("noise", dist.StudentT(5.0, 0.0, 1.0))
        with pyro.plate("data", len(group)):
            pyro.sample("y", dist.Normal(effect[group], noise.exp()), obs=y)

    return Pair(model, AutoNormal(model), (group, torch.randn(18)))


@program(quick=False, compiled="depends on 'locs.stability_unconstrained'")
def wavelets_of_a_walk() -> Pair:
    """A random walk in its Haar wavelets, the innovations stable, by StableReparam."""

    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
        stability = pyro.sample("stability", dist.Uniform(1.1, 1.9))
        with pyro.poutine.reparam(config={"path": HaarReparam(dim=-1, flip=True)}):
            path = pyro.sample("path", dist.Normal(0.0, scale).expand([8]).to_event(1))
        with pyro.plate("times", len(y)), pyro.poutine.reparam(config={"shock": StableReparam()}):
            shock = pyro.sample("shock", dist.Stable(stability, 0.0, 0.1))
            pyro.sample("y", dist.Normal(path.cumsum(-1) + shock, 0.3), obs=y)

    return Pair(model, AutoNormal(model), (torch.randn(8).cumsum(0),))


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def decentred_by_itself() -> Pair:
    """AutoReparam over a hierarchy."""
    y, group = torch.randn(20), torch.arange(20) % 5

    @AutoReparam()
    def model(group, y):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", 5):
            level = pyro.sample("level", dist.Normal(loc, scale))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(level[group], 1.0), obs=y)

    return Pair(model, AutoNormal(model), (group, y))


@program(quick=False, declines=NO_LATENTS_OF_ROWS)
def heavy_tailed_states() -> Pair:
    """A state space model with Student t noise as a LinearHMM, reparameterised to a Gaussian one."""
    y = torch.randn(6, 1)

    @pyro.poutine.reparam(config={"y": LinearHMMReparam(obs=StudentTReparam())})
    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
        law = dist.LinearHMM(
            dist.Normal(torch.zeros(1), 1.0).to_event(1),
            torch.eye(1),
            dist.Normal(torch.zeros(1), scale.unsqueeze(-1)).to_event(1),
            torch.eye(1),
            dist.StudentT(4.0, torch.zeros(1), 0.5).to_event(1),
            duration=6,
        )
        pyro.sample("y", law, obs=y)

    return Pair(model, AutoNormal(model), (y,))


@program(quick=False, compiled="depends on 'locs.mean_normal_unconstrained'", declines=NO_LATENTS_OF_ROWS)
def directions() -> Pair:
    """A direction on the sphere by ProjectedNormalReparam, from a value given as the start."""
    x = nn.functional.normalize(torch.randn(10, 3) + torch.tensor([2.0, 0.0, 0.0]), dim=-1)

    @pyro.poutine.reparam(config={"mean": ProjectedNormalReparam()})
    def model(x):
        mean = pyro.sample("mean", dist.ProjectedNormal(torch.zeros(3)))
        kappa = pyro.sample("kappa", dist.LogNormal(1.0, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.ProjectedNormal(kappa * mean), obs=x)

    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"kappa": torch.tensor(3.0)}))
    return Pair(model, guide, (x,))


@program(
    quick=False,
    declines={
        **NO_LATENTS_OF_ROWS,
        **dict.fromkeys(("predict", "reconstruct", "sample"), "observes no data"),
    },
    missing={"predictive check": "observes no data"},
)
def starts_that_are_generated() -> Pair:
    """AutoDelta from values that a function makes for each start, as in Pyro's tutorial of mixtures."""
    x = torch.cat([torch.randn(8) - 2, torch.randn(8) + 2])

    def start():
        return init_to_value(values={"locs": torch.tensor([-1.0, 1.0]), "weights": torch.tensor([0.5, 0.5])})

    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            laws = [dist.Normal(locs[k], 1.0).log_prob(x) + weights[k].log() for k in range(2)]
            pyro.factor("mixed", torch.logaddexp(*laws))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Pair(model, AutoDelta(model, init_loc_fn=init_to_generated(generate=start)), (x,))
