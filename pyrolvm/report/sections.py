"""The run on a page: summary, training, data, settings, versions; and the order of all sections."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pandas as pd

from pyrolvm import plots
from pyrolvm.diagnostics.guide_quality import Diagnosis
from pyrolvm.inference.posterior.saving import versions
from pyrolvm.models import REGISTRY
from pyrolvm.report.findings import Findings
from pyrolvm.report.model import model_parts
from pyrolvm.report.parts import Part, Section, facts, figure, number, table
from pyrolvm.report.quality import evidence, evidence_name, guide, predictive, standard_error
from pyrolvm.report.samples import samples
from pyrolvm.runs import still_rising

LAST = 100
"""Steps that the bound is averaged over, as `FittedModel.elbo` has it."""
MOST_NAMES = 20


def all_sections(found: Findings) -> list[Section]:
    """The page from top to bottom."""
    parts = {
        "Summary": _summary(found),
        "Model": model_parts(found),
        "Training": _training(found),
        "Evidence": evidence(found),
        "Guide": guide(found),
        "Predictive checks": predictive(found),
        "Samples": samples(found),
        "Data": _data(found),
        "Settings": _settings(found),
        "Versions": [_versions(found)],
        "Repeat": _repeat(found),
    }
    return [Section(title, p) for title, p in parts.items()]


def titled(found: Findings) -> str:
    """The heading: the model and the folder."""
    return f"{found.run.config['model']['name']}, run {found.run.path.resolve().name}"


def described(config: dict[str, Any]) -> str:
    """The model as it is built: PPCA(data_dim=4, latent_dim=2)."""
    name, arguments = config["model"]["name"], config["model"]["arguments"]
    return str(name) if arguments is None else f"{name}({_keywords(arguments)})"


def _keywords(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _summary(found: Findings) -> list[Part]:
    fitted, diagnosis = found.fitted, found.diagnosis
    shown = facts(
        ("model", described(found.run.config)),
        ("rows", _rows(found)),
        (f"ELBO, {found.unit}", f"{number(fitted.elbo)} (mean of the last {LAST} steps)"),
        ("ELBO, held out", fitted.held_out_elbo if "validation_elbo" in fitted.history else None),
        (f"{evidence_name(diagnosis)}, nats per datum", _mean_evidence(diagnosis)),
        ("engine", fitted.engine),
        ("stopped", fitted.stopped_because),
    )
    return [shown, *(_missing(found) if diagnosis is None else [Part("words", diagnosis.sentences)])]


def _rows(found: Findings) -> str:
    split = found.recipe.record.get("split")
    more = f" and {split['held_out']:,} held out" if split else ""
    source = f"{_source(found)}: " if "source" in found.recipe.record else ""
    return f"{source}{found.fitted.num_rows:,}{more}"


def _source(found: Findings) -> str:
    options = found.recipe.record.get("options") or {}
    return f"{found.recipe.record.get('source')}{f' ({_keywords(options)})' if options else ''}"


def _last(history: pd.DataFrame, column: str) -> float | None:
    """The last value of a column; None if there is none."""
    if column not in history or history[column].isna().all():
        return None
    return float(history[column].dropna().iloc[-1])


def _mean_evidence(diagnosis: Diagnosis | None) -> str | None:
    if diagnosis is None or diagnosis.evidence is None:
        return None
    values = diagnosis.evidence["log_evidence"]
    mean, error = (number(v, 3) for v in (values.mean(), standard_error(values)))
    return f"{mean} ± {error} ({diagnosis.method}, {len(values):,} rows)"


def _missing(found: Findings) -> list[Part]:
    what = f"Evidence, guide and predictive checks are not on this page: {found.reason}. To have them, type"
    return [
        Part("note", what),
        Part("code", f"pyrolvm report {shlex.quote(str(found.run.path))} DATA"),
        Part("text", "or, in Python, with the data x as the model sees them,"),
        Part("code", f"pyrolvm.report.write_report({str(found.run.path)!r}, x)"),
    ]


def _training(found: Findings) -> list[Part]:
    history = found.fitted.history
    if not len(history):
        return [Part("text", "No step was taken.")]
    steps, seconds = int(history["step"].iloc[-1]), _last(history, "seconds")
    end = number(found.fitted.elbo)
    alt = f"The ELBO over {steps:,} steps; its last {LAST} steps have the mean {end} {found.unit}."
    return [
        facts(("steps", steps), ("seconds in steps", seconds)),
        *_may_rise(history),
        figure(lambda: plots.plot_elbo(history, unit=found.unit), "The bound, step by step", alt),
        _means(history, found.unit),
        *_restarts(found.run.path / "restarts.csv"),
    ]


def _may_rise(history: pd.DataFrame) -> list[Part]:
    rise = still_rising(history)
    if rise is None:
        return []
    words = f"The ELBO rose by {number(rise)} over the last fifth of the steps and may not be done"
    return [Part("note", f"{words}: give it more steps, or a larger learning rate.")]


def _means(history: pd.DataFrame, unit: str) -> Part:
    last = history.tail(LAST)
    names = {"elbo": "ELBO", "log_likelihood": "expected log-likelihood", "kl": "KL"}
    rows = {label: last[name].agg(["mean", "std"]) for name, label in names.items() if name in last}
    frame = pd.DataFrame(rows).T.rename(columns={"std": "sd over steps"})
    return table(frame, f"The last {len(last)} steps, {unit}", "term")


def _restarts(file: Path) -> list[Part]:
    if not file.is_file():
        return []
    frame = pd.read_csv(file)
    return [table(frame.set_index(frame.columns[0]), "Restarts, best first")]


def _data(found: Findings) -> list[Part]:
    record, fitted = found.recipe.record, found.fitted
    shown = facts(
        ("source", _source(found) if "source" in record else None),
        ("rows read", record.get("rows")),
        ("rows fitted to", fitted.num_rows),
        ("shape of a row", " × ".join(map(str, found.recipe.shape)) or None),
        ("columns", _names(found.columns)),
        ("labels", record.get("labels")),
        ("digest (SHA-256)", record.get("sha256")),
        ("transforms", ", ".join(t.kind for t in found.recipe.transforms) or "none recorded"),
    )
    return [shown, *_transforms(found), _sites(found)]


def _names(columns: list[str]) -> str | None:
    if not columns:
        return None
    more = f" and {len(columns) - MOST_NAMES} more" if len(columns) > MOST_NAMES else ""
    return f"{', '.join(columns[:MOST_NAMES])}{more} ({len(columns)})"


def _transforms(found: Findings) -> list[Part]:
    parts = []
    for t in found.recipe.transforms:
        if t.threshold is not None:
            parts.append(Part("text", f"Values above {number(t.threshold)} count as 1, others as 0."))
            continue
        count = max(t.offset.size, t.scale.size)
        names = found.columns
        index = names if len(names) == count else ["every value"] if count == 1 else range(count)
        columns = {"offset": t.offset.reshape(-1), "scale": t.scale.reshape(-1)}
        frame = pd.DataFrame(columns, index=pd.Index(index))
        parts.append(table(frame, f"{t.kind}: (value - offset) / scale", "column"))
    return parts


def _sites(found: Findings) -> Part:
    roles = {}
    for s in found.fitted.structure.sites:
        role = "observed" if s.observed else ("latent of each datum" if s.local else "latent shared by all")
        shape = " × ".join(map(str, s.event_shape)) or "a number"
        roles[s.name] = (role, s.family + (", summed out" if s.enumerated else ""), shape)
    columns = ["role", "distribution", "shape"]
    return table(pd.DataFrame.from_dict(roles, orient="index", columns=columns), "Sites of the model", "site")


def _settings(found: Findings) -> list[Part]:
    said = {
        k: "none" if v is None else v if isinstance(v, str) else json.dumps(v)
        for k, v in found.fitted.settings.items()
    }
    return [table(pd.Series(said, name="value").to_frame(), "What the fit was given", "setting")]


def _versions(found: Findings) -> Part:
    columns = {"of the fit": found.run.config.get("versions", {}), "of this page": versions()}
    return table(pd.DataFrame(columns).astype(str), "What the numbers depend on", "package")


def _repeat(found: Findings) -> list[Part]:
    if found.run.command:
        return [Part("text", "This command repeats the run:"), Part("code", found.run.command)]
    name = found.run.config["model"]["name"]
    built = f"pyrolvm.{described(found.run.config)}" if name in REGISTRY else "model"
    settings = found.fitted.settings
    known = ("optimizer", "learning_rate", "clip_norm", "batch_size", "num_steps", "seed")
    said = _keywords({k: settings[k] for k in known if k in settings})
    words = "The run was started from Python and no command was recorded. As far as its settings are known:"
    return [Part("text", words), Part("code", f"pyrolvm.fit({built}, x, {said})")]
