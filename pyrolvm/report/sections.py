"""The run on a page: summary, training, data, settings, versions; and the order of all sections."""

from __future__ import annotations

import json
import shlex

import pandas as pd

from pyrolvm import plots
from pyrolvm.data.columns import listed
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.posterior.saving import versions
from pyrolvm.models import REGISTRY
from pyrolvm.report.findings import Findings
from pyrolvm.report.model import model_parts, samples
from pyrolvm.report.parts import Part, facts, figure, number, table
from pyrolvm.report.quality import GUIDE, evidence, evidence_name, measured, standard_error
from pyrolvm.runs import described

LAST = 100
"""Steps that the bound is averaged over, as `FittedModel.elbo` has it."""
MOST_NAMES = 20
TERMS = {"elbo": "ELBO", "log_likelihood": "expected log-likelihood", "kl": "KL"}


def all_sections(found: Findings) -> dict[str, list[Part]]:
    """The page from top to bottom."""
    return {
        "Summary": _summary(found),
        "Model": model_parts(found),
        "Training": _training(found),
        "Evidence": evidence(found),
        "Guide": measured(found, *GUIDE),
        "Predictive checks": measured(found, "predictive check"),
        "Samples": samples(found),
        "Data": _data(found),
        "Settings": _settings(found),
        "Versions": [_versions(found)],
        "Repeat": _repeat(found),
    }


def titled(found: Findings) -> str:
    """The heading: the model and the folder."""
    return f"{found.run.config['model']['name']}, run {found.run.path.resolve().name}"


def _built(found: Findings) -> str:
    """The model as it is built."""
    return described(*(found.run.config["model"][k] for k in ("name", "arguments")))


def _summary(found: Findings) -> list[Part]:
    fitted, diagnosis = found.fitted, found.diagnosis
    shown = facts(
        ("model", _built(found)),
        ("rows", _rows(found)),
        (
            f"{found.fitted.structure.bound_name}, {found.unit}",
            f"{number(fitted.elbo)} ({_of_which(fitted)})",
        ),
        (
            f"{fitted.structure.bound_name}, held out",
            fitted.held_out_elbo if "validation_elbo" in fitted.history else None,
        ),
        *_mean_evidence(found),
        ("engine", fitted.engine),
        ("stopped", fitted.stopped_because),
        ("convergence", fitted.convergence.sentence),
    )
    return [shown, *(_missing(found) if diagnosis is None else [Part("words", diagnosis.sentences)])]


def _of_which(fitted: FittedModel) -> str:
    """What the bound was computed of."""
    return "of these parameters" if "elbo" in fitted.convergence.numbers else f"mean of the last {LAST} steps"


def _rows(found: Findings) -> str:
    split, source = found.recipe.record.get("split"), _source(found)
    more = f" and {split['held_out']:,} held out" if split else ""
    return f"{f'{source}: ' if source else ''}{found.fitted.num_rows:,}{more}"


def _source(found: Findings) -> str | None:
    record = found.recipe.record
    return described(record["source"], record.get("options") or None) if "source" in record else None


def _mean_evidence(found: Findings) -> list[tuple[str, str]]:
    report = found.reports.get("log p(x)")
    if report is None:
        return []
    values = report.table["log_evidence"]
    mean, error = (number(v, 3) for v in (values.mean(), standard_error(values)))
    words = f"{mean} ± {error} ({report.method}, {len(values):,} rows)"
    return [(f"{evidence_name(report)}, nats per datum", words)]


def _missing(found: Findings) -> list[Part]:
    what = f"Evidence, guide and predictive checks are not on this page: {found.reason}. To have them, type"
    return [
        Part("note", what),
        Part("code", f"pyrolvm report {shlex.quote(str(found.run.path))} DATA"),
        Part("text", "or, in Python, with the data x as the model sees them,"),
        Part("code", f"pyrolvm.report.write_report({str(found.run.path)!r}, x)"),
    ]


def _training(found: Findings) -> list[Part]:
    history, unit, file = found.fitted.history, found.unit, found.run.path / "restarts.csv"
    if not len(history):
        return [Part("text", "No step was taken.")]
    last, steps = history.tail(LAST), int(history["step"].iloc[-1])
    seconds = history["seconds"].dropna().tail(1).tolist() if "seconds" in history else []
    end = number(last["elbo"].mean())
    name = found.fitted.structure.bound_name
    alt = f"The {name} over {steps:,} steps; its last {LAST} steps have the mean {end} {unit}."
    labels = TERMS | {"elbo": name} | ({"kl": "-log p(z)"} if found.fitted.structure.points else {})
    terms = {label: last[column].agg(["mean", "std"]) for column, label in labels.items() if column in last}
    means = pd.DataFrame(terms).T.rename(columns={"std": "sd over steps"})
    parts = [
        facts(("steps", steps), ("seconds in steps", seconds[0] if seconds else None)),
        figure(plots.plot_elbo(history, unit=unit, name=name), "The bound, step by step", alt),
        table(means, f"The last {len(last)} steps, {unit}", "term"),
    ]
    if found.fitted.convergence.converged is False:
        parts.insert(1, Part("note", f"Convergence: {found.fitted.convergence.sentence}."))
    if file.is_file():
        parts.append(table(pd.read_csv(file, index_col=0), "Restarts, best first"))
    return parts


def _data(found: Findings) -> list[Part]:
    record, fitted, columns = found.recipe.record, found.fitted, found.run.columns
    shown = facts(
        ("source", _source(found)),
        ("rows read", record.get("rows")),
        ("rows fitted to", fitted.num_rows),
        ("shape of a row", " × ".join(map(str, found.recipe.shape)) or None),
        ("columns", f"{listed(columns, MOST_NAMES)} ({len(columns)})" if columns else None),
        ("labels", record.get("labels")),
        ("digest (SHA-256)", record.get("sha256")),
        ("transforms", ", ".join(t.kind for t in found.recipe.transforms) or "none recorded"),
    )
    return [shown, *_transforms(found), _sites(found)]


def _transforms(found: Findings) -> list[Part]:
    parts = []
    for t in found.recipe.transforms:
        if t.threshold is not None:
            parts.append(Part("text", f"Values above {number(t.threshold)} count as 1, others as 0."))
            continue
        frame = pd.DataFrame({"offset": t.offset.reshape(-1), "scale": t.scale.reshape(-1)})
        frame.index = pd.Index(found.names(len(frame)) if t.scale.ndim else ["every value"])
        parts.append(table(frame, f"{t.kind}: (value - offset) / scale", "column"))
    return parts


def _sites(found: Findings) -> Part:
    rows = {}
    for s in found.fitted.structure.sites:
        role = "observed" if s.observed else ("latent of each datum" if s.local else "latent shared by all")
        family = s.family + (", summed out" if s.enumerated else "")
        rows[s.name] = {
            "role": role,
            "distribution": family,
            "shape": " × ".join(map(str, s.event_shape)) or "a number",
        }
    return table(pd.DataFrame.from_dict(rows, orient="index"), "Sites of the model", "site")


def _settings(found: Findings) -> list[Part]:
    texts = {
        k: "none" if v is None else v if isinstance(v, str) else json.dumps(v)
        for k, v in found.fitted.settings.items()
    }
    return [table(pd.DataFrame({"value": texts}), "What the fit was given", "setting")]


def _versions(found: Findings) -> Part:
    columns = {"of the fit": found.run.config.get("versions", {}), "of this page": versions()}
    return table(pd.DataFrame(columns).astype(str), "What the numbers depend on", "package")


def _repeat(found: Findings) -> list[Part]:
    if found.run.command:
        return [Part("text", "This command repeats the run:"), Part("code", found.run.command)]
    name = found.run.config["model"]["name"]
    built = f"pyrolvm.{_built(found)}" if name in REGISTRY else "model"
    settings = found.fitted.settings
    known = ("optimizer", "learning_rate", "clip_norm", "batch_size", "num_steps", "seed")
    call = ", ".join(f"{k}={settings[k]!r}" for k in known if k in settings)
    words = "The run was started from Python and no command was recorded. As far as its settings are known:"
    return [Part("text", words), Part("code", f"pyrolvm.fit({built}, x, {call})")]
