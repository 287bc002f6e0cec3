"""`pyrolvm fit`: the run folder around one job, and what is printed of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from pyrolvm.errors import DivergenceError, SettingError
from pyrolvm.files import write_atomically
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.plots import plot_elbo
from pyrolvm.shell.job import Job
from pyrolvm.shell.runs import RunFolder
from pyrolvm.shell.tables import console, print_facts, print_table


def run_fit(options: Any, command: str) -> None:
    """`options` are the arguments of the command, by name; `command` is the line that repeats it."""
    if options.resume and options.overwrite:
        raise SettingError("--resume goes on with the run and --overwrite replaces it: say one of them")
    job = Job(options)
    folder = RunFolder(Path(options.out), job.identity(), command, options.resume, options.overwrite)
    folder.check()
    try:
        fitted, restarts = job.run(folder)
    except KeyboardInterrupt:
        if not folder.has_own_state:
            raise
        folder.begin(keep_state=True)
        raise KeyboardInterrupt(f"stopped at step {folder.step}; to go on: {command} --resume") from None
    except DivergenceError:
        if folder.has_own_state:
            folder.begin(keep_state=True)
        raise
    folder.begin(keep_state=True)
    _save(fitted, restarts, folder, job)
    if not options.quiet:
        _print_result(fitted, restarts, job)


def _save(fitted: FittedModel, restarts: Any, folder: RunFolder, job: Job) -> None:
    fitted.save(folder.path, extra=job.record(folder.command))
    if folder.step:  # it was trained further
        folder.clear_derived()
    if restarts is not None:
        write_atomically(folder.path / "restarts.csv", lambda p: restarts.to_csv(p, index=False))
    if len(fitted.history):  # a run that went back to its start has none
        figure = plot_elbo(fitted.history)
        write_atomically(folder.path / "elbo.png", lambda p: figure.savefig(p, format="png", dpi=150))
    if job.options.inference_data:
        from pyrolvm.diagnostics.inference_data import save_inference_data, to_inference_data

        samples = to_inference_data(fitted, job.data.train)
        save_inference_data(samples, folder.path / "inference_data.nc")


def _print_result(fitted: FittedModel, restarts: Any, job: Job) -> None:
    if restarts is not None:
        columns = ["seed", "bound", "steps", "seconds", "outcome"]
        print_table(columns, restarts[columns].astype(object).to_numpy().tolist(), "restarts, best first")
        console().print()
    history = fitted.history
    unit = "nats per datum" if fitted.structure.data_plate else "nats in total"
    facts: list[tuple[str, Any]] = [
        ("model", _described(job)),
        ("data", _rows(job)),
        ("steps", int(history["step"].max()) if len(history) else 0),
        ("engine", fitted.engine),
        ("stopped", fitted.stopped_because),
        (f"ELBO, {unit}", fitted.elbo),
    ]
    if not math.isnan(fitted.held_out_elbo):
        facts.append(("ELBO, held out", fitted.held_out_elbo))
    if job.options.kl_warmup and len(history):
        facts.append(("KL weight at the end", float(history["kl_weight"].iloc[-1])))
    print_facts([*facts, ("run", job.options.out)])
    if rise := still_rising(history):
        console().print(
            f"the ELBO rose by {rise:.3g} over the last fifth of the steps and may not be done: more --steps, or a "
            "larger --learning-rate",
            style="yellow",
        )


def _described(job: Job) -> str:
    said = ", ".join(f"{k}={v}" for k, v in job.arguments.items())
    return f"{job.pair.name}({said})" if job.pair.cls is not None else job.pair.text


def _rows(job: Job) -> str:
    train, held_out = job.data.train, job.data.held_out
    kinds = "".join(f", {t.kind}d" for t in job.data.transforms)
    more = f" and {held_out.num_rows:,} held out" if held_out is not None else ""
    return f"{job.options.data}: {train.num_rows:,} rows{more}{kinds}"


def still_rising(history: pd.DataFrame) -> float | None:
    """The rise of the ELBO from the last but one tenth of the steps to the last, nats, if it is beyond its noise."""
    elbo, size = history["elbo"], len(history) // 10
    if size < 10:
        return None
    before, after = elbo.iloc[-2 * size : -size], elbo.iloc[-size:]
    rise = float(after.mean() - before.mean())
    noise = float(((before.var() + after.var()) / size) ** 0.5)
    # a trend also adds to the variances, so that this errs on the silent side
    return rise if rise > max(5 * noise, 0.01) else None
