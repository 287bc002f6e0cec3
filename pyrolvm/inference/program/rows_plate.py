"""Which of a program's plates is over the rows of the data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.program.structure import Plate, is_deterministic, rows_dim, sample_sites


def find_data_plate(
    model_trace: Trace,
    batch_rows: int,
    *,
    drawn: bool = False,
    named: Collection[str] = (),
    arguments: Iterable[Any] = (),
) -> Plate | None:
    """The plate of an observed site over the rows of the data.

    Of several that are as long as the data, one that the program makes by `data_plate`, else one at the dimension where
    the rows of an argument stand in an observed value, else the outermost.

    Parameters
    ----------
    drawn : bool
        Whether plates draw a subsample of the rows.
    named : collection of str
        The names of plates that are made by `data_plate`, or known to be the one.
    arguments : iterable
        Those of the program, of which tensors [rows, ...] carry rows.
    """
    sites = [s for s in sample_sites(model_trace) if s["is_observed"] and not is_deterministic(s)]
    frames = {f for s in sites for f in s["cond_indep_stack"]}
    over_rows = [f for f in frames if f.vectorized and batch_rows == (f.full_size if drawn else f.size)]
    if not over_rows:
        return None
    if len(over_rows) > 1:
        tensors = [x for x in arguments if isinstance(x, Tensor) and x.dim() and len(x) == batch_rows]
        shown = {
            f for s in sites for f in over_rows if f in s["cond_indep_stack"] and _holds_rows(s, f, tensors)
        }
        over_rows = [f for f in over_rows if f.name in named] or [*shown] or over_rows
    frame = min(over_rows, key=lambda f: f.dim)
    return Plate(frame.name, frame.dim, frame.size, frame.full_size)


def at_one_dimension(plate: Plate, sites: Iterable[Any], guide: str) -> Plate:
    """The plate where these sites, all inside it, have it; a `ProgramError` if that differs."""
    dims = {s["name"]: rows_dim(s, plate) for s in sites}
    if len(set(dims.values())) > 1:
        places = ", ".join(f"{dim} around '{name}'" for name, dim in dims.items())
        raise ProgramError(
            f"guide='{guide}' needs the plate '{plate.name}' at one dimension, and the model has it at {places}: give "
            "these plates the same `dim`"
        )
    return replace(plate, dim=next((dim for dim in dims.values() if dim is not None), plate.dim))


def _holds_rows(site: Any, frame: Any, arguments: Sequence[Tensor]) -> bool:
    """Whether the observed value is a view of an argument, turned so that its rows stand at the plate's dimension."""
    value = site["value"]
    dim = value.dim() - len(site["fn"].event_shape) + frame.dim
    if not 0 <= dim < value.dim():
        return False
    return any(
        value.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        and value.shape[dim] == len(x)
        and value.stride(dim) == x.stride(0)
        for x in arguments
    )


def holds_some(trace: Trace, made: Collection[str], size: int | None = None) -> bool:
    """Whether a plate of the program's own holds fewer rows than it is of; `made` are those of `data_plate`.

    With a size, of plates that are given their rows only those of that many count.
    """
    nodes: dict[str, Any] = trace.nodes
    drawn = [s["fn"] for s in nodes.values() if isinstance(s.get("fn"), _Subsample)]
    frames = [f for s in sample_sites(trace) for f in s["cond_indep_stack"] if f.name not in made]
    frames = [f for f in frames if size is None or f.full_size == size]
    return any(fn.subsample_size is not None and fn.subsample_size < fn.size for fn in drawn) or any(
        f.size < f.full_size for f in frames if f.vectorized
    )
