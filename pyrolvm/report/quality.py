"""The posterior on a page: evidence, guide, predictive checks."""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pyrolvm import plots
from pyrolvm.diagnostics import CollapseReport, Gaps, GlobalTail, PredictiveCheck, ReferenceComparison
from pyrolvm.diagnostics.evidence import Evidence
from pyrolvm.diagnostics.tails import LocalTails
from pyrolvm.plots.style import BLUE, GREY, ORANGE, RED, axes_of, legend_above, panels_of, row_name
from pyrolvm.report.findings import Findings
from pyrolvm.report.parts import Part, facts, figure, number, table

GUIDE = ("k-hat per datum", "k-hat of shared latents", "collapse", "gaps", "reference")
DIMENSIONS = ["kl", "kl_kind", "mean_variance", "active", "collapsed"]
TERMS = {
    "average_kl": "average KL",
    "mutual_information": "of it, information about the datum",
    "marginal_kl": "of it, mismatch of aggregated posterior and prior",
    "shuffle_loss": "fall of log p(x | z) with another datum's z",
}
MONTE_CARLO = "Monte Carlo error of the mean"
NOTED = ["data", "method", "num_samples", "rows", "mean", "standard_error", "min", "max", "untrusted"]
"""What an estimate noted in the run folder has."""


def standard_error(values: Any) -> Any:
    """Of the mean over rows, of each column."""
    return values.std() / math.sqrt(len(values))


def measured(found: Findings, *names: str) -> list[Part]:
    """What these measures of the diagnosis found, or why they found nothing."""
    reports = [found.reports[name] for name in names if name in found.reports]
    return [part for report in reports for part in _parts(report)] + found.why_not(*names)


def evidence(found: Findings) -> list[Part]:
    """log p of each datum, and the estimates that were noted in the run folder."""
    report = found.reports.get("log p(x)")
    if report is None:
        return [*found.why_not("log p(x)"), *_noted(found)]
    tables = {f"training rows ({len(report.table):,})": report.table}
    if found.held_out is not None:
        tables[f"held-out rows ({len(found.held_out):,})"] = found.held_out
    alt = "Histogram of log p of each datum."
    for name, t in tables.items():
        mean, low, high = t["log_evidence"].agg(["mean", "min", "max"]).map(number)
        alt += f" {name}: mean {mean}, from {low} to {high}."
    return [
        Part("text", _how(found, report)),
        _moments(found, tables),
        figure(_draw_evidence(tables), "log p of each datum", alt),
        *_noted(found),
    ]


def _draw_evidence(tables: dict[str, pd.DataFrame]) -> Figure:
    """Histograms of log p of each datum, as shares of each set of rows, with their means."""
    columns = {name: t["log_evidence"].to_numpy(float) for name, t in tables.items()}
    values = {name: v[np.isfinite(v)] for name, v in columns.items()}
    together = np.concatenate(list(values.values()))
    edges = np.histogram_bin_edges(together, bins=int(np.clip(len(together) ** 0.5, 8, 30)))
    drawn, ax = axes_of(None, 6.0, 3.0)
    for (name, v), colour, dash in zip(values.items(), (BLUE, ORANGE), ("-", "--"), strict=False):
        if len(v):
            share = np.histogram(v, edges)[0] / len(v)
            ax.stairs(share, edges, color=colour, linewidth=1.4, linestyle=dash, label=name, fill=False)
            ax.axvline(v.mean(), color=colour, linewidth=1, linestyle=":")
    ax.set(xlabel="log p of each datum (nats); dotted: mean", ylabel="share of the rows", ylim=(0, None))
    legend_above(ax)
    return drawn


def evidence_name(report: Evidence) -> str:
    """What the evidence is of, in a few words."""
    return report.name.removeprefix("the guide's ").removeprefix("the ").rstrip(",")


def _how(found: Findings, report: Evidence) -> str:
    structure = found.fitted.structure
    draws = "" if report.method == "exact" else f", {found.num_samples:,} draws per datum"
    shared = "; the latents shared by all data are drawn from the guide" if structure.global_latents else ""
    return f"What is estimated: {evidence_name(report)}. How: {report.method}{draws}{shared}."


def _moments(found: Findings, tables: dict[str, pd.DataFrame]) -> Part:
    frame = pd.DataFrame({k: _column(t["log_evidence"], t["standard_error"]) for k, t in tables.items()})
    frame = frame.drop(index=MONTE_CARLO) if not frame.loc[MONTE_CARLO].any() else frame
    shift = found.recipe.log_scale(math.prod(found.recipe.shape))
    if shift:
        frame.loc["mean in the data's own units"] = frame.loc["mean"] - shift
    of = " (of the standardised data)" if shift else ""
    return table(frame, f"log p of each datum, nats{of}", "statistic")


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
    if not found.run.evidence:
        return []
    whole = {"num_samples": "Int64", "untrusted": "Int64"}
    frame = pd.DataFrame(found.run.evidence).reindex(columns=NOTED).set_index("data").astype(whole)
    return [table(frame, "Estimates noted in the run folder, nats per datum", "data")]


@singledispatch
def _parts(report: Any) -> list[Part]:
    """Of any measure: its sentences."""
    return [Part("text", report.sentence)]


@_parts.register
def _(report: LocalTails) -> list[Part]:
    k, limit, above = report.table["k_hat"], number(report.threshold), f"{report.num_above:,}"
    shown = facts(
        ("limit of k-hat", f"{limit} for {report.num_samples:,} draws"),
        ("data above it", f"{above} of {len(k):,}"),
        ("largest k-hat", float(k.max())),
        ("median effective sample size", float(report.table["effective_sample_size"].median())),
    )
    if not np.isfinite(k).any():
        return [shown, Part("text", "All importance weights are the same: the guide is the posterior.")]
    alt = f"k-hat of {len(k):,} data: {above} above the limit {limit}, the largest {number(k.max())}."
    drawn = plots.plot_khat(k.to_numpy(), report.threshold)
    return [
        shown,
        figure(drawn, "k-hat of each datum, in the order of the rows", alt),
        table(report.worst, "Data of largest k-hat; log evidence and ELBO in nats", "row"),
    ]


@_parts.register
def _(report: GlobalTail) -> list[Part]:
    if not report.names:
        return []
    k_hat = f"none: {report.reason}" if report.k_hat is None else report.k_hat
    return [facts(("latents shared by all data", ", ".join(report.names)), ("their k-hat", k_hat))]


@_parts.register
def _(report: CollapseReport) -> list[Part]:
    frame, active = report.dimensions, report.active_units
    rows = {text: (getattr(report, n), report.standard_error[n]) for n, text in TERMS.items()}
    terms = pd.DataFrame.from_dict(rows, orient="index", columns=["nats", "standard error"])
    kl = ", ".join(f"{row_name(i)} {number(v)}" for i, v in frame["kl"].head(8).items())
    alt = f"KL of {len(frame)} latent dimensions, {active} of them active: {kl} nats."
    return [
        facts(("active units", f"{active} of {len(frame)}")),
        figure(plots.plot_active_units(frame), "What each latent dimension carries", alt),
        table(terms, "What the latents carry together", "term"),
        table(frame[DIMENSIONS], "Latent dimensions; KL in nats per datum", "dimension"),
    ]


@_parts.register
def _(report: Gaps) -> list[Part]:
    gaps, family = report.table, report.family.replace("_", "-")
    frame = pd.DataFrame({"mean": gaps.mean(), "standard_error": standard_error(gaps)}).drop("standard_error")
    frame.index = frame.index.str.replace("_", " ")
    means = ", ".join(f"{n} {number(v)}" for n, v in frame["mean"].items() if str(n).endswith("gap"))
    title = f"Evidence and gaps of {len(gaps):,} data, nats per datum; family: {family}"
    return [
        figure(plots.plot_gaps(gaps), "Where the bound loses", f"Bars of the mean gaps in nats: {means}."),
        table(frame, title, "term"),
    ]


@_parts.register
def _(report: ReferenceComparison) -> list[Part]:
    sites = table(report.sites, "Guide against NUTS, in standard deviations of NUTS", "site")
    return [Part("text", report.sentence), sites]


@_parts.register
def _(report: PredictiveCheck) -> list[Part]:
    """Statistics of the data among those of data that the model makes."""
    frame = report.table
    wrong = ", ".join(map(str, frame.index[frame["extreme"]])) or "none"
    alt = f"A histogram of each of {len(frame)} statistics over {len(report.replicates)} data sets that the"
    alt += f" model made, with a line at its value in the data. Extreme: {wrong}."
    title = "Grey: data made by the model; line: the data, red where extreme"
    return [
        Part("text", report.sentence),
        figure(_draw_replicates(report), title, alt),
        table(frame, "Statistics; extreme: two-sided p-value below 0.05", "statistic"),
    ]


def _draw_replicates(check: Any) -> Figure:
    """A panel for each statistic: its values in data made by the model, and its value in the data."""
    drawn, panels = panels_of(len(check.table))
    for ax, (name, row) in zip(panels, check.table.iterrows(), strict=True):
        ax.hist(check.replicates[name], bins=20, color=GREY, alpha=0.55)
        ax.axvline(row["observed"], color=RED if row["extreme"] else BLUE, linewidth=2)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.locator_params(axis="x", nbins=3)
        ax.set_title(str(name).replace("$", r"\$"), fontsize="small", loc="left")
    return drawn
