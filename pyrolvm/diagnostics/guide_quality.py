"""How good is the guide? Every measure of a fit that is defined for it, in tables and in sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from pyrolvm.diagnostics.collapse import CollapseReport, collapse_report
from pyrolvm.diagnostics.evidence import Evidence, evidence_of
from pyrolvm.diagnostics.gaps import Gaps, evidence_gaps
from pyrolvm.diagnostics.measures import Measure, Report, measure_seed
from pyrolvm.diagnostics.predictive import PredictiveCheck, Statistic, predictive_check
from pyrolvm.diagnostics.reference import ReferenceComparison, compare_with_nuts
from pyrolvm.diagnostics.tails import GlobalTail, LocalTails, global_khat, judged_together, local_khat
from pyrolvm.errors import PyrolvmError, SettingError, count
from pyrolvm.inference.posterior.evidence import khat_threshold
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.pair import Pair
from pyrolvm.progress import PATIENCE, progress_bar

REPLICATES = 200
GAP_ROWS = 200
REFERENCE_ROWS = 5

GLOBAL_EVALUATIONS = 4e7
"""As many evaluations of a datum's density as `diagnose` spends on k-hat of global latents, some twenty seconds;
a fortieth of it for programs whose draws are taken one by one."""


class Asked(NamedTuple):
    """What is diagnosed, and how: the fit, all rows, those looked at one by one, and the options of `diagnose`."""

    fitted: FittedModel
    data: Pair
    part: Pair
    rows: np.ndarray
    num_samples: int
    reference: Any
    statistics: Mapping[str, Statistic] | None
    gaps: bool
    options: dict[str, Any]


def _local(asked: Asked, found: Mapping[str, Any]) -> LocalTails:
    table = local_khat(asked.fitted, asked.part.batch, asked.num_samples, **asked.options)
    return LocalTails(table.set_axis(_row_index(asked)), asked.num_samples)


def _evidence(asked: Asked, found: Mapping[str, Any]) -> Evidence:
    tails = found["k-hat per datum"].table if "k-hat per datum" in found else None
    rows, options = asked.data.num_rows, asked.options
    report = evidence_of(
        asked.fitted, asked.part.batch, asked.num_samples, tails, num_data=rows, **options
    )
    if report.per_datum:
        report.table.index = _row_index(asked)
    return report


def _row_index(asked: Asked) -> pd.Index:
    return pd.Index(asked.rows, name="row")


def _global(asked: Asked, found: Mapping[str, Any]) -> GlobalTail:
    """k-hat of the global latents, unless integrating out those of each datum would take minutes."""
    fitted, names = asked.fitted, judged_together(asked.fitted.structure)
    inner = 100 if fitted.structure.local_latents and not fitted.structure.joint_guide else 1
    evaluations = asked.num_samples * asked.data.num_rows * inner
    if names and evaluations > GLOBAL_EVALUATIONS / (1 if fitted.vectorized else 40):
        reason = f"it takes {evaluations:.1e} evaluations of the model: call global_khat(fitted, x)"
        return GlobalTail(None, names, reason, asked.num_samples)
    return global_khat(fitted, asked.data.batch, asked.num_samples, **asked.options)


def _gaps(asked: Asked, found: Mapping[str, Any]) -> Gaps:
    return evidence_gaps(asked.fitted, _first(asked.part, GAP_ROWS), **asked.options)


def _collapse(asked: Asked, found: Mapping[str, Any]) -> CollapseReport:
    return collapse_report(asked.fitted, asked.part.batch, **asked.options)


def _reference(asked: Asked, found: Mapping[str, Any]) -> ReferenceComparison:
    if isinstance(asked.reference, ReferenceComparison):
        return asked.reference
    shared = asked.fitted.structure.global_latents
    few = asked.data.batch if shared else _first(asked.part, REFERENCE_ROWS)
    return compare_with_nuts(asked.fitted, few, **asked.options)


def _predictive(asked: Asked, found: Mapping[str, Any]) -> PredictiveCheck:
    return predictive_check(asked.fitted, asked.part.batch, asked.statistics, REPLICATES, **asked.options)


def _first(pair: Pair, number: int) -> Any:
    """The data of the first rows; all, if rows cannot be taken apart."""
    if not pair.structure.chunkable or pair.num_rows <= number:
        return pair.batch
    return pair.batch.take(torch.arange(number, device=pair.device))


MEASURES: dict[str, Callable[[Asked, Mapping[str, Any]], Report]] = {
    "k-hat per datum": _local,
    "log p(x)": _evidence,
    "k-hat of shared latents": _global,
    "gaps": _gaps,
    "collapse": _collapse,
    "reference": _reference,
    "predictive check": _predictive,
}
"""What `diagnose` computes, by name: a function of what is asked and of the reports before it."""

FIRST = "log p(x)"
"""The first in words, which the others refer to."""


@dataclass(frozen=True, repr=False)
class Diagnosis(Report):
    """How far the guide is from the posterior, on some rows of the data.

    Attributes
    ----------
    reports : dict
        Measure -> its report, for those of `MEASURES` that were asked for and are defined for the program.
    not_done : dict
        Measure -> why it could not be computed.
    rows : array
        The numbers of the rows that were looked at one by one.
    num_data : int
        Rows of the data.
    num_samples : int
        Draws of the guide per datum.
    tempered : bool
        Whether the likelihood is weighted by a power, or by weights of rows: then all of this is of the tempered model.
    points : tuple of str
        Latents that the guide holds at one value: it is a point estimate of them.
    """

    reports: dict[str, Any]
    not_done: dict[str, str]
    rows: np.ndarray
    num_data: int
    num_samples: int
    tempered: bool = False
    points: tuple[str, ...] = field(default=())

    @property
    def evidence(self) -> pd.DataFrame | None:
        """`log_evidence` and `standard_error` of each datum, nats."""
        report = self.reports.get("log p(x)")
        return None if report is None else report.table

    @property
    def method(self) -> str:
        """How the evidence was computed; empty without it."""
        report = self.reports.get("log p(x)")
        return "" if report is None else report.method

    @property
    def k_hat(self) -> pd.DataFrame | None:
        """k-hat of each datum: see `local_khat`."""
        report = self.reports.get("k-hat per datum")
        return None if report is None else report.table

    @property
    def global_tail(self) -> GlobalTail:
        """k-hat of the latents shared by all data, or why there is none."""
        return self.reports.get("k-hat of shared latents", GlobalTail(None))

    @property
    def collapse(self) -> CollapseReport | None:
        """What the latents carry."""
        return self.reports.get("collapse")

    @property
    def gaps(self) -> Gaps | None:
        """Where the bound loses."""
        return self.reports.get("gaps")

    @property
    def predictive(self) -> PredictiveCheck | None:
        """Whether the model makes data like these."""
        return self.reports.get("predictive check")

    @property
    def reference(self) -> ReferenceComparison | None:
        """The guide against NUTS."""
        return self.reports.get("reference")

    @property
    def threshold(self) -> float:
        """min(1 - 1 / log10 num_samples, 0.7), what k-hat should be below."""
        return khat_threshold(self.num_samples)

    @property
    def worst(self) -> pd.DataFrame:
        """The data of largest k-hat, largest first; empty without latents of each datum."""
        report = self.reports.get("k-hat per datum")
        if report is None:
            return pd.DataFrame(columns=["k_hat", "effective_sample_size", "log_evidence", "elbo"])
        return report.worst

    @property
    def good(self) -> bool:
        """Whether no k-hat is above the threshold, and the guide is no point estimate."""
        tail = self.global_tail.k_hat
        local = self.reports.get("k-hat per datum")
        poor = (local is not None and local.num_above > 0) or (tail is not None and not tail <= self.threshold)
        return not poor and not self.points

    @property
    def verdict(self) -> str:
        """The whole in one sentence."""
        if self.points:
            return f"The guide is a point estimate of {', '.join(self.points)}: it has no distance from the posterior."
        if not self.good:
            return "The guide is not close to the posterior everywhere, or the model is wrong."
        judged = self.k_hat is not None or self.global_tail.k_hat is not None
        what = "close to the posterior by every k-hat" if judged else "not judged: no k-hat is defined for it"
        return f"The guide is {what}."

    @property
    def sentences(self) -> list[str]:
        """The findings in plain words, measure by measure."""
        names = [FIRST, *(name for name in MEASURES if name != FIRST)]
        found = [s for name in names if name in self.reports for s in self.reports[name].sentences]
        points = [self.verdict] if self.points else []
        return points + found + [f"Not computed: {what} ({why})." for what, why in self.not_done.items()]

    @property
    def paragraph(self) -> str:
        """The findings in plain words, as one text."""
        return self.sentence

    @property
    def shown(self) -> str:
        """The largest k-hat, the latent dimensions and the predictive check."""
        tables = [] if self.k_hat is None else [f"largest k-hat:\n{self.worst.to_string(float_format='%.2f')}"]
        tables += [report.shown for report in (self.collapse, self.predictive) if report is not None]
        return "".join(f"\n{table}\n" for table in tables).rstrip()

    def __repr__(self) -> str:
        lines = [f"Diagnosis: {self.verdict}", *(s for s in self.sentences if s != self.verdict)]
        return "\n  ".join(lines)


def diagnose(
    fitted: FittedModel,
    x: Any,
    num_samples: int = 1000,
    *,
    reference: ReferenceComparison | str | bool | None = None,
    statistics: Mapping[str, Statistic] | None = None,
    gaps: bool = False,
    max_rows: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> Diagnosis:
    """Measure how good the guide is on `x`: evidence, k-hat, collapse, predictive checks, and more on demand.

    Parameters
    ----------
    fitted : FittedModel
    x : data as `fit` takes them
    num_samples : int
        Draws of the guide per datum for k-hat and the evidence.
    reference : "nuts" or ReferenceComparison, optional
        "nuts" runs NUTS (on five rows where no latents are shared); or what `compare_with_nuts` returned.
    statistics : dict, optional
        Of the predictive check; see `predictive_check`.
    gaps : bool
        Also split the evidence gap (of 200 rows at most): a minute, rather than seconds.
    max_rows : int
        Data that are looked at one by one, drawn at random if there are more.

    Returns
    -------
    Diagnosis
        What is not defined for the program (collapse without latents of each datum, say), or fails in it, is left out
        and named in `not_done`.

    Raises
    ------
    DataError
        The data do not fit.
    SettingError
        The reference is unknown.
    """
    count("num_samples", num_samples)
    asked = _asked(fitted, x, count("max_rows", max_rows), seed)
    asked = asked._replace(num_samples=num_samples, reference=reference, statistics=statistics, gaps=gaps)
    wanted = {"gaps": gaps, "reference": _is_wanted(reference)}
    names = [name for name in MEASURES if wanted.get(name, True)]
    reports: dict[str, Any] = {}
    refused: dict[str, str] = {}
    with progress_bar("diagnose", len(names), enabled=progress, unit="", after=PATIENCE) as bar:
        asked = asked._replace(options={"seed": seed, "progress": progress})
        for name in names:
            bar.note(name)
            try:
                reports[name] = MEASURES[name](asked, reports)
            except PyrolvmError as error:
                refused[name] = str(error)
            except Exception as error:  # whatever a stranger's guide raises costs its own measure, not the others
                refused[name] = f"the program raised {type(error).__name__}: {error}".strip(": ")
            bar.advance()
    structure = fitted.structure
    points = tuple(s.name for s in structure.latents if s.point)
    return Diagnosis(
        reports, refused, asked.rows, asked.data.num_rows, num_samples, structure.tempered, points
    )


def _asked(fitted: FittedModel, x: Any, max_rows: int, seed: int) -> Asked:
    """The rows that are looked at."""
    pair = fitted.pair(x)
    rows, part = np.arange(pair.num_rows), pair
    if pair.structure.chunkable and len(rows) > max_rows:
        draw = np.random.default_rng(measure_seed(seed, Measure.ROWS))
        rows = np.sort(draw.choice(rows, max_rows, replace=False))
        part = pair.take(torch.as_tensor(rows, device=pair.device))
    return Asked(fitted, pair, part, rows, 0, None, None, False, {})


def _is_wanted(reference: Any) -> bool:
    """Whether a reference is wanted. Raises `SettingError` for one that is not known."""
    if reference in (None, False):
        return False
    if reference is True or reference == "nuts" or isinstance(reference, ReferenceComparison):
        return True
    raise SettingError(
        f'reference={reference!r} is not known: pass "nuts", or what compare_with_nuts(fitted, x) returned'
    )
