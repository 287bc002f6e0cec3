"""Has the fit converged? One verdict, with the numbers behind it.

The bound is a noisy series, and its noise is correlated where an optimiser has momentum or minibatches share rows. Its
last third is cut into batches whose means b_1, ..., b_B are nearly independent, and a line is fitted through them,

    b_i = a + r i / B + e_i,        se(r)^2 = var(e) / sum_i (i/B - 1/2)^2 * (1 + rho) / (1 - rho),

with rho the correlation of neighbouring residuals, and the rise r over the window is compared with what would matter.
A rise that matters and is beyond its error: not yet. A rise that with two errors still does not matter: converged.
Anything else is a bound too noisy, or too short, to say.

What matters: of parameters and latents that all data share, a tenth of a nat in total, since a posterior is as narrow
as the data make it; of networks for the latents of each datum, a thousandth of the bound, or 0.0002 nats per number of
a datum.

Batch means: Glynn and Whitt (1991), "Estimating the asymptotic variance with batch means".
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm.inference.program.structure import Structure

LEAST_STEPS = 150
"""Fewer steps are not judged."""
LEAST_HELD_OUT = 12
"""Fewer evaluations of the held-out bound are not judged."""
BATCHES = 20
WINDOW = 1 / 3
"""Share of the run, its end, whose trend is looked at."""
NATS_IN_TOTAL = 0.1
SHARE_OF_BOUND = 1e-3
NATS_PER_NUMBER = 2e-4
ERRORS = 3.0
"""A rise of so many errors is one."""
REMEDY = "give it more steps, or leave num_steps out: it then runs until it has converged"


@dataclass(frozen=True)
class Convergence:
    """Whether a fit has converged.

    Attributes
    ----------
    converged : bool or None
        None where it cannot be told.
    sentence : str
        The verdict in words, with its numbers.
    numbers : dict
        What it rests on, bounds in nats per datum: `rise` over the last third of the run, its `error`, the `tolerance`
        below which a rise does not matter, and what else was looked at.
    """

    converged: bool | None
    sentence: str
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """Converged, not yet, or cannot tell."""
        return {True: "converged", False: "not yet", None: "cannot tell"}[self.converged]

    @property
    def reason(self) -> str:
        """Why a run that ends by this verdict ends."""
        return "converged" if self.converged else "no lower learning rate is tried"

    def record(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)


def unknown(reason: str = "the run kept no record of it") -> Convergence:
    """The verdict where nothing can be said."""
    return Convergence(None, f"cannot tell: {reason}")


def recorded(record: Any) -> Convergence:
    """The verdict that a run folder holds; of an older run, or a damaged record, that nothing can be said."""
    if not isinstance(record, dict) or not isinstance(record.get("sentence"), str):
        return unknown()
    numbers = {str(k): float(v) for k, v in record.get("numbers", {}).items()}
    return Convergence(record.get("converged"), record["sentence"], numbers)


@dataclass(frozen=True)
class Trend:
    """The rise of a series over a window, and the standard error of that rise."""

    rise: float
    error: float

    @property
    def z(self) -> float:
        """The rise in errors."""
        return self.rise / self.error if self.error > 0 else math.inf * np.sign(self.rise)


def trend_of(values: np.ndarray, num_batches: int = BATCHES) -> Trend:
    """The line through the batch means of `values` [at least 6], an error that allows for their correlation."""
    count = min(num_batches, len(values))
    means = np.array([part.mean() for part in np.array_split(np.asarray(values, np.float64), count)])
    time = (np.arange(count) + 0.5) / count - 0.5
    spread = float(time @ time)
    rise = float(time @ means) / spread
    left = means - means.mean() - rise * time
    variance = float(left @ left) / (count - 2)
    correlation = float(left[1:] @ left[:-1]) / max(float(left @ left), 1e-300)
    correlation = min(max(correlation, 0.0), 0.9)
    return Trend(rise, math.sqrt(variance / spread * (1 + correlation) / (1 - correlation)))


def what_matters(structure: Structure, level: float) -> float:
    """The least rise of a bound near `level` that matters, nats per datum."""
    total = NATS_IN_TOTAL / structure.num_data
    if structure.global_latents or not structure.local_latents:
        return total
    numbers = sum(math.prod(s.event_shape) for s in structure.observed if s.local)
    return max(total, SHARE_OF_BOUND * abs(level), NATS_PER_NUMBER * numbers)


def judge(history: pd.DataFrame, structure: Structure) -> Convergence:
    """The verdict on a run of stochastic steps, from its record: the held-out bound's where there is one."""
    held_out = history["validation_elbo"].dropna() if "validation_elbo" in history else pd.Series(dtype=float)
    name = structure.bound_name
    if len(held_out) >= LEAST_HELD_OUT:
        window = held_out.to_numpy()[-max(LEAST_HELD_OUT // 2, round(len(held_out) * WINDOW)) :]
        return _verdict(window, f"the last {len(window)} held-out values of the {name}", structure)
    if len(history) < LEAST_STEPS:
        return unknown(f"{len(history)} steps are too few to judge")
    settled = _settled(history)
    size = round(len(history) * WINDOW)
    if settled < size:
        return unknown(f"the schedules of the run reached their ends only {settled} steps before its own")
    return _verdict(
        history["elbo"].to_numpy()[-size:], f"the last third of {len(history):,} steps the {name}", structure
    )


def _settled(history: pd.DataFrame) -> int:
    """Steps at the end of the run during which the KL had its final weight."""
    if "kl_weight" not in history:
        return len(history)
    weights = history["kl_weight"].to_numpy()
    other = np.flatnonzero(weights != weights[-1])
    return len(weights) if not len(other) else len(weights) - int(other[-1]) - 1


def _verdict(values: np.ndarray, where: str, structure: Structure) -> Convergence:
    if not np.isfinite(values).all():
        return unknown("the bound was not finite at every step")
    found, unit = trend_of(values), "nats per datum" if structure.data_plate else "nats in total"
    tolerance = what_matters(structure, float(values.mean()))
    numbers = {"rise": found.rise, "error": found.error, "tolerance": tolerance}
    went = "rose" if found.rise >= 0 else "fell"
    seen = f"over {where} {went} by {abs(found.rise):.2g} ± {found.error:.1g} {unit}"
    if abs(found.rise) > max(tolerance, ERRORS * found.error):
        remedy = REMEDY if found.rise > 0 else "take a lower learning_rate"
        return Convergence(False, f"not yet: {seen}; {remedy}", numbers)
    if abs(found.rise) + 2 * found.error < tolerance:
        return Convergence(
            True, f"converged: {seen}, less than the {tolerance:.2g} that would matter", numbers
        )
    return Convergence(None, f"cannot tell: {seen}, and {tolerance:.2g} would matter", numbers)
