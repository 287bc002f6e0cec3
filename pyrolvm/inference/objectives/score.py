"""Score-function gradients: REINFORCE, and NVIL's baselines.

    h = (f(b) - baseline) d log q(b) / da

REINFORCE has no baseline (Williams 1992; Pyro's `Trace_ELBO` is the same estimator). NVIL has, for each datum,

    baseline = C(x) + c            C a network of the first data argument, c the decaying average of f - C
    h / max(1, s)                  s the decaying standard deviation of f - C                        (`normalise`)

The network's own loss is the squared distance (f - baseline)^2. Costs are those of one datum: a minibatch's factor N/B
is in none of them, so that the baselines mean the same in batches of all sizes.

Any discrete site is taken, whatever its values; reparameterised sites beside it have their path gradient.

R. J. Williams, "Simple statistical gradient-following algorithms", Machine Learning 8, 1992.
A. Mnih and K. Gregor, "Neural variational inference and learning in belief networks", ICML 2014, sections 2.3-2.4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyrolvm.errors import SettingError, count
from pyrolvm.inference.objectives.base import Estimate
from pyrolvm.inference.objectives.discrete import DiscreteObjective, Run, assembled, drawn, score
from pyrolvm.inference.objectives.own import Made, features, fed, network
from pyrolvm.inference.program.pair import Pair


def score_gain(run: Run, signal: Tensor, log_q: Tensor) -> Tensor:
    """log p - log q of reparameterised sites + signal * score: [draws, cells]."""
    unreached = run.densities.score
    path = run.densities.log_weight if unreached is None else run.densities.log_weight + unreached
    return path + signal.detach() * log_q


class REINFORCE(DiscreteObjective):
    """The score-function gradient without a baseline."""

    def estimated(self, pair: Pair, controls: Any) -> Estimate:
        """The ELBO of a draw, and its surrogate."""
        run = drawn(pair)
        return assembled(pair, [run], score_gain(run, run.cost, score(run, "REINFORCE")))


class NVIL(DiscreteObjective):
    """The score-function gradient with a learned baseline, a decaying average and normalised costs.

    Parameters
    ----------
    hidden : int
        Units of the baseline's tanh layer; 0 leaves the network out.
    decay : float
        Of the averages, in [0, 1).
    normalise : bool
        Divide the guide's gradient by the standard deviation of the costs where that is above 1. The gradient is then
        right in direction only (of the guide's part of it); False keeps it unbiased.
    """

    def __init__(self, hidden: int = 100, decay: float = 0.8, normalise: bool = True) -> None:
        super().__init__()
        self.hidden, self.normalise = count("hidden", hidden, 0), bool(normalise)
        if not 0 <= decay < 1:
            raise SettingError(f"decay={decay!r} must be at least 0 and below 1")
        self.decay = float(decay)
        self.baseline, self.average = Made(), Average(self.decay)

    def estimated(self, pair: Pair, controls: Any) -> Estimate:
        """The ELBO of a draw, its surrogate, and the baseline's loss."""
        run = drawn(pair)
        log_q = score(run, "NVIL")
        expected = self._expected(pair, run)
        centre, deviation = self.average(run.cost - expected.detach())
        error = run.cost - expected - centre
        signal = error.detach() / (deviation.clamp(min=1.0) if self.normalise else 1.0)
        own = error.square() if expected.requires_grad else None
        terms = {"baseline_error": (run.densities.scale * error.square()).sum()}
        return assembled(pair, [run], score_gain(run, signal, log_q), own, **terms)

    def _expected(self, pair: Pair, run: Run) -> Tensor:
        """C(x): [1, cells]; zeros where costs are not of rows of the data."""
        x = features(pair, run) if self.hidden else None
        if x is None:
            self.baseline.settle()
            return torch.zeros_like(run.cost)
        net = self.baseline.get("x", lambda: network((x.shape[1], self.hidden, 1), nn.Tanh), x)
        self.baseline.settle()
        return fed(net, x).reshape(run.cost.shape)


class Average(nn.Module):
    """Decaying mean and standard deviation of the costs of batches, without the present one."""

    weight: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        for name in ("weight", "mean", "square"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def forward(self, cost: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, deviation) of earlier batches, then take `cost` in."""
        seen = self.weight.clamp(min=torch.finfo(cost.dtype).tiny)
        mean = self.mean / seen
        variance = (self.square / seen - mean.square()).clamp(min=0)
        for buffer, now in (
            (self.weight, torch.ones_like(self.weight)),
            (self.mean, cost.mean()),
            (self.square, cost.square().mean()),
        ):
            buffer.mul_(self.decay).add_((1 - self.decay) * now)
        return mean, variance.sqrt()
