"""The iterates of a stage: their mean, and whether they are stationary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pyrolvm.inference.training.stationarity import effective_size, split_r_hat

MOST_KEPT = 2000
"""Numbers of an iterate whose stationarity is judged."""
MOST_PENDING = 2**22
"""Numbers of iterates that wait to be averaged together."""


@dataclass
class Iterates:
    """Iterates as flat vectors, in the order of the program's parameters.

    Parameters
    ----------
    judged : bool
        Whether they are kept, for their stationarity; else their mean alone.
    """

    judged: bool
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    averaged: int = 0
    rows: list[np.ndarray] = field(default_factory=list)
    pending: list[Tensor] = field(default_factory=list)

    def add(self, flat: Tensor) -> None:
        """Take one in, which nobody changes; one of another length (a branch has made parameters) begins anew."""
        if len(flat) != len(self.mean):
            self.clear()
            self.mean = torch.zeros_like(flat)
        self.pending.append(flat)
        if len(self.pending) * len(flat) >= MOST_PENDING:
            self.take_in()

    def take_in(self) -> None:
        """Average those that wait, all at once: each by itself would cost more than the step before it."""
        if not self.pending:
            return
        new = torch.stack(self.pending)
        self.pending = []
        self.averaged += len(new)
        self.mean.lerp_(new.mean(0), len(new) / self.averaged)
        if self.judged:
            self.rows.extend(new[:, :: max(1, new.shape[1] // MOST_KEPT)].double().cpu().numpy())

    def average_anew(self) -> None:
        """Forget the mean, not the iterates."""
        self.averaged = 0

    def clear(self) -> None:
        """Forget them."""
        self.averaged, self.rows, self.pending = 0, [], []

    def named(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean by the names of the parameters; of none there is no mean."""
        sizes = [p.numel() for p in parameters.values()]
        if not self.averaged or sum(sizes) != len(self.mean):
            return {}
        parts = zip(parameters.items(), self.mean.split(sizes), strict=True)
        return {name: part.reshape(p.shape).to(p.dtype) for (name, p), part in parts}

    def r_hat(self, least: int) -> float:
        """Split R-hat of the last half; nan of fewer than `least`."""
        return split_r_hat(self._last_half) if len(self.rows) >= least else math.nan

    def effective_size(self, least: int) -> float:
        """The independent draws that the last half is worth; nan of fewer than `least`."""
        return effective_size(self._last_half) if len(self.rows) >= least else math.nan

    @property
    def _last_half(self) -> np.ndarray:
        return np.stack(self.rows[len(self.rows) // 2 :])


def flattened(parameters: Mapping[str, Tensor]) -> Tensor:
    """All in one vector, a copy."""
    return torch.cat([p.detach().reshape(-1) for p in parameters.values()])
