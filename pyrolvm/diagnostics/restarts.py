"""Whether several fits of one model agree.

Their bounds may differ (local optima), and so may their posteriors where the bounds agree: by names of components
or by rotations, which `align` takes out, or truly. For draws of S each from F guides, with W the mean of their
variances and B the variance of their means,

    R-hat = sqrt(((S - 1) / S W + B) / W),

Gelman and Rubin's (1992) with a fit in the place of a chain: near 1 if the fits agree to within their own
posterior. It does not measure the guide's distance from the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyrolvm.diagnostics.measures import Measure, Report, measure_seed, table_of
from pyrolvm.errors import SettingError, count
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.enumerated import enumerated_sites
from pyrolvm.progress import watched

Draws = dict[str, Tensor]
Align = Callable[[Draws, Draws], Draws]
AGREEMENT = 1.1


@dataclass(frozen=True, repr=False)
class RestartComparison(Report):
    """Several fits beside each other.

    Attributes
    ----------
    bounds : DataFrame
        One row per fit: `bound` on the data, `standard_error` of its Monte Carlo noise, and how far it is
        `below_best`, nats per datum; `near_best`: within `tolerance` and the noise of the best.
    table : DataFrame
        One row per (site, element) of those near the best: `r_hat`, `between_sd`, `within_sd`.
    reconstruction_r_hat : float
        Of new data drawn given the latents, which names and rotations do not change; NaN where latents are enumerated.
    aligned : bool
        Whether `align` was given.
    tolerance : float
        Nats per datum.
    """

    shows = "bounds"
    bounds: pd.DataFrame
    table: pd.DataFrame
    reconstruction_r_hat: float
    aligned: bool
    tolerance: float

    @property
    def agree(self) -> bool:
        """Whether two or more fits reach the best bound and their posteriors agree, R-hat below 1.1."""
        return bool(self.bounds["near_best"].sum() > 1 and (self.table["r_hat"] < AGREEMENT).all())

    @property
    def sentences(self) -> list[str]:
        """The findings in plain words."""
        near, total = int(self.bounds["near_best"].sum()), len(self.bounds)
        words = f"{near} of {total} fits are within {self.tolerance:g} nats per datum of the best bound"
        if near < total:
            words += f" (the worst is {self.bounds['below_best'].max():.2f} below)"
        if near < 2:
            advice = "the others found worse optima, so that more restarts may find a better one still"
            return [f"{words}: {advice}."]
        if not len(self.table):
            return [f"{words}, and there are no sampled latents to compare."]
        differ = float((self.table["r_hat"] >= AGREEMENT).mean())
        if differ == 0:
            return [f"{words}, and their posteriors agree."]
        words += f"; their posteriors differ in {100 * differ:.0f} % of the latents"
        if self.reconstruction_r_hat < AGREEMENT:
            words += ", though not in the data they predict"
            if not self.aligned:
                words += ": names or rotations of the latents may be all that differs (align= takes them out)"
        return [f"{words}."]


@torch.no_grad()
def compare_restarts(
    fits: Sequence[FittedModel],
    x: Any,
    align: Align | None = None,
    num_samples: int = 200,
    *,
    tolerance: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> RestartComparison:
    """Compare the bounds and the posteriors of several fits of one model on `x`.

    Parameters
    ----------
    fits : list of FittedModel
        Two or more.
    x : data as `fit` takes them
        The training data, or some others: then the KL of latents that all data share is weighed as it was in
        training, by their number of rows over N. Where `x` was used to choose between fits, or when to stop
        (`validation` of `fit`), these are validation bounds, optimistic for the fit that is chosen.
    align : callable, optional
        (draws, draws of the best fit) -> draws with the best fit's names, order and rotation; both are
        site -> [num_samples, rows, ...] or [num_samples, ...].
    num_samples : int
        Draws of each fit.
    tolerance : float
        How far from the best bound, in nats per datum, a fit still counts as having found it; the posteriors of the
        others are not compared.

    Raises
    ------
    SettingError
        Fewer than two fits, or fits of different latents.
    ProgramError
        Latents are summed out that are not in the data plate.
    """
    count("num_samples", num_samples, 2)
    if len(fits) < 2:
        raise SettingError(f"{len(fits)} fit has nothing to be compared with: pass two or more")
    names = _compared(fits[0])
    if any(_compared(f) != names for f in fits):
        raise SettingError("the fits have different latents: pass fits of one model")
    each = watched(fits, "bounds of restarts", len(fits), enabled=progress, unit="fits")
    each_bound = [_bound(f, x, num_samples, seed) for f in each]
    bounds = pd.DataFrame(each_bound, columns=["bound", "standard_error"]).rename_axis("fit")
    bounds["below_best"] = bounds["bound"].max() - bounds["bound"]
    bounds["near_best"] = bounds["below_best"] <= tolerance + 3 * bounds["standard_error"]
    near = [f for f, good in zip(fits, bounds["near_best"], strict=True) if good]
    best = fits[int(bounds["bound"].to_numpy().argmax())]
    seeds = [measure_seed(seed, Measure.RESTARTS, 1, i) for i in range(len(near) + 1)]
    each = watched([best, *near], "draws of restarts", len(near) + 1, enabled=progress, unit="fits")
    found = (f.posterior(x, num_samples, seed=s) for f, s in zip(each, [seeds[-1], *seeds[:-1]], strict=True))
    reference, *draws = [{n: values[n].double() for n in names} for values in found]
    if align is not None:
        draws = [align(d, reference) for d in draws]
    tables = [_r_hat(name, torch.stack([d[name] for d in draws])) for name in names]
    table = pd.concat(tables) if tables else pd.DataFrame(columns=["r_hat", "between_sd", "within_sd"])
    predicted = _reconstruction_r_hat(near, x, num_samples, seed)
    return RestartComparison(bounds, table, predicted, align is not None, tolerance)


def _compared(fitted: FittedModel) -> list[str]:
    """The latents that the guide draws."""
    return [s.name for s in fitted.structure.latents if not s.enumerated or s.in_guide]


def _bound(fitted: FittedModel, x: Any, num_samples: int, seed: int) -> tuple[float, float]:
    """The ELBO per datum of the rows of `x`, and its standard error; all fits see the same noise."""
    # (1/M) sum_i E_q [log p(x_i, z_i | g) - log q(z_i | x_i, g)] - KL(q(g) || p(g)) / N,
    # with M the rows of `x`, N those of the fit, and enumerated latents summed out
    enumerated_sites(fitted.structure)  # those that cannot be summed out datum by datum are refused
    pair, parts = fitted.pair(x), []
    for draws in fitted.draw_chunks(pair.batch, num_samples, seed=measure_seed(seed, Measure.RESTARTS, 0)):
        parts.append(draws.log_weight.double().sum(1))
    shared: Any = (draws.global_log_prior, draws.global_log_guide)
    each = torch.stack(parts).sum(0) / pair.num_rows
    each = each + (shared[0] - shared[1]).double() / max(1, fitted.num_data)
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


def _r_hat(name: str, draws: Tensor) -> pd.DataFrame:
    """draws: [fits, num_samples, ...] -> one row per element."""
    flat = draws.reshape(*draws.shape[:2], -1).cpu()
    within = flat.var(1).mean(0)
    between = flat.mean(1).var(0) if len(flat) > 1 else torch.zeros_like(within)
    # point masses: the same point agrees, another one does not
    ratio = torch.where(between > 0, between / within, torch.zeros_like(within))
    r_hat = ((flat.shape[1] - 1) / flat.shape[1] + ratio).sqrt()
    return table_of({"r_hat": r_hat, "between_sd": between.sqrt(), "within_sd": within.sqrt()}, name)


def _reconstruction_r_hat(fits: list[FittedModel], x: Any, num_samples: int, seed: int) -> float:
    """R-hat of draws of new data given each datum's latents: the 99 % quantile over the elements of the data."""
    if len(fits) < 2 or any(s.enumerated for s in fits[0].structure.sites):
        return math.nan
    seeds = [measure_seed(seed, Measure.RESTARTS, 2, i) for i in range(len(fits))]
    made = [f.predict(x, num_samples, seed=s) for f, s in zip(fits, seeds, strict=True)]
    tables = [_r_hat(name, torch.stack([m[name].double() for m in made])) for name in made[0]]
    return float(pd.concat(tables)["r_hat"].quantile(0.99))
