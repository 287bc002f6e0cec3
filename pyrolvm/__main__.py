"""`python -m pyrolvm` is the command `pyrolvm`."""

from __future__ import annotations

from pyrolvm.cli import app

if __name__ == "__main__":
    app(prog_name="pyrolvm")
