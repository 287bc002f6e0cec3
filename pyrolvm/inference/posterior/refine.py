"""Per-datum refinement: the guide of some rows, improved for each of them alone while the model is held.

From q(z | x_n) as the fitted guide has it, a private Gaussian q_n climbs the bound of its own row,

    L_n[q] = E_q [ log p(x_n, z) - log q(z) ],        amortisation gap_n = L_n[q_n] - L_n[q(z | x_n)] >= 0,

which one network for all rows leaves open (Cremer, Li and Duvenaud 2018, section 3). This is also how rows that a
guide per datum was not trained on get a posterior. Latents that the rows share keep the fitted guide.

C. Cremer, X. Li and D. Duvenaud, "Inference suboptimality in variational autoencoders", ICML 2018.
Y. Kim et al., "Semi-amortized variational autoencoders", ICML 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyrolvm.data.batch import Batch
from pyrolvm.errors import ProgramError, SettingError, count, one_of
from pyrolvm.inference.engine import Problem, TrainingState, choose_engine
from pyrolvm.inference.engine.optimizers import OptimizerSpec
from pyrolvm.inference.objectives import prepare
from pyrolvm.inference.posterior.evidence.chunks import joint_draws
from pyrolvm.inference.posterior.record import Record
from pyrolvm.inference.posterior.rows import batch_of, check_columns, is_training_data
from pyrolvm.inference.posterior.suiting import suited
from pyrolvm.inference.program.checks import inspect_program
from pyrolvm.inference.program.noise import noise_state, seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.per_datum import FAMILIES, PerDatum, kind_of_gaussian
from pyrolvm.inference.program.program import Program
from pyrolvm.plates import data_rows
from pyrolvm.progress import PATIENCE, progress_bar
from pyrolvm.seeds import Purpose, derived_seed

CHUNK_ROWS = 1024
"""The most rows that climb at once."""
RATES = (4.0, 2.0, 1.0)
"""Climbs of a row, by their share of the learning rate; each takes its units from what the last one found."""
JUDGED_DRAWS = 1000
"""Draws for each of the two bounds of a row."""


class _Elsewhere:
    """A guide of what the rows share, run on the rows that it has parameters for."""

    def __init__(self, guide: Callable[..., Any], rows: Batch) -> None:
        self.guide, self.rows = guide, rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with data_rows(self.rows.total_rows, self.rows.indices):
            return self.guide(*self.rows.args, **self.rows.kwargs)


@dataclass(frozen=True)
class Steps:
    """How the rows climb: parameters of `FittedModel.refine`."""

    num_steps: int
    learning_rate: float
    num_samples: int
    seed: int
    engine: str
    progress: bool

    def __post_init__(self) -> None:
        count("num_steps", self.num_steps)
        count("num_samples", self.num_samples)
        if not self.learning_rate > 0:
            raise SettingError(f"learning_rate must be positive, not {self.learning_rate}")

    @property
    def each(self) -> int:
        """Steps of one climb."""
        return max(1, self.num_steps // len(RATES))

    @property
    def optimizer(self) -> OptimizerSpec:
        """Adam with the rate of every climb."""
        return OptimizerSpec(learning_rate=lambda share: self.learning_rate * _falling(share))


@dataclass
class Climb:
    """The rows of one refinement, and how far they got.

    Attributes
    ----------
    pair : Pair
        The fitted model with a guide per datum for these rows; its entries are all that it learns.
    table : DataFrame
        One row per datum, in nats: `elbo_start`, `elbo`, their difference `gap` and its `standard_error`.
    of_guide : bool
        Whether the start is the fitted guide itself, so that the gap is that of amortisation.
    """

    pair: Pair
    table: pd.DataFrame
    family: str
    of_guide: bool
    engine: str


def climb(fitted: Record, x: Any, family: str, steps: Steps) -> Climb:
    """Refine the rows of `x`, in the family asked for or, if "auto", in the guide's own."""
    if not any(s.local and not s.discrete for s in fitted.structure.latents):
        raise ProgramError(
            "refine() fits what each row has of its own, and this program has no continuous latents in a plate over "
            "its rows: declare them by `with pyrolvm.data_plate(x):`, or fit for more steps"
        )
    data = suited(fitted.program, x, fitted.call)
    check_columns(fitted, data)
    own = _starting_guide(fitted, data)
    batch = data.of(len(data.indices))
    family, of_guide = _family(fitted, batch, own, one_of("family", family, ("auto", *FAMILIES)))
    guide = PerDatum(family).bind(fitted.program.model, own, _shared_guide(fitted))
    parts = _parts(fitted, batch)
    pair = _started(fitted.program.with_row_guide(guide), guide, batch, batch.take(parts[0]), steps.seed)
    before = {name: table.clone() for name, table in guide.entries().items()}
    start = pair
    if of_guide and not fitted.structure.per_datum:
        start = Pair(fitted.program, fitted.structure, batch_of(fitted, batch))
    judged = [_bounds(start, steps.seed, i) for i in range(2)]
    note = _take_steps(pair, guide, parts, steps)
    _keep_better(guide, before, judged[0], _bounds(pair, steps.seed, 0))
    return Climb(pair, _table(judged[1], _bounds(pair, steps.seed, 1)), family, of_guide, note)


def _parts(fitted: Record, batch: Batch) -> list[Tensor]:
    """The rows that climb at once."""
    every = torch.arange(batch.num_rows, device=fitted.program.device)
    return list(every.split(CHUNK_ROWS)) if fitted.structure.chunkable else [every]


def _started(program: Program, guide: PerDatum, batch: Batch, first: Batch, seed: int) -> Pair:
    """The pair with an entry for every row, where the fitted guide puts it; nothing else is learned."""
    program.initialise(first, derived_seed(seed, Purpose.REFINE))
    program.start_rows(batch, derived_seed(seed, Purpose.REFINE, 1))
    guide.count_in_units(torch.arange(batch.num_rows, device=program.device))
    program.collect()
    with seeded(derived_seed(seed, Purpose.CHECK), program.device):
        structure = inspect_program(program, first)
    program.hold(structure.row_tables)
    return Pair(program, structure, batch)


def _starting_guide(fitted: Record, batch: Batch) -> Any:
    """The fitted guide if it knows these rows, else the one that the model brings, else None (the prior)."""
    structure = fitted.structure
    if structure.joint_guide:
        raise ProgramError(
            f"the guide draws the latents of all data at once ('{structure.joint_guide}'), so that no row can be "
            "refined alone: use a guide that is independent over data, such as AutoNormal"
        )
    if not structure.per_datum or is_training_data(fitted, batch):
        return fitted.program.guide
    return fitted.program.contract.guide if fitted.program.knows("guide") else None


def _shared_guide(fitted: Record) -> Any:
    """The guide of what the rows share, run on rows that it has parameters for."""
    guide, example = fitted.program.guide, fitted.example
    if not fitted.structure.per_datum:
        return guide
    if example is None:
        raise SettingError(
            "the guide has parameters for each training row and cannot run without them: load the run with "
            "example=x, the data that it was fitted to"
        )
    return _Elsewhere(guide, example)


def _family(fitted: Record, batch: Batch, own: Any, family: str) -> tuple[str, bool]:
    """(family, whether the guide is of it): what "auto" means."""
    if own is not fitted.program.guide:
        return ("mean_field" if family == "auto" else family), False
    if fitted.program.row_guide is not None:
        usual = fitted.program.row_guide.family
        return (usual, True) if family == "auto" else (family, family == usual)
    few = batch.take(torch.arange(min(2, batch.num_rows), device=batch.indices.device))
    with torch.no_grad(), seeded(0, fitted.program.device):
        guide = Pair(fitted.program, fitted.structure, few if fitted.structure.chunkable else batch).guide()
    nodes: list[Any] = [guide.nodes[s.name] for s in fitted.structure.local_latents if s.in_guide]
    kinds = {
        kind_of_gaussian(node["fn"])
        for node in nodes
        if not getattr(node["fn"].support, "is_discrete", False)
    }
    usual = "mean_field" if kinds == {"mean_field"} else "full"
    chosen = usual if family == "auto" else family
    return chosen, kinds == {chosen}


def _take_steps(pair: Pair, guide: PerDatum, parts: list[Tensor], steps: Steps) -> str:
    """Climb, some rows at a time, each with an optimiser of its own; the engine's sentence."""
    program, total = pair.program, len(parts) * steps.each * len(RATES)
    with (
        program.evaluating(),
        progress_bar("refining", total, enabled=steps.progress, after=PATIENCE) as bar,
    ):
        running, note = choose_engine(steps.engine, _problem(pair, steps), total, on_compile=bar.note)
        for i, rows in enumerate(parts):
            random = noise_state(derived_seed(steps.seed, Purpose.REFINE, 2, i), program.device)
            for turn in range(len(RATES)):
                state = TrainingState(program.tensors(), {}, turn * steps.each, random)
                random = running.run(state, rows.cpu().expand(steps.each, -1))[0].random
                guide.count_in_units(rows)
                bar.advance(steps.each)
    return getattr(running, "note", note)


def _problem(pair: Pair, steps: Steps) -> Problem:
    """The bound of every row, as the engines take it."""
    kind = TraceEnum_ELBO if pair.structure.enumerated else TraceMeanField_ELBO
    many = steps.num_samples
    elbo = kind(num_particles=many, vectorize_particles=pair.vectorized and many > 1)
    return Problem(
        pair.program,
        pair.structure,
        prepare(elbo, pair.structure),
        steps.optimizer,
        pair.batch,
        minibatch=True,
        num_rows=pair.batch.num_rows,
        schedules=dict(pair.program.controls),
        num_steps=steps.each * len(RATES),
    )


def _falling(share: float) -> float:
    """The rate's share after that share of the steps: of each climb its own, to a hundredth along a cosine."""
    turn, within = divmod(share * len(RATES) - 1e-9, 1)
    return RATES[int(turn)] * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * within)))


@torch.no_grad()
def _bounds(pair: Pair, seed: int, stream: int) -> Tensor:
    """log p(x_n, z) - log q(z) of `JUDGED_DRAWS` draws, the same noise at every call: [draws, rows], nats."""
    parts = []
    for i, chunk in enumerate(pair.chunks(JUDGED_DRAWS)):
        with seeded(derived_seed(seed, Purpose.REFINE, 3, stream, i), pair.device):
            drawn = joint_draws(chunk, JUDGED_DRAWS)
            each = [chunk.densities(m, g, chunk.held(g)).log_weight.double() for m, g, _ in drawn]
            parts.append(torch.cat(each))
    return torch.cat(parts, 1)


@torch.no_grad()
def _keep_better(guide: PerDatum, before: dict[str, Tensor], start: Tensor, end: Tensor) -> None:
    """Put the start back where the climb failed: judged by other draws than those that are reported."""
    failed = ~(end.mean(0) >= start.mean(0))
    for name, table in guide.entries().items():
        table[failed] = before[name][failed]


def _table(start: Tensor, end: Tensor) -> pd.DataFrame:
    gap = end - start
    error = gap.std(0) / math.sqrt(len(gap))
    columns = {"elbo_start": start.mean(0), "elbo": end.mean(0), "gap": gap.mean(0), "standard_error": error}
    return pd.DataFrame({k: v.cpu().numpy() for k, v in columns.items()}).rename_axis("row")
