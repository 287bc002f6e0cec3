"""`fit`: data, model and objective in, a `FittedModel` out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO, RenyiELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyrolvm.data.arrays import Batch, as_batch
from pyrolvm.data.plan import BatchPlan
from pyrolvm.errors import DataError, ProgramError, SettingError
from pyrolvm.inference.engine import Step, choose_engine
from pyrolvm.inference.engine.optimizers import OptimizerSpec
from pyrolvm.inference.objectives import prepare
from pyrolvm.inference.posterior.fitted import FittedModel, suit
from pyrolvm.inference.program.devices import resolve_device
from pyrolvm.inference.program.noise import noise_state, seeded
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import inspect_program
from pyrolvm.inference.training.evaluation import HeldOutBound
from pyrolvm.inference.training.loop import CHECKPOINT_FILE, Callback, Training
from pyrolvm.inference.training.plateau import Plateau
from pyrolvm.plates import arange_rows
from pyrolvm.progress import progress_bar
from pyrolvm.seeds import Purpose, derived_seed

EXAMPLE_ROWS = 8


def fit(
    model: Any,
    data: Any,
    *,
    guide: Any = None,
    objective: ELBO | None = None,
    optimizer: str | type[Optimizer] = "adam",
    learning_rate: float = 1e-3,
    optimizer_options: dict[str, Any] | None = None,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
    num_steps: int | None = None,
    num_epochs: int | None = None,
    batch_size: int | None = None,
    validation: Any = None,
    validate_every: int | None = None,
    patience: int | None = None,
    kl_warmup: float = 0.0,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 30.0,
    resume: bool = False,
    on_nan: str = "raise",
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    engine: str = "auto",
) -> FittedModel:
    """Train a model/guide pair by stochastic variational inference.

    Parameters
    ----------
    model: a `LatentVariableModel`, or any Pyro callable (then `guide` is needed).
    data: tensor, array, DataFrame or `Dataset`; a tuple (positional) or dict (keyword) of them for a
        program of several arguments. Floating values are cast to `dtype`.
    guide: a callable of the model's arguments, an AutoGuide instance or an AutoGuide class.
    objective: a Pyro ELBO object; `Trace_ELBO()` by default, `TraceEnum_ELBO()` if the model enumerates,
        `TraceGraph_ELBO()` if it samples discrete latents.
        `RenyiELBO` is the bound of each datum, the plate's scale outside the logarithm.
    optimizer, learning_rate, optimizer_options: a name ("adam", "sgd", ...) or a torch.optim class; one
        optimiser over all parameters. The loss is in nats per datum.
    schedule: optimiser -> torch scheduler, stepped once per step.
    clip_norm: largest global norm of the gradient; None for no clipping.
    num_steps, num_epochs: how long, in steps or passes over the data (1000 steps if neither is given).
    batch_size: rows per step, by a plan that visits every row once per pass; None passes the data whole.
    validation: held-out data like `data`, or the share of rows to hold out; its bound is computed with the
        same noise every `validate_every` steps (a pass over the data by default).
    patience: stop when the held-out bound has not risen by more than its noise from `patience` evaluations to the
        next `patience` (after any KL warm-up), and keep the best parameters; None trains to the end.
    kl_warmup: share of the steps over which the KL's weight rises linearly to 1.
    device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1" or "mps".
    dtype: torch.float32 by default.
    seed: of initial values, batches and noise, apart; the same seed gives the same numbers on a CPU.
    checkpoint: a folder to keep the training state in, written every `checkpoint_seconds`, at the end and on
        interrupt; with `resume=True` the run goes on from it (`num_steps` counts from the start).
    on_nan: "raise" names step and site and leaves the last good state in the model; "rollback" stops
        there and returns it; "skip" leaves out the steps that were not finite.
    callbacks: called between chunks with a `Report`; a returned sentence ends the run.
    engine: "auto", "compiled" or "eager".

    Raises
    ------
    DataError, ProgramError, SettingError, RunFolderError: bad input, before the first step.
    DivergenceError: the bound or a parameter stopped being finite, or the model's own `check_fit` refuses the end.
    """
    _check_settings(on_nan, kl_warmup, objective, num_steps, num_epochs)
    target = torch.device(resolve_device(device))
    dtype = dtype or torch.float32
    program = Program(model, guide, device=target, dtype=dtype)
    batch = suit(program.owner, as_batch(data, dtype, target))
    if batch_size is not None or validation is not None:
        batch.check_rows()
    batch, held_out = _split(batch, validation, program, seed)
    plan = BatchPlan(batch.num_rows or 1, batch_size, seed)
    rows = plan.rows(0, 1)[0].to(target)
    first = batch.take(rows) if batch_size is not None else batch
    total_rows = batch.num_rows or 1
    program.initialise(first, (total_rows, rows), derived_seed(seed, Purpose.START))
    with seeded(derived_seed(seed, Purpose.CHECK), target):
        structure = inspect_program(program, first, (total_rows, rows))
    steps = _num_steps(plan, num_steps, num_epochs)
    spec = OptimizerSpec(optimizer, learning_rate, optimizer_options or {}, schedule, clip_norm)
    step = Step(
        program,
        structure,
        prepare(objective, structure),
        spec,
        batch,
        minibatch=batch_size is not None,
        num_rows=total_rows,
        warmup_steps=round(kl_warmup * steps),
    )
    _first_step(step, rows, seed)
    if held_out is not None and structure.per_datum:
        raise SettingError(
            f"the guide has parameters for each training row ('{structure.per_datum[0]}') and none for held-out "
            "ones: leave validation out, or use an amortised guide"
        )
    with progress_bar(_title(model), steps, enabled=progress) as bar:
        running, note = choose_engine(engine, step, steps, on_compile=bar.note)
        training = Training(
            step,
            running,
            plan,
            running.initial_state(noise_state(seed, target)),
            steps,
            settings=_settings(step, plan, seed, batch),
            validate=HeldOutBound(step, held_out, seed) if held_out is not None else None,
            validate_every=_cadence(validate_every, plan, steps) if held_out is not None else 0,
            plateau=_plateau(patience, held_out, step),
            checkpoint=Path(checkpoint) if checkpoint is not None else None,
            checkpoint_seconds=checkpoint_seconds,
            on_nan=on_nan,
            callbacks=callbacks,
        )
        if resume:
            _resume(training)
        training.run(bar)
    _check_fit(program, batch)
    return FittedModel(
        program,
        structure,
        training.history.frame(),
        settings=training.settings | {"num_steps": steps, "kept_step": training.kept_step},
        example=_few(batch) if structure.takes_any_rows and not structure.per_datum else batch,
        num_rows=total_rows,
        engine=getattr(running, "note", note),  # an engine that fell back says so itself
        stopped_because=training.stopped_because,
        columns=batch.columns,
    )


def _check_settings(
    on_nan: str, kl_warmup: float, objective: Any, num_steps: int | None, num_epochs: int | None
) -> None:
    if on_nan not in ("raise", "rollback", "skip"):
        raise SettingError(f"on_nan='{on_nan}' is not known: choose from raise, rollback, skip")
    if not 0.0 <= kl_warmup <= 1.0:
        raise SettingError(f"kl_warmup is a share of the steps, between 0 and 1, not {kl_warmup}")
    if kl_warmup and isinstance(objective, RenyiELBO):
        raise SettingError(
            "kl_warmup weighs the KL of the ELBO, which a Renyi bound does not have: leave it out"
        )
    if num_steps is not None and num_epochs is not None:
        raise SettingError("give num_steps or num_epochs, not both")
    for name, value in (("num_steps", num_steps), ("num_epochs", num_epochs)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise SettingError(f"{name} must be a positive whole number, not {value!r}")


def _split(batch: Batch, validation: Any, program: Program, seed: int) -> tuple[Batch, Batch | None]:
    if validation is None:
        return batch, None
    if not isinstance(validation, float):
        held_out = suit(program.owner, as_batch(validation, program.dtype, program.device))
        held_out.check_rows()
        return batch, held_out
    count = round(validation * batch.num_rows)
    if not 0 < count < batch.num_rows:
        raise SettingError(
            f"validation={validation} of {batch.num_rows} rows leaves {count} to hold out: give a share such as 0.1, "
            "or held-out data"
        )
    generator = torch.Generator().manual_seed(derived_seed(seed, Purpose.SPLIT))
    order = torch.randperm(batch.num_rows, generator=generator)
    return batch.take(order[count:].sort().values), batch.take(order[:count].sort().values)


def _num_steps(plan: BatchPlan, num_steps: int | None, num_epochs: int | None) -> int:
    return num_steps or (plan.num_steps(num_epochs) if num_epochs else 1000)


def _cadence(validate_every: int | None, plan: BatchPlan, steps: int) -> int:
    """Every pass over the data; with the data whole, fifty times in the run."""
    every = validate_every or (plan.num_steps(1) if plan.batch_size is not None else max(1, steps // 50))
    return min(every, steps)


def _plateau(patience: int | None, held_out: Batch | None, step: Step) -> Plateau | None:
    if patience is None:
        return None
    if held_out is None:
        raise SettingError("patience watches the held-out bound: give validation=0.1 or held-out data")
    if not isinstance(patience, int) or patience < 2:
        raise SettingError(f"patience must be a whole number of at least 2 evaluations, not {patience!r}")
    return Plateau(patience, first_step=step.warmup_steps)


def _first_step(step: Step, rows: Tensor, seed: int) -> None:
    """One bound and gradient with all of Pyro's validation on, before anything is trained."""
    program = step.program
    noise = seeded(derived_seed(seed, Purpose.CHECK), program.device)
    with program.scope(validate=True), noise, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found .* in .* but not", UserWarning)
        try:
            surrogate, terms = step.loss(rows, step.kl_weight(0))
        except (ValueError, NotImplementedError) as error:
            if isinstance(error, (ProgramError, SettingError, DataError)):
                raise
            raise ProgramError(
                f"{type(step.objective).__name__} cannot take this program: {error}"
            ) from error
    program.check_registered(surrogate)
    if not surrogate.requires_grad:
        raise ProgramError("the bound depends on no parameter, so there is nothing to fit")
    if not bool(torch.isfinite(terms[0])):
        raise ProgramError(
            f"the bound is {terms[0].item()} before the first step: the data lie outside the model's support, or are "
            f"too large for its starting values (standardise them)\n{step.structure.table()}"
        )


def _settings(step: Step, plan: BatchPlan, seed: int, batch: Batch) -> dict[str, Any]:
    """What must agree for a checkpoint to be of the same run."""
    return {
        "objective": type(step.objective).__name__,
        "num_particles": getattr(step.objective, "num_particles", 1),
        "optimizer": step.optimizer.name,
        "learning_rate": step.optimizer.learning_rate,
        "optimizer_options": {k: _plain(v) for k, v in step.optimizer.options.items()},
        "clip_norm": step.optimizer.clip_norm,
        "batch_size": plan.batch_size,
        "num_rows": batch.num_rows,
        "warmup_steps": step.warmup_steps,
        "seed": seed,
        "dtype": str(step.program.dtype).removeprefix("torch."),
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _resume(training: Training) -> None:
    if training.checkpoint is None:
        raise SettingError("resume=True needs checkpoint='...', the folder that the run wrote to")
    if not (training.checkpoint / CHECKPOINT_FILE).exists():
        return  # nothing was written yet: the run starts, so that one command can be repeated until it is done
    training.load_checkpoint()


def _check_fit(program: Program, batch: Batch) -> None:
    """What the model has to say of its own fit; it keeps the parameters of the last step."""
    check = getattr(program.owner, "check_fit", None)
    if check is not None:
        with program.scope():
            check(*batch.args, **batch.kwargs)


def _few(batch: Batch) -> Batch:
    rows = arange_rows(min(EXAMPLE_ROWS, batch.num_rows))
    return batch.take(rows)


def _title(model: Any) -> str:
    return (
        type(model).__name__ if isinstance(model, torch.nn.Module) else getattr(model, "__name__", "program")
    )
