"""Bidirectional Monte Carlo: log p(x) between a lower and an upper bound.

Simulate z* ~ p(z) and x ~ p(x | z*): then z* is an exact draw of p(z | x). Annealed importance sampling from
the start to the posterior bounds log p(x) from below, and the same chain run backwards from z* from above,

    E[log (1/S) sum_s w_s]  <=  log p(x)  <=  E[-log (1/S) sum_s 1 / w_s],

so that their gap bounds the error of both: a proof, on simulated data, of how good the estimates of
method="ais" with these settings are.

Grosse, Ghahramani and Adams (2015), "Sandwiching the marginal likelihood using bidirectional Monte Carlo".
Grosse, Ancha and Roy (2016), "Measuring the reliability of MCMC inference with bidirectional Monte Carlo".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import SettingError
from pyrolvm.inference.posterior.evidence.ais import Annealing, backward, check_annealable, forward, pilot
from pyrolvm.inference.posterior.evidence.runs import Run, chunk_sizes, chunks
from pyrolvm.inference.posterior.evidence.streams import StreamingLogMeanExp
from pyrolvm.inference.posterior.evidence.target import Target
from pyrolvm.inference.program.handlers import Fixed
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.structure import sample_sites
from pyrolvm.progress import PATIENCE, Bar, progress_bar
from pyrolvm.seeds import Purpose, derived_seed

if TYPE_CHECKING:
    from pyrolvm.inference.posterior.fitted import FittedModel


@torch.no_grad()
def bidirectional(
    fitted: FittedModel,
    num_rows: int = 100,
    *,
    x: Any = None,
    exact_draws: dict[str, Tensor] | None = None,
    num_chains: int = 16,
    num_steps: int = 500,
    start: str = "prior",
    schedule: str = "sigmoid",
    num_leapfrog: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Bounds on log p(x) from both sides, one row per datum, nats.

    Of `num_rows` data simulated from the fitted model; or of given data `x` whose posterior is known, with
    `exact_draws`: latent site -> draws of p(z | x), [num_chains, rows, ...]. Latents outside the data plate are
    held at one draw from the guide: the bounds are on log p(x | that draw).

    Columns: lower, upper, gap = upper - lower, lower_error and upper_error (standard errors over chains),
    acceptance. Raises `SettingError` for programs that `method="ais"` refuses, that cannot be simulated
    (several arguments or observed sites, a likelihood to a power), or if one of x and exact_draws is missing.
    """
    annealing = Annealing(num_steps, start, schedule, num_leapfrog)
    check_annealable(fitted, annealing)
    if num_chains < 1 or num_rows < 1:
        raise SettingError(f"num_chains={num_chains} and num_rows={num_rows} must be at least 1")
    if (x is None) != (exact_draws is None):
        raise SettingError("pass both x= and exact_draws=, or neither to simulate the data")
    if x is None and start == "guide" and fitted.structure.per_datum:
        raise SettingError(
            f"the guide has parameters for each training row ('{fitted.structure.per_datum[0]}') and none for "
            "simulated ones: use start='prior'"
        )
    if x is None:
        posed = _simulated(fitted, num_rows, num_chains, seed)
    else:
        posed = _given(fitted, x, exact_draws or {}, num_chains, seed)
    rows = num_rows if x is None else fitted.batch(x).num_rows
    total = rows * (annealing.num_moves + num_steps - 1)
    with progress_bar("log p(x), both sides", total, enabled=progress, unit="moves", after=PATIENCE) as bar:
        parts = [_sandwich(*datum, num_chains, annealing, bar) for datum in posed]
    return pd.concat(parts, ignore_index=True)


Posed = tuple[Run, dict[str, Tensor], dict[str, Tensor]]
"""Some rows, the latents held, and exact posterior draws of the others."""


def _sandwich(
    run: Run,
    held: dict[str, Tensor],
    exact: dict[str, Tensor],
    num_chains: int,
    annealing: Annealing,
    bar: Bar,
) -> pd.DataFrame:
    watch = partial(bar.advance, run.num_rows)
    step_sizes = pilot(run, annealing, held, watch)
    target = Target(run, num_chains, annealing.start, held)
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


def _given(
    fitted: FittedModel, x: Any, exact: dict[str, Tensor], num_chains: int, seed: int
) -> Iterator[Posed]:
    if fitted.structure.global_latents:
        raise SettingError(
            f"the posterior of the data depends on '{fitted.structure.global_latents[0].name}', which the guide "
            "draws: leave x= and exact_draws= out to simulate the data"
        )
    wanted, rows = {s.name for s in fitted.structure.local_latents}, fitted.batch(x).num_rows
    shapes = {name: tuple(draws.shape[:2]) for name, draws in exact.items()}
    if set(exact) != wanted or any(shape != (num_chains, rows) for shape in shapes.values()):
        raise SettingError(
            f"exact_draws must hold [num_chains={num_chains}, rows={rows}, ...] of each of {sorted(wanted)}, "
            f"not {shapes}"
        )
    first = 0
    for run, _ in chunks(fitted, x, num_chains, seed):
        last = first + run.num_rows
        yield run, {}, {name: draws[:, first:last] for name, draws in exact.items()}
        first = last


def _simulated(fitted: FittedModel, num_rows: int, num_chains: int, seed: int) -> Iterator[Posed]:
    structure, example = fitted.structure, fitted.example
    observed = [s for s in structure.observed if s.family != "Delta"]
    if len(observed) != 1 or len(example.args) != 1 or example.kwargs or not structure.takes_any_rows:
        raise SettingError(
            "only a program of one argument, which is the value of its one observed site in a data plate, can be "
            "simulated: pass x= and exact_draws="
        )
    rows, _ = chunk_sizes(structure, example, num_rows, num_chains)
    device, held = fitted.program.device, None
    for index, part in enumerate(torch.arange(num_rows, device=device).split(rows)):
        with seeded(derived_seed(seed, Purpose.EVIDENCE, index), device):
            if held is None:
                held = Run(fitted.program, structure, example, fitted.num_rows).held_draw(1)
            run = Run(fitted.program, structure, example.take(part % example.num_rows), fitted.num_rows)
            yield _simulate(run, observed[0].name, held, num_chains)


def _simulate(run: Run, observed: str, held: dict[str, Tensor], num_chains: int) -> Posed:
    """(z*, x) ~ p(z, x) for as many rows as the run has."""
    story = run.model(1, Fixed(held), poutine.uncondition)
    _check_scales(story, held)
    sites = {s["name"]: s for s in sample_sites(story) if s["name"] not in held}
    nesting, plate = run.structure.max_plate_nesting, run.structure.data_plate
    assert plate is not None
    value = sites[observed]["value"]  # [1, plates..., event...]
    old: Any = run.batch.args[0]
    x = value.movedim(1 + nesting + plate.dim, 1).reshape(old.shape).to(old.dtype)
    run = Run(run.program, run.structure, type(run.batch)((x,), {}), run.total)
    exact = {name: site["value"] for name, site in sites.items() if name != observed}
    again: Any = run.model(1, Fixed({**held, **exact})).nodes[observed]["value"]
    if not torch.equal(again.expand_as(value), value):
        raise SettingError(
            f"'{observed}' is not the program's argument but computed from it, so that data cannot be simulated: "
            "pass x= and exact_draws="
        )
    return run, held, {name: z.expand(num_chains, *z.shape[1:]) for name, z in exact.items()}


def _check_scales(trace: Trace, held: dict[str, Tensor]) -> None:
    """A likelihood to a power is no distribution of x, so that the draw that made x is none of the posterior."""
    scales = {s["name"]: s["scale"] for s in sample_sites(trace) if s["name"] not in held}
    first = next(iter(scales.values()))
    for name, scale in scales.items():
        if not math.isclose(float(scale), float(first), rel_tol=1e-9):
            raise SettingError(
                f"'{name}' is raised to a power, so that what the model simulates does not follow the density it "
                "states: pass x= and exact_draws="
            )
