"""Several fits from different starting values, and the one with the best bound.

Bounds of latent variable models have many local optima; mixtures are the plainest case (McLachlan and
Peel 2000, "Finite mixture models", section 2.12).
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pyrolvm.data.arrays import as_batch
from pyrolvm.data.far.streamed import StreamedDataset
from pyrolvm.data.plan import is_share
from pyrolvm.data.precision import as_dtype
from pyrolvm.errors import ConvergenceWarning, DivergenceError, count
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.training.evaluation import bound_of
from pyrolvm.inference.training.fit import fit, warned
from pyrolvm.inference.training.many import num_workers, run_all
from pyrolvm.inference.training.streaming import parted

LAST_SHARE = 0.1
"""The share of the steps that the final bound is averaged over, where nothing is held out."""


def fit_restarts(
    build: Callable[[int], Any], data: Any, *, num_restarts: int = 10, seed: int = 0, **fit_options: Any
) -> tuple[FittedModel, pd.DataFrame]:
    """Fit `build(seed)`, `build(seed + 1)`, ... and keep the fit with the best final bound.

    Runs through joblib: `with joblib.parallel_config(n_jobs=4): fit_restarts(...)` spreads the fits over processes.

    Parameters
    ----------
    build : callable
        seed -> a new model, or a pair (model, guide), whose starting values depend on that seed alone.
    data : tensor, array, DataFrame or Dataset, or a tuple or dict of them
        As for `fit`, which is called with the seed of `build`, so that a row of the table can be reproduced by
        `fit(build(seed), data, seed=seed, ...)`.
    num_restarts : int
        How many fits.
    seed : int
        Of the first fit. It also decides which rows a share `validation` holds out, the same for all fits.
    **fit_options
        Of `fit`. With `checkpoint`, each restart has a folder `restart-<number>` of its own there.

    Returns
    -------
    best : FittedModel
        The fit with the highest bound.
    table : DataFrame
        One row per restart, best first: `restart`, `seed`, `bound` in nats per datum (nan if it diverged), `steps`,
        `seconds`, `outcome`. With `validation` the bound is that of the held-out data, under the same noise for all
        restarts; otherwise that of the parameters of a run until converged, or the mean over the last tenth of
        the steps.

    Raises
    ------
    SettingError
        `num_restarts` is not a positive whole number.
    DivergenceError
        Every restart diverged.

    Notes
    -----
    Other errors are those of `fit`.
    """
    num_restarts = count("num_restarts", num_restarts)
    data, fit_options = _hold_out(data, fit_options, seed)
    if num_workers() != 1:
        fit_options["progress"] = False
    attempt = _Attempt(build, data, fit_options, seed)
    best, highest, rows = None, -float("inf"), []
    for fitted, row in run_all(attempt, [(restart,) for restart in range(num_restarts)]):
        rows.append(row)
        if fitted is not None and row["bound"] > highest:  # one fit alone is kept in memory
            best, highest = fitted, row["bound"]
    if best is None:
        raise DivergenceError(f"all {num_restarts} restarts diverged; the last one: {rows[-1]['outcome']}")
    warned(best.convergence)
    return best, pd.DataFrame(rows).sort_values("bound", ascending=False, ignore_index=True)


@dataclass
class _Attempt:
    """One restart."""

    build: Callable[[int], Any]
    data: Any
    options: dict[str, Any]
    seed: int

    def __call__(self, restart: int) -> tuple[FittedModel | None, dict[str, Any]]:
        """(fit, row of the table); no fit if it diverged."""
        seed, start = self.seed + restart, time.perf_counter()
        row: dict[str, Any] = {"restart": restart, "seed": seed, "bound": float("nan"), "steps": 0}
        try:
            fitted = self._fit(self.build(seed), restart, seed)
        except DivergenceError as error:
            return None, row | {"seconds": time.perf_counter() - start, "outcome": f"diverged: {error}"}
        row |= {"bound": self._bound(fitted), "steps": len(fitted.history)}
        return fitted, row | {"seconds": time.perf_counter() - start, "outcome": fitted.stopped_because}

    def _fit(self, built: Any, restart: int, seed: int) -> FittedModel:
        model, guide = built if isinstance(built, tuple) else (built, self.options.get("guide"))
        # an objective's own modules are trained: each restart begins with those that were passed
        objective = copy.deepcopy(self.options.get("objective"))
        options = self.options | {"guide": guide, "seed": seed, "objective": objective}
        if options.get("checkpoint") is not None:
            options["checkpoint"] = Path(options["checkpoint"]) / f"restart-{restart}"
        with warnings.catch_warnings():  # of the best alone
            warnings.simplefilter("ignore", ConvergenceWarning)
            return fit(model, self.data, **options)

    def _bound(self, fitted: FittedModel) -> float:
        if self.options.get("validation") is not None:
            return self._held_out_bound(fitted)
        if "elbo" in fitted.convergence.numbers:  # of a run until converged: at its parameters
            return fitted.elbo
        elbo = fitted.history["elbo"]
        return float(elbo.tail(max(1, round(LAST_SHARE * len(elbo)))).mean())

    def _held_out_bound(self, fitted: FittedModel) -> float:
        """The held-out bound of the fit's parameters, under the noise of the first seed for all restarts."""
        batch = fitted.batch(self.options["validation"])
        return bound_of(fitted, batch, self.seed, self.options.get("objective"))


def _hold_out(data: Any, options: dict[str, Any], seed: int) -> tuple[Any, dict[str, Any]]:
    """Hold out a share `validation` once, so that all restarts are judged by the same rows."""
    share = options.get("validation")
    if isinstance(data, StreamedDataset) and share is not None:
        data, held_out = parted(data, share, seed)
        return data, options | {"validation": held_out}
    if not is_share(share):
        return data, options
    batch = as_batch(data, as_dtype(options.get("dtype") or torch.float32))
    train, held_out = batch.split(float(share), seed)  # type: ignore[arg-type]
    return train, options | {"validation": held_out}
