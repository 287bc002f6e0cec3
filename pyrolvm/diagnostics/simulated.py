"""Data that a fitted model makes, with the latents they came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.data.arrays import Batch
from pyrolvm.errors import SettingError
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import sample_sites
from pyrolvm.seeds import Purpose, derived_seed

Arrays = dict[str, np.ndarray]
Rebuild = Callable[[Any, dict[str, Tensor]], Any]


@dataclass(frozen=True)
class Simulation:
    """One simulated data set.

    Attributes
    ----------
    data
        As `fit` takes them.
    truth : dict
        Latent site -> [rows, ...] (local) or [...] (global), float64.
    """

    data: Any
    truth: Arrays


def simulations(
    like: Pair, count: int, rebuild: Rebuild | None = None, *, rows: bool, seed: int = 0
) -> Iterator[Simulation]:
    """(z, x) ~ p(z, x): one data set of `count` rows if `rows`, else `count` data sets shaped as the data of `like`.

    Raises
    ------
    SettingError
        It is not clear where in the arguments the simulated values belong.
    """
    pair = like.take(torch.arange(count, device=like.device) % like.num_rows) if rows else like
    places = _places(pair, seed) if rebuild is None else {}
    for index in range(1 if rows else count):
        with seeded(derived_seed(seed, Purpose.SIMULATE, index), pair.device):
            trace = pair.simulate()
        nodes: Any = trace.nodes
        observed = {s.name: nodes[s.name]["value"].detach() for s in pair.structure.observed}
        batch = pair.batch
        data = rebuild(batch.args, observed) if rebuild else _as_data(_replaced(batch, observed, places))
        yield Simulation(data, _truth(pair, trace))


def _truth(pair: Pair, trace: Trace) -> Arrays:
    latents = {s.name for s in pair.structure.latents}
    return {
        s["name"]: s["value"].detach().cpu().double().numpy()
        for s in sample_sites(trace)
        if s["name"] in latents
    }


def _places(pair: Pair, seed: int) -> dict[str, str]:
    """Observed site -> the argument that holds its values."""
    with seeded(seed, pair.device):
        model, _ = pair.draw()
    names, found = {s.name for s in pair.structure.observed}, dict[str, str]()
    for site in (s for s in sample_sites(model) if s["name"] in names):
        holders = [n for n, t in pair.batch.tensors() if _same_numbers(t, site["value"])]
        if not holders:
            raise SettingError(
                f"no argument of the model holds the values of the observed site '{site['name']}', so simulated "
                "ones have no place: pass rebuild=lambda arguments, simulated: (...)"
            )
        found[site["name"]] = holders[0]
    return found


def _same_numbers(argument: Tensor, value: Tensor) -> bool:
    return argument.numel() == value.numel() and torch.equal(
        argument.reshape(-1).double(), value.detach().reshape(-1).double()
    )


def _replaced(batch: Batch, observed: dict[str, Tensor], places: dict[str, str]) -> Batch:
    """`batch` with the simulated values in the place of the data."""
    new = {places[name]: value for name, value in observed.items()}

    def put(name: str, old: Tensor | None) -> Tensor | None:
        return new[name].reshape(old.shape).to(old.dtype) if name in new and old is not None else old

    args = tuple(put(f"args[{i}]", v) for i, v in enumerate(batch.args))
    return replace(batch, args=args, kwargs={k: put(k, v) for k, v in batch.kwargs.items()})


def _as_data(batch: Batch) -> Any:
    """What `fit` takes: one tensor, a tuple of positional arguments, or a dict of keyword arguments."""
    if batch.kwargs and not batch.args:
        return batch.kwargs
    return batch.args[0] if len(batch.args) == 1 and not batch.kwargs else batch.args
