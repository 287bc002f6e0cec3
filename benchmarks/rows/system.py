"""A module of pyrolvm as a row: run by Pyro and by both engines as it is, with the same parameters everywhere.

Pyro is shown the parameters once a step, by `pyro.module`; the hand-written losses of `systems_by_hand.py` take the
module's networks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pyro
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from torch import Tensor

from benchmarks.rows.base import Row, Start, seeded
from pyrolvm import data_plate

NOT_WRITTEN = "not written for this row"
NO_JIT = "Pyro has no Jit form of its objective"


def made(build: Callable[[], Any], start: Start | None = None) -> Any:
    """The module with its initial values, or those of `start`, on the device of `start`."""
    with pyro.get_param_store().scope():  # an AutoGuide writes to it
        system = seeded(build)
    if start is not None:
        system.load_state_dict(start)
        system.to(next(iter(start.values())).device)
    return system


def start_of(build: Callable[[], Any]) -> Start:
    return dict(made(build).state_dict())


def in_pyro(start: Start, build: Callable[[], Any]) -> tuple[Any, Any]:
    system = made(build, start)
    system.data_plate = data_plate  # its own would show Pyro the parameters again, in model and guide

    def model(*data: Tensor) -> None:
        pyro.module("system", system)
        system.model(*data)

    return model, system.guide


def in_torch(start: Start, build: Callable[[], Any], loss: Callable[..., Tensor]) -> tuple[list[Tensor], Any]:
    system = made(build, start)
    return [p for p in system.parameters() if p.requires_grad], functools.partial(loss, system)


def system(
    name: str,
    about: str,
    build: Callable[[], Any],
    data: Callable[[], tuple[Tensor, ...]],
    batch_size: int | None,
    loss: Callable[..., Tensor] | str,
    **more: Any,
) -> Row:
    """A row of a module with `model` and `guide`; `more` are fields of the row that differ from the ELBO's."""
    fields: dict[str, Any] = {
        "pyro": functools.partial(in_pyro, build=build),
        "elbo": lambda: Trace_ELBO(max_plate_nesting=1),
        "jit": lambda: JitTrace_ELBO(max_plate_nesting=1, ignore_jit_warnings=True),
    }
    return Row(
        name=name,
        about=f"{about}, batch {batch_size or 'all'}",
        data=data,
        batch_size=batch_size,
        start=functools.partial(start_of, build),
        torch=loss if isinstance(loss, str) else functools.partial(in_torch, build=build, loss=loss),
        numpyro=NOT_WRITTEN,
        **(fields | more),
    )
