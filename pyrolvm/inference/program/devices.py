"""Devices by name, and the default device of torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

from pyrolvm.errors import SettingError


def resolve_device(name: str) -> str:
    """The device `name`, with "auto" resolved. Raises `SettingError` if it is unknown or not on this machine."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise SettingError(f"device='{name}' is not known: use auto, cpu, cuda, cuda:N or mps") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, False):
        raise SettingError(f"device='{name}' is not on this machine: use device='cpu'")
    return name


F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)


def placed(function: F) -> F:
    """Run a function with new tensors on the CPU unless it says otherwise, as it is written.

    Under `torch.set_default_device("cuda")` row numbers and permutations would be made there, and meet data and
    generators that are not.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def with_methods_placed(cls: C) -> C:
    """A class whose methods are `placed`."""
    for name, method in list(vars(cls).items()):
        asked = inspect.isfunction(method) and not inspect.isgeneratorfunction(method)
        if asked and not name.startswith("_"):
            setattr(cls, name, placed(method))
    return cls
