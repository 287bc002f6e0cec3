"""The contract of a model: an `nn.Module` with `model` and `guide` of the same arguments."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from torch import Tensor, nn

from pyrolvm.errors import DataError, ProgramError
from pyrolvm.plates import current_rows, data_plate


class LatentVariableModel(nn.Module):
    """A generative model p(x, z) and its guide q(z | x), with all learnables held in itself.

    Write two methods of the same arguments::

        class Mine(LatentVariableModel):
            def __init__(self, data_dim): ...
            def model(self, x): ...   # x: [batch, data_dim], or None to generate
            def guide(self, x): ...

    Rules: every parameter exists after construction; the data plate is `self.data_plate(x)`; the
    observed site tolerates `x=None`. What else a model can say of itself is optional:

    - `log_marginal(x)` -> [batch], the exact log p(x) in nats, if there is a closed form;
    - `check_data(x)` raises `DataError` for data outside the model's support;
    - `check_fit(x)` raises `DivergenceError` if the end of a fit to `x` is no answer (a collapsed component, say).
    """

    constructor: dict[str, Any]
    """The arguments it was built with, by name: what a run folder keeps to build it again."""

    def __new__(cls, *args: Any, **kwargs: Any) -> LatentVariableModel:
        """Note the arguments in `constructor`."""
        self = super().__new__(cls)
        # nn.Module.__setattr__ needs a finished __init__; copies and unpickling pass no arguments
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        constructor = {k: v for k, v in bound.arguments.items() if k != "self"}
        object.__setattr__(self, "constructor", constructor)
        return self

    def model(self, x: Tensor | None = None) -> Any:
        """The generative program p(x, z); `x`: [batch, ...] or None to generate."""
        raise NotImplementedError(f"{type(self).__name__} must define model(self, x)")

    def guide(self, x: Tensor | None = None) -> Any:
        """The approximate posterior q(z | x), of the same arguments as `model`."""
        raise NotImplementedError(f"{type(self).__name__} must define guide(self, x)")

    def data_plate(self, x: Any = None) -> pyro.plate:
        """The plate over the rows of `x`; under `fit` it carries the number of rows of the whole data.

        Outside `fit` it also shows Pyro the module's parameters, so that `pyro.infer.SVI` trains them.
        """
        if current_rows() is None:
            register(self)
        return data_plate(x)

    def check_data(self, x: Tensor) -> None:
        """Refuse, before the first step, data the model cannot have generated."""
        check_finite(x)


def check_finite(x: Tensor) -> None:
    """Raise `DataError` naming the first row and column of `x` [rows, ...] that is not finite."""
    where = first_row_where(x, lambda part: ~torch.isfinite(part)) if x.is_floating_point() else None
    if where is None:
        return
    value = x[tuple(where)].item()
    raise DataError(
        f"the data hold {value} at row {where[0]}, column {tuple(where[1:]) if len(where) != 2 else where[1]}: "
        "drop or fill such rows first, e.g. x[np.isfinite(x).all(axis=1)]"
    )


def first_row_where(x: Tensor, wrong: Callable[[Tensor], Tensor]) -> list[int] | None:
    """The index of the first entry of `x` [rows, ...] that `wrong` marks, or None.

    Looks at some rows at a time: data mapped from a file may be larger than memory.
    """
    first = 0
    for part in x.split(max(1, 2**22 // max(1, x[:1].numel()))) if x.dim() else (x,):
        marks = wrong(part)
        if bool(marks.any()):
            row, *rest = marks.nonzero()[0].tolist()
            return [first + row, *rest]
        first += len(part)
    return None


def check_columns(x: Tensor, data_dim: int, model: str) -> None:
    """Raise `DataError` unless `x` is [rows, data_dim]."""
    if x.dim() == 2 and x.shape[1] == data_dim:
        return
    raise DataError(
        f"{model} was built for data of shape [rows, {data_dim}] but got {list(x.shape)}: "
        f"build it with data_dim={x.shape[-1] if x.dim() else 1} or pass x.reshape(-1, {data_dim})"
    )


_serials: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_next_serial = itertools.count()


def register(module: nn.Module) -> None:
    """Show Pyro the trainable parameters of `module`, under names that no other instance has.

    Called by `data_plate`, so that plain `pyro.infer.SVI` trains them. Unlike `pyro.module`, which takes a
    name from the caller, a second instance cannot fall on the first one's entries in the global store
    and stay untrained; frozen parameters stay out.
    """
    if module not in _serials:  # by identity: a deep copy gets a number of its own
        _serials[module] = next(_next_serial)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        entry = f"{type(module).__name__}-{_serials[module]}.{name}"
        if pyro.param(entry, parameter) is not parameter:
            raise ProgramError(
                f"Pyro's parameter store holds another tensor as {entry!r}, so that SVI would train that one "
                "and not the module's: call pyro.clear_param_store(), restore the module by load_state_dict, "
                "and keep its parameters contiguous"
            )
