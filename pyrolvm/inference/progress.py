"""The progress bar: ELBO, steps per second, time left; silent where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """What a loop tells its watcher; this one says nothing."""

    def begin(self, done: int) -> None:
        """Steps start now, after `done` that a run before this one took."""

    def update(self, done: int, **fields: Any) -> None:
        """`done` steps are finished."""

    def note(self, text: str) -> None:
        """Say what is going on."""


class _RichBar(Bar):
    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress, self.task = progress, task
        self.begin(0)

    def begin(self, done: int) -> None:
        self.first, self.start = done, time.perf_counter()
        self.progress.update(self.task, completed=done)

    def update(self, done: int, **fields: Any) -> None:
        speed = (done - self.first) / max(time.perf_counter() - self.start, 1e-9)
        text = "  ".join([f"{k} {v:.3f}" for k, v in fields.items()] + [f"{speed:,.0f} steps/s"])
        self.progress.update(self.task, completed=done, text=text)

    def note(self, text: str) -> None:
        self.progress.update(self.task, text=text)


@contextmanager
def progress_bar(title: str, total: int, *, enabled: bool = True) -> Iterator[Bar]:
    """A bar on standard error if that is a terminal and `enabled`; else a silent one."""
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield Bar()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        yield _RichBar(progress, progress.add_task(title, total=total, text=""))
