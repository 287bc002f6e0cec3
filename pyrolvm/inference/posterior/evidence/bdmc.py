"""Bidirectional Monte Carlo: log p(x) between a lower and an upper bound.

Simulate z* ~ p(z) and x ~ p(x | z*): then z* is an exact draw of p(z | x). Annealed importance sampling from
the start to the posterior bounds log p(x) from below, and the same chain run backwards from z* from above,

    E[log (1/S) sum_s w_s]  <=  log p(x)  <=  E[-log (1/S) sum_s 1 / w_s],

so that their gap bounds the error of both: it measures, on simulated data, the error of method="ais" with
these settings.

Grosse, Ghahramani and Adams (2015), "Sandwiching the marginal likelihood using bidirectional Monte Carlo".
Grosse, Ancha and Roy (2016), "Measuring the reliability of MCMC inference with bidirectional Monte Carlo".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import SettingError, count
from pyrolvm.inference.posterior.evidence.ais import Annealing, backward, check_annealable, forward, pilot
from pyrolvm.inference.posterior.evidence.chunks import chunk_sizes, evidence_chunks
from pyrolvm.inference.posterior.evidence.streams import StreamingLogMeanExp
from pyrolvm.inference.posterior.evidence.target import Target
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import rows_dim, sample_sites
from pyrolvm.progress import PATIENCE, Bar, progress_bar
from pyrolvm.seeds import Purpose, derived_seed


@torch.no_grad()
def bidirectional(
    pair: Pair,
    num_rows: int = 100,
    *,
    exact_draws: dict[str, Tensor] | None = None,
    num_chains: int = 16,
    num_steps: int = 500,
    start: str = "prior",
    schedule: str = "sigmoid",
    num_leapfrog: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Lower and upper bounds on log p(x), one row per datum, in nats.

    The data are `num_rows` rows simulated from the fitted model; with `exact_draws`, the pair's own rows. Latents
    outside the data plate are held at one draw from the guide: the bounds are on log p(x | that draw).

    Parameters
    ----------
    pair : Pair
        The program on some rows, which set the shape of the simulated data: `fitted.pair(x)`.
    num_rows : int
        Data to simulate.
    exact_draws : dict, optional
        Latent site -> draws of p(z | x), [num_chains, rows, ...].
    num_chains : int
        S, chains per datum in each direction.
    num_steps, start, schedule, num_leapfrog
        As of `Annealing`.
    seed : int
        Of the simulated data and the chains.

    Returns
    -------
    DataFrame
        lower, upper, gap = upper - lower, lower_error and upper_error (standard errors over chains, the upper one given
        the exact draw that its chains start from: chains that do not mix share more than it shows), acceptance.

    Raises
    ------
    SettingError
        `method="ais"` cannot be used for the program, or its data cannot be simulated (several arguments or observed
        sites, a likelihood to a power).
    """
    annealing = Annealing(num_steps, start, schedule, num_leapfrog)
    check_annealable(pair, annealing)
    count("num_chains", num_chains)
    count("num_rows", num_rows)
    if exact_draws is None and start == "guide" and pair.structure.per_datum:
        raise SettingError(
            f"the guide has parameters for each training row ('{pair.structure.per_datum[0]}') and none for "
            "simulated ones: use start='prior'"
        )
    posed = _simulated(pair, num_rows, num_chains, seed)
    if exact_draws is not None:
        posed = _given(pair, exact_draws, num_chains)
    rows = num_rows if exact_draws is None else len(pair.batch.indices)
    total = rows * (annealing.num_moves + num_steps - 1)
    with progress_bar("log p(x), both sides", total, enabled=progress, unit="moves", after=PATIENCE) as bar:
        parts = [
            _sandwich(*datum, num_chains, annealing, bar, derived_seed(seed, Purpose.EVIDENCE, i))
            for i, datum in enumerate(posed)
        ]
    return pd.concat(parts, ignore_index=True)


Posed = tuple[Pair, dict[str, Tensor], dict[str, Tensor]]
"""Some rows, the latents held, and exact posterior draws of the others."""


def _sandwich(
    pair: Pair,
    held: dict[str, Tensor],
    exact: dict[str, Tensor],
    num_chains: int,
    annealing: Annealing,
    bar: Bar,
    seed: int,
) -> pd.DataFrame:
    watch = partial(bar.advance, pair.num_rows)
    with seeded(seed, pair.device):
        step_sizes = pilot(pair, annealing, held, watch)
        target = Target(pair, num_chains, annealing.start, held)
        log_w, acceptance = forward(target, annealing, step_sizes, watch)
        reverse_log_w, _ = backward(target, annealing, step_sizes, target.coordinates(exact), watch)
    below, above = StreamingLogMeanExp.empty(log_w), StreamingLogMeanExp.empty(log_w)
    below.add(log_w)
    above.add(-reverse_log_w)
    columns = {
        "lower": below.value,
        "upper": -above.value,
        "gap": -above.value - below.value,
        "lower_error": below.standard_error,
        "upper_error": above.standard_error,
        "acceptance": acceptance,
    }
    return pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})


def _given(pair: Pair, exact: dict[str, Tensor], num_chains: int) -> Iterator[Posed]:
    structure, rows = pair.structure, len(pair.batch.indices)
    if structure.global_latents:
        raise SettingError(
            f"the posterior of the data depends on '{structure.global_latents[0].name}', which the guide "
            "draws: leave exact_draws= out to simulate the data"
        )
    wanted = {s.name for s in structure.local_latents}
    shapes = {name: tuple(draws.shape[:2]) for name, draws in exact.items()}
    if set(exact) != wanted or any(shape != (num_chains, rows) for shape in shapes.values()):
        raise SettingError(
            f"exact_draws must hold [num_chains={num_chains}, rows={rows}, ...] of each of {sorted(wanted)}, "
            f"not {shapes}"
        )
    first = 0
    for part, _ in evidence_chunks(pair, num_chains):
        last = first + part.num_rows
        yield part, {}, {name: draws[:, first:last] for name, draws in exact.items()}
        first = last


def _simulated(pair: Pair, num_rows: int, num_chains: int, seed: int) -> Iterator[Posed]:
    structure, batch = pair.structure, pair.batch
    observed = structure.observed
    if len(observed) != 1 or len(batch.args) != 1 or batch.kwargs or not structure.chunkable:
        raise SettingError(
            "only a program of one argument, which is the value of its one observed site in a data plate, can be "
            "simulated: pass the data and exact_draws="
        )
    rows, _ = chunk_sizes(pair, num_rows, num_chains)
    with seeded(derived_seed(seed, Purpose.SIMULATE), pair.device):
        held = pair.held_draw(1)
    for index, part in enumerate(torch.arange(num_rows, device=pair.device).split(rows)):
        with seeded(derived_seed(seed, Purpose.SIMULATE, 1 + index), pair.device):
            posed = _simulate(pair.take(part % len(batch.indices)), observed[0].name, held, num_chains)
        yield posed


def _simulate(pair: Pair, observed: str, held: dict[str, Tensor], num_chains: int) -> Posed:
    """(z*, x) ~ p(z, x) for as many rows as the pair has."""
    story = pair.simulate(1, given=held)
    _check_scales(story, held)
    sites = {s["name"]: s for s in sample_sites(story) if s["name"] not in held}
    nesting, rows = pair.structure.max_plate_nesting, rows_dim(sites[observed], pair.structure.data_plate)
    assert rows is not None
    value = sites[observed]["value"]  # [1, plates..., event...]
    old: Any = pair.batch.args[0]
    x = value.movedim(1 + nesting + rows, 1).reshape(old.shape).to(old.dtype)
    pair = pair.on(replace(pair.batch, args=(x,)))
    exact = {
        name: site["value"] for name, site in sites.items() if name != observed and not site["is_observed"]
    }
    again: Any = pair.model(1, given={**held, **exact}).nodes[observed]["value"]
    if not torch.equal(again.expand_as(value), value):
        raise SettingError(
            f"'{observed}' is not the program's argument but computed from it, so that data cannot be simulated: "
            "pass the data and exact_draws="
        )
    return pair, held, {name: z.expand(num_chains, *z.shape[1:]) for name, z in exact.items()}


def _check_scales(trace: Trace, held: dict[str, Tensor]) -> None:
    """Refuse a likelihood to a power: it is not a density of x, so the z that generated x is no posterior draw."""
    scales = {s["name"]: s["scale"] for s in sample_sites(trace) if s["name"] not in held}
    first = next(iter(scales.values()))
    for name, scale in scales.items():
        if not math.isclose(float(scale), float(first), rel_tol=1e-9):
            raise SettingError(
                f"'{name}' is raised to a power, so that what the model simulates does not follow the density it "
                "states: pass the data and exact_draws="
            )
