"""Controls: numbers of a program or an objective that follow a schedule over a run.

Learning rate, KL weight, temperature, power of the likelihood: each has a name, and a schedule that is a number or a
function of the share of the run that is done, in (0, 1]. A program reads one with `control("temperature")`; in a
compiled loop the value is a tensor, so that it can change from step to step without another compilation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pyrolvm.errors import ProgramError, SettingError

Schedule = float | Callable[[float], float]

_current: ContextVar[Mapping[str, Any] | None] = ContextVar("pyrolvm_controls", default=None)


@contextmanager
def controlled(values: Mapping[str, Any]) -> Iterator[None]:
    """Within the block, `control(name)` is `values[name]`."""
    token = _current.set(values)
    try:
        yield
    finally:
        _current.reset(token)


def control(name: str, default: float | None = None) -> Any:
    """The present value of a control, a number or a 0-d tensor; `default` where nothing sets it.

    Raises
    ------
    ProgramError
        Nothing sets it and there is no default.
    """
    value = (_current.get() or {}).get(name, default)
    if value is None:
        raise ProgramError(
            f"the control '{name}' has no value: pass controls={{'{name}': 1.0}} to fit, or "
            f"control('{name}', default=1.0) in the program"
        )
    return value


def value_of(name: str, schedule: Schedule, share: float) -> float:
    """The value of a schedule at `share` of the run. Raises `SettingError` if it is no finite number."""
    try:
        value = float(schedule(share) if callable(schedule) else schedule)
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"the schedule of '{name}' must be a number or a function of the share of the run: {error}"
        ) from None
    if not math.isfinite(value):
        raise SettingError(f"the schedule of '{name}' is {value} at {share:.3g} of the run")
    return value


def linear(start: float, end: float, until: float = 1.0) -> Callable[[float], float]:
    """A straight line from `start` to `end`, reached at the share `until` of the run and kept."""
    _check_until(until)
    return lambda share: start + (end - start) * min(1.0, share / until)


def exponential(start: float, end: float, until: float = 1.0) -> Callable[[float], float]:
    """A constant factor per step from `start` to `end`, both of one sign, reached at `until` and kept."""
    _check_until(until)
    if start * end <= 0:
        raise SettingError(f"an exponential schedule cannot go from {start} to {end}: both need one sign")
    return lambda share: start * (end / start) ** min(1.0, share / until)


def _check_until(until: float) -> None:
    if not 0 < until <= 1:
        raise SettingError(f"until is a share of the run, above 0 and at most 1, not {until}")
