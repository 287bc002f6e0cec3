"""The importance-weighted and Renyi bounds, per datum.

    L_{K,alpha}(x_n) = 1/(1-alpha) log (1/K) sum_k ( p(x_n, z_k) / q(z_k | x_n) )^(1-alpha),   z_k ~ q

alpha = 0 is the importance-weighted bound (Burda, Grosse & Salakhutdinov 2016, eq. 8), other alpha
the variational Renyi bound (Li & Turner 2016, eq. 9), alpha -> 1 the ELBO. The logarithm is taken for
each datum, and the scale N/B of a minibatch stands outside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyrolvm.inference.objectives.base import Estimate, Objective
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.weights import LogDensities, log_densities


def renyi_estimate(elbo: pyro.infer.RenyiELBO, pair: Pair) -> Estimate:
    """The bound of the particles and alpha of one of Pyro's objects."""
    program, batch = pair.program, pair.batch
    traces = pyro.infer.RenyiELBO._get_traces(elbo, program.model, program.guide, batch.args, batch.kwargs)
    draws = [log_densities(model_trace, guide_trace) for model_trace, guide_trace in traces]
    scale = draws[0].scale
    bounds = renyi_bound(torch.cat([d.log_weight for d in draws]), elbo.alpha)  # [cells]
    surrogate = bounds + score_term(draws, bounds)
    log_likelihood = torch.cat([d.log_likelihood for d in draws]).mean(0)
    kl = torch.cat([d.log_guide - d.log_prior for d in draws]).mean(0)
    total = [(scale * term).sum() for term in (bounds, -surrogate, log_likelihood, kl)]
    terms = {"log_likelihood": total[2].detach(), "kl": total[3].detach()}
    return Estimate(total[0].detach(), total[1], terms)


def renyi_bound(log_weight: Tensor, alpha: float) -> Tensor:
    """L_{K,alpha} over the leading axis: log_weight [K, ...] -> [...], nats."""
    if alpha == 1.0:
        return log_weight.mean(0)
    if math.isinf(alpha):
        return log_weight.amax(0) if alpha < 0 else log_weight.amin(0)
    tempered = (1.0 - alpha) * log_weight
    return (tempered.logsumexp(0) - math.log(len(log_weight))) / (1.0 - alpha)


def score_term(draws: list[LogDensities], bounds: Tensor) -> Any:
    """For sites without a path derivative: grad E_q[L] has the term L * grad sum_k log q(z_k)."""
    scores = [d.score.sum(0) for d in draws if d.score is not None]
    if not scores:
        return 0.0
    total = torch.stack(scores).sum(0)  # [cells]
    return bounds.detach() * (total - total.detach())


class RenyiELBO(Objective, pyro.infer.RenyiELBO):
    """Pyro's `RenyiELBO`, with the bound of each datum and the plate's scale outside the logarithm.

    Runs under `pyro.infer.SVI` as well as under `fit`; `fit` reads Pyro's own class the same way.
    """

    _get_trace = pyro.infer.RenyiELBO._get_trace

    def estimate(self, pair: Pair, controls: Mapping[str, Any]) -> Estimate:
        """L_{K,alpha}, summed over the data."""
        return renyi_estimate(self, pair)


class PyroRenyi(Objective):
    """Pyro's own class, read as the papers define the bound."""

    def __init__(self, elbo: pyro.infer.RenyiELBO) -> None:
        self.elbo = elbo

    def settings(self) -> dict[str, Any]:
        """Those of Pyro's object."""
        return {"name": "RenyiELBO", **Objective.settings(self.elbo)}  # type: ignore[arg-type]

    def estimate(self, pair: Pair, controls: Mapping[str, Any]) -> Estimate:
        """L_{K,alpha}, summed over the data."""
        return renyi_estimate(self.elbo, pair)
