"""What is noted between the steps of a chunk, without ending it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Watch:
    """After every few steps of a run, while the program's tensors are those after that step.

    Parameters
    ----------
    every : int
        Steps between two notes; they are counted from the first step of the run, not of the chunk.
    note : callable
        (steps done) -> None.
    """

    every: int
    note: Callable[[int], None]

    def parts(self, first_step: int, num_steps: int) -> Iterator[int]:
        """The lengths of pieces of a chunk; what is due after a piece is noted when the next one is asked for."""
        step, end = first_step, first_step + num_steps
        while step < end:
            stop = min(end, step + self.every - step % self.every)
            yield stop - step
            step = stop
            self.passed(step)

    def passed(self, step: int) -> None:
        """Note, if `step` is one where it is due."""
        if step % self.every == 0:
            self.note(step)
