"""Words for the shell's Tab key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def words(text: str) -> Callable[[str], list[str]]:
    """A completer among the words of `text`."""
    return lambda incomplete: [w for w in text.split() if w.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """Names of models, and files of Python."""
    from pyrolvm.models import REGISTRY

    names = [name.lower() for name in REGISTRY if name.lower().startswith(incomplete.lower())]
    return names + _files(incomplete, (".py",))


def complete_data(incomplete: str) -> list[str]:
    """Names of data sets, and files that can be read."""
    from pyrolvm.data import DATASETS, SUFFIXES

    return [name for name in DATASETS if name.startswith(incomplete)] + _files(incomplete, SUFFIXES)


def _files(incomplete: str, suffixes: tuple[str, ...]) -> list[str]:
    folder = Path(incomplete).parent if incomplete and not incomplete.endswith("/") else Path(incomplete)
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() or p.name.lower().endswith(suffixes)]
    texts = [f"{p}/" if p.is_dir() else str(p) for p in found if not p.name.startswith(".")]
    return sorted(t for t in texts if t.startswith(incomplete))
