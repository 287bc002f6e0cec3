"""Training the entries of a batch in parameters that have one entry for each row of the data.

A step takes the entries of its rows out of a table [N, ...] and of the optimiser's slots of that shape, lets torch's
own optimiser update them, and puts them back: nothing else of the table is read or written, so that the cost of a step
does not depend on N. As in `torch.optim.SparseAdam`, moments move when their row is visited, and only then; the
optimiser's count of steps, the learning rate and its schedule are those of the run. A weight decay acts on the rows of
the batch.

A batch that begins a new pass over the data may hold a row twice. Its gradients are then added up, so that both copies
become the same entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyrolvm.errors import SettingError
from pyrolvm.inference.engine.optimizers import OPTIMIZERS, OptimizerSpec


def places_of(rows: Tensor) -> Tensor:
    """A place of the batch for each of its rows, the same for equal rows: [batch], int64."""
    return torch.searchsorted(rows.sort().values, rows)


def collected(gradient: Tensor, places: Tensor) -> Tensor:
    """The gradients of equal rows added up at their common place, 0 elsewhere: [batch, ...]."""
    return torch.zeros_like(gradient).index_add(0, places, gradient)


def is_elementwise(spec: OptimizerSpec) -> bool:
    """Whether the optimiser is known to treat every entry of a parameter by itself."""
    return spec.optimizer in OPTIMIZERS or spec.optimizer in OPTIMIZERS.values()


def is_per_row(slot: Tensor, table: Tensor) -> bool:
    """Whether a slot of the optimiser's state has an entry for each row, as its table has."""
    return slot.shape == table.shape


def blank_slots(spec: OptimizerSpec, table: Tensor) -> dict[str, Tensor]:
    """The slots per row of a table whose rows were never visited.

    Raises
    ------
    SettingError
        The optimiser is not known to treat every entry by itself.
    """
    if not is_elementwise(spec):
        raise SettingError(
            f"the guide has parameters for each row, and {spec.name} is not known to update every entry by itself: "
            f"choose from {', '.join(OPTIMIZERS)}, or pass the data whole (batch_size=None)"
        )
    # a step without a gradient, on zeros: what the optimiser holds of an entry to which nothing has happened yet
    one = torch.zeros_like(table[:1], requires_grad=True)
    one.grad = torch.zeros_like(one)
    optimizer = spec.build([one])
    optimizer.step()
    slots = optimizer.state[one]
    return {
        name: value.expand_as(table).clone()
        for name, value in slots.items()
        if isinstance(value, Tensor) and is_per_row(value, one)
    }


def taken(slots: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The entries of `rows` in slots [N, ...]."""
    return {name: slot.index_select(0, rows) for name, slot in slots.items()}


def put_back(tables: Sequence[Tensor], rows: Tensor, entries: Sequence[Tensor]) -> None:
    """Write the entries [batch, ...] of `rows` to tables [N, ...]."""
    with torch.no_grad():
        for table, entry in zip(tables, entries, strict=True):
            table.index_copy_(0, rows, entry)
