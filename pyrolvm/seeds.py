"""Seeds: one stream of random numbers per purpose, spawned from the seed of a run.

Seeds are spawned by domain (`numpy.random.SeedSequence`'s spawn keys), never by adding numbers, so that two purposes
never share a draw.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What random numbers are for. New purposes go to the end: the numbers are part of every stream."""

    START = 0
    """Starting values of parameters."""
    PLAN = 1
    """Which rows each batch holds."""
    SPLIT = 2
    """Which rows are held out."""
    NOISE = 3
    """Monte Carlo noise of training."""
    CHECK = 4
    """Trial runs before the first step."""
    HELD_OUT = 5
    """Noise of the held-out bound: the same at every evaluation."""
    GUIDE = 6
    """Draws from the guide."""
    PRIOR = 7
    """Draws from the model alone."""
    GENERATE = 8
    """New data from the fitted model."""
    MEANS = 9
    """Means without a closed form, averaged over draws."""
    EVIDENCE = 10
    """Estimates of log p(x)."""
    SIMULATE = 11
    """Simulated data that something is checked against."""
    DIAGNOSE = 12
    """Every other measure of a fit."""
    REFINE = 14
    """Refinement of a guide for each datum."""
    PART = 15
    """Parts of an answer that is written as it comes."""


def derived_seed(seed: int, purpose: Purpose, *index: int) -> int:
    """A 63-bit seed for one purpose, and one part of it (a chunk, a chain, a refit): the same on every machine."""
    sequence = np.random.SeedSequence(seed, spawn_key=(int(purpose), *index))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)
