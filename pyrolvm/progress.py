"""Progress bars: how far, how fast, time left. Silent unless a terminal shows them; nested bars vanish when done."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

PATIENCE = 1.0
"""Delay in seconds before the bar of something that may end at once appears."""


class _Bar(tqdm):
    monitor_interval = 0  # no thread beside the ones that compute


class Bar:
    """The position of a loop, shown by `tqdm`."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar, self.done = bar, 0.0

    def begin(self, done: float) -> None:
        """Start the clock, after `done` steps that an earlier run took."""
        self.bar.reset()
        self.bar.initial = self.done = done
        self.update(done)

    def update(self, done: float, **fields: float) -> None:
        """Show that `done` steps are finished, with numbers to print beside."""
        self.done = done
        self.bar.set_postfix_str("  ".join(f"{k} {v:.3f}" for k, v in fields.items()), refresh=False)
        self.bar.update(min(done, self.bar.total) - self.bar.n)

    def note(self, text: str) -> None:
        """Show a text until the next update: what takes long now."""
        due = not self.bar.disable and time.time() >= self.bar.start_t + self.bar.delay
        self.bar.set_postfix_str(text, refresh=due)

    def advance(self, steps: float = 1) -> None:
        """Show that so many more steps are finished."""
        self.update(self.done + steps)


@contextmanager
def progress_bar(
    title: str, total: int, *, enabled: bool = True, unit: str = "steps", after: float = 0.0
) -> Iterator[Bar]:
    """A bar on standard error if that is a terminal and `enabled`; else a silent one.

    Parameters
    ----------
    title : str
        What stands before the bar.
    total : int
        Number of steps.
    enabled : bool
        Whether to show it at all.
    unit : str
        What the speed is counted in; an empty one shows no speed.
    after : float
        Delay in seconds before it appears.

    Notes
    -----
    A bar inside another is a further line, which vanishes when it is done.
    """
    rate = ", {rate_fmt}" if unit else ""
    layout = f"{{desc}} |{{bar:24}}| {{n:,.0f}}/{{total:,.0f}} [{{elapsed}}<{{remaining}}{rate}{{postfix}}]"
    # smoothing=0 is the mean speed of the whole run, miniters=0 looks at the clock at each update
    with _Bar(
        desc=title, total=total, disable=None if enabled else True, unit=f" {unit}", delay=after, leave=None,
        bar_format=layout, smoothing=0, miniters=0, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        yield Bar(bar)


def watched(
    steps: Iterable[T], title: str, total: int, *, enabled: bool = True, unit: str = ""
) -> Iterator[T]:
    """`steps` one by one, under a bar that appears after `PATIENCE` seconds."""
    with progress_bar(title, total, enabled=enabled, unit=unit, after=PATIENCE) as bar:
        for step in steps:
            yield step
            bar.advance()
