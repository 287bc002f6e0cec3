"""A polite kill (SIGTERM) as the interrupt that Ctrl-C is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM raises `KeyboardInterrupt`. Outside the main thread, which gets no signals, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
