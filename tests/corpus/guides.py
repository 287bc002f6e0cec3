"""One hierarchical model under every kind of guide that Pyro brings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.easyguide import EasyGuide, easy_guide
from pyro.distributions.transforms import affine_autoregressive, block_autoregressive, iterated
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)
from pyro.infer.autoguide.initialization import init_to_median
from torch.distributions import constraints

from corpus.form import NO_LATENTS_OF_ROWS, Pair, program


def growth() -> tuple[torch.Tensor, torch.Tensor]:
    """(group of each row, measurement), six groups of five."""
    group = torch.arange(30) % 6
    return group, 1.0 + 0.5 * torch.randn(6)[group] + 0.3 * torch.randn(30)


def multilevel(group, y=None):
    """A mean, a spread, a level of each group and a noise."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", 6):
        level = pyro.sample("level", dist.Normal(mu, tau))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("rows", len(group)):
        return pyro.sample("y", dist.Normal(level[group], noise), obs=y)


def under(guide: Any, **options: Any) -> Pair:
    """The multilevel model under an AutoGuide of the model, or one by name."""
    return Pair(multilevel, guide if isinstance(guide, str) else guide(multilevel), growth(), **options)


def with_levels(about: str, name: str, make: Callable[[], Pair], **expected: Any) -> None:
    """Put one guide of the multilevel model into the corpus."""
    make.__doc__, make.__name__, make.__module__ = about, name, __name__
    program(**{"declines": NO_LATENTS_OF_ROWS, **expected})(make)


def _named(make: Callable[[], Pair]) -> Callable[[], Pair]:
    return lambda: make()


with_levels("AutoNormal by name.", "auto_normal", _named(lambda: under("AutoNormal")))
with_levels(
    "AutoDelta, a point estimate of all.",
    "auto_delta",
    _named(lambda: under(AutoDelta)),
)
with_levels("AutoDiagonalNormal.", "auto_diagonal_normal", _named(lambda: under(AutoDiagonalNormal)))
with_levels(
    "AutoMultivariateNormal from the prior's medians.",
    "auto_multivariate_normal",
    _named(lambda: under(partial(AutoMultivariateNormal, init_loc_fn=init_to_median))),
)
with_levels(
    "AutoLowRankMultivariateNormal of rank two.",
    "auto_low_rank",
    _named(lambda: under(partial(AutoLowRankMultivariateNormal, rank=2))),
)
with_levels(
    "AutoIAFNormal, an inverse autoregressive flow.",
    "auto_iaf_normal",
    _named(lambda: under(partial(AutoIAFNormal, hidden_dim=[12], num_transforms=2))),
)
with_levels(
    "AutoNormalizingFlow of two affine autoregressive transforms.",
    "auto_normalizing_flow",
    _named(lambda: under(lambda m: AutoNormalizingFlow(m, partial(iterated, 2, affine_autoregressive)))),
)
with_levels(
    "AutoNormalizingFlow of a transform without an inverse.",
    "auto_flow_without_inverse",
    _named(lambda: under(lambda m: AutoNormalizingFlow(m, partial(iterated, 1, block_autoregressive)))),
)
with_levels(
    "AutoLaplaceApproximation while it climbs.",
    "auto_laplace",
    _named(lambda: under(AutoLaplaceApproximation)),
)
with_levels(
    "AutoStructured: the levels depend on their spread, the rest is mean-field.",
    "auto_structured",
    _named(
        lambda: under(
            lambda m: AutoStructured(
                m,
                conditionals={"mu": "normal", "tau": "normal", "level": "mvn", "noise": "delta"},
                dependencies={"level": {"tau": "linear"}},
            )
        )
    ),
)
with_levels(
    "AutoGaussian, a sparse joint Gaussian along the model's dependencies.",
    "auto_gaussian",
    _named(lambda: under("AutoGaussian")),
)
with_levels(
    "AutoNormalMessenger.",
    "auto_normal_messenger",
    _named(lambda: under(AutoNormalMessenger)),
)
with_levels(
    "AutoHierarchicalNormalMessenger.",
    "auto_hierarchical_messenger",
    _named(lambda: under(AutoHierarchicalNormalMessenger)),
)
with_levels(
    "AutoRegressiveMessenger.", "auto_regressive_messenger", _named(lambda: under(AutoRegressiveMessenger))
)


def _listed() -> Pair:
    guide = AutoGuideList(multilevel)
    guide.append(AutoMultivariateNormal(pyro.poutine.block(multilevel, expose=["mu", "tau"])))
    guide.append(AutoNormal(pyro.poutine.block(multilevel, expose=["level"])))
    guide.append(AutoDelta(pyro.poutine.block(multilevel, expose=["noise"])))
    return Pair(multilevel, guide, growth())


with_levels("AutoGuideList of three kinds, the noise at a point.", "auto_guide_list", _listed)


def _listed_with_a_function() -> Pair:
    def noise(group, y=None):
        loc = pyro.param("noise_loc", torch.tensor(-1.0))
        pyro.sample("noise", dist.LogNormal(loc, 0.3))

    guide = AutoGuideList(multilevel)
    guide.append(AutoNormal(pyro.poutine.block(multilevel, hide=["noise"])))
    guide.append(noise)
    return Pair(multilevel, guide, growth())


with_levels(
    "AutoGuideList with a function of one's own.", "auto_guide_list_function", _listed_with_a_function
)


def _by_mean_field() -> Pair:
    return under(AutoNormal, objective=TraceMeanField_ELBO)


with_levels("AutoNormal under TraceMeanField_ELBO.", "auto_normal_mean_field", _by_mean_field)


@program(declines=NO_LATENTS_OF_ROWS)
def easy_guide_decorated() -> Pair:
    """An easyguide: a joint block for the mean and the spread, a plate of levels, a point for the noise."""

    @easy_guide(multilevel)
    def guide(self, group, y):
        block = self.group(match="mu|tau")
        loc = pyro.param("block_loc", torch.zeros(block.event_shape))
        block.sample("block", dist.Normal(loc, 0.5).to_event(1))
        with self.plate("groups", 6):
            loc = pyro.param("level_loc", torch.zeros(6))
            scale = pyro.param("level_scale", 0.5 * torch.ones(6), constraint=constraints.positive)
            pyro.sample("level", dist.Normal(loc, scale))
        self.map_estimate("noise")

    return Pair(multilevel, guide, growth())


@program(declines=NO_LATENTS_OF_ROWS)
def easy_guide_class() -> Pair:
    """An EasyGuide class with its own initial values."""

    class Guide(EasyGuide):
        def init(self, site):
            return site["value"]

        def guide(self, group, y=None):
            for name in ("mu", "tau", "noise"):
                self.map_estimate(name)
            with self.plate("groups", 6):
                self.map_estimate("level")

    return Pair(multilevel, Guide(multilevel), growth())
