"""The systems on small data: diffusion, mixtures, one latent dimension, global latents, losses, missing entries."""

from __future__ import annotations

import functools
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import JitTrace_ELBO, JitTraceEnum_ELBO, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn
from torch.nn.functional import huber_loss, softplus

import pyrolvm
from benchmarks.reproduce.semi_implicit import COUNTS
from benchmarks.rows import systems_by_hand as by_hand
from benchmarks.rows.base import Row, Start, seeded
from benchmarks.rows.mixture import faithful
from benchmarks.rows.ppca import digits
from benchmarks.rows.system import NOT_WRITTEN, made, system
from pyrolvm import GeneralisedBayes, data_plate

MIXING = 50
WEIGHT, PRIOR_SCALE = 4.0, 10.0


@functools.cache
def whole_digits() -> tuple[Tensor]:
    """Of mean 0 and variance 1 over all pixels together."""
    (x,) = digits()
    return ((x - x.mean(0)) / x.std(0).square().mean().sqrt(),)


@functools.cache
def digits_with_gaps() -> tuple[Tensor]:
    """A fifth of the entries taken out."""
    (x,) = digits()
    return (torch.where(seeded(lambda: torch.rand_like(x)) < 0.2, torch.nan, x),)


@functools.cache
def arc() -> tuple[Tensor]:
    """2000 points along an arc, wider at one end."""
    t, noise = seeded(lambda: (2 * torch.rand(2000, 1), torch.randn(2000, 2)))
    return (torch.cat([(2 * t).cos(), (2 * t).sin()], -1) + (0.05 + 0.1 * t) * noise,)


@functools.cache
def line_with_outliers() -> tuple[Tensor, Tensor]:
    a = torch.linspace(-2, 2, 80)
    y = 1 + 2 * a + 0.5 * seeded(lambda: torch.randn(80))
    return a, torch.where(torch.arange(80) < 72, y, -4.0)


def diffusion() -> Any:
    return pyrolvm.DiffusionVAE(64, scaling="none")


def mixture() -> Any:
    return pyrolvm.BayesianGaussianMixture(2, 10)


def nonlinear_lvm() -> Any:
    return pyrolvm.NonlinearLVM(2, 1)


def missing_ppca() -> Any:
    return pyrolvm.PPCA(64, 8, missing="mask")


class HuberLine(nn.Module):
    """A line by Huber's loss, exp(-w loss) p(line), under a Gaussian of full covariance."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.tril = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 2))
        self.model = GeneralisedBayes(self._line, self._loss, weight=WEIGHT).model

    def _line(self, a: Tensor, y: Tensor) -> Tensor:
        return pyro.sample("line", dist.Normal(a.new_zeros(2), PRIOR_SCALE).to_event(1))

    def _loss(self, line: Tensor, a: Tensor, y: Tensor) -> Tensor:
        mean = line[..., :1] + line[..., 1:] * a
        return huber_loss(mean, y.expand(mean.shape), reduction="none", delta=0.5)

    def guide(self, a: Tensor, y: Tensor) -> None:
        tril = self.tril.tril(-1) + torch.diag_embed(softplus(self.tril.diagonal()))
        pyro.sample("line", dist.MultivariateNormal(self.loc, scale_tril=tril))


def mites(x: Tensor) -> None:
    """Red mites on 150 apple leaves (Yin and Zhou 2018)."""
    r = pyro.sample("r", dist.Gamma(x.new_full((), 0.01), 0.01))
    p = pyro.sample("p", dist.Beta(x.new_full((), 0.01), 0.01))
    with data_plate(x):
        pyro.sample("x", dist.NegativeBinomial(r, p), obs=x)


class MitesPair(nn.Module):
    """The model and its semi-implicit guide."""

    def __init__(self) -> None:
        super().__init__()
        self.guide, self.model = pyrolvm.SemiImplicitGuide(mites, num_mixing=MIXING), mites
        self.guide(COUNTS)  # its networks are made by the first run


def mites_in_pyro(start: Start) -> tuple[Any, Any]:
    """An AutoGuide shows its parameters itself."""
    pair = made(MitesPair, start)
    return pair.model, pair.guide


def mixture_in_sklearn() -> Any:
    from sklearn.mixture import BayesianGaussianMixture

    return BayesianGaussianMixture(
        n_components=10, weight_concentration_prior_type="dirichlet_distribution", random_state=0
    )


def rows() -> list[Row]:
    return [
        system(
            "diffusion", "diffusion of T = 1000, MLP 256-256, digits (1797 x 64)", diffusion, whole_digits, 128,
            by_hand.diffusion,
        ),
        system(
            "bayesian-mixture", "Bayesian Gaussian mixture, 10 components, Old Faithful (272 x 2)", mixture,
            faithful, None, NOT_WRITTEN, has_globals=True,
            elbo=lambda: TraceEnum_ELBO(max_plate_nesting=1),
            jit=lambda: JitTraceEnum_ELBO(max_plate_nesting=1, ignore_jit_warnings=True),
            sklearn=mixture_in_sklearn,
        ),
        system(
            "nonlinear-lvm", "nonlinear LVM with a noise network, 2000 x 2, latent 1", nonlinear_lvm, arc, 256,
            by_hand.nonlinear_lvm,
            learning_rate=1e-4,  # at 1e-3 the noise decides when it leaves its start: paths part by 0.1 nats
        ),
        system(
            "semi-implicit", f"semi-implicit guide of a negative binomial, K = {MIXING}, 150 counts", MitesPair,
            lambda: (COUNTS,), None, NOT_WRITTEN, has_globals=True, pyro=mites_in_pyro,
            elbo=lambda: Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1),
            jit=lambda: JitTrace_ELBO(
                num_particles=50, vectorize_particles=True, max_plate_nesting=1, ignore_jit_warnings=True
            ),
        ),
        system(
            "generalised-bayes", "a line by Huber's loss, 80 rows with outliers", HuberLine, line_with_outliers,
            None, functools.partial(by_hand.huber_line, weight=WEIGHT, prior_scale=PRIOR_SCALE), has_globals=True,
        ),
        system(
            "ppca-missing", "PPCA with a fifth of the entries missing, digits (1797 x 64), latent 8", missing_ppca,
            digits_with_gaps, 256, by_hand.missing_ppca,
        ),
    ]  # fmt: skip
