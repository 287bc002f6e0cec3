"""`fit`: data, model and objective in, a `FittedModel` out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pyro.infer import ELBO, RenyiELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyrolvm.controls import Schedule
from pyrolvm.data.arguments import as_call
from pyrolvm.data.batch import Batch
from pyrolvm.data.precision import as_dtype
from pyrolvm.errors import ConvergenceWarning, DataError, SettingError, one_of, warn_user
from pyrolvm.inference.engine import Engine, choose_engine
from pyrolvm.inference.engine.optimizers import OptimizerSpec
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.posterior.convergence import Convergence, judge
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.posterior.history import History
from pyrolvm.inference.program.devices import placed, resolve_device
from pyrolvm.inference.program.noise import noise_state
from pyrolvm.inference.training import exact
from pyrolvm.inference.training.bounds import Bounds
from pyrolvm.inference.training.checkpoint import Checkpoint, recorded_engine
from pyrolvm.inference.training.loop import Callback, Training
from pyrolvm.inference.training.plateau import Plateau
from pyrolvm.inference.training.rules import NoMoreRise, Rule, most_steps
from pyrolvm.inference.training.setup import Setup, alternating, cadence, plateau_of, set_up, settings_of
from pyrolvm.inference.training.starts import checked, from_data
from pyrolvm.inference.training.together import check_alike, device_of, in_step, share
from pyrolvm.inference.training.until import Until
from pyrolvm.processes import ALONE, Processes, here
from pyrolvm.progress import Bar, progress_bar

EXAMPLE_ROWS = 8
DEFAULT_RATE = 1e-3
"""The learning rate of a run of given length."""
EXPECTED_STEPS = 10_000
"""Of a run until converged, to choose an engine by."""


@placed
@torch.inference_mode(False)
@torch.enable_grad()
@in_step
def fit(
    model: Any,
    data: Any = (),
    *more: Any,
    guide: Any = None,
    objective: ELBO | Callable[..., Any] | str | None = None,
    optimizer: str | type[Optimizer] = "auto",
    learning_rate: Schedule | None = None,
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
    controls: Mapping[str, Schedule] | None = None,
    init: Any = "auto",
    initialise: bool = True,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 30.0,
    resume: bool = False,
    on_nan: Literal["raise", "rollback", "skip"] = "raise",
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    engine: Literal["auto", "compiled", "eager"] = "auto",
    alternate: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    rows: str | int | Sequence[str | int] | None = None,
    parallel: bool = True,
) -> FittedModel:
    """Train a model/guide pair by stochastic variational inference.

    Parameters
    ----------
    model : LatentVariableModel or callable
        A `LatentVariableModel`, or any Pyro callable (then `guide` is needed).
    data : tensor, array, DataFrame or Dataset
        A tuple (positional) or dict (keyword) of them for a program of several arguments; nothing for a program of
        none. Floating values are cast to `dtype`; integers stay integers.
    *more : Any
        Further arguments of the model, as it takes them: `fit(model, x, y, 3, guide=guide)`. What is no tensor, array
        or table reaches it as it is, and a list or dict of tensors is one argument.
    guide : callable, AutoGuide instance, AutoGuide class or name of one, optional
        Of the model's arguments; e.g. `AutoNormal` or "AutoNormal"; "per_datum" for parameters of each row's own.
    objective : pyro.infer.ELBO, callable or str, optional
        A Pyro ELBO object, a function `loss(model, guide, *args)` as `SVI` takes it, or a name of
        `pyrolvm.inference.objectives.OBJECTIVES`. By default the model's own `objective()`; else `Trace_ELBO()`,
        `TraceEnum_ELBO()` if the model enumerates, `TraceGraph_ELBO()` if it samples discrete latents. `RenyiELBO` is
        the bound of each datum, the plate's scale outside the logarithm.
    optimizer : str or class
        A name ("adam", "sgd", ...) or a torch.optim class; one optimiser over all parameters. The loss is in nats per
        datum. "lbfgs" takes no such steps: the ELBO on the whole data is maximised on fixed draws of the guide,
        doubled until the optimum stays; layers cannot be trained so. "auto" is that where it can be and nothing is
        given that it has not, up to 600 numbers in all latents and 20,000 rows; else Adam.
    learning_rate : float or callable, optional
        A number, or a function of the share of the run that is done. None is 0.001 for a run of given length; else a
        rate is found that starts high and falls until a lower one would gain nothing.
    optimizer_options : dict, optional
        Further arguments of the optimiser, e.g. {"betas": (0.9, 0.99)}.
    schedule : callable, optional
        Optimiser -> torch scheduler, stepped once per step.
    clip_norm : float, optional
        Largest global norm of the gradient; None for no clipping.
    num_steps : int, optional
        Steps of the run. If neither this nor num_epochs is given it runs until it has converged, for 100,000 steps
        (of small networks on minibatches, 1,000,000) at the most; functions of the share of the run then go
        their way over 2,000 steps or 20 passes.
    num_epochs : int, optional
        Passes over the data, instead of num_steps.
    batch_size : int, optional
        Rows per step, by a plan that visits every row once per pass; None passes the data whole.
    validation : float or data, optional
        Held-out data like `data`, or the share of rows to hold out; its bound is computed with the
        same noise every `validate_every` steps.
    validate_every : int, optional
        Steps between held-out bounds; a pass over the data by default.
    patience : int, optional
        Stop when the held-out bound has not risen by more than its noise from `patience` evaluations to the
        next `patience` (after any KL warm-up), and keep the best parameters; None trains to the end.
    kl_warmup : float
        Share of the steps over which the KL's weight rises linearly to 1.
    controls : dict, optional
        Name -> number, or function of the share of the run that is done: "kl_weight", and what the model or the
        objective reads ("temperature", say). Columns of the history.
    init : {"auto", "own", "median", "prior"}, dict or FittedModel
        Where to start. "auto": a fresh model from the data (k-means, principal components) where it knows how; else
        where the program puts its parameters, or elsewhere if the bound is infinite there. "own": where the program
        puts them. "median", "prior": an AutoGuide at medians or a draw of the prior. A dict: values of sites (of an
        AutoGuide) or of parameters, by name. A fitted model: from its parameters, with a new optimiser.
    initialise : bool
        False is the older name of init="own".
    device : str
        "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1" or "mps".
    dtype : torch.dtype or str, optional
        "float32" or "float64": by default that of the networks that functions use, else float32.
    seed : int
        Of initial values, batches and noise, apart; the same seed gives the same numbers on a CPU.
    checkpoint : str or Path, optional
        A folder to keep the training state in.
    checkpoint_seconds : float
        Seconds between two writings of the checkpoint; it is also written at the end and on interrupt.
    resume : bool
        Go on from the checkpoint (`num_steps` counts from the start), with the engine that the run began with.
    on_nan : {"raise", "rollback", "skip"}
        "raise" names step and site and leaves the last good state in the model; "rollback" stops
        there and returns it; "skip" leaves out the steps that were not finite.
    callbacks : sequence of callables
        Called between chunks with a `Report`; a returned sentence ends the run.
    progress : bool
        Show a progress bar at a terminal.
    engine : {"auto", "compiled", "eager"}
        What runs the steps.
    alternate : int, optional
        Coordinate ascent on that many fixed draws of each latent, at least 4, instead of stochastic steps: odd steps
        take the guide to convergence, even ones improve the model, by L-BFGS on all data. Optimiser, learning rate
        and engine are then not used, and the bound never falls.
    model_kwargs : dict, optional
        Keyword arguments of model and guide.
    rows : names or positions of arguments, optional
        Those whose leading dimension is the rows of the data. By default all, if they are of one length; else those as
        long as the model's plate around its observed sites.
    parallel : bool
        Where torch's launcher started several processes (`torchrun --nproc-per-node 4 script.py`), share the rows of
        every step among them; the first one alone prints and writes. False: each makes a fit of its own.

    Returns
    -------
    FittedModel

    Raises
    ------
    DataError, ProgramError, SettingError, RunFolderError
        Bad input, before the first step.
    DivergenceError
        The bound or a parameter stopped being finite, or the model's own `check_fit` refuses the end.
    """
    _check_settings(on_nan, kl_warmup, objective, seed, checkpoint_seconds)
    init = checked(init, initialise)
    folder = Path(checkpoint) if checkpoint is not None else None
    processes = here() if parallel else ALONE
    resume = resume or (folder is not None and processes.restarted)
    begun = processes.first(lambda: recorded_engine(folder, forget=processes.may_restart and not resume))
    begun = begun if resume else None
    target = device_of(processes, torch.device(resolve_device(device)))
    until = num_steps is None and num_epochs is None
    free_rate = until and patience is None and learning_rate is None and schedule is None
    spec = OptimizerSpec(
        "adam" if optimizer in ("auto", exact.NAME) else optimizer,
        DEFAULT_RATE if learning_rate is None else learning_rate,
        optimizer_options or {},
        schedule,
        clip_norm,
    )
    prepare = partial(
        set_up,
        model,
        as_call(data, more, model_kwargs),
        guide,
        objective,
        spec,
        carriers=rows,
        controls=controls,
        kl_warmup=kl_warmup,
        num_steps=num_steps,
        num_epochs=num_epochs,
        batch_size=batch_size,
        validation=validation,
        device=target,
        dtype=None if dtype is None else as_dtype(dtype),
        seed=seed,
        init=init if begun in (None, exact.NAME) else "own",
        processes=processes if alternate is None else ALONE,
    )
    setup = processes.each(prepare)
    run = _Run(setup, spec, processes, folder, checkpoint_seconds, alternate, until, free_rate)
    check_alike(setup, run.settings, processes)
    only_stochastic = {
        "num_steps": num_steps, "num_epochs": num_epochs, "learning_rate": learning_rate, "schedule": schedule,
        "optimizer_options": optimizer_options, "clip_norm": clip_norm, "batch_size": batch_size,
        "validation": validation, "patience": patience, "controls": controls, "kl_warmup": kl_warmup or None,
        "alternate": alternate, "init": None if from_data(init) and not isinstance(init, Mapping) else init,
        "objective": None if isinstance(objective, str | None) and objective in exact.ELBOS else objective,
    }  # fmt: skip
    given = {k: v for k, v in only_stochastic.items() if v is not None}
    start, why = exact.choose(optimizer, setup, given, seed)
    if start is not None:
        return run.on_fixed_draws(start, why, callbacks)
    log_joint = None
    if begun is None and until and optimizer == "auto" and "init" not in given:
        log_joint = exact.place(setup, seed)
    plateau = plateau_of(patience, setup.held_out, kl_warmup, setup.problem.num_steps)
    with progress_bar(_title(model), run.most_steps, enabled=progress and processes.is_first) as bar:
        return run.by_steps(
            begun or engine, objective, plateau, bar, resume, log_joint,
            validate_every=validate_every, on_nan=on_nan, callbacks=callbacks,
        )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """A fit that is set up: on fixed draws, or by steps."""

    setup: Setup
    spec: OptimizerSpec
    processes: Processes
    folder: Path | None
    checkpoint_seconds: float
    alternate: int | None
    until: bool
    free_rate: bool

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self.setup, self.spec, self.alternate, self.free_rate)

    @property
    def most_steps(self) -> int:
        setup, problem = self.setup, self.setup.problem
        if not self.until:
            return problem.num_steps
        return most_steps(problem.program, problem.structure, setup.plan, setup.batch_size)

    def on_fixed_draws(
        self, start: exact.Start | exact.Averaged, why: str, callbacks: Sequence[Callback]
    ) -> FittedModel:
        """By L-BFGS; every process takes the first one's solution."""
        setup, processes = self.setup, self.processes
        kept = settings_of(setup, self.spec, free_rate=True) | {"optimizer": exact.NAME}
        keeper = Checkpoint(self.folder, self.checkpoint_seconds, kept, exact.NAME, processes)
        solution, record = exact.run(
            setup, start, setup.seed, keeper, callbacks if processes.is_first else ()
        )
        processes.align(setup.problem.program.tensors().values())
        verdict = exact.verdict_of(setup, solution, setup.seed)
        note = f"L-BFGS on {verdict.numbers.get('num_draws', 1):.0f} fixed draws: {why}"
        settings = kept | {"num_processes": processes.count}
        return _finished(setup, record, settings, note, start.sentence, verdict, len(solution.history))

    def by_steps(self, *args: Any, **kwargs: Any) -> FittedModel:
        """By an engine; arguments as of `_by_steps`."""
        try:
            return self._by_steps(*args, **kwargs)
        finally:
            self.setup.problem.processes.close()

    def _by_steps(
        self,
        engine: str,
        objective: Any,
        plateau: Plateau | None,
        bar: Bar,
        resume: bool,
        log_joint: LogJoint | None,
        **loop: Any,
    ) -> FittedModel:
        """By an engine; `log_joint` of the data, if it is known; `loop` goes to `Training`."""
        setup = self.setup
        parted = share(setup, self.processes) if self.processes.count > 1 and self.alternate is None else ""
        problem = setup.problem
        own = [self.processes.rank] if problem.sharing and self.processes.rank else []
        noise = noise_state(setup.seed, problem.program.device, *own)
        running, note = self._engine(engine, objective, bar)
        held_out = setup.held_out_bound
        every = cadence(loop.pop("validate_every"), setup.plan, problem.num_steps)
        training = Training(
            problem,
            running,
            setup.plan,
            running.initial_state(noise),
            self.most_steps,
            Checkpoint(self.folder, self.checkpoint_seconds, self.settings, running.name, self.processes),
            validate=held_out,
            validate_every=every if held_out is not None else 0,
            plateau=plateau,
            until=self._rule(running, noise) if self.until and plateau is None else None,
            **loop,
        )
        if resume:
            training.resume()
        training.run(bar)
        # an engine that fell back says so itself
        note = "; ".join(filter(None, [getattr(running, "note", note), parted]))
        settings = training.checkpoint.settings | {
            "num_steps": None if self.until else self.most_steps,
            "kept_step": training.kept_step,
            "num_processes": self.processes.count,
        }
        verdict = exact.weighed(setup, _verdict(training), training.state.step, setup.seed, log_joint)
        step = training.kept_step or training.state.step
        return _finished(setup, training.history, settings, note, training.stopped_because, verdict, step)

    def _engine(self, asked: str, objective: Any, bar: Bar) -> tuple[Engine, str]:
        """What runs the steps, and why."""
        if self.alternate is not None:
            return alternating(self.setup, objective, self.alternate)
        expected = min(self.most_steps, EXPECTED_STEPS) if self.until else self.most_steps
        return choose_engine(asked, self.setup.problem, expected, on_compile=bar.note)

    def _rule(self, running: Engine, noise: dict[str, Tensor]) -> Rule:
        """When a fit without a number of steps ends."""
        problem, setup = self.setup.problem, self.setup
        if self.alternate is not None:
            return NoMoreRise(problem.structure)
        first = problem.num_steps if len(problem.scheduled) > 1 or callable(self.spec.learning_rate) else 0
        bounds = Bounds(problem, running, setup.plan, noise, setup.held_out_bound, first)
        return Until(problem, bounds, not self.free_rate, first)


def _finished(
    setup: Setup,
    history: History,
    settings: dict[str, Any],
    engine: str,
    stopped_because: str,
    verdict: Convergence,
    step: int,
) -> FittedModel:
    problem, batch = setup.problem, setup.batch
    program, structure = problem.program, problem.structure
    program.controls = problem.values_at(step)
    if program.contract is not None:
        program.contract.fresh = False
    if program.knows("check_fit"):  # it keeps the parameters of the last step
        with program.scope(mode="predict"):
            program.contract.check_fit(*batch.args[:1])
    program.settle()
    return FittedModel(
        program,
        structure,
        history.frame(),
        settings=settings,
        example=_few(batch) if structure.chunkable and not structure.per_datum else batch,
        num_rows=problem.num_rows,
        engine=engine,
        stopped_because=stopped_because,
        columns=batch.columns,
        convergence=warned(verdict),
        call=_few(batch),
    )


def _verdict(training: Training) -> Convergence:
    if training.until is not None:
        return training.until.ended(training.state.step)
    if training.plateau is not None and training.plateau.flat:
        return Convergence(True, f"converged: {training.plateau.flat}")
    return judge(training.history.frame(), training.problem.structure)


def warned(verdict: Convergence) -> Convergence:
    """The verdict; a fit that stopped too early warns."""
    if verdict.converged is False:
        said = verdict.sentence.removeprefix("not yet: ")
        warn_user(f"the fit stopped before it had converged: {said}", ConvergenceWarning)
    return verdict


def _check_settings(
    on_nan: str, kl_warmup: float, objective: Any, seed: Any, checkpoint_seconds: float
) -> None:
    one_of("on_nan", on_nan, ("raise", "rollback", "skip"))
    if not 0.0 <= kl_warmup <= 1.0:
        raise SettingError(f"kl_warmup is a share of the steps, between 0 and 1, not {kl_warmup}")
    if kl_warmup and isinstance(objective, RenyiELBO):
        raise SettingError(
            "kl_warmup weighs the KL of the ELBO, which a Renyi bound does not have: leave it out"
        )
    if not checkpoint_seconds >= 0:
        raise SettingError(f"checkpoint_seconds must not be negative, not {checkpoint_seconds}")


def _few(batch: Batch) -> Batch:
    try:
        return batch.take(torch.arange(min(EXAMPLE_ROWS, batch.num_rows)))
    except DataError:  # lengths differ, and no rows are taken
        return batch


def _title(model: Any) -> str:
    if isinstance(model, torch.nn.Module):
        return type(model).__name__
    return getattr(model, "__name__", "program")
