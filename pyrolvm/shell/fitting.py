"""`pyrolvm fit`: one fit with its run folder, and what is printed of it."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import lr_scheduler

from pyrolvm.data import BatchPlan
from pyrolvm.errors import DivergenceError, SettingError, count, one_of
from pyrolvm.files import write_atomically
from pyrolvm.inference.objectives import OBJECTIVES
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.routes import ROW_GUIDES
from pyrolvm.inference.training.fit import fit
from pyrolvm.inference.training.restarts import fit_restarts
from pyrolvm.plots import plot_elbo
from pyrolvm.processes import ALONE, here
from pyrolvm.runs import NamedModel, Preparation, RunFolder, Source, described, find_model
from pyrolvm.runs.folder import states
from pyrolvm.runs.recipe import SAMPLED_ROWS
from pyrolvm.seeds import Purpose, derived_seed
from pyrolvm.shell.arguments import constructor_arguments, held, run_of_codes, source_of
from pyrolvm.shell.options import FIT
from pyrolvm.shell.printing import caution, console, note, print_facts, print_table
from pyrolvm.shell.values import read_flags

OF_OBJECTIVES = ("num_particles", "alpha", "gradient")
LAST_RATE = 0.01
"""The exponential schedule ends at this share of the learning rate."""
SCHEDULES: dict[str, Callable[[int], Any]] = {
    "none": lambda steps: None,
    "cosine": lambda steps: partial(lr_scheduler.CosineAnnealingLR, T_max=steps),
    "exponential": lambda steps: partial(lr_scheduler.ExponentialLR, gamma=LAST_RATE ** (1 / steps)),
}
"""Of the learning rate, over the steps of the run."""


class Job:
    """One fit: its model, data and settings, all checked before anything is trained or written.

    `own` and `extras` are options of the model's constructor: those known to the shell, and words that are not.
    """

    def __init__(
        self, model: str, data: str, options: dict[str, Any], own: dict[str, Any], extras: list[str]
    ) -> None:
        for word in (model, data):
            if word.startswith("-"):
                raise SettingError(f"{word}: give MODEL and DATA first, then options")
        extras = list(extras)
        while extras and (Path(extras[0]).is_file() or "://" in extras[0]):  # a pattern that became its files
            data = f"{data}\n{extras.pop(0)}"
        self.options, self.text = options, Source(data).called
        self.named = _named(model, own, options)
        own |= read_flags(extras)
        self.first = run_of_codes(options.get("codes_of"), self.named, own, options)
        self.data = _preparation(options).apply(
            source_of(data, options),
            as_vectors=self.named.takes_columns,
            takes_labels=self.named.takes_labels,
            streamed="batch_size" in options,
            transforms=None if self.first is None else self.first.recipe.transforms,
        )
        self.arguments = constructor_arguments(
            self.named, own, options.get("set", {}), self._from_data() | held(self.first)
        )
        self.num_restarts = count("num_restarts", options.get("num_restarts", 1))
        self.fit_options = self._fit_options()
        plain = _plain(self.arguments)
        self.record = {
            "model": self.named.text,
            "guide": options.get("guide"),
            "arguments": plain if self.named.cls is not None else None,
            "data": self.data.record,
            **({"codes_of": options["codes_of"]} if self.first is not None else {}),
        }
        # what must agree for a run to be resumed, beside the data and settings that `fit` compares
        self.identity = {
            "model": self.named.name,
            "guide": options.get("guide"),
            "arguments": plain,
            "restarts": self.num_restarts,
        }
        if self.num_restarts > 1 and isinstance(self.named.program, torch.nn.Module):
            raise SettingError(
                f"restarts build the model anew, and {self.named.text} is built already: name its class instead"
            )

    def _from_data(self) -> dict[str, Any]:
        """The constructor's arguments that the data give."""
        found: dict[str, Any] = {}
        if self.named.takes_columns:
            found["data_dim"] = math.prod(self.data.train.row_shape)
        if self.named.takes_labels:
            classes = self.data.record["classes"]
            found |= {"num_classes": len(classes)} if classes else {"condition_dim": 1}
        return found

    def _fit_options(self) -> dict[str, Any]:
        """The keyword arguments of `fit`: those given, words turned into objects."""
        o = self.options
        given: dict[str, Any] = {k: v for k, v in o.items() if k in FIT and k != "guide"}
        given["objective"] = _objective(o.get("objective"), {k: o[k] for k in OF_OBJECTIVES if k in o})
        if "schedule" in o:
            epochs, plan = o.get("num_epochs"), BatchPlan(self.data.train.num_rows, o.get("batch_size"))
            steps = plan.num_steps(epochs) if epochs else o.get("num_steps")
            if steps is None and o["schedule"] != "none":
                raise SettingError(
                    f"schedule={o['schedule']} falls over the steps of the run: give num_steps or num_epochs; without "
                    "a schedule the rate falls by itself"
                )
            given["schedule"] = SCHEDULES[one_of("schedule", o["schedule"], SCHEDULES)](steps or 1)
        return given | {"validation": self.data.held_out}

    def run(self, folder: RunFolder, quiet: bool) -> tuple[FittedModel, Any]:
        """Train; with the table of restarts if there are several."""
        options = self.fit_options | {
            "checkpoint": folder.checkpoint,
            "callbacks": [folder],
            "resume": folder.resume,
            "progress": not quiet,
        }
        if self.num_restarts > 1:
            return fit_restarts(self.build, self.data.train, num_restarts=self.num_restarts, **options)
        built = self.build(self.options.get("seed", 0))
        model, guide = built if isinstance(built, tuple) else (built, None)
        return fit(model, self.data.train, guide=guide, **options), None

    def build(self, seed: int) -> Any:
        """The model, or (model, guide), its starting values drawn from `seed` alone."""
        with seeded(derived_seed(seed, Purpose.START), torch.device("cpu")):
            if self.first is not None:
                return self.first.fitted.model.with_prior(self.arguments["prior"])
            return self.named.build(self.arguments)

    @property
    def rows(self) -> str:
        """The data, and how many rows of them."""
        train, held_out = self.data.train, self.data.held_out
        kinds = "".join(f", {t.kind}d" for t in self.data.transforms)
        more = f" and {held_out.num_rows:,} held out" if held_out is not None else ""
        return f"{self.text}: {train.num_rows:,} rows{more}{kinds}"


def _named(text: str, own: dict[str, Any], options: dict[str, Any]) -> NamedModel:
    """The model; `guide` and `alpha` are options of its constructor if that has some of the name."""
    if options.get("guide") in ROW_GUIDES:  # of any model: `fit` makes it
        return find_model(text, options["guide"])
    if ".py" not in text and ":" not in text:
        named = find_model(text)
        own |= {n: str(options.pop(n)) for n in ("guide", "alpha") if n in named.options and n in options}
        if "guide" in own:
            return named
    return find_model(text, options.get("guide"))


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, str | int | float | list | None) else repr(v) for k, v in arguments.items()}


def _preparation(options: dict[str, Any]) -> Preparation:
    chosen = {f.name: options[f.name] for f in fields(Preparation) if f.name in options}
    if options.get("standardise_overall"):
        chosen |= {"standardise": True, "per_column": False}
    return Preparation(**{"split_seed": options.get("seed", 0)} | chosen)


def _objective(name: str | None, given: dict[str, Any]) -> Any:
    """The ELBO of this name, ours or its class's, with the settings that are given; without any, what `fit` takes."""
    names = {cls.__name__: short for short, cls in OBJECTIVES.items()}
    name = names.get(name or "", name)
    if name is not None:
        one_of("objective", name, OBJECTIVES)
    for setting in given:
        having = [n for n, cls in OBJECTIVES.items() if setting in inspect.signature(cls).parameters]
        if name is None and setting == "num_particles":
            raise SettingError(f"num_particles is of an objective: name it, {', '.join(having)}")
        if name not in having:
            raise SettingError(
                f"{setting} is of objective={' and '.join(having)}: give both, or leave it out"
            )
    if name == "renyi":
        if given.get("alpha") == 1.0:
            raise SettingError("alpha=1 is the ELBO itself: take objective=trace")
        given = {"num_particles": 10, "alpha": 0.0} | given
    if name is None or not given:
        return name
    least = 2 if name == "renyi" else 1
    if "num_particles" in given:
        draws = given["num_particles"] = count("num_particles", given["num_particles"], least)
        if "vectorize_particles" in inspect.signature(OBJECTIVES[name]).parameters:
            given["vectorize_particles"] = draws > 1
    return OBJECTIVES[name](**given)


def run_fit(
    job: Job, path: Path, command: str, resume: bool, overwrite: bool, inference_data: bool, quiet: bool
) -> None:
    """Train in the run folder `path`, write it and print what came out."""
    processes = here() if job.options.get("parallel", True) else ALONE
    if processes.restarted and not resume:  # the launcher repeats the command that it was given
        resume = processes.first(lambda: any(states(path)))
        overwrite = not resume
    folder = RunFolder(path, job.identity, command, resume, overwrite)
    try:  # nothing may keep the run from being written at its end
        json.dumps(job.record | folder.identity, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SettingError(f"the settings cannot be written to the run folder: {error}") from None
    processes.first(folder.check)
    try:
        fitted, restarts = job.run(folder, quiet)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(_stopped(folder, stop) if processes.is_first else str(stop)) from None
    except DivergenceError:
        if processes.is_first and folder.has_own_state:
            folder.begin(keep_state=True)
        raise
    if not processes.is_first:
        return
    folder.begin(keep_state=True)
    _save(fitted, restarts, folder, job, inference_data)
    if not quiet:
        _print_result(fitted, restarts, job, path)


def _stopped(folder: RunFolder, stop: BaseException) -> str:
    """What a stopped run leaves, and how to continue."""
    if folder.has_own_state:
        folder.begin(keep_state=True)
        kept, at = folder.kept_step, folder.step
        late = f"; the last checkpoint that could be written is of step {kept}" if kept < at else ""
        return f"stopped at step {at if late else kept}{late}; to go on: {folder.command} --resume"
    folder.withdraw()
    if not folder.step:
        return str(stop) if folder.begun else ""
    return f"stopped at step {folder.step}; no checkpoint could be written, so nothing was kept: repeat the command"


def _save(fitted: FittedModel, restarts: Any, folder: RunFolder, job: Job, inference_data: bool) -> None:
    fitted.save(folder.path, extra={"command": folder.command, **job.record})
    if folder.step:  # it was trained further
        folder.clear_derived()
    if restarts is not None:
        write_atomically(folder.path / "restarts.csv", lambda p: restarts.to_csv(p, index=False))
    if len(fitted.history):  # a run that went back to its start has none
        figure = plot_elbo(fitted.history, name=fitted.structure.bound_name)
        write_atomically(folder.path / "elbo.png", lambda p: figure.savefig(p, format="png", dpi=150))
    if inference_data:
        from pyrolvm.diagnostics.inference_data import save_inference_data, to_inference_data

        draws = to_inference_data(fitted, job.data.in_memory(SAMPLED_ROWS).train)
        save_inference_data(draws, folder.path / "inference_data.nc")


def _print_result(fitted: FittedModel, restarts: Any, job: Job, path: Path) -> None:
    if restarts is not None:
        columns = ["seed", "bound", "steps", "seconds", "outcome"]
        print_table(columns, restarts[columns].astype(object).to_numpy().tolist(), "restarts, best first")
        console().print()
    history = fitted.history
    unit = "nats per datum" if fitted.structure.data_plate else "nats in total"
    bound = fitted.structure.bound_name
    held_out, warmed = fitted.held_out_elbo, job.options.get("kl_warmup") and len(history)
    own = f" --model {job.named.text}" if ".py" in job.named.text else ""
    print_facts(
        ("model", job.named.text if job.named.cls is None else described(job.named.name, job.arguments)),
        ("data", job.rows),
        ("steps", int(history["step"].max()) if len(history) else 0),
        ("engine", fitted.engine),
        ("stopped", fitted.stopped_because),
        (f"{bound}, {unit}", fitted.elbo),
        (f"{bound}, held out", None if math.isnan(held_out) else held_out),
        ("KL weight at the end", float(history["kl_weight"].iloc[-1]) if warmed else None),
        ("run", str(path)),
        ("next", f"pyrolvm report {path}{own}"),
    )
    (note if fitted.convergence.converged else caution)(fitted.convergence.sentence)
