"""Posterior predictive checks: whether the fitted model would make data like these.

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
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.diagnostics.measures import Measure, Report, measure_seed, noise
from pyrolvm.errors import SettingError, count, one_of
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.draws import tidy
from pyrolvm.inference.program.pair import BUDGET, Pair, Values
from pyrolvm.progress import watched

Statistic = Callable[[Tensor], Any]
EXTREME = 0.05

OF_ROWS = "sd of the rows' means"
STATISTICS: dict[str, Statistic] = {
    "mean": lambda x: x.double().mean(),
    "sd": lambda x: x.double().std(),
    "smallest": lambda x: x.min(),
    "largest": lambda x: x.max(),
    "share of zeros": lambda x: (x == 0).double().mean(),
    OF_ROWS: lambda x: x.double().reshape(len(x), -1).mean(1).std(),
}
"""What is looked at by default: tensor [rows, ...] -> number."""
OF_ONE_NUMBER: dict[str, Statistic] = {"value": lambda x: x.double().sum()}
"""What is looked at of a site that is a single number, which has no deviation."""


@dataclass(frozen=True, repr=False)
class PredictiveCheck(Report):
    """Statistics of the data among those of data sets that the model makes.

    Attributes
    ----------
    table : DataFrame
        One row per statistic: `observed`, `mean` and `sd` of the replicates, `z`, `p_value`, and `extreme`, a two-sided
        p-value below 0.05. Where several sites are observed, rows are called "site: statistic".
    replicates : DataFrame
        [num_samples, statistics].
    """

    shows = "table"
    table: pd.DataFrame
    replicates: pd.DataFrame

    @property
    def passed(self) -> bool:
        """Whether no statistic of the data is extreme among the replicates'."""
        return not bool(self.table["extreme"].any())

    @property
    def sentences(self) -> list[str]:
        """The findings in plain words."""
        wrong = self.table[self.table["extreme"]]
        if not len(wrong):
            return [f"The model makes data like these in all {len(self.table)} statistics looked at."]
        found = ", ".join(
            f"{name} {'smaller' if row['p_value'] > 0.5 else 'larger'} than the model's "
            f"({row['observed']:z.3g} against {row['mean']:z.3g} ± {row['sd']:.2g})"
            for name, row in wrong.iterrows()
        )
        return [f"The model does not make data like these: {found}."]


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

    Parameters
    ----------
    statistics : dict, optional
        Name -> function of a tensor [rows, ...] (the values of an observed site) to a number; `STATISTICS` by default.
    latents : {"same", "new"}
        "same" draws the replicates' latents of each datum from q(z | x), "new" from the model, given the global
        latents. Global latents come from the guide in both.
    site : str, optional
        The observed site to look at; all of them by default.

    Raises
    ------
    SettingError
        An unknown choice, or a statistic that is not one finite number.

    Notes
    -----
    Rows that `poutine.mask` leaves out altogether are left out of the data and of the replicates. A single masked entry
    has the data's median in both, so that it moves no comparison.
    """
    one_of("latents", latents, ("same", "new"))
    count("num_samples", num_samples)
    chosen = STATISTICS if statistics is None else dict(statistics)
    if not chosen:
        raise SettingError("statistics is empty: pass a dict of name -> function of a tensor [rows, ...]")
    pair = fitted.pair(x)
    with noise(pair, seed, Measure.PREDICTIVE):
        model, _ = pair.draw()
    names = [s.name for s in fitted.structure.observed]
    if not names:
        raise SettingError("the program observes no data that its model could make anew")
    names = names if site is None else [one_of("site", site, names)]
    sites = [_Observed(pair, model, name, chosen) for name in names]
    make = _same if latents == "same" else _new
    made = make(fitted, pair, num_samples, seed)
    made = watched(made, "predictive check", num_samples, enabled=progress, unit="data sets")
    observed = _of_all(sites, {s.name: s.value for s in sites})
    replicates = pd.DataFrame([_of_all(sites, values) for values in made])
    return PredictiveCheck(_table(observed, replicates), replicates)


def _of_all(sites: list[_Observed], values: Values) -> dict[str, float]:
    """The statistics of every site: by name, or by "site: name" if there are several sites."""
    alone = len(sites) == 1
    each = [(s.name, s.of(values[s.name])) for s in sites]
    return {k if alone else f"{name}: {k}": v for name, found in each for k, v in found.items()}


class _Observed:
    """The statistics of one observed site, its masked values left out."""

    def __init__(self, pair: Pair, model: Trace, name: str, statistics: Mapping[str, Statistic]) -> None:
        self.name, self.statistics = name, statistics
        node: Any = model.nodes[name]
        self.value = tidy(pair.structure, node, node["value"])[0]
        self.kept = observed_mask(pair, node)
        if statistics is STATISTICS:
            self.statistics = _usual(self.value if self.kept is None else self.value[self._rows])

    def of(self, value: Tensor) -> dict[str, float]:
        """The statistics of values [rows, ...] of this site."""
        if self.kept is not None:
            median = self.value[self.kept].double().median().to(value.dtype).item()
            value = value[self._rows].masked_fill(~self.kept[self._rows], median)
        return {name: _number(name, statistic, value) for name, statistic in self.statistics.items()}

    @property
    def _rows(self) -> Tensor:
        """The rows of which any value counts: bool [rows]."""
        assert self.kept is not None
        return self.kept.reshape(len(self.kept), -1).any(1)


def _usual(value: Tensor) -> Mapping[str, Statistic]:
    """What is looked at by default of values [rows, ...], as far as they have it."""
    if value.numel() == 1:
        return OF_ONE_NUMBER
    return {name: of for name, of in STATISTICS.items() if name != OF_ROWS or len(value) > 1}


def observed_mask(pair: Pair, node: Any) -> Tensor | None:
    """Which values of an observed site count: bool [rows, plates..., event...]; None if all do."""
    fn, kept = node["fn"], _wide(node["mask"], node["fn"], node["value"])
    while fn is not None:  # masks of `dist.mask(...)` lie below `to_event`
        kept = kept & _wide(getattr(fn, "_mask", None), fn, node["value"])
        fn = getattr(fn, "base_dist", None)
    return None if bool(kept.all()) else tidy(pair.structure, node, kept)[0]


def _wide(mask: Any, fn: Any, value: Tensor) -> Tensor:
    """A mask of the batch of `fn`, for every entry of its value."""
    kept = torch.as_tensor(True if mask is None else mask, device=value.device)
    return kept.reshape((*kept.shape, *(1,) * len(fn.event_shape))).expand(value.shape)


def _number(name: str, statistic: Statistic, value: Tensor) -> float:
    """The statistic of some data. Raises `SettingError` unless it is one finite number."""
    found = np.asarray(statistic(value.detach().cpu()))
    if found.size != 1 or not np.isfinite(float(found.reshape(()))):
        what = f"gave {found} of data {list(value.shape)}"
        raise SettingError(f"the statistic '{name}' {what}: it must be one finite number")
    return float(found.reshape(()))


def _same(fitted: FittedModel, pair: Pair, num_samples: int, seed: int) -> Iterator[Values]:
    """Replicates given each datum's own latents, some at a time."""
    size = max(1, BUDGET // (pair.width * max(1, pair.batch.num_rows)))
    for first in range(0, num_samples, size):
        part = min(size, num_samples - first)
        draws = fitted.draws(pair.batch, part, seed=measure_seed(seed, Measure.PREDICTIVE, first))
        for index in range(part):
            yield {name: value[index] for name, value in draws.predicted.items()}


def _new(fitted: FittedModel, pair: Pair, num_samples: int, seed: int) -> Iterator[Values]:
    """Replicates with latents of each datum from the model, one data set at a time."""
    names = [s.name for s in fitted.structure.observed]
    for index in range(num_samples):
        with noise(pair, seed, Measure.PREDICTIVE, index):
            nodes: Any = pair.simulate(given=pair.held_draw()).nodes
            values = {n: tidy(pair.structure, nodes[n], nodes[n]["value"])[0] for n in names}
        yield values


def _table(observed: dict[str, float], replicates: pd.DataFrame) -> pd.DataFrame:
    T = pd.Series(observed)
    p = (replicates > T).mean() + 0.5 * (replicates == T).mean()
    sd = replicates.std()
    away = T - replicates.mean()
    z = (away / sd).where(away != 0, 0.0)  # infinite where replicates are all alike and the data are not
    columns = {"observed": T, "mean": replicates.mean(), "sd": sd, "z": z, "p_value": p}
    return pd.DataFrame({**columns, "extreme": 2 * np.minimum(p, 1 - p) < EXTREME})
