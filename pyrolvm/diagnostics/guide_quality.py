"""How good is the guide? Everything that can be said of a fit, in tables and in one paragraph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyrolvm.data.arrays import Batch
from pyrolvm.diagnostics.collapse import CollapseReport, collapse_report
from pyrolvm.diagnostics.gaps import Gaps, evidence_gaps
from pyrolvm.diagnostics.pair import Pair
from pyrolvm.diagnostics.predictive import PredictiveCheck, Statistic, predictive_check
from pyrolvm.diagnostics.reference import ReferenceComparison, compare_with_nuts
from pyrolvm.diagnostics.tails import GlobalTail, global_khat, local_khat
from pyrolvm.errors import PyrolvmError, SettingError
from pyrolvm.inference.posterior.evidence import evidence_table, khat_threshold
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.structure import sample_sites
from pyrolvm.plates import arange_rows
from pyrolvm.progress import PATIENCE, Bar, progress_bar
from pyrolvm.seeds import Purpose, derived_seed

WORST = 5
REPLICATES = 200
GAP_ROWS = 200
REFERENCE_ROWS = 5


GLOBAL_EVALUATIONS = 4e7
"""As many evaluations of a datum's density as `diagnose` spends on k-hat of global latents, some twenty seconds;
a fortieth of it for programs whose draws are taken one by one."""


@dataclass(frozen=True)
class Diagnosis:
    """How far the guide is from the posterior, on the rows `rows` of the data.

    evidence: one row per datum: `log_evidence` and `standard_error`, nats; `method` how it was had.
    k_hat: one row per datum: `k_hat`, `effective_sample_size`, `log_evidence`, `elbo` (see `local_khat`); None
        without latents of each datum. global_tail: k-hat of the latents shared by all, or why there is none.
    threshold: min(1 - 1 / log10 num_samples, 0.7), what k-hat should be below.
    collapse, gaps, predictive, reference: the reports of those names; None if not asked for or not defined.
    tempered: whether the program weighs its likelihood by a power; then all of this is of the tempered model.
    not_done: what could not be computed -> why.
    """

    evidence: pd.DataFrame | None
    method: str
    k_hat: pd.DataFrame | None
    global_tail: GlobalTail
    threshold: float
    collapse: CollapseReport | None
    gaps: Gaps | None
    predictive: PredictiveCheck | None
    reference: ReferenceComparison | None
    tempered: bool
    rows: np.ndarray
    num_data: int
    num_samples: int
    not_done: dict[str, str]

    @property
    def worst(self) -> pd.DataFrame:
        """The data of largest k-hat, largest first; empty without latents of each datum."""
        if self.k_hat is None:
            return pd.DataFrame(columns=["k_hat", "effective_sample_size", "log_evidence", "elbo"])
        return self.k_hat.sort_values("k_hat", ascending=False).head(WORST)

    @property
    def good(self) -> bool:
        """Whether no k-hat is above the threshold."""
        tail = self.global_tail.k_hat
        return (self.k_hat is None or bool((self.k_hat["k_hat"] <= self.threshold).all())) and (
            tail is None or tail <= self.threshold
        )

    @property
    def sentences(self) -> list[str]:
        """The findings in plain words, one entry for each thing that was looked at."""
        parts = [self._about_evidence(), self._about_data(), self._about_shared()]
        reports = (self.gaps, self.collapse, self.reference, self.predictive)
        parts += [report.sentence for report in reports if report is not None]
        parts += [f"Not computed: {what} ({why})." for what, why in self.not_done.items()]
        return [part for part in parts if part]

    @property
    def paragraph(self) -> str:
        """The findings in plain words."""
        return " ".join(self.sentences)

    def _about_evidence(self) -> str:
        count, total = len(self.rows), self.num_data
        data = f"{count} data" if count == total else f"{count} of {total} data, drawn at random"
        if self.evidence is None:
            return f"On {data}:"
        mean, error = self.evidence["log_evidence"].mean(), self.evidence["standard_error"]
        noise = float(np.sqrt((error**2).sum()) / len(error))
        shared = bool(self.global_tail.names)
        what = "the log evidence of the tempered model" if self.tempered else "log p(x)"
        what = f"the guide's predictive {what}" if shared else what
        words = f"On {data}, {what} is {mean:.2f} nats per datum ({self.method}"
        words += f", ± {noise:.2f})" if noise >= 0.005 else ")"
        if self.k_hat is None:
            return f"{words}."
        elbo = self.k_hat["elbo"].mean()
        if shared:
            gap = self.k_hat["log_evidence"].mean() - elbo
            return f"{words}; with the shared latents at their means the bound is {gap:.2f} below log p(x)."
        return f"{words}, and the bound {elbo:.2f}, which is {mean - elbo:.2f} below."

    def _about_data(self) -> str:
        if self.k_hat is None:
            return ""
        k = self.k_hat["k_hat"]
        bad = int((k > self.threshold).sum())
        words = f"k-hat is at most {self.threshold:.2f}, the limit for {self.num_samples} draws, "
        if math.isinf(k.max()):
            return "The importance weights of every datum are all the same: the guide is the posterior."
        if not bad:
            return f"{words}for every datum (largest {k.max():.2f}): the guide is close to each posterior."
        rows = ", ".join(f"{row} ({value:.2f})" for row, value in self.worst["k_hat"].items())
        return (
            f"{words}for {100 * (1 - bad / len(k)):.0f} % of the data and above it for {bad}, most for rows {rows}: "
            "there the approximation is poor or the model is wrong for these data, and k-hat alone cannot tell "
            "which; estimates of their log p(x) by importance sampling are not to be trusted."
        )

    def _about_shared(self) -> str:
        tail = self.global_tail
        if not tail.names:
            return ""
        names = ", ".join(tail.names)
        if tail.k_hat is None:
            return f"There is no k-hat for the latents shared by all data ({names}): {tail.reason}."
        if math.isinf(tail.k_hat):
            return f"For the latents shared by all data ({names}) the guide is the posterior."
        words = f"For the latents shared by all data ({names}) k-hat is {tail.k_hat:.2f}"
        if tail.k_hat <= self.threshold:
            return f"{words}, below {self.threshold:.2f}: the guide is close to their posterior."
        return (
            f"{words}, above {self.threshold:.2f}: the approximation is poor or the model is wrong; a guide with "
            "correlations (AutoMultivariateNormal) or a comparison with NUTS tells which."
        )

    def __str__(self) -> str:
        tables = (
            [] if self.k_hat is None else [f"largest k-hat:\n{self.worst.to_string(float_format='%.2f')}"]
        )
        if self.collapse is not None:
            tables.append(self.collapse.dimensions.to_string(float_format="%.3f", max_rows=40))
        if self.predictive is not None:
            tables.append(self.predictive.table.to_string(float_format="%.3f"))
        return "\n\n".join([self.paragraph, *tables])


def _global_tail(fitted: FittedModel, data: Batch, num_samples: int, seed: int, progress: bool) -> GlobalTail:
    """k-hat of the global latents, unless integrating out those of each datum would take minutes."""
    structure = fitted.structure
    names = tuple(s.name for s in structure.global_latents)
    evaluations = num_samples * data.num_rows * (100 if structure.local_latents else 1)
    affordable = GLOBAL_EVALUATIONS / (1 if fitted.vectorized else 40)
    if names and evaluations > affordable:
        return GlobalTail(
            None, names, f"it takes {evaluations:.1e} evaluations of the model: call global_khat(fitted, x)"
        )
    return global_khat(fitted, data, num_samples, seed=seed, progress=progress)


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
    """Say how good the guide is on `x`: evidence, k-hat, collapse, predictive checks, and more if asked.

    Parameters
    ----------
    num_samples: draws of the guide per datum for k-hat and the evidence.
    reference: "nuts" runs NUTS (on five rows where no latents are shared), or what `compare_with_nuts` returned.
    statistics: of the predictive check; see `predictive_check`.
    gaps: also split the evidence gap (of 200 rows at most): a minute, rather than seconds.
    max_rows: data that are looked at one by one, drawn at random if there are more.

    What a program has no meaning for (collapse without latents of each datum, say) is left out and named in
    `not_done`. Raises as `FittedModel.batch` for data that do not fit.
    """
    data = fitted.batch(x)
    rows = _chosen(fitted, data, max_rows, seed)
    part = data if len(rows) == data.num_rows else data.take(torch.as_tensor(rows))
    nuts = _wants_nuts(reference)
    compared = reference if isinstance(reference, ReferenceComparison) else None
    gap = None
    with progress_bar("diagnose", 5 + gaps + nuts, enabled=progress, unit="", after=PATIENCE) as bar:
        run = _Attempts(bar, seed=seed, progress=progress)
        k_hat = run("k-hat per datum", local_khat, fitted, part, num_samples)
        found = run("log p(x)", _evidence, fitted, part, k_hat, num_samples)
        evidence, method = found if found is not None else (None, "")
        collapse = run("collapse", collapse_report, fitted, part)
        if gaps:
            gap = run("gaps", evidence_gaps, fitted, _first(fitted, part, GAP_ROWS))
        predictive = run("predictive check", predictive_check, fitted, part, statistics, REPLICATES)
        if nuts:
            few = data if fitted.structure.global_latents else _first(fitted, part, REFERENCE_ROWS)
            compared = run("reference", compare_with_nuts, fitted, few)
        for table in (evidence, k_hat):
            if table is not None and len(table) == len(rows):
                table.index = pd.Index(rows, name="row")
        tail = run("k-hat of shared latents", _global_tail, fitted, data, num_samples)
        tail = GlobalTail(None) if tail is None else tail
    return Diagnosis(
        evidence,
        method,
        k_hat,
        tail,
        khat_threshold(num_samples),
        collapse,
        gap,
        predictive,
        compared,
        _is_tempered(fitted, part),
        rows,
        data.num_rows,
        num_samples,
        run.refused,
    )


def _wants_nuts(reference: Any) -> bool:
    """Raise `SettingError` for a reference that is not known."""
    if reference in (None, False) or isinstance(reference, ReferenceComparison):
        return False
    if reference is True or reference == "nuts":
        return True
    raise SettingError(
        f'reference={reference!r} is not known: pass "nuts", or what compare_with_nuts(fitted, x) returned'
    )


class _Attempts:
    """Calls that may not be defined for a program: their refusal is kept, not raised."""

    def __init__(self, bar: Bar, **options: Any) -> None:
        self.refused: dict[str, str] = {}
        self.bar, self.options = bar, options

    def __call__(self, what: str, function: Any, *args: Any) -> Any:
        self.bar.note(what)
        try:
            return function(*args, **self.options)
        except PyrolvmError as error:
            self.refused[what] = str(error)
            return None
        finally:
            self.bar.advance()


def _chosen(fitted: FittedModel, data: Batch, max_rows: int, seed: int) -> np.ndarray:
    whole = np.arange(data.num_rows)
    structure = fitted.structure
    if data.num_rows <= max_rows or structure.per_datum or not structure.takes_any_rows:
        return whole
    return np.sort(np.random.default_rng(seed).choice(whole, max_rows, replace=False))


def _first(fitted: FittedModel, data: Batch, count: int) -> Batch:
    if data.num_rows <= count or fitted.structure.per_datum or not fitted.structure.takes_any_rows:
        return data
    return data.take(arange_rows(count))


def _evidence(
    fitted: FittedModel, data: Batch, k_hat: pd.DataFrame | None, num_samples: int, seed: int, progress: bool
) -> tuple[pd.DataFrame, str]:
    """log p(x) of every row: exact where the model knows it or its latents can be summed out, else estimated."""
    latents = [s for s in fitted.structure.sites if not s.observed]
    if getattr(fitted.program.owner, "log_marginal", None) or all(s.discrete for s in latents):
        table, method = evidence_table(fitted.pair(data), "exact", seed=seed, progress=progress), "exact"
    elif k_hat is not None and not fitted.structure.global_latents:
        table, method = k_hat, "importance sampling"  # of the same weights
    else:
        table, method = (
            evidence_table(fitted.pair(data), "importance", num_samples, seed=seed, progress=progress),
            "importance sampling",
        )
    return table[["log_evidence", "standard_error"]].copy(), method


@torch.no_grad()
def _is_tempered(fitted: FittedModel, data: Batch) -> bool:
    """Whether the program weighs its likelihood by a power, so that its evidence is not log p(x)."""
    with seeded(derived_seed(0, Purpose.DIAGNOSE), fitted.program.device):
        model, _ = Pair(fitted, _first(fitted, data, 2)).run(1)
    observed = [s for s in sample_sites(model) if s["is_observed"]]
    plates = [
        math.prod(f.full_size / f.size for f in s["cond_indep_stack"] if f.vectorized) for s in observed
    ]
    return any(
        not math.isclose(float(s["scale"]), p, rel_tol=1e-6) for s, p in zip(observed, plates, strict=True)
    )
