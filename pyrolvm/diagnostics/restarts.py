"""Do several fits of one model say the same?

Their bounds may differ (local optima), and so may their posteriors where the bounds agree: by names of components
or by rotations, which `align` takes out, or truly. For draws of S each from F guides, with W the mean of their
variances and B the variance of their means,

    R-hat = sqrt(((S - 1) / S W + B) / W),

Gelman and Rubin's (1992) with a fit in the place of a chain: near 1 if the fits agree to within their own
posterior. It says nothing of the guide's distance from the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyrolvm.diagnostics.pair import Pair
from pyrolvm.errors import SettingError
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.structure import sample_sites
from pyrolvm.progress import watched
from pyrolvm.seeds import Purpose, derived_seed

Draws = dict[str, Tensor]
Align = Callable[[Draws, Draws], Draws]
AGREEMENT = 1.1


@dataclass(frozen=True)
class RestartComparison:
    """Several fits beside each other.

    bounds: one row per fit: `bound` on the data, `standard_error` of its Monte Carlo noise, and how far it is
        `below_best`, nats per datum; `near_best`: within `tolerance` and the noise of the best.
    table: one row per (site, element) of those near the best: `r_hat`, `between_sd`, `within_sd`.
    reconstruction_r_hat: of new data drawn given the latents, which names and rotations do not change; nan
        where latents are enumerated.
    """

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
    def sentence(self) -> str:
        """The findings in plain words."""
        near, total = int(self.bounds["near_best"].sum()), len(self.bounds)
        words = f"{near} of {total} fits are within {self.tolerance:g} nats per datum of the best bound"
        if near < total:
            words += f" (the worst is {self.bounds['below_best'].max():.2f} below)"
        if near < 2:
            return (
                f"{words}: the others found worse optima, so that more restarts may find a better one still."
            )
        differ = float((self.table["r_hat"] >= AGREEMENT).mean()) if len(self.table) else 0.0
        if not len(self.table):
            return f"{words}, and there are no sampled latents to compare."
        if differ == 0:
            return f"{words}, and their posteriors agree."
        words += f"; their posteriors differ in {100 * differ:.0f} % of the latents"
        if self.reconstruction_r_hat < AGREEMENT:
            words += ", though not in what they say of the data"
            if not self.aligned:
                words += ": names or rotations of the latents may be all that differs (align= takes them out)"
        return words + "."

    def __str__(self) -> str:
        return f"{self.sentence}\n{self.bounds.to_string(float_format='%.3f')}"


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

    align: (draws, draws of the best fit) -> draws with the best fit's names, order and rotation; both are
        site -> [num_samples, rows, ...] or [num_samples, ...].
    tolerance: how far from the best bound, in nats per datum, a fit still counts as having found it; the
        posteriors of the others are not compared.

    Raises `SettingError` for fewer than two fits, or fits of different latents.
    """
    if len(fits) < 2:
        raise SettingError(f"{len(fits)} fit has nothing to be compared with: pass two or more")
    names = [s.name for s in fits[0].structure.sites if not s.observed and not s.enumerated]
    if any([s.name for s in f.structure.sites if not s.observed and not s.enumerated] != names for f in fits):
        raise SettingError("the fits have different latents: pass fits of one model")
    each = watched(fits, "bounds of restarts", len(fits), enabled=progress, unit="fits")
    bounds = _bounds(each, x, num_samples, tolerance, seed)
    near = [f for f, good in zip(fits, bounds["near_best"], strict=True) if good]
    best = fits[int(bounds["bound"].to_numpy().argmax())]
    reference = _latents(best, x, names, num_samples, seed)
    each = watched(near, "draws of restarts", len(near), enabled=progress, unit="fits")
    draws = [
        _latents(f, x, names, num_samples, derived_seed(seed, Purpose.RESTART, i)) for i, f in enumerate(each)
    ]
    if align is not None:
        draws = [align(d, reference) for d in draws]
    tables = [_r_hat(name, torch.stack([d[name] for d in draws])) for name in names] if names else []
    table = pd.concat(tables) if tables else pd.DataFrame(columns=["r_hat", "between_sd", "within_sd"])
    said = _reconstruction_r_hat(near, x, num_samples, seed)
    return RestartComparison(bounds, table, said, align is not None, tolerance)


def _bounds(
    fits: Iterable[FittedModel], x: Any, num_samples: int, tolerance: float, seed: int
) -> pd.DataFrame:
    found = [_bound(f, x, num_samples, seed) for f in fits]
    table = pd.DataFrame(found, columns=["bound", "standard_error"]).rename_axis("fit")
    table["below_best"] = table["bound"].max() - table["bound"]
    table["near_best"] = table["below_best"] <= tolerance + 3 * table["standard_error"]
    return table


def _bound(fitted: FittedModel, x: Any, num_samples: int, seed: int) -> tuple[float, float]:
    """The ELBO of all rows of `x`, per datum, from whole draws, and its standard error."""
    if any(s.enumerated for s in fitted.structure.sites):
        return _summed_bound(fitted, x, num_samples, seed)
    pair = Pair(fitted, fitted.batch(x))
    parts = []
    with seeded(derived_seed(seed, Purpose.DIAGNOSE), fitted.program.device):
        for model, guide in pair.draws(num_samples):
            shared = [not pair.is_local(s) for s in sample_sites(guide)]
            local = pair.log_prob(model, pair.is_local) - pair.log_prob(guide, pair.is_local)
            total = local.sum(1)
            if any(shared) or pair.structure.data_plate is None:
                total = total + pair.log_prob(model, lambda s: not pair.is_local(s)).sum(1)
                total = total - pair.log_prob(guide, lambda s: not pair.is_local(s)).sum(1)
            parts.append(total)
    each = torch.cat(parts) / max(pair.batch.num_rows, 1)
    return float(each.mean()), float(each.std() / len(each) ** 0.5) if len(each) > 1 else 0.0


def _summed_bound(fitted: FittedModel, x: Any, num_samples: int, seed: int) -> tuple[float, float]:
    """With enumerated latents summed out; that of the fit itself if others are shared by all data."""
    if fitted.structure.global_latents:
        return fitted.elbo, float(
            fitted.history["elbo"].tail(100).std() / min(100, len(fitted.history)) ** 0.5
        )
    options: dict[str, Any] = {"num_samples": num_samples, "num_particles": 1, "seed": seed}
    return float(fitted.log_evidence(x, "iwae", **options).mean()), 0.0


def _latents(fitted: FittedModel, x: Any, names: list[str], num_samples: int, seed: int) -> Draws:
    values = fitted.posterior(x, num_samples, seed=seed)
    return {n: values[n].double() for n in names}


def _r_hat(name: str, draws: Tensor) -> pd.DataFrame:
    """draws: [fits, num_samples, ...] -> one row per element."""
    flat = draws.reshape(*draws.shape[:2], -1).cpu()
    within = flat.var(1).mean(0)
    between = flat.mean(1).var(0) if len(flat) > 1 else torch.zeros_like(within)
    # point masses: the same point agrees, another one does not
    ratio = torch.where(between > 0, between / within, torch.zeros_like(within))
    r_hat = ((flat.shape[1] - 1) / flat.shape[1] + ratio).sqrt()
    index = pd.MultiIndex.from_product([[name], range(flat.shape[2])], names=["site", "element"])
    columns = {"r_hat": r_hat, "between_sd": between.sqrt(), "within_sd": within.sqrt()}
    return pd.DataFrame({k: v.numpy() for k, v in columns.items()}, index=index)


def _reconstruction_r_hat(fits: list[FittedModel], x: Any, num_samples: int, seed: int) -> float:
    """R-hat of draws of new data given each datum's latents: the 99 % quantile over the elements of the data."""
    if len(fits) < 2 or any(s.enumerated for s in fits[0].structure.sites):
        return math.nan
    made = [
        f.predict(x, num_samples, seed=derived_seed(seed, Purpose.RESTART, i)) for i, f in enumerate(fits)
    ]
    tables = [_r_hat(name, torch.stack([m[name].double() for m in made])) for name in made[0]]
    return float(pd.concat(tables)["r_hat"].quantile(0.99))
