"""Covariances of what a guide answers: its own, or put right by linear response."""

from __future__ import annotations

import math

import pandas as pd
import torch
from torch import Tensor

from pyrolvm.errors import SettingError, one_of
from pyrolvm.inference.log_joint import declined
from pyrolvm.inference.log_joint.draws import fixed_normals, least_draws
from pyrolvm.inference.log_joint.families import DIAGONAL, POINT, Family, Gaussian, guide_of
from pyrolvm.inference.log_joint.fixed import MOVES, maximise
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.modes import Place
from pyrolvm.inference.log_joint.response import respond
from pyrolvm.inference.program.pair import Pair
from pyrolvm.seeds import Purpose, derived_seed

METHODS = ("linear_response", "guide")
DRAWS = 4096


def covariance(pair: Pair, sites: list[str] | None, method: str, seed: int) -> pd.DataFrame:
    """As `FittedModel.covariance`."""
    one_of("method", method, METHODS)
    if (reason := declined(pair)) is not None:
        raise SettingError(f"covariance() needs a normal distribution of unconstrained latents: {reason}")
    log_joint = LogJoint(pair)
    q = Family(pair.program, log_joint).read()
    if q.kind == POINT:
        raise SettingError(
            f"a point ({type(guide_of(pair.program)).__name__}) has no covariance: take AutoNormal"
        )
    if method == "linear_response":
        q = _responded(log_joint, q, seed)
    values, names = _values(log_joint, q, seed)
    kept = [i for i, name in enumerate(names) if sites is None or name.split("[")[0] in sites]
    if not kept:
        raise SettingError(
            f"sites={sites} names none of the latents: {', '.join(s.name for s in log_joint.sites)}"
        )
    labels = [names[i] for i in kept]
    found = torch.cov(values[:, kept].T, correction=0).reshape(len(kept), len(kept))
    return pd.DataFrame(found.numpy(), index=labels, columns=labels)


def _responded(log_joint: LogJoint, q: Gaussian, seed: int) -> Gaussian:
    """A mean field's location with the covariance of its linear response; the guide must be at its optimum."""
    if q.kind != DIAGONAL:
        raise SettingError(
            "linear response puts a mean field right (AutoNormal, AutoDiagonalNormal), and this guide has its own "
            "covariances: method='guide'"
        )
    place = Place(q.location, q.scale, float(log_joint.slope(q.location)[0]), True)
    optimum = maximise(log_joint, place, DIAGONAL, 0, derived_seed(seed, Purpose.DIAGNOSE, 2) % 2**31)
    moved = float(((optimum.q.location - q.location).abs() / q.scale).max())
    if not math.isfinite(optimum.monte_carlo_error):
        raise SettingError(
            "the bound has no optimum, as nothing holds some latent where it is (a flat prior without data): "
            "method='guide'"
        )
    if moved > 2 * MOVES:
        raise SettingError(
            f"linear response holds at the optimum of the bound, and the guide is {moved:.2g} sd away from it: fit it "
            "with optimizer='lbfgs', or for more steps"
        )
    response = respond(optimum, seed)
    if not response.kept:
        raise SettingError(
            f"linear response lowers the bound by {-response.gain:.2g} nats, so its covariance is worse than the "
            "guide's own (a skewed scale, usually): take guide=AutoMultivariateNormal, or method='guide'"
        )
    return response.q


def _values(log_joint: LogJoint, q: Gaussian, seed: int) -> tuple[Tensor, list[str]]:
    """Every entry of every latent at draws whose moments are exact in unconstrained space, and the names."""
    M = max(DRAWS, least_draws(q.dim, True))
    return log_joint.scalars(q.at(fixed_normals(M, q.dim, derived_seed(seed, Purpose.DIAGNOSE, 3))))
