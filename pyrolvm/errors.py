"""The errors a user sees. Each names what was wrong, where, and what to type instead."""

from __future__ import annotations

import difflib
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

__all__ = [
    "ConvergenceWarning",
    "DataError",
    "DivergenceError",
    "ProgramError",
    "PyrolvmError",
    "RunFolderError",
    "SettingError",
]

T = TypeVar("T")


class PyrolvmError(Exception):
    """Base of every error this package raises on purpose."""


class DataError(PyrolvmError, ValueError):
    """The data do not fit the model: shape, type, missing values or support."""


class ProgramError(PyrolvmError, ValueError):
    """The model/guide pair is not a program that can be fitted: sites, plates or parameters."""


class SettingError(PyrolvmError, ValueError):
    """An argument of `fit` or of an estimator has a value it cannot have."""


class RunFolderError(PyrolvmError, ValueError):
    """A run folder or checkpoint is missing, damaged, or of another program or version."""


class DivergenceError(PyrolvmError, ArithmeticError):
    """The bound or a parameter stopped being finite, or the fit ended in a degenerate state."""


class ConvergenceWarning(UserWarning):
    """A fit stopped before it had converged."""


def one_of(name: str, value: T, choices: Iterable[Any]) -> T:
    """`value` if it is one of `choices`; else `SettingError` that lists them."""
    known = list(choices)
    if value not in known:
        raise SettingError(f"{name}={value!r} is not known: choose from {', '.join(map(str, known))}")
    return value


def count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int if it is a whole number of at least `least`; else `SettingError`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        wanted = "a positive whole number" if least == 1 else f"a whole number of at least {least}"
        raise SettingError(f"{name} must be {wanted}, not {value!r}")
    return int(value)


def positive(name: str, value: Any) -> float:
    """`value` as a float if it is a positive, finite number; else `SettingError`."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < float(value) < math.inf:
        raise SettingError(f"{name} must be a positive number, not {value!r}")
    return float(value)


def did_you_mean(word: str, known: Iterable[str], shown: Callable[[str], str] = repr) -> str:
    """A question with the known words that are near, as `shown`, and a space; empty if none is."""
    near = dict.fromkeys(map(shown, difflib.get_close_matches(word, list(known), n=3)))
    return f"did you mean {' or '.join(near)}? " if near else ""


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the caller outside this package."""
    level, frame = 2, sys._getframe(1)
    ours = ("pyrolvm.", "torch.utils._contextlib")  # the decorators of torch stand between
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(ours):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
