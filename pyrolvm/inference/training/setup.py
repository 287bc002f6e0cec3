"""From what a user passes to `fit` to a checked problem: data, program, start, structure, objective."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro.infer.autoguide import AutoGuide
from torch.nn.parameter import is_lazy

from pyrolvm.controls import Schedule, value_of
from pyrolvm.data.arguments import arguments_of
from pyrolvm.data.batch import Batch
from pyrolvm.data.dataset import Dataset
from pyrolvm.data.far.streamed import StreamedDataset
from pyrolvm.data.plan import BatchPlan, is_share
from pyrolvm.data.precision import check_precision
from pyrolvm.errors import DataError, ProgramError, SettingError, count
from pyrolvm.inference.engine.ascent import LEAST_DRAWS, CoordinateAscent
from pyrolvm.inference.engine.optimizers import OptimizerSpec
from pyrolvm.inference.engine.problem import KL_WEIGHT, Problem, schedules_of, unweighable
from pyrolvm.inference.objectives import prepare
from pyrolvm.inference.objectives.choice import as_objective
from pyrolvm.inference.objectives.foreign import LossFunction
from pyrolvm.inference.posterior.suiting import suited
from pyrolvm.inference.program.carriers import Rows as Carriers
from pyrolvm.inference.program.carriers import carried, check_call, not_taken
from pyrolvm.inference.program.checks import inspect_program
from pyrolvm.inference.program.hints import reason_of
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.training.evaluation import HeldOutBound, chosen_or_usual
from pyrolvm.inference.training.plateau import Plateau
from pyrolvm.inference.training.rules import MOST_STEPS, SCHEDULED_EPOCHS, SCHEDULED_STEPS
from pyrolvm.inference.training.starts import InfiniteBoundError, from_data, set_values, strategies
from pyrolvm.inference.training.streaming import Streamed, parted, stream
from pyrolvm.processes import ALONE, Processes
from pyrolvm.seeds import Purpose, derived_seed

START_ROWS = 100_000
"""The most rows that a model's start is computed from."""


@dataclass
class Setup:
    """A run before its first step: everything checked, nothing trained."""

    problem: Problem
    plan: BatchPlan
    batch: Batch
    held_out: Batch | None
    seed: int
    streamed: Streamed | None = None

    @property
    def batch_size(self) -> int | None:
        """Rows of a step, of all processes together; None where it takes the data whole."""
        return self.plan.batch_size if self.streamed is None else self.streamed.plan.whole_batch

    @property
    def held_out_bound(self) -> HeldOutBound | None:
        """The bound of the held-out data."""
        return None if self.held_out is None else HeldOutBound(self.problem, self.held_out, self.seed)


def set_up(
    model: Any,
    data: Any,
    guide: Any,
    objective: Any,
    optimizer: OptimizerSpec,
    *,
    carriers: Carriers = None,
    controls: Mapping[str, Schedule] | None,
    kl_warmup: float,
    num_steps: int | None,
    num_epochs: int | None,
    batch_size: int | None,
    validation: Any,
    device: torch.device,
    dtype: torch.dtype | None,
    seed: int,
    init: Any,
    processes: Processes = ALONE,
) -> Setup:
    """Read the data, start the model, look at the program, and take one step on trial.

    Where the bound is infinite at the start, an AutoGuide that is made here is placed elsewhere.
    """
    failed: ProgramError | None = None
    for attempt, place in enumerate(strategies(init)):
        try:
            program = Program(model, guide, device=device, dtype=dtype, start=place)
            return _set_up(
                program, data, objective, optimizer, controls, kl_warmup, num_steps, num_epochs, batch_size,
                validation, seed, init, attempt, carriers, processes,
            )  # fmt: skip
        except InfiniteBoundError as error:
            failed = failed or error
            if program.auto_guide is None or isinstance(guide, AutoGuide):
                break
    assert failed is not None
    raise failed


def _set_up(
    program: Program,
    data: Any,
    objective: Any,
    optimizer: OptimizerSpec,
    controls: Mapping[str, Schedule] | None,
    kl_warmup: float,
    num_steps: int | None,
    num_epochs: int | None,
    batch_size: int | None,
    validation: Any,
    seed: int,
    init: Any,
    attempt: int,
    carriers: Carriers,
    processes: Processes,
) -> Setup:
    device, dtype = program.device, program.dtype
    streamed: Streamed | None = None
    if isinstance(data, StreamedDataset):
        data, validation = parted(data, validation, seed)
        streamed = stream(program, data, batch_size, seed, processes)
    batch = suited(program, data) if streamed is None else streamed.batch
    objective, batch = _with_its_own(objective, program, batch)
    check_call(program, batch)
    batch = carried(program, batch, carriers, derived_seed(seed, Purpose.CHECK))
    _warn_of_precision(data, dtype)
    if batch_size is not None or validation is not None:
        batch.check_rows()
    batch, held_out = _split(batch, validation, program, seed)
    num_rows = batch.num_rows or 1 if streamed is None else streamed.num_rows
    plan = BatchPlan(num_rows, batch_size, seed) if streamed is None else streamed.plan
    steps = _num_steps(plan, num_steps, num_epochs)
    if from_data(init):
        start_from(program, batch if streamed is None else streamed.start, seed)
    rows = plan.rows(0, 1)[0].to(device)
    first = batch.take(rows) if batch_size is not None else batch.of(batch.num_rows or 1)
    brought = program.contract.controls() if program.contract is not None else {}
    program.controls = {k: value_of(k, v, 1 / steps) for k, v in {**brought, **(controls or {})}.items()}
    again = (10 + attempt,) if attempt else ()
    program.initialise(first, derived_seed(seed, Purpose.START, *again))
    program.start_rows(batch, derived_seed(seed, Purpose.START, 3))
    with seeded(derived_seed(seed, Purpose.CHECK), device):
        structure = inspect_program(program, first)
    set_values(program, structure, init)
    prepared = prepare(chosen_or_usual(objective, program), structure)
    schedules = schedules_of(brought, prepared, controls, kl_warmup)
    problem = Problem(
        program,
        structure,
        prepared,
        optimizer,
        batch,
        minibatch=batch_size is not None,
        num_rows=num_rows,
        schedules=schedules,
        num_steps=steps,
    )
    adopt_modules(problem, rows, seed)
    _first_step(problem, rows, seed)
    if held_out is not None and structure.per_datum:
        raise SettingError(
            f"the guide has parameters for each training row ('{structure.per_datum[0]}') and none for held-out "
            "ones: leave validation out (`fitted.refine(x)` judges other rows afterwards), or use an amortised guide"
        )
    return Setup(problem, plan, batch, held_out, seed, streamed)


def _with_its_own(objective: Any, program: Program, batch: Batch) -> tuple[Any, Batch]:
    """A loss that is a function with those arguments of a step that the model does not take, and the rest of them."""
    own = not_taken(program, batch)
    if not own or not callable(objective) or not isinstance(as_objective(objective), LossFunction):
        return objective, batch
    rest = {name: value for name, value in batch.kwargs.items() if name not in own}
    return partial(objective, **own), dataclasses.replace(batch, kwargs=rest)


def start_from(program: Program, batch: Batch, seed: int) -> None:
    """Start a fresh model from its data, where it knows how to."""
    model = program.contract
    if model is None or not model.fresh or not program.knows("initialise_from") or not batch.args:
        return
    x = batch.args[0]
    if not isinstance(x, torch.Tensor):
        return
    if len(x) > START_ROWS:  # evenly over the data: not all of a file that is larger than memory
        x = x[torch.linspace(0, len(x) - 1, START_ROWS).long()]
    frozen = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
    with seeded(derived_seed(seed, Purpose.START, 1), program.device), torch.no_grad():
        model.initialise_from(x, seed=seed)
        for parameter, value in frozen:
            parameter.copy_(value)


def _warn_of_precision(data: Any, dtype: torch.dtype) -> None:
    """Look at the data as they were passed: after a cast it is too late."""
    call = arguments_of(data)
    for part in (*call.args, *call.kwargs.values()):
        values = part.values if isinstance(part, Dataset | pd.DataFrame) else part
        columns = [str(c) for c in part.columns or ()] if isinstance(part, Dataset) else None
        numeric = isinstance(values, torch.Tensor) or (
            isinstance(values, np.ndarray) and values.dtype.kind in "fiu"
        )
        if numeric:
            check_precision(values, columns or None, dtype)


def _split(batch: Batch, validation: Any, program: Program, seed: int) -> tuple[Batch, Batch | None]:
    """(training data, held-out data): a share of the rows, or data of their own."""
    if validation is None:
        return batch, None
    if is_share(validation):
        return batch.split(float(validation), seed)
    held = suited(program, validation, batch)
    if not held.num_rows and batch.num_rows:
        raise DataError(
            f"validation={validation!r} holds no rows: give a share such as 0.1, or held-out data"
        )
    held.check_rows()
    return batch, held


def _num_steps(plan: BatchPlan, num_steps: int | None, num_epochs: int | None) -> int:
    if num_steps is not None and num_epochs is not None:
        raise SettingError("give num_steps or num_epochs, not both")
    if num_epochs is not None:
        return plan.num_steps(count("num_epochs", num_epochs))
    if num_steps is None:  # until converged: schedules go their way over this length
        return min(MOST_STEPS, max(SCHEDULED_STEPS, plan.num_steps(SCHEDULED_EPOCHS)))
    return count("num_steps", num_steps)


def cadence(validate_every: int | None, plan: BatchPlan, steps: int) -> int:
    """Steps between held-out bounds: a pass over the data; with the data whole, a fiftieth of the run."""
    if validate_every is not None:
        return min(count("validate_every", validate_every), steps)
    return min(plan.num_steps(1) if plan.batch_size is not None else max(1, steps // 50), steps)


def plateau_of(patience: int | None, held_out: Batch | None, kl_warmup: float, steps: int) -> Plateau | None:
    """The rule that ends a run when its held-out bound is flat."""
    if patience is None:
        return None
    if held_out is None:
        raise SettingError("patience watches the held-out bound: give validation=0.1 or held-out data")
    return Plateau(count("patience", patience, least=2), first_step=round(kl_warmup * steps))


def adopt_modules(problem: Problem, rows: torch.Tensor, seed: int) -> None:
    """Take the objective's modules in; lazy ones get their shapes from a first estimate."""
    program, modules = problem.program, problem.objective.modules()
    for module in modules.values():
        module.to(device=program.device, dtype=program.dtype)
    if any(is_lazy(p) for m in modules.values() for p in m.parameters()):
        with (
            seeded(derived_seed(seed, Purpose.START, 2), program.device),
            program.untouched(),
            program.scope(),
        ):
            problem.loss(rows, [1.0] * len(problem.scheduled[1:]))
    program.adopt("objective.", modules)


def _first_step(problem: Problem, rows: torch.Tensor, seed: int) -> None:
    """One bound and gradient with all of Pyro's validation on, before anything is trained."""
    program = problem.program
    values = problem.controls(0, 1)[0].tolist()[1:]
    noise = seeded(derived_seed(seed, Purpose.CHECK), program.device)
    with program.untouched(), noise, program.scope(validate=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found .* in .* but not", UserWarning)
        try:
            loss = problem.loss(rows, values)
        except (ValueError, NotImplementedError, LookupError, RuntimeError, TypeError) as error:
            if isinstance(error, (ProgramError, SettingError, DataError)):
                raise
            raise _refusal(problem, error) from error
    terms = dict(zip(problem.terms, loss.terms.tolist(), strict=True))
    if loss.remainder is not None:
        _check_weighted(problem, terms, loss.remainder.item())
    program.check_registered(loss.surrogate)
    if not loss.surrogate.requires_grad:
        raise ProgramError(
            "the bound depends on no parameter, so there is nothing to fit: make numbers of model or guide a "
            "pyro.param, and take .detach(), .item() and float() off those that are"
        )
    if not torch.isfinite(loss.terms[0]):
        raise InfiniteBoundError(
            f"the bound is {loss.terms[0].item()} before the first step: the data lie outside the model's support, or "
            f"are too large for its starting values (standardise them)\n{problem.structure.table()}"
        )


def _refusal(problem: Problem, error: Exception) -> Exception:
    name = problem.objective.settings().get("name", type(problem.objective).__name__)
    if KL_WEIGHT in problem.schedules and problem.structure.enumerated:
        return SettingError(
            unweighable(f"a latent that is summed out ('{problem.structure.enumerated[0].name}')")
        )
    summed = problem.structure.enumerated
    hint = ""
    given = getattr(getattr(problem.objective, "elbo", None), "max_plate_nesting", math.inf)
    depth = problem.structure.max_plate_nesting
    if given < depth:
        hint = f"\nplates are nested {depth} deep: pass max_plate_nesting={depth}"
    elif summed and not isinstance(error, (NotImplementedError, TypeError)):
        site = summed[0]
        hint = (
            f"\n'{site.name}' is summed out: its {site.num_states} values come along one more dimension, left of the "
            f"plates; let shapes broadcast (`means[{site.name}]`, pyro.ops.indexing.Vindex) where the program expands, "
            "reshapes or stacks to sizes"
        )
    return ProgramError(f"{name} cannot take this program: {reason_of(error)}{hint}")


def _check_weighted(problem: Problem, terms: Mapping[str, float], remainder: float) -> None:
    """A KL that is not known cannot be weighed, nor one that the bound is not the likelihood minus."""
    if not abs(remainder) <= 1e-3 * max(1.0, abs(terms["elbo"])):
        raise SettingError(unweighable(f"{problem.objective.settings().get('name', 'this objective')}"))


def alternating(setup: Setup, objective: Any, num_draws: int) -> tuple[CoordinateAscent, str]:
    """The engine of coordinate ascent, on the ELBO of `num_draws` fixed draws, and its sentence.

    Raises
    ------
    SettingError
        Too few draws, a weight of the KL, or an objective that is not the ELBO.
    """
    problem = setup.problem
    if setup.streamed is not None:
        raise SettingError("coordinate ascent (alternate=) takes the data whole: load them (`.load()`)")
    count("alternate", num_draws, least=LEAST_DRAWS)
    program = problem.program
    usual = chosen_or_usual(objective, program)
    if usual not in (None, "trace", "meanfield", "enum"):
        raise SettingError(
            f"coordinate ascent (alternate=) climbs the ELBO, not {usual!r}: take objective='trace'"
        )
    if KL_WEIGHT in problem.schedules or len(problem.scheduled) > 1:
        raise SettingError(
            "coordinate ascent (alternate=) climbs one bound: leave kl_warmup and schedules out"
        )
    at_once = Pair(program, problem.structure, setup.batch).vectorized
    name = "enum" if problem.structure.enumerated else usual or "meanfield"
    settings = {"num_particles": num_draws, "vectorize_particles": at_once}
    problem.objective = prepare((name, settings), problem.structure)
    engine = CoordinateAscent(problem)
    return engine, engine.note


def settings_of(
    setup: Setup, optimizer: OptimizerSpec, alternate: int | None = None, free_rate: bool = False
) -> dict[str, Any]:
    """What must agree for a checkpoint to be of the same run: plain values, JSON-able."""
    problem = setup.problem
    return {
        "objective": problem.objective.settings().get("name", type(problem.objective).__name__),
        **{k: v for k, v in problem.objective.settings().items() if k not in ("name", "max_plate_nesting")},
        "optimizer": optimizer.name,
        "learning_rate": None
        if free_rate
        else ("a function" if callable(optimizer.learning_rate) else optimizer.learning_rate),
        "optimizer_options": {
            k: list(v) if isinstance(v, tuple) else v for k, v in optimizer.options.items()
        },
        "clip_norm": optimizer.clip_norm,
        "alternate": alternate,
        "controls": problem.constants | dict.fromkeys(problem.scheduled[1:], "a function"),
        "batch_size": setup.batch_size,
        "num_rows": setup.batch.num_rows if setup.streamed is None else setup.streamed.num_rows,
        "seed": setup.seed,
        "dtype": str(problem.program.dtype).removeprefix("torch."),
        "data": (setup.batch if setup.streamed is None else setup.streamed).fingerprint(),
        "validation": setup.held_out.fingerprint() if setup.held_out is not None else None,
    }
