"""How good is the guide? Every measure of a fit that is defined for it, in tables and in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyrolvm.diagnostics.asked import MEASURES, Asked
from pyrolvm.diagnostics.measures import KhatReport, Measure, measure_seed
from pyrolvm.diagnostics.predictive import Statistic
from pyrolvm.diagnostics.reference import ReferenceComparison
from pyrolvm.diagnostics.tails import GlobalTail
from pyrolvm.errors import PyrolvmError, SettingError, count
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.devices import placed
from pyrolvm.inference.program.pair import Pair
from pyrolvm.progress import PATIENCE, progress_bar

FIRST = "log p(x)"
"""The first in words, which the others refer to."""


def _part(name: str, attribute: str = "", missing: Any = None, *, doc: str) -> Any:
    """A property of a diagnosis: the report of that name, or an attribute of it."""

    def read(diagnosis: Diagnosis) -> Any:
        report = diagnosis.reports.get(name)
        return missing if report is None else getattr(report, attribute) if attribute else report

    return property(read, doc=doc)


@dataclass(frozen=True, repr=False)
class Diagnosis(KhatReport):
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

    evidence = _part(
        "log p(x)", "table", doc="`log_evidence` and `standard_error` of each datum, nats; or None."
    )
    method = _part("log p(x)", "method", "", doc="How the evidence was computed; empty without it.")
    k_hat = _part("k-hat per datum", "table", doc="k-hat of each datum, see `local_khat`; or None.")
    global_tail = _part("k-hat of shared latents", missing=GlobalTail(None), doc="A `GlobalTail`.")
    collapse = _part("collapse", doc="A `CollapseReport`, or None.")
    gaps = _part("gaps", doc="`Gaps`, or None.")
    predictive = _part("predictive check", doc="A `PredictiveCheck`, or None.")
    reference = _part("reference", doc="A `ReferenceComparison`, or None.")

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
        tail, local = self.global_tail.k_hat, self.reports.get("k-hat per datum")
        near = tail is None or tail <= self.threshold
        return near and not self.points and (local is None or local.num_above == 0)

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
        return points + found + _not_computed(self.not_done)

    @property
    def paragraph(self) -> str:
        """The findings in plain words, as one text."""
        return self.sentence

    @property
    def shown(self) -> str:
        """The largest k-hat, the latent dimensions and the predictive check."""
        tables = [report.shown for report in (self.collapse, self.predictive) if report is not None]
        if self.k_hat is not None:
            tables.insert(0, "largest k-hat:\n" + self.worst.to_string(float_format="{:z.2f}".format))
        return "".join(f"\n{table}\n" for table in tables).rstrip()

    def __repr__(self) -> str:
        lines = [f"Diagnosis: {self.verdict}", *(s for s in self.sentences if s != self.verdict)]
        return "\n  ".join(lines)


def _not_computed(reasons: Mapping[str, str]) -> list[str]:
    """A sentence for each reason, with all measures that are refused for want of the same thing."""
    wanting: dict[str, list[str]] = {}
    for what, why in reasons.items():
        wanting.setdefault(why.partition(" needs ")[2] or why, []).append(what)
    found = []
    for same, names in wanting.items():
        why = reasons[names[0]] if len(names) == 1 else f"each needs {same}"
        found.append(f"Not computed: {', '.join(names)} ({why}).")
    return found


@placed
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
    wanted = {"gaps": gaps, "reference": _is_wanted(reference)}
    names = [name for name in MEASURES if wanted.get(name, True)]
    pair = fitted.pair(x)
    part, rows = looked_at(pair, count("max_rows", max_rows), seed)
    options = {"seed": seed, "progress": progress}
    asked = Asked(fitted, pair, part, rows, num_samples, reference, statistics, options)
    reports: dict[str, Any] = {}
    refused: dict[str, str] = {}
    with progress_bar("diagnose", len(names), enabled=progress, unit="", after=PATIENCE) as bar:
        for name in names:
            bar.note(name)
            try:
                reports[name] = MEASURES[name](asked, reports)
            except PyrolvmError as error:
                refused[name] = str(error)
            except Exception as error:  # a stranger's guide: it costs its own measure, not the others
                refused[name] = f"the program raised {type(error).__name__}: {error}".strip(": ")
            bar.advance()
    points = tuple(s.name for s in fitted.structure.latents if s.point)
    tempered = fitted.structure.tempered
    return Diagnosis(reports, refused, rows.to_numpy(), pair.num_rows, num_samples, tempered, points)


def looked_at(pair: Pair, max_rows: int, seed: int) -> tuple[Pair, pd.Index]:
    """The rows that are looked at one by one, and their numbers."""
    rows = np.arange(pair.num_rows)
    if pair.structure.chunkable and len(rows) > max_rows:
        draw = np.random.default_rng(measure_seed(seed, Measure.ROWS))
        rows = np.sort(draw.choice(rows, max_rows, replace=False))
        pair = pair.take(torch.as_tensor(rows, device=pair.device))
    return pair, pd.Index(rows, name="row")


def _is_wanted(reference: Any) -> bool:
    """Whether a reference is wanted. Raises `SettingError` for one that is not known."""
    if reference in (None, False):
        return False
    if reference is True or reference == "nuts" or isinstance(reference, ReferenceComparison):
        return True
    raise SettingError(
        f'reference={reference!r} is not known: pass "nuts", or what compare_with_nuts(fitted, x) returned'
    )
