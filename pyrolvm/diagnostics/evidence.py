"""log p(x) of the data, beside the bound: exact where it is known, else by importance sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm.diagnostics.measures import Measure, Report, measure_seed
from pyrolvm.errors import ProgramError, SettingError
from pyrolvm.inference.posterior.evidence import evidence_table
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.pair import Pair


@dataclass(frozen=True, repr=False)
class Evidence(Report):
    """log p(x) of each datum.

    Attributes
    ----------
    table : DataFrame
        One row per datum: `log_evidence` and `standard_error`, nats; one row in all without a data plate.
    method : {"exact", "importance sampling"}
        How it was computed.
    name : str
        What it is: "log p(x)", or what stands for it in a program whose likelihood is weighted, or that has latents
        shared by all data.
    per_datum : bool
        Whether rows are data; else the data are one.
    num_data : int
        Data that were given, of which the rows may be some.
    elbo : float or None
        The mean bound, nats per datum; None with latents that all data share.
    gap : float or None
        How far that bound is below log p(x) with the shared latents at their means, mean over the data.
    """

    table: pd.DataFrame
    method: str
    name: str
    per_datum: bool
    num_data: int
    elbo: float | None = None
    gap: float | None = None

    @property
    def sentences(self) -> list[str]:
        """The findings in plain words."""
        mean, error = self.table["log_evidence"].mean(), self.table["standard_error"]
        noise = float(np.sqrt((error**2).sum()) / len(error))
        exact = self.method if noise < 0.005 else f"{self.method}, ± {noise:.2f}"
        if not self.per_datum:
            return [f"{self.name} of the data is {mean:z.2f} nats in total ({exact})."]
        count, total = len(self.table), self.num_data
        data = f"{count} data" if count == total else f"{count} of {total} data, drawn at random"
        words = f"On {data}, {self.name} is {mean:z.2f} nats per datum ({exact})"
        if self.elbo is not None:
            words += f", and the bound {self.elbo:z.2f}, which is {self.gap:z.2f} below"
        elif self.gap is not None:
            words += f"; with the shared latents at their means the bound is {self.gap:z.2f} below log p(x)"
        return [f"{words}."]


def evidence_name(fitted: FittedModel) -> str:
    """What `log_evidence` of this program is.

    log p(x) = log integral p(x, z) dz is the evidence of a normalised model. With the likelihood under a power, or
    under weights of rows, it is the logarithm of the tempered model's normaliser,
    log Z = log integral p(x | z)^w p(z) dz.
    """
    tempered = "log evidence (log Z) of the tempered model, not log p(x),"
    what = tempered if fitted.structure.tempered else "log p(x)"
    if fitted.structure.global_latents:
        return f"the guide's predictive {what}"
    return f"the {what}" if fitted.structure.tempered else what


def evidence_of(
    fitted: FittedModel,
    pair: Pair,
    num_samples: int,
    tails: pd.DataFrame | None,
    num_data: int,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Evidence:
    """log p(x) of each row of `pair`, of `num_data` data, by the best method that the program has.

    Parameters
    ----------
    tails : DataFrame or None
        What `local_khat` found for the same rows: its estimates are taken where no latents are shared, and its bounds.

    Raises
    ------
    SettingError, ProgramError
        The guide has no density per datum, or is a point estimate.
    """
    shared = bool(fitted.structure.global_latents)
    options: dict[str, Any] = {"seed": measure_seed(seed, Measure.EVIDENCE), "progress": progress}
    try:
        table: Any = evidence_table(pair, "exact", **options)
        method = "exact"
    except (SettingError, ProgramError):
        method = "importance sampling"
        weigh = tails is None or shared  # else the tails are of the same weights
        table = evidence_table(pair, "importance", num_samples, **options) if weigh else tails
    table = table[["log_evidence", "standard_error"]].copy()
    elbo = gap = None
    if tails is not None:
        elbo = None if shared else float(tails["elbo"].mean())
        gap = float((tails if shared else table)["log_evidence"].mean() - tails["elbo"].mean())
    per_datum = fitted.structure.data_plate is not None
    return Evidence(table, method, evidence_name(fitted), per_datum, num_data, elbo, gap)
