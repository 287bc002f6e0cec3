"""Posterior predictive checks: would the fitted model make data like these?

For a statistic T of the whole data set, and data sets x_rep made by the fitted model,

    p = Pr(T(x_rep) > T(x)) + 1/2 Pr(T(x_rep) = T(x)),

near 0 or 1 where the model does not make what the data show (Gelman, Meng and Stern 1996, "Posterior
predictive assessment of model fitness via realized discrepancies"; ties counted half). It is not
uniform under the model but closer to 1/2, the data having been used twice, most of all where each replicated
datum keeps the latents of its own ("same"): with `latents="new"` they are drawn from the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrolvm.diagnostics.pair import Pair, Values
from pyrolvm.errors import SettingError
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.draws import BUDGET
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.structure import sample_sites
from pyrolvm.progress import watched
from pyrolvm.seeds import Purpose, derived_seed

Statistic = Callable[[Tensor], Any]
EXTREME = 0.05

STATISTICS: dict[str, Statistic] = {
    "mean": lambda x: x.double().mean(),
    "sd": lambda x: x.double().std(),
    "smallest": lambda x: x.min(),
    "largest": lambda x: x.max(),
    "share of zeros": lambda x: (x == 0).double().mean(),
    "sd of the rows' means": lambda x: x.double().reshape(len(x), -1).mean(1).std(),
}
"""What is looked at if nothing is said: tensor [rows, ...] -> number."""


@dataclass(frozen=True)
class PredictiveCheck:
    """table: one row per statistic: `observed`, `mean` and `sd` of the replicates, `z`, `p_value`, `extreme`.

    replicates: [num_samples, statistics]. `extreme` is a two-sided p-value below 0.05.
    """

    table: pd.DataFrame
    replicates: pd.DataFrame

    @property
    def passed(self) -> bool:
        """Whether no statistic of the data is extreme among the replicates'."""
        return not bool(self.table["extreme"].any())

    @property
    def sentence(self) -> str:
        """The findings in plain words."""
        wrong = self.table[self.table["extreme"]]
        if not len(wrong):
            return f"The model makes data like these in all {len(self.table)} statistics looked at."
        found = ", ".join(
            f"{name} {'smaller' if row['p_value'] > 0.5 else 'larger'} than the model's "
            f"({row['observed']:.3g} against {row['mean']:.3g} ± {row['sd']:.2g})"
            for name, row in wrong.iterrows()
        )
        return f"The model does not make data like these: {found}."

    def __str__(self) -> str:
        return f"{self.sentence}\n{self.table.to_string(float_format='%.3f')}"


@torch.no_grad()
def predictive_check(
    fitted: FittedModel,
    x: Any,
    statistics: Mapping[str, Statistic] | None = None,
    num_samples: int = 200,
    *,
    latents: str = "same",
    site: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PredictiveCheck:
    """Compare statistics of `x` with those of `num_samples` data sets that the fitted model makes.

    statistics: name -> function of a tensor [rows, ...] (the observed site's values) to a number; those of
        `STATISTICS` by default.
    latents: "same" draws the replicates' latents of each datum from q(z | x), "new" from the model, given the
        global latents. Global latents come from the guide in both.
    site: the observed site to look at; needed if there are several.

    Raises `SettingError` for an unknown choice, or a statistic that is not one finite number.
    """
    if latents not in ("same", "new"):
        raise SettingError(f"latents='{latents}' is not known: choose same or new")
    name = _site(fitted, site)
    chosen = STATISTICS if statistics is None else dict(statistics)
    if not chosen:
        raise SettingError("statistics is empty: pass a dict of name -> function of a tensor [rows, ...]")
    data = fitted.batch(x)
    with seeded(derived_seed(seed, Purpose.DIAGNOSE), fitted.program.device):
        model, _ = Pair(fitted, data).run(1)
        nodes: Any = model.nodes
        observed = _evaluate(chosen, nodes[name]["value"])
    make = _same if latents == "same" else _new
    made = make(fitted, x, name, num_samples, seed)
    made = watched(made, "predictive check", num_samples, enabled=progress, unit="data sets")
    replicates = pd.DataFrame([_evaluate(chosen, v) for v in made])
    return PredictiveCheck(_table(observed, replicates), replicates)


def _site(fitted: FittedModel, site: str | None) -> str:
    names = [s.name for s in fitted.structure.observed]
    if site is None and len(names) == 1:
        return names[0]
    if site not in names:
        raise SettingError(f"site={site!r} is no observed site: choose one of {', '.join(names)}")
    return site


def _evaluate(statistics: Mapping[str, Statistic], value: Tensor) -> dict[str, float]:
    found = {}
    for name, statistic in statistics.items():
        result = np.asarray(statistic(value.detach().cpu()))
        number = float(result.reshape(())) if result.size == 1 else float("nan")
        if not np.isfinite(number):
            raise SettingError(
                f"the statistic '{name}' gave {result} of data {list(value.shape)}: it must be one "
                "finite number"
            )
        found[name] = number
    return found


def _same(fitted: FittedModel, x: Any, name: str, num_samples: int, seed: int) -> Iterator[Tensor]:
    """Replicates given each datum's own latents, some at a time."""
    data = fitted.batch(x)
    width = max(1, sum(t.numel() for _, t in data.tensors()))
    size = max(1, BUDGET // width)
    for first in range(0, num_samples, size):
        count = min(size, num_samples - first)
        yield from fitted.draws(x, count, seed=derived_seed(seed, Purpose.DIAGNOSE, first)).predictive[name]


def _new(fitted: FittedModel, x: Any, name: str, num_samples: int, seed: int) -> Iterator[Tensor]:
    """Replicates with latents of each datum from the model, one data set at a time."""
    pair = Pair(fitted, fitted.batch(x))
    for index in range(num_samples):
        with seeded(derived_seed(seed, Purpose.DIAGNOSE, index), fitted.program.device):
            nodes: Any = pair.simulate(_shared(pair)).nodes
            yield nodes[name]["value"]


def _shared(pair: Pair) -> Values:
    if not pair.structure.global_latents:
        return {}
    guide = pair.guide_at({}, 1)
    return {s["name"]: s["value"] for s in sample_sites(guide) if not pair.is_local(s)}


def _table(observed: dict[str, float], replicates: pd.DataFrame) -> pd.DataFrame:
    T = pd.Series(observed)
    p = (replicates > T).mean() + 0.5 * (replicates == T).mean()
    sd = replicates.std()
    z = ((T - replicates.mean()) / sd).where(sd > 0, 0.0)
    columns = {"observed": T, "mean": replicates.mean(), "sd": sd, "z": z, "p_value": p}
    return pd.DataFrame({**columns, "extreme": 2 * np.minimum(p, 1 - p) < EXTREME})
