"""The shell's door: the command `pyrolvm`."""

from __future__ import annotations

from pyrolvm.shell.app import app

__all__ = ["app"]
