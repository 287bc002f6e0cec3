"""What ends a run whose steps are not counted beforehand, and within which limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pyrolvm.data.plan import BatchPlan
from pyrolvm.inference.engine import TrainingState
from pyrolvm.inference.posterior.convergence import Convergence, what_matters
from pyrolvm.inference.posterior.history import History
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import Structure

LAYERS = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, _ConvNd)

LOOK_EVERY = 100
"""Steps between two iterates that are kept."""
MOST_STEPS, MOST_SMALL_STEPS, MOST_PASSES = 100_000, 1_000_000, 50_000
"""A run that has not converged by then ends all the same. Networks on minibatches need more steps, and may take as many
as the second and third say, where they cost little."""
MOST_PRODUCTS = 1e13
"""Of a trained number and a row, over the run: what costs little."""
SCHEDULED_STEPS, SCHEDULED_EPOCHS = 2000, 20
"""The length, the larger of the two, over which schedules that are functions of the share of the run go their way."""
SHARE_OF_MATTER = 0.05
"""Of what matters: what is predicted to gain less is not done."""


def most_steps(program: Program, structure: Structure, plan: BatchPlan, batch_size: int | None) -> int:
    """The upper limit of a run, in steps of `batch_size` rows, that is to run until it has converged."""
    if is_shared(structure) or batch_size is None:
        return MOST_STEPS
    products = batch_size * sum(p.numel() for p in program.parameters.values())
    cheap = min(MOST_SMALL_STEPS, plan.num_steps(MOST_PASSES), int(MOST_PRODUCTS / max(products, 1)))
    return max(MOST_STEPS, cheap)


def is_shared(structure: Structure) -> bool:
    """Whether what is fitted is of latents or parameters that all data share, rather than of networks."""
    return bool(structure.global_latents) or not structure.local_latents


def has_networks(program: Program) -> bool:
    """Whether layers are trained: what mixes its inputs by a matrix of weights."""
    trained = {id(p) for p in program.parameters.values()}
    layers = [m for module in program.reached for m in module.modules() if isinstance(m, LAYERS)]
    return any(id(p) in trained for layer in layers for p in layer.parameters(recurse=False))


class Rule(Protocol):
    """What ends a run whose steps are not counted beforehand.

    Attributes
    ----------
    prefix : str
        Of its tensors in a checkpoint.
    every : int
        It looks at the run, and notes it, after numbers of steps that this one divides.
    verdict : Convergence or None
        Once the run has ended by it.
    """

    prefix: str
    every: int
    verdict: Convergence | None

    def begin(self, state: TrainingState) -> TrainingState:
        """Before the first step; the state to begin with."""

    def ahead(self, step: int) -> int:
        """Steps from `step` to the next look; those before it would decide nothing."""

    def seen(self) -> Tensor:
        """What it notes of the program after every few steps."""

    def note(self, step: int, seen: Tensor) -> None:
        """Keep what was seen after `step` steps, all of them finite."""

    def look(self, state: TrainingState, history: History) -> tuple[TrainingState, str | None]:
        """After a number of steps that `every` divides; the state to go on from, and a reason to stop."""

    def retreat(self, state: TrainingState) -> TrainingState | None:
        """After steps that were not finite; the state to go on from, None if there is none."""

    def ended(self, step: int) -> Convergence:
        """The verdict on a run that ended at `step`."""

    def flatten(self) -> dict[str, Tensor]:
        """All that it has seen as CPU tensors, for a checkpoint."""

    def unflatten(self, saved: dict[str, Tensor], device: torch.device) -> None:
        """Restore what `flatten` gave."""


@dataclass
class NoMoreRise:
    """The rule of coordinate ascent, whose bound never falls: ten steps that gain nothing that matters."""

    structure: Structure
    prefix = "ascent/"
    every = 10
    verdict: Convergence | None = None

    def begin(self, state: TrainingState) -> TrainingState:
        """As `Rule.begin`."""
        return state

    def ahead(self, step: int) -> int:
        """As `Rule.ahead`."""
        return self.every - step % self.every

    def seen(self) -> Tensor:
        """As `Rule.seen`: the history has it all."""
        return torch.empty(0)

    def note(self, step: int, seen: Tensor) -> None:
        """As `Rule.note`."""

    def look(self, state: TrainingState, history: History) -> tuple[TrainingState, str | None]:
        """As `Rule.look`."""
        bound = history.column("elbo")[-self.every - 1 :]
        rise = float(bound[-1] - bound[0])
        tolerance = SHARE_OF_MATTER * what_matters(self.structure, bound[-1])
        if len(bound) <= self.every or not rise < tolerance:
            return state, None
        words = f"converged: ten steps of coordinate ascent gained {rise:.2g} nats per datum"
        self.verdict = Convergence(True, words, {"gain": rise, "tolerance": tolerance})
        return state, self.verdict.reason

    def retreat(self, state: TrainingState) -> None:
        """As `Rule.retreat`: there is nothing to lower."""

    def ended(self, step: int) -> Convergence:
        """As `Rule.ended`."""
        words = f"not yet: coordinate ascent still rises after {step:,} steps; go on by init=fitted"
        return self.verdict or Convergence(False, words)

    def flatten(self) -> dict[str, Tensor]:
        """As `Rule.flatten`: the history has it all."""
        return {}

    def unflatten(self, saved: dict[str, Tensor], device: torch.device) -> None:
        """As `Rule.unflatten`."""
