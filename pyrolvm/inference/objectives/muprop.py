"""MuProp: the first-order Taylor expansion of the cost at the guide's means as a control variate.

One pass has every layer at its mean, v_l = sigmoid(a_l(v_1, ..., v_{l-1})), with cost f(v) and derivatives g_l =
df/dv_l (through the layers after l too). With theta_l = sigmoid(a_l) at the drawn layers before l,

    h_l = (f(b) - f(v) - sum_{k <= l} <g_k, b_k - theta_k>) (b_l - theta_l) + g_l theta_l (1 - theta_l)

The last term is the mean of what was taken off, so that the estimate is unbiased whatever f(v) and g are.

S. Gu, S. Levine, I. Sutskever and A. Mnih, "MuProp: unbiased backpropagation for stochastic neural networks", ICLR
2016.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrolvm.inference.objectives.base import Estimate
from pyrolvm.inference.objectives.discrete import DiscreteObjective, assembled, cost_at, drawn_bits
from pyrolvm.inference.program.pair import Pair


class MuProp(DiscreteObjective):
    """The Taylor control variate, for programs whose latents are all bits and that also run at their means."""

    def estimated(self, pair: Pair, controls: Any) -> Estimate:
        """The ELBO of a draw and its surrogate."""
        run = drawn_bits(pair, "MuProp")
        mean_cost, slopes = _at_means(pair)
        signal, estimates = run.cost - mean_cost, []
        for bits in run.bits:
            g, apart = slopes[bits.name], bits.value - bits.probs
            signal = signal - run.summed(g * apart, bits.event_dims)
            estimates.append(run.beside(signal, bits) * apart + g * bits.probs * (1 - bits.probs))
        return assembled(pair, [run], run.log_joint + run.passed_on(estimates))


def _at_means(pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
    """f(v) [1, cells] and its derivative in each layer's means, both held."""
    means: dict[str, Tensor] = {}

    def choose(site: Any, logits: Tensor) -> Tensor:
        mean = logits.sigmoid()
        means[site["name"]] = mean if mean.requires_grad else mean.requires_grad_()
        return means[site["name"]]

    cost = cost_at(pair, "MuProp", choose).log_weight
    slopes = torch.autograd.grad(cost.sum(), list(means.values()))
    return cost.detach(), dict(zip(means, slopes, strict=True))
