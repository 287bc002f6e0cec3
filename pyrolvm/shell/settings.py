"""Options of `pyrolvm fit` as the objects that `pyrolvm.fit` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro.infer
import torch
from torch.optim import lr_scheduler

from pyrolvm.errors import SettingError
from pyrolvm.inference.objectives import RenyiELBO
from pyrolvm.shell.pairs import FLAGGED, read_setting, read_value

OBJECTIVES: dict[str, type] = {
    "trace": pyro.infer.Trace_ELBO,
    "meanfield": pyro.infer.TraceMeanField_ELBO,
    "tracegraph": pyro.infer.TraceGraph_ELBO,
    "enum": pyro.infer.TraceEnum_ELBO,
    "renyi": RenyiELBO,
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
SCHEDULES = ("none", "cosine", "exponential")
LAST_RATE = 0.01
"""The exponential schedule ends at this share of the learning rate."""


def given_options(options: Any) -> dict[str, Any]:
    """The constructor's arguments that were given, by flag or by --set."""
    given = {name: getattr(options, name) for name in FLAGGED if getattr(options, name) is not None}
    if isinstance(given.get("hidden"), str):
        sizes = read_value(given["hidden"])
        given["hidden"] = sizes if isinstance(sizes, list) else [sizes]
    for name, value in map(read_setting, options.set):
        if name in given:
            raise SettingError(f"{name} is said twice: by its flag and by --set")
        given[name] = value
    return given


def make_objective(name: str | None, particles: int | None, alpha: float | None) -> Any:
    """The ELBO that was asked for; None for the program's own default."""
    if alpha is not None and name != "renyi":
        raise SettingError("--alpha is of --objective renyi: say both, or leave it out")
    if name is None:
        if particles is None:
            return None
        raise SettingError(f"--particles is of an --objective: name it, {', '.join(OBJECTIVES)}")
    cls = OBJECTIVES[one_of("objective", name, OBJECTIVES)]
    count = particles if particles is not None else (10 if name == "renyi" else 1)
    if count < (2 if name == "renyi" else 1):
        raise SettingError(f"--particles {count} is too few for --objective {name}")
    options: dict[str, Any] = {"num_particles": count, "vectorize_particles": count > 1}
    if name != "renyi":
        return cls(**options)
    if alpha == 1.0:
        raise SettingError("--alpha 1 is the ELBO itself: say --objective trace")
    return cls(alpha=alpha or 0.0, **options)


def make_schedule(name: str, num_steps: int) -> Callable[[Any], Any] | None:
    """Cosine to zero, or exponential to a hundredth, over the steps of the run."""
    one_of("schedule", name, SCHEDULES)
    if name == "cosine":
        return lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps)
    if name == "exponential":
        return lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=LAST_RATE ** (1 / num_steps))
    return None


def one_of(option: str, value: str, known: Iterable[str]) -> str:
    """`value`, if it is known. Raises `SettingError`."""
    known = list(known)
    if value in known:
        return value
    raise SettingError(f"--{option} {value} is not known: choose from {', '.join(known)}")
