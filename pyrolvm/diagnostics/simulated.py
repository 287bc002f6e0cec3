"""Data that a fitted model makes, with the latents they came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrolvm.data.arguments import Arguments
from pyrolvm.data.batch import Batch
from pyrolvm.errors import SettingError
from pyrolvm.inference.program.draws import tidy
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import sample_sites
from pyrolvm.seeds import Purpose, derived_seed

Arrays = dict[str, np.ndarray]
Rebuild = Callable[[Any, dict[str, Tensor]], Any]


class Simulation(NamedTuple):
    """Simulated data, as `fit` takes them, and the latents behind them: site -> [rows, ...] or [...], float64."""

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
        data = rebuild(pair.batch.args, observed) if rebuild else _replaced(pair.batch, observed, places)
        latents = [s.name for s in pair.structure.latents if s.name in nodes]
        truth = {n: tidy(pair.structure, nodes[n], nodes[n]["value"])[0] for n in latents}
        yield Simulation(data, {n: value.detach().cpu().double().numpy() for n, value in truth.items()})


def _places(pair: Pair, seed: int) -> dict[str, str]:
    """Observed site -> the argument that holds its values."""
    with seeded(seed, pair.device):
        model, _ = pair.draw()
    names, found = {s.name for s in pair.structure.observed}, dict[str, str]()
    for site in (s for s in sample_sites(model) if s["name"] in names):
        value = site["value"].detach().reshape(-1).double()
        holders = (n for n, t in pair.batch.tensors() if torch.equal(t.reshape(-1).double(), value))
        if (holder := next(holders, None)) is None:
            raise SettingError(
                f"no argument of the model holds the values of the observed site '{site['name']}', so simulated "
                "ones have no place: pass rebuild=lambda arguments, simulated: (...)"
            )
        found[site["name"]] = holder
    return found


def _replaced(batch: Batch, observed: dict[str, Tensor], places: dict[str, str]) -> Any:
    """The simulated values in the place of the data: a tensor, a tuple of arguments, or a dict of named ones."""
    new = {places[name]: value for name, value in observed.items()}

    def put(name: str, old: Any) -> Any:
        return new[name].reshape(old.shape).to(old.dtype) if name in new else old

    made = batch.map(put)
    args = made.args
    if made.kwargs:
        return Arguments(args, made.kwargs) if args else made.kwargs
    return args[0] if len(args) == 1 and not isinstance(args[0], tuple | dict) else args
