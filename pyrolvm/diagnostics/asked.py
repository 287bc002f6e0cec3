"""What `diagnose` computes: each measure with the settings that fit the size of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from pyrolvm.diagnostics.collapse import collapse_report
from pyrolvm.diagnostics.evidence import Evidence, evidence_of
from pyrolvm.diagnostics.gaps import evidence_gaps
from pyrolvm.diagnostics.measures import Report
from pyrolvm.diagnostics.predictive import Statistic, predictive_check
from pyrolvm.diagnostics.reference import ReferenceComparison, compare_with_nuts
from pyrolvm.diagnostics.tails import GlobalTail, LocalTails, global_khat, judged_together, local_khat
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.pair import Pair

GAP_ROWS = 200
REFERENCE_ROWS = 5

GLOBAL_EVALUATIONS = 4e7
"""As many evaluations of a datum's density as `diagnose` spends on k-hat of global latents, some twenty seconds."""
GLOBAL_RUNS = 5e3
"""As many runs of a program whose draws are taken one by one, whatever its number of data: some twenty seconds too."""


class Asked(NamedTuple):
    """What is diagnosed: the fit, all rows, those looked at one by one and their numbers, and how."""

    fitted: FittedModel
    data: Pair
    part: Pair
    rows: pd.Index
    num_samples: int
    reference: Any
    statistics: Mapping[str, Statistic] | None
    options: dict[str, Any]


def _local(asked: Asked, found: Mapping[str, Any]) -> LocalTails:
    table = local_khat(asked.fitted, asked.part.batch, asked.num_samples, **asked.options)
    return LocalTails(table.set_axis(asked.rows), asked.num_samples)


def _evidence(asked: Asked, found: Mapping[str, Any]) -> Evidence:
    tails = found["k-hat per datum"].table if "k-hat per datum" in found else None
    report = evidence_of(
        asked.fitted, asked.part, asked.num_samples, tails, asked.data.num_rows, **asked.options
    )
    if report.per_datum:
        report.table.index = asked.rows
    return report


def _global(asked: Asked, found: Mapping[str, Any]) -> GlobalTail:
    """k-hat of the global latents, unless integrating out those of each datum would take minutes."""
    fitted, names = asked.fitted, judged_together(asked.fitted.structure)
    inner = 100 if fitted.structure.local_latents and not fitted.structure.joint_guide else 1
    runs = asked.num_samples * inner
    evaluations = runs * asked.data.num_rows
    if names and (evaluations > GLOBAL_EVALUATIONS or not (fitted.vectorized or runs <= GLOBAL_RUNS)):
        reason = f"it takes {evaluations:.1e} evaluations of the model: call global_khat(fitted, x)"
        return GlobalTail(None, names, reason, asked.num_samples)
    return global_khat(fitted, asked.data.batch, asked.num_samples, **asked.options)


def _reference(asked: Asked, found: Mapping[str, Any]) -> ReferenceComparison:
    if isinstance(asked.reference, ReferenceComparison):
        return asked.reference
    shared = asked.fitted.structure.global_latents
    few = asked.data if shared else next(asked.part.split(REFERENCE_ROWS))
    return compare_with_nuts(asked.fitted, few.batch, **asked.options)


MEASURES: dict[str, Callable[[Asked, Mapping[str, Any]], Report]] = {
    "k-hat per datum": _local,
    "log p(x)": _evidence,
    "k-hat of shared latents": _global,
    "gaps": lambda a, _: evidence_gaps(a.fitted, next(a.part.split(GAP_ROWS)).batch, **a.options),
    "collapse": lambda a, _: collapse_report(a.fitted, a.part.batch, **a.options),
    "reference": _reference,
    "predictive check": lambda a, _: predictive_check(a.fitted, a.part.batch, a.statistics, **a.options),
}
"""What `diagnose` computes, by name: a function of what is asked and of the reports before it."""
