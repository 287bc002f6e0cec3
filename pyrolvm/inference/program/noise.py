"""torch's default generators: put in a state, read, and left as found.

Pyro draws from torch's default generators. The noise of a run is therefore kept as the *state* of
those generators: put in before a chunk, taken out after it, and the caller's own state restored.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pyrolvm.seeds import Purpose, derived_seed

RUNNING = threading.RLock()
"""Held while a program runs or generators are exchanged: Pyro's handlers and parameter store, torch's default
generators and its default dtype belong to the process, so programs of two threads must take turns."""


def generator_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the default generators that a program on `device` may draw from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_generator_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put states taken by `generator_state` back."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Leave the default generators after as they were before."""
    with RUNNING:
        before = generator_state(device)
        try:
            yield
        finally:
            set_generator_state(before, device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from `seed` inside; the caller's generators are left as found. Never around a `yield`."""
    with kept_generators(device):
        torch.manual_seed(seed)
        yield


def noise_state(seed: int, device: torch.device, *part: int) -> dict[str, Tensor]:
    """The state a run's Monte Carlo noise starts from, or a `part` of it, which has a stream of its own."""
    with seeded(derived_seed(seed, Purpose.NOISE, *part), device):
        return generator_state(device)
