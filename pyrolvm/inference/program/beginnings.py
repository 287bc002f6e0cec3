"""Where the parameters of a program begin, and which values a fitted one runs with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pyro
import torch
from pyro.params.param_store import ParamStoreDict
from torch import Tensor
from torch.distributions import constraints, transform_to

MODULE = "$$$"
"""Stands in the names that `pyro.module` gives. A module carries its own values: the store may have another's."""


def present(dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(unconstrained values, constraints) of the parameters in Pyro's own store, modules apart."""
    state = pyro.get_param_store().get_state()
    names = [name for name in state["params"] if MODULE not in name]
    values = {name: state["params"][name].detach().to(dtype=dtype, device=device) for name in names}
    return values, {name: state["constraints"][name] for name in names}


@contextmanager
def begun(values: Mapping[str, Tensor], known: Mapping[str, Any] | None) -> Iterator[None]:
    """A `pyro.param` that is made inside begins at the unconstrained value of its name.

    With `known` constraints, only if it has the same constraint and the shape of its own start: else the value is that
    of another program. One that is only read there, `pyro.param(name)`, is made.
    """
    usual, read = ParamStoreDict.setdefault, ParamStoreDict.__getitem__

    def getitem(store: ParamStoreDict, name: str) -> Tensor:
        if (
            name not in store and known is not None and name in values
        ):  # pyro.param(name), made by another program
            setdefault(store, name, transform_to(known[name])(values[name]), known[name])
        return read(store, name)

    def setdefault(
        store: ParamStoreDict,
        name: str,
        start: Tensor | Callable[[], Tensor],
        constraint: constraints.Constraint = constraints.real,
    ) -> Tensor:
        if name in store or name not in values:
            return usual(store, name, start, constraint)
        own, value = start() if callable(start) else start, values[name]
        shape = transform_to(constraint)(value).shape
        if known is not None and (type(known[name]) is not type(constraint) or shape != own.shape):
            return usual(store, name, own, constraint)
        usual(store, name, own, constraint)
        with torch.no_grad():
            store._params[name].copy_(value)
        return store[name]

    patched = mock.patch.multiple(ParamStoreDict, setdefault=setdefault, __getitem__=getitem)
    with patched:
        yield


@contextmanager
def put_in(kept: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Tensors hold their kept values inside, and afterwards what they held before."""
    changed = [(t, value, t.data) for t, value in kept if not _is_same(t, value)]
    for tensor, value, _ in changed:
        tensor.data = value
    try:
        yield
    finally:
        for tensor, _, before in changed:
            tensor.data = before


def _is_same(tensor: Tensor, value: Tensor) -> bool:
    alike = tensor.dtype == value.dtype and tensor.device == value.device
    return alike and tensor.shape == value.shape and torch.equal(tensor.detach(), value)
