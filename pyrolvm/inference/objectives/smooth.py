"""Whether a program is smooth between the values of its discrete latents, as relaxations need it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.distributions import OneHotCategorical

from pyrolvm.errors import ProgramError
from pyrolvm.inference.objectives.discrete import Read, cost_at, unwrapped
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair

NODES = 24
TOLERANCE = 0.05
ROUNDING = 16
"""Units in the last place of the cost, a sum over data, that its difference may be wrong by."""


class Smoothness:
    """Checks each program once, at a step with Pyro's validation on."""

    def __init__(self) -> None:
        self.checked: set[Any] = set()

    def check(self, pair: Pair, what: str, read: Read) -> None:
        """Raise `ProgramError` if the cost jumps between all bits 0 and all bits 1, or between two categories.

        f(1) - f(0) is compared with the integral of the derivative that autograd gives, by Gauss-Legendre nodes.
        """
        key = (pair.program.model, pair.program.guide)
        if not is_validation_enabled() or key in self.checked:
            return
        ends = [_cost(pair, read, t)[0] for t in (0.0, 1.0)]
        nodes = zip(*np.polynomial.legendre.leggauss(NODES), strict=True)
        slopes = torch.stack(
            [_cost(pair, read, (float(node) + 1) / 2)[1] * weight / 2 for node, weight in nodes]
        )
        rise = ends[1] - ends[0]
        rounding = ROUNDING * torch.finfo(rise.dtype).eps * (ends[0].abs() + ends[1].abs())
        if bool((rise - slopes.sum()).abs() > TOLERANCE * (rise.abs() + slopes.abs().sum() + 1) + rounding):
            raise ProgramError(
                f"{what} runs the program at values between the discrete ones, and its log-densities jump there "
                "(values used as an index, compared or rounded?), so that its gradient would be wrong: use DisARM() or "
                "NVIL()"
            )
        self.checked.add(key)


def _cost(pair: Pair, read: Read, at: float) -> tuple[Tensor, Tensor]:
    """(f, df/dt) at t, summed over data, both held: []. The noise is the same at every t."""
    share = torch.tensor(at, device=pair.device, requires_grad=True)

    def choose(site: Any, logits: Tensor) -> Tensor:
        if isinstance(unwrapped(site["fn"]), OneHotCategorical):
            ends = torch.eye(logits.shape[-1]).to(logits)
            return (ends[0] + share * (ends[-1] - ends[0])).expand(logits.shape)
        return share.to(logits).expand(logits.shape)

    with torch.enable_grad(), seeded(0, pair.device):
        cost = cost_at(pair, read, choose).log_weight.sum()
    return cost.detach(), torch.autograd.grad(cost, share, allow_unused=True, materialize_grads=True)[0]
