"""Python's search for garbage, which takes a fifth of the time of imports and of graphs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEW_OBJECTS = 100_000
"""New objects after which Python looks for garbage while a step is traced and compiled; its own number is 700."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Let Python look for garbage seldom: modules and graphs are many objects, all of them needed."""
    usual = gc.get_threshold()
    if usual[0]:
        gc.set_threshold(max(usual[0], NEW_OBJECTS), *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
