"""What every contender offers: it is built for a case, and runs steps of its plan."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import Case


class UnavailableError(Exception):
    """Why a contender does not take part in a row."""


class Runner:
    """A program in training.

    title: the column of the table.
    fixed_chunk: whether steps come in multiples of the case's chunk only (a loop compiled for one length).
    paired: whether it follows the case's plan step by step, so that bounds can be compared step by step.
    has_bounds: whether it computes a bound at all.
    patience: how many times longer than others it is timed.
    """

    title = ""
    fixed_chunk = False
    paired = True
    has_bounds = True
    patience = 1.0

    def __init__(self, case: Case) -> None:
        self.case = case

    def run(self, first: int, num_steps: int) -> Tensor | None:
        """Take steps first, ..., first + num_steps - 1; the bounds before each, in nats, on the CPU."""
        raise TypeError(f"{type(self).__name__} must define run")

    def seconds(self, first: int, num_steps: int) -> float:
        """Seconds that these steps take, all work on the device done."""
        synchronise(self.case.device)
        start = time.perf_counter()
        self.run(first, num_steps)
        synchronise(self.case.device)
        return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available(value: Any) -> Any:
    """`value`, unless it is the sentence that says why there is none."""
    if isinstance(value, str):
        raise UnavailableError(value)
    return value
