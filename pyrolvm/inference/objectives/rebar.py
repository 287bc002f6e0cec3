"""REBAR and RELAX: the cost of relaxed bits as a control variate, tuned to the least variance.

A bit is b = 1[z > 0] of z = a + log u - log(1 - u) with u uniform. For a function c of z,

    h_l = (f(b) - c_l(z_l)) (b_l - theta_l) + dc_l/dz_l * w_l,       w = (1 - theta) / u if b = 1, theta / (1 - u) if
    b = 0

    REBAR    c_l = eta_l f(b_1, ..., b_{l-1}, sigma(z_l / lambda_l), sigma(z_{l+1} / lambda_{l+1}), ...)
    RELAX    c_l = the same + r_l(x, z_l, 2 b_1 - 1, ..., 2 b_{l-1} - 1),       r_l a network

w is 1 minus the derivative in a of z given b, z = a + logit(u~) with u~ uniform where b has its value: both draws of
z, free and given b, use the same u, as Tucker et al. tie them, so that one relaxed run for each layer is enough. Any
c and any lambda, eta and network leave h unbiased; they descend sum_l |h_l|^2, the variance of one draw but for a
constant, by second derivatives of f and r.

f is continued to values between the bits by the program itself, and must be smooth there: a program that takes the bits
as indices, compares or rounds them is refused at its first step.

G. Tucker et al., "REBAR: low-variance, unbiased gradient estimates for discrete latent variable models", NeurIPS 2017.
W. Grathwohl et al., "Backpropagation through the void", ICLR 2018.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyrolvm.errors import count, positive
from pyrolvm.inference.objectives.base import Estimate
from pyrolvm.inference.objectives.discrete import (
    Bits,
    DiscreteObjective,
    Run,
    assembled,
    cost_at,
    drawn_bits,
    in_cells,
)
from pyrolvm.inference.objectives.own import Made, features, fed, network
from pyrolvm.inference.objectives.smooth import check_smooth
from pyrolvm.inference.program.pair import Pair


class Tuned(nn.Module):
    """The temperature and the weight of one layer's relaxed cost."""

    def __init__(self, temperature: float, eta: float) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.eta = nn.Parameter(torch.tensor(float(eta)))


class REBAR(DiscreteObjective):
    """The relaxed cost as a control variate, for programs whose latents are all bits.

    Parameters
    ----------
    temperature : float
        Where each layer's lambda starts.
    eta : float
        Where each layer's weight of the control variate starts.
    """

    def __init__(self, temperature: float = 0.5, eta: float = 1.0) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature)
        self.eta = float(eta)
        self.tuned = Made()

    def estimated(self, pair: Pair, controls: Any) -> Estimate:
        """The ELBO of a draw, its surrogate, and the variance as the modules' own loss."""
        name = type(self).__name__
        if is_validation_enabled():
            check_smooth(pair, name)
        run = drawn_bits(pair, name)
        estimates = [self._estimated(pair, run, place) for place in range(len(run.bits))]
        for module in self.modules().values():
            if isinstance(module, Made):
                module.settle()
        own = run.squares(estimates)
        return assembled(pair, [run], run.log_joint + run.passed_on(estimates), own, **self._terms(run, own))

    def _estimated(self, pair: Pair, run: Run, place: int) -> Tensor:
        """h of one layer: [batch..., event...]."""
        bits = run.bits[place]
        u, b, theta = bits.noise, bits.value, bits.probs
        z = (bits.logits.detach() + u.logit()).requires_grad_()
        control = self.control(pair, run, place, z)  # [1, cells]
        slope = torch.autograd.grad(control.sum(), z, create_graph=True)[0]
        weight = torch.where(b > 0, (1 - theta) / u, theta / (1 - u))
        return run.beside(run.cost - control, bits) * (b - theta) + slope * weight

    def control(self, pair: Pair, run: Run, place: int, z: Tensor) -> Tensor:
        """c of one layer at z: [1, cells]."""
        at = {b.name: i for i, b in enumerate(run.bits)}

        def choose(site: Any, logits: Tensor) -> Tensor:
            here = at[site["name"]]
            bits = run.bits[here]
            if here < place:
                return bits.value
            raw = z if here == place else logits + bits.noise.logit()
            return (raw / self._tuned(bits).log_temperature.exp()).sigmoid()

        return self._tuned(run.bits[place]).eta * cost_at(pair, type(self).__name__, choose).log_weight

    def _tuned(self, bits: Bits) -> Any:
        return self.tuned.get(bits.name, lambda: Tuned(self.temperature, self.eta), bits.value)

    def _terms(self, run: Run, own: Tensor) -> dict[str, Tensor]:
        """The squared gradient in the logits, and the mean temperature: total over data, as all terms are."""
        return {"gradient_square": (run.densities.scale * own).sum()}


class RELAX(REBAR):
    """REBAR with a network added to each layer's control variate.

    Parameters
    ----------
    hidden : int
        Units of each of the network's layers.
    num_layers : int
        Hidden ReLU layers of it.
    temperature, eta : float
        As of `REBAR`.
    """

    def __init__(
        self, hidden: int = 200, num_layers: int = 2, temperature: float = 0.5, eta: float = 1.0
    ) -> None:
        super().__init__(temperature, eta)
        self.hidden, self.num_layers = count("hidden", hidden), count("num_layers", num_layers)
        self.free = Made()

    def control(self, pair: Pair, run: Run, place: int, z: Tensor) -> Tensor:
        """REBAR's, and the network's of x, z and the bits before."""
        bits, x = run.bits[place], features(pair, run)
        before = [in_cells(2 * b.value - 1, run.densities, b.event_dims) for b in run.bits[:place]]
        parts = [in_cells(z, run.densities, bits.event_dims), *before, *([] if x is None else [x])]
        inputs = torch.cat(parts, -1)  # [cells, features]
        sizes = (inputs.shape[-1], *(self.hidden,) * self.num_layers, 1)
        net = self.free.get(bits.name, lambda: network(sizes, nn.ReLU, last=0.0), inputs)
        return super().control(pair, run, place, z) + fed(net, inputs).reshape(run.cost.shape)
