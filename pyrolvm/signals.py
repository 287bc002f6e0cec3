"""A polite kill (SIGTERM) as the interrupt that Ctrl-C is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Asked:
    """Whether somebody asked for an end."""

    interrupted: bool = False


@contextmanager
def termination_as_interrupt() -> Iterator[Asked]:
    """Within the block SIGTERM raises `KeyboardInterrupt`. Outside the main thread, which gets no signals, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield Asked()
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield Asked()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def interrupts_noted() -> Iterator[Asked]:
    """Within the block Ctrl-C and SIGTERM are noted, for an end at the next place that suits; a second Ctrl-C raises.

    Processes that work in step cannot stop where one of them happens to stand.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _: Any) -> None:
        if asked.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.interrupted = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
