"""One training step's loss, as every engine computes it: a pure function of parameters, rows and noise."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyrolvm.data.arrays import Batch
from pyrolvm.inference.engine.optimizers import OptimizerSpec
from pyrolvm.inference.objectives import estimate
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import Structure
from pyrolvm.plates import data_rows

TERMS = ("elbo", "log_likelihood", "kl")


@dataclass
class Step:
    """What is trained, on what, how: the fixed part of a run, shared by all engines.

    data: the data that rows are taken from, on the program's device. `minibatch`: whether rows are taken.
    num_rows: N, the rows of the whole training data, which plates and the KL of global latents refer to.
    warmup_steps: length of the linear KL warm-up, 0 for none.
    """

    program: Program
    structure: Structure
    objective: ELBO
    optimizer: OptimizerSpec
    data: Batch
    minibatch: bool
    num_rows: int
    warmup_steps: int = 0

    def controls(self, first_step: int, num_steps: int) -> Tensor:
        """Learning rate and KL weight of each step: [num_steps, 2], float64, on the host."""
        rates = self.optimizer.learning_rates(first_step, num_steps)
        weights = [self.kl_weight(first_step + k) for k in range(num_steps)]
        return torch.tensor([rates, weights], dtype=torch.float64).T.contiguous()

    def kl_weight(self, step: int) -> float:
        """Linear warm-up from 1/warmup_steps to 1 (Bowman et al. 2016; Sonderby et al. 2016)."""
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    def loss(self, rows: Tensor, kl_weight: Any = 1.0) -> tuple[Tensor, Tensor]:
        """The loss to descend and the terms to report, both in nats per datum.

        rows: [batch] indices. Returns (surrogate, [len(TERMS)]). Call it inside `program.scope()`.
        """
        batch = self.data.take(rows) if self.minibatch else self.data
        with ExitStack() as stack:
            stack.enter_context(data_rows(self.num_rows, rows))
            if self.warmup_steps:
                stack.enter_context(_KLWeight(kl_weight))
            result = estimate(
                self.objective, self.program.model, self.program.guide, batch.args, batch.kwargs
            )
        n = self.structure.num_data
        bound, kl = result.bound, result.kl
        if self.warmup_steps:  # what is reported is the ELBO itself, not the weighted one
            kl = kl / kl_weight
            bound = result.log_likelihood - kl
        return result.surrogate / n, torch.stack([bound, result.log_likelihood, kl]) / n


class _KLWeight(Messenger):
    """Weigh log p(z) and log q(z) of every latent site."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not isinstance(msg["fn"], _Subsample):
            msg["scale"] = msg["scale"] * self.weight
