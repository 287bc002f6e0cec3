"""Progress bars: how far, how fast, time left; silent where nobody watches, and within one another."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds before what may be over at once shows a bar."""

_open: list[Progress] = []
"""What is on the terminal now: a second bar is a line of the same display."""


class Bar:
    """What a loop tells its watcher; this one says nothing."""

    done = 0.0

    def begin(self, done: int) -> None:
        """Steps start now, after `done` that a run before this one took."""

    def update(self, done: float, **fields: Any) -> None:
        """`done` steps are finished."""

    def note(self, text: str) -> None:
        """Say what is going on."""

    def advance(self, steps: float = 1) -> None:
        """So many more steps are finished."""
        self.done += steps
        self.update(self.done)


class _RichBar(Bar):
    def __init__(self, console: Console, title: str, total: int, unit: str, after: float) -> None:
        self.console, self.title, self.total, self.unit = console, title, total, unit
        self.stack = ExitStack()
        self.progress: Any = None
        self.task: Any = None
        self.shows_at = time.perf_counter() + after

    def begin(self, done: int) -> None:
        self.first, self.start = done, time.perf_counter()
        self._show("", completed=done)

    def update(self, done: float, **fields: Any) -> None:
        speed = (done - self.first) / max(time.perf_counter() - self.start, 1e-9)
        rate = [f"{speed:,.0f} {self.unit}/s"] if self.unit else []
        self._show("  ".join([f"{k} {v:.3f}" for k, v in fields.items()] + rate), completed=done)

    def note(self, text: str) -> None:
        self._show(text)

    def _show(self, text: str, **fields: Any) -> None:
        if time.perf_counter() < self.shows_at:
            return
        if self.task is None:
            self._appear()
        self.progress.update(self.task, text=text, **fields)

    def _appear(self) -> None:
        if _open:
            self.progress = _open[-1]
            self.stack.callback(lambda: self.progress.remove_task(self.task))
        else:
            self.progress = self.stack.enter_context(_display(self.console))
            _open.append(self.progress)
            self.stack.callback(_open.clear)
        self.task = self.progress.add_task(self.title, total=self.total, text="")


def _display(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=console,
        transient=False,
    )


@contextmanager
def progress_bar(
    title: str, total: int, *, enabled: bool = True, unit: str = "steps", after: float = 0.0
) -> Iterator[Bar]:
    """A bar on standard error if that is a terminal and `enabled`; else a silent one.

    unit: what the speed is in; no speed if empty. after: seconds before it shows. Inside another one it is a
    further line, which goes when it is done.
    """
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield Bar()
        return
    bar = _RichBar(console, title, total, unit, after)
    bar.begin(0)
    with bar.stack:
        yield bar


def watched(
    steps: Iterable[T], title: str, total: int, *, enabled: bool = True, unit: str = ""
) -> Iterator[T]:
    """`steps` one by one, under a patient bar."""
    with progress_bar(title, total, enabled=enabled, unit=unit, after=PATIENCE) as bar:
        for step in steps:
            yield step
            bar.advance()
