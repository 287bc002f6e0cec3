"""Whether a program is smooth between the bits of its latents, as relaxations need it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.objectives.discrete import cost_at
from pyrolvm.inference.program.noise import kept_generators
from pyrolvm.inference.program.pair import Pair

NODES = 24
TOLERANCE = 0.05


def check_smooth(pair: Pair, what: str) -> None:
    """Raise `ProgramError` if the cost jumps between all bits 0 and all bits 1.

    f(1) - f(0) is compared with the integral of the derivative that autograd gives, by Gauss-Legendre nodes.
    """
    with torch.enable_grad(), kept_generators(pair.device):
        ends = [_cost(pair, what, torch.tensor(t))[0] for t in (0.0, 1.0)]
        rise, path, length = ends[1] - ends[0], torch.zeros_like(ends[0]), torch.zeros_like(ends[0])
        for node, weight in zip(*np.polynomial.legendre.leggauss(NODES), strict=True):
            slope = _cost(pair, what, torch.tensor((float(node) + 1) / 2))[1]
            path, length = path + float(weight) / 2 * slope, length + float(weight) / 2 * slope.abs()
    if bool(((rise - path).abs() > TOLERANCE * (rise.abs() + length + 1)).any()):
        raise ProgramError(
            f"{what} runs the program at values between 0 and 1, and its log-densities jump there (bits used as an "
            f"index, "
            "compared or rounded?), so that its gradient would be wrong: use DisARM() or NVIL()"
        )


def _cost(pair: Pair, what: str, share: Tensor) -> tuple[Tensor, Tensor]:
    """(f, df/dt) summed over data with every bit at `share`, both held: []."""
    share = share.requires_grad_()

    def choose(site: Any, logits: Tensor) -> Tensor:
        return share.to(logits).expand(logits.shape)

    cost = cost_at(pair, what, choose).log_weight.sum()
    return cost.detach(), torch.autograd.grad(cost, share)[0]
