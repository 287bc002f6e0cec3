"""The importance-weighted and Renyi bounds, per datum.

    L_{K,alpha}(x_n) = 1/(1-alpha) log (1/K) sum_k ( p(x_n, z_k) / q(z_k | x_n) )^(1-alpha),   z_k ~ q

alpha = 0 is the importance-weighted bound (Burda, Grosse & Salakhutdinov 2016, eq. 8), other alpha
the variational Renyi bound (Li & Turner 2016, eq. 9), alpha -> 1 the ELBO. The logarithm is taken for
each datum, and the scale N/B of a minibatch stands outside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyrolvm.inference.objectives.base import Estimate, estimate
from pyrolvm.inference.program.weights import LogDensities, log_densities


@estimate.register
def _renyi(
    objective: pyro.infer.RenyiELBO,
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: dict | None = None,
) -> Estimate:
    pairs = objective._get_traces(model, guide, args, kwargs or {})
    draws = [log_densities(model_trace, guide_trace) for model_trace, guide_trace in pairs]
    scale = draws[0].scale
    bounds = renyi_bound(torch.cat([d.log_weight for d in draws]), objective.alpha)  # [cells]
    surrogate = bounds + _score_term(draws, bounds)
    log_likelihood = torch.cat([d.log_likelihood for d in draws]).mean(0)
    kl = torch.cat([d.log_guide - d.log_prior for d in draws]).mean(0)
    total = [(scale * term.sum()) for term in (bounds, -surrogate, log_likelihood, kl)]
    return Estimate(total[0].detach(), total[1], total[2].detach(), total[3].detach())


def renyi_bound(log_weight: Tensor, alpha: float) -> Tensor:
    """L_{K,alpha} over the leading axis: log_weight [K, ...] -> [...], nats."""
    if alpha == 1.0:
        return log_weight.mean(0)
    tempered = (1.0 - alpha) * log_weight
    return (tempered.logsumexp(0) - math.log(len(log_weight))) / (1.0 - alpha)


def _score_term(draws: list[LogDensities], bounds: Tensor) -> Any:
    """For sites without a path derivative: grad E_q[L] has the term L * grad sum_k log q(z_k)."""
    scores = [d.score.sum(0) for d in draws if d.score is not None]
    if not scores:
        return 0.0
    total = torch.stack(scores).sum(0)  # [cells]
    return bounds.detach() * (total - total.detach())


class RenyiELBO(pyro.infer.RenyiELBO):
    """Pyro's `RenyiELBO`, with the bound of each datum and the plate's scale outside the logarithm.

    Runs under `pyro.infer.SVI` as well as under `fit`; `fit` reads Pyro's own class the same way.
    """

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """A scalar with the value of -bound (nats, summed over data) and the gradient of the surrogate."""
        result = estimate(self, model, guide, args, kwargs)
        return -result.bound + (result.surrogate - result.surrogate.detach())

    @torch.no_grad()
    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """-bound in nats, summed over the data."""
        return -estimate(self, model, guide, args, kwargs).bound.item()

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """-bound in nats; gradients are accumulated in the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()
