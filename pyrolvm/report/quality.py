"""The posterior on a page: evidence, guide, predictive checks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm import plots
from pyrolvm.diagnostics.collapse import CollapseReport
from pyrolvm.diagnostics.guide_quality import Diagnosis
from pyrolvm.report.figures import draw_evidence, draw_replicates
from pyrolvm.report.findings import Findings
from pyrolvm.report.parts import Part, facts, figure, number, row_name, table

DIMENSIONS = ["kl", "kl_kind", "mean_variance", "active", "collapsed"]
MONTE_CARLO = "Monte Carlo error of the mean"
NOTED = ["data", "method", "num_samples", "rows", "mean", "standard_error", "min", "max", "untrusted"]
"""What an estimate noted in the run folder has."""


def standard_error(values: pd.Series) -> float:
    """Of the mean over rows."""
    return float(values.std() / math.sqrt(len(values)))


def evidence(found: Findings) -> list[Part]:
    """log p of each datum, and the estimates that were noted in the run folder."""
    diagnosis = found.diagnosis
    if diagnosis is None or diagnosis.evidence is None:
        return [*found.why_not("log p(x)"), *_noted(found)]
    tables = {f"training rows ({len(diagnosis.evidence):,})": diagnosis.evidence}
    if found.held_out is not None:
        tables[f"held-out rows ({len(found.held_out):,})"] = found.held_out
    spans = "; ".join(f"{name}: {_span(t['log_evidence'])}" for name, t in tables.items())
    return [
        Part("text", _how(diagnosis)),
        _moments(found, tables),
        figure(
            lambda: draw_evidence(tables),
            "log p of each datum",
            f"Histogram of log p of each datum. {spans}.",
        ),
        *_noted(found),
    ]


def _span(values: pd.Series) -> str:
    return f"mean {number(values.mean())}, from {number(values.min())} to {number(values.max())}"


def evidence_name(diagnosis: Diagnosis | None) -> str:
    """What the evidence is of, in a word or two."""
    if diagnosis is None:
        return "log p(x)"
    what = "log evidence of the tempered model" if diagnosis.tempered else "log p(x)"
    return f"predictive {what}" if diagnosis.global_tail.names else what


def _how(diagnosis: Diagnosis) -> str:
    draws = "" if diagnosis.method == "exact" else f", {diagnosis.num_samples:,} draws per datum"
    shared = (
        "; the latents shared by all data are drawn from the guide" if diagnosis.global_tail.names else ""
    )
    return f"What is estimated: {evidence_name(diagnosis)}. How: {diagnosis.method}{draws}{shared}."


def _moments(found: Findings, tables: dict[str, pd.DataFrame]) -> Part:
    columns = {name: _column(t["log_evidence"], t["standard_error"]) for name, t in tables.items()}
    frame = pd.DataFrame(columns)
    frame = frame.drop(index=MONTE_CARLO) if not frame.loc[MONTE_CARLO].any() else frame
    shift = found.recipe.log_scale(math.prod(found.recipe.shape))
    if shift:
        frame.loc["mean in the data's own units"] = frame.loc["mean"] - shift
    return table(
        frame, "log p of each datum, nats" + (" (of the standardised data)" if shift else ""), "statistic"
    )


def _column(values: pd.Series, errors: pd.Series) -> dict[str, float]:
    low, middle, high = values.quantile([0.05, 0.5, 0.95])
    return {
        "mean": values.mean(),
        "standard error of the mean over rows": standard_error(values),
        MONTE_CARLO: float(np.sqrt((errors**2).sum()) / len(errors)),
        "sd": values.std(),
        "smallest": values.min(),
        "5 %": low,
        "median": middle,
        "95 %": high,
        "largest": values.max(),
    }


def _noted(found: Findings) -> list[Part]:
    """What `pyrolvm evidence` left in the folder."""
    entries = found.run.evidence
    if not entries:
        return []
    whole = {"num_samples": "Int64", "untrusted": "Int64"}
    frame = pd.DataFrame(entries).reindex(columns=NOTED).set_index("data").astype(whole)
    return [table(frame, "Estimates noted in the run folder, nats per datum", "data")]


def guide(found: Findings) -> list[Part]:
    """How far the guide is from the posterior."""
    diagnosis = found.diagnosis
    if diagnosis is None:
        return found.why_not()
    return [
        *_local(diagnosis),
        *_shared(diagnosis),
        *(_collapse(diagnosis.collapse) if diagnosis.collapse is not None else []),
        *_gaps(diagnosis),
        *_reference(diagnosis),
        *found.why_not("k-hat per datum", "collapse", "gaps", "reference"),
    ]


def _local(diagnosis: Diagnosis) -> list[Part]:
    if diagnosis.k_hat is None:
        return []
    k, limit = diagnosis.k_hat["k_hat"], diagnosis.threshold
    high, ess = int((k > limit).sum()), diagnosis.k_hat["effective_sample_size"]
    shown = facts(
        ("limit of k-hat", f"{number(limit)} for {diagnosis.num_samples:,} draws"),
        ("data above it", f"{high:,} of {len(k):,}"),
        ("largest k-hat", float(k.max())),
        ("median effective sample size", float(ess.median())),
    )
    worst = table(diagnosis.worst, "Data of largest k-hat; log evidence and ELBO in nats", "row")
    if not np.isfinite(k).any():
        return [shown, Part("text", "All importance weights are the same: the guide is the posterior.")]
    alt = (
        f"k-hat of {len(k):,} data: {high:,} above the limit {number(limit)}, the largest {number(k.max())}."
    )
    draw = lambda: plots.plot_khat(k.to_numpy(), limit)  # noqa: E731
    return [shown, figure(draw, "k-hat of each datum, in the order of the rows", alt), worst]


def _shared(diagnosis: Diagnosis) -> list[Part]:
    tail = diagnosis.global_tail
    if not tail.names:
        return []
    names = ", ".join(tail.names)
    k_hat = f"none: {tail.reason}" if tail.k_hat is None else tail.k_hat
    return [facts(("latents shared by all data", names), ("their k-hat", k_hat))]


def _collapse(report: CollapseReport) -> list[Part]:
    shown = facts(("active units", f"{report.active_units} of {len(report.dimensions)}"))
    names = {
        "average_kl": "average KL",
        "mutual_information": "of it, information about the datum",
        "marginal_kl": "of it, mismatch of aggregated posterior and prior",
        "shuffle_loss": "fall of log p(x | z) with another datum's z",
    }
    rows = {text: (getattr(report, n), report.standard_error[n]) for n, text in names.items()}
    terms = pd.DataFrame.from_dict(rows, orient="index", columns=["nats", "standard error"])
    kl = ", ".join(f"{row_name(i)} {number(v)}" for i, v in report.dimensions["kl"].head(8).items())
    alt = (
        f"KL of {len(report.dimensions)} latent dimensions, {report.active_units} of them active: {kl} nats."
    )
    return [
        shown,
        figure(lambda: plots.plot_active_units(report.dimensions), "What each latent dimension carries", alt),
        table(terms, "What the latents carry together", "term"),
        table(report.dimensions[DIMENSIONS], "Latent dimensions; KL in nats per datum", "dimension"),
    ]


def _gaps(diagnosis: Diagnosis) -> list[Part]:
    if diagnosis.gaps is None:
        return []
    gaps = diagnosis.gaps.table
    errors = gaps.std() / math.sqrt(len(gaps))
    frame = pd.DataFrame({"mean": gaps.mean(), "standard_error": errors}).drop("standard_error")
    frame.index = frame.index.str.replace("_", " ")
    said = ", ".join(f"{n} {number(v)}" for n, v in frame["mean"].items() if str(n).endswith("gap"))
    family = diagnosis.gaps.family.replace("_", "-")
    return [
        figure(
            lambda: plots.plot_gaps(gaps), "Where the bound loses", f"Bars of the mean gaps in nats: {said}."
        ),
        table(frame, f"Evidence and gaps of {len(gaps):,} data, nats per datum; family: {family}", "term"),
    ]


def _reference(diagnosis: Diagnosis) -> list[Part]:
    if diagnosis.reference is None:
        return []
    sites = table(diagnosis.reference.sites, "Guide against NUTS, in standard deviations of NUTS", "site")
    return [Part("text", diagnosis.reference.sentence), sites]


def predictive(found: Findings) -> list[Part]:
    """Statistics of the data among those of data that the model makes."""
    check: Any = found.diagnosis.predictive if found.diagnosis is not None else None
    if check is None:
        return found.why_not("predictive check")
    wrong = ", ".join(map(str, check.table.index[check.table["extreme"]])) or "none"
    alt = f"A histogram of each of {len(check.table)} statistics over {len(check.replicates)} data sets that the"
    alt += f" model made, with a line at its value in the data. Extreme: {wrong}."
    title = "Grey: data made by the model; line: the data, red where extreme"
    return [
        Part("text", check.sentence),
        figure(lambda: draw_replicates(check), title, alt),
        table(check.table, "Statistics; extreme: two-sided p-value below 0.05", "statistic"),
    ]
