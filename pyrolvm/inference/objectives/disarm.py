"""DisARM and ARM: two draws that mirror each other, for latent bits.

From one uniform u for each bit, with theta = sigmoid(a),

    b = 1[u > 1 - theta],   b' = 1[1 - u > 1 - theta]                           both Bernoulli(theta)

    ARM      h = (f(b) - f(b')) (u - 1/2)
    DisARM   h = (f(b) - f(b')) (b - b') max(theta, 1 - theta) / 2              its mean given b and b'

With several layers, each has a mirrored draw of its own, the layers before it held and those after it drawn anew: one
more run of the pair for each layer. The model's gradient and the bound are means over all draws.

M. Yin and M. Zhou, "ARM: augment-REINFORCE-merge gradient", ICLR 2019.
Z. Dong, A. Mnih and G. Tucker, "DisARM: an antithetic gradient estimator for binary latent variables", NeurIPS 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrolvm.inference.objectives.base import Estimate
from pyrolvm.inference.objectives.discrete import Bits, DiscreteObjective, assembled, drawn_bits
from pyrolvm.inference.program.pair import Pair


class DisARM(DiscreteObjective):
    """The antithetic gradient of programs whose latents are all bits.

    Parameters
    ----------
    marginalise : bool
        Average over what the two draws do not show of u (DisARM); False is ARM.
    """

    def __init__(self, marginalise: bool = True) -> None:
        super().__init__()
        self.marginalise = bool(marginalise)

    def estimated(self, pair: Pair, controls: Any) -> Estimate:
        """The ELBO, averaged over the draws, and its surrogate."""
        run = drawn_bits(pair, "DisARM")
        runs, estimates = [run], []
        held: dict[str, Tensor] = {}
        for bits in run.bits:
            mirrored = ((1 - bits.noise) > 1 - bits.probs).to(bits.value.dtype)
            other = drawn_bits(pair, "DisARM", {**held, bits.name: mirrored})
            difference = run.beside(run.cost - other.cost, bits)
            estimates.append(difference * self._factor(bits, mirrored))
            runs.append(other)
            held[bits.name] = bits.value
        log_joint = sum((r.log_joint for r in runs[1:]), runs[0].log_joint) / len(runs)
        return assembled(pair, runs, log_joint + run.passed_on(estimates))

    def _factor(self, bits: Bits, mirrored: Tensor) -> Tensor:
        if not self.marginalise:
            return bits.noise - 0.5
        return (bits.value - mirrored) * torch.maximum(bits.probs, 1 - bits.probs) / 2
