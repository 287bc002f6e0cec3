"""When to stop: the held-out bound no longer rises by more than its own noise.

Two windows of evaluations are compared, the last W and the W before them. The noise of one evaluation is
taken from successive differences, which a trend hardly enters (von Neumann et al. 1941),

    s^2 = mean (v_i - v_{i-1})^2 / 2,

and the run is flat when the mean of the last window is not above that of the one before it by the standard
error of their difference, s sqrt(2 / W).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass
class Plateau:
    """The stopping rule on the held-out bound, with the best parameters so far.

    Parameters
    ----------
    patience : int
        W, evaluations in a window.
    first_step : int
        Evaluations before this step do not count.
    """

    patience: int
    first_step: int = 0
    values: list[float] = field(default_factory=list)
    best: float = -math.inf
    best_step: int = 0
    best_parameters: dict[str, Tensor] = field(default_factory=dict)
    flat: str = ""

    prefix = "plateau/"
    """Of its tensors in a checkpoint."""

    def add(self, step: int, value: float, parameters: dict[str, Tensor]) -> str | None:
        """Add an evaluation `value`, in nats per datum. Returns the reason to stop, or None."""
        if step < self.first_step:
            return None
        self.values.append(value)
        if value > self.best:
            self.best, self.best_step = value, step
            self.best_parameters = {k: v.detach().clone() for k, v in parameters.items()}
        return self._verdict()

    def flatten(self) -> dict[str, Tensor]:
        """The record as CPU tensors, for a checkpoint."""
        record = torch.tensor([self.best, self.best_step, *self.values], dtype=torch.float64)
        return {"plateau/record": record} | {
            f"plateau/best/{k}": v.cpu() for k, v in self.best_parameters.items()
        }

    def unflatten(self, saved: dict[str, Tensor], device: torch.device) -> None:
        """Restore the record of `flatten`; no change if the checkpoint has none."""
        if "plateau/record" not in saved:
            return
        best, best_step, *self.values = saved["plateau/record"].tolist()
        self.best, self.best_step = best, int(best_step)
        prefix = "plateau/best/"
        self.best_parameters = {
            k.removeprefix(prefix): v.to(device) for k, v in saved.items() if k.startswith(prefix)
        }

    def _verdict(self) -> str | None:
        w = self.patience
        if len(self.values) < 2 * w:
            return None
        recent = np.array(self.values[-2 * w :])
        rise = recent[w:].mean() - recent[:w].mean()
        error = math.sqrt(np.mean(np.diff(recent) ** 2) / 2) * math.sqrt(2 / w)
        if rise > error:
            return None
        self.flat = (
            f"the held-out ELBO is flat: its last {w} values rose by {rise:.4f} nats per datum, "
            f"within their noise of {error:.4f}"
        )
        return self.flat
