"""A table of settings by what they say of data that they have not seen."""

from __future__ import annotations

import copy
import inspect
import time
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyrolvm.data.arrays import as_batch
from pyrolvm.data.far.streamed import StreamedDataset
from pyrolvm.data.plan import is_share
from pyrolvm.data.precision import as_dtype
from pyrolvm.errors import ConvergenceWarning, DivergenceError, SettingError, one_of
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.training.evaluation import bound_of
from pyrolvm.inference.training.fit import fit, warned
from pyrolvm.inference.training.many import num_workers, run_all
from pyrolvm.inference.training.streaming import parted
from pyrolvm.progress import watched

CRITERIA = ("log_evidence", "bound")
IN_95_PERCENT = 1.96
OF_FIT = tuple(inspect.signature(fit).parameters)


def sweep(
    model: Any,
    data: Any,
    grid: Mapping[str, Sequence[Any]],
    *,
    validation: Any = 0.2,
    by: str = "log_evidence",
    num_samples: int = 1000,
    seed: int = 0,
    progress: bool = True,
    **fit_options: Any,
) -> tuple[FittedModel, pd.DataFrame]:
    """Fit every combination of settings, and compare them by held-out data.

    Runs through joblib: `with joblib.parallel_config(n_jobs=4): sweep(...)`. The table does not depend on the number of
    workers but for rounding, where they have other numbers of threads.

    Parameters
    ----------
    model : class, callable or program
        What makes a model of its settings: `functools.partial(VAE, 64)`, say. Where the grid has settings of `fit`
        alone, also a model or a Pyro function itself; each fit begins from a copy of it.
    data : tensor, array, DataFrame or Dataset, or a tuple or dict of them
        As for `fit`.
    grid : dict
        Name -> values. A name that the maker of models takes goes there, else to `fit`.
    validation : float or data
        Held-out data, or the share of rows to hold out: the same for all fits.
    by : {"log_evidence", "bound"}
        Nats per held-out datum: log p(x), exact where it is known, else by `num_samples` weights; or the bound, for
        programs whose latents the data share.
    seed : int
        Of every fit, so that they differ by their settings alone.
    **fit_options
        Of `fit`, for all.

    Returns
    -------
    best : FittedModel
    table : DataFrame
        One row per combination, best first: its settings; `log_evidence` or `bound`; of the evidence `standard_error`
        over the rows, `lower` and `upper` ends of its 95 % interval, `below_best` and `difference_error`, of the
        differences row by row to the best; `elbo` of the training data, `converged`, `seconds`, `outcome`.

    Raises
    ------
    SettingError
        The grid is empty, or has a name that neither takes.
    DivergenceError
        Every fit diverged.
    """
    one_of("by", by, CRITERIA)
    train, held_out = _apart(data, validation, fit_options, seed)
    split = _split_names(model, grid)
    settings = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    options = fit_options | {"seed": seed, "progress": progress and num_workers() == 1}
    calls = [(model, split, chosen, train, held_out, options, by, num_samples) for chosen in settings]
    best, rows, scores = None, [], []
    for chosen, (fitted, score, row) in zip(
        settings,
        watched(run_all(_one, calls), "sweep", len(calls), enabled=progress, unit="fits"),
        strict=True,
    ):
        if score is not None and (best is None or row[by] > max(r[by] for r in rows if r[by] == r[by])):
            best = fitted
        rows.append(chosen | row)
        scores.append(score)
    if best is None:
        raise DivergenceError(f"all {len(rows)} fits diverged; the last one: {rows[-1]['outcome']}")
    warned(best.convergence)
    return best, _table(rows, scores, by)


def _apart(data: Any, validation: Any, options: dict[str, Any], seed: int) -> tuple[Any, Any]:
    """(data to train on, held-out data)."""
    if not is_share(validation):
        return data, validation
    if isinstance(data, StreamedDataset):
        return parted(data, validation, seed)
    return as_batch(data, as_dtype(options.get("dtype") or torch.float32)).split(float(validation), seed)


def _split_names(model: Any, grid: Mapping[str, Sequence[Any]]) -> set[str]:
    """The names of the grid that go to the maker of models."""
    if not grid or any(isinstance(values, str) or not len(values) for values in grid.values()):
        raise SettingError('grid has no values: pass lists of them by name, e.g. {"latent_dim": [2, 5, 10]}')
    makes = isinstance(model, type) or not isinstance(model, torch.nn.Module)
    takes = dict(inspect.signature(model).parameters) if makes else {}
    own = {
        name
        for name in grid
        if name in takes and (name not in OF_FIT or takes[name].default is not inspect.Parameter.empty)
    }
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    for name in set(grid) - own:
        if any_name and name not in OF_FIT:
            own.add(name)
        else:
            one_of("grid", name, (*takes, *OF_FIT))
    return own


def _one(
    model: Any,
    own: set[str],
    chosen: dict[str, Any],
    train: Any,
    held_out: Any,
    options: Any,
    by: str,
    number: int,
) -> tuple[FittedModel | None, Tensor | None, dict[str, Any]]:
    """One combination: (fit, score of each held-out row, row of the table)."""
    start = time.perf_counter()
    row: dict[str, Any] = {by: float("nan"), "elbo": float("nan"), "converged": None}
    made = _made(model, {n: v for n, v in chosen.items() if n in own}, options["seed"])
    try:
        with warnings.catch_warnings():  # of the best alone
            warnings.simplefilter("ignore", ConvergenceWarning)
            given = options | {n: v for n, v in chosen.items() if n not in own}
            # an objective's own modules are trained: each fit begins with those that were passed
            fitted = fit(made, train, **given | {"objective": copy.deepcopy(given.get("objective"))})
    except DivergenceError as error:
        return None, None, row | {"seconds": time.perf_counter() - start, "outcome": f"diverged: {error}"}
    score = _score(fitted, held_out, by, number, options)
    row |= {by: float(score.mean()), "elbo": fitted.elbo, "converged": fitted.convergence.converged}
    return fitted, score, row | {"seconds": time.perf_counter() - start, "outcome": fitted.stopped_because}


def _made(model: Any, settings: dict[str, Any], seed: int) -> Any:
    """A new model, whose starting values depend on the seed alone."""
    if not settings and not isinstance(model, type):
        return copy.deepcopy(model)
    with seeded(seed, torch.device("cpu")):
        return model(**settings)


def _score(fitted: FittedModel, held_out: Any, by: str, number: int, options: dict[str, Any]) -> Tensor:
    """Nats of each held-out row; of the bound its mean alone."""
    if by == "bound":
        return torch.tensor(
            [bound_of(fitted, fitted.batch(held_out), options["seed"], options.get("objective"))]
        )
    try:
        return fitted.log_evidence(held_out, "exact").cpu()
    except SettingError:
        return fitted.log_evidence(held_out, "importance", number, seed=options["seed"], progress=False).cpu()


def _table(rows: list[dict[str, Any]], scores: list[Tensor | None], by: str) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    if by == "log_evidence":
        best = scores[int(table[by].argmax())]
        for i, score in enumerate(scores):
            if score is not None and best is not None:
                error, below = _error(score), best - score
                near = {
                    "lower": score.mean() - IN_95_PERCENT * error,
                    "upper": score.mean() + IN_95_PERCENT * error,
                }
                found = {
                    "standard_error": error,
                    **near,
                    "below_best": below.mean(),
                    "difference_error": _error(below),
                }
                table.loc[i, list(found)] = [float(v) for v in found.values()]
        last = [c for c in table if c in ("elbo", "converged", "seconds", "outcome")]
        table = table[[c for c in table if c not in last] + last]
    return table.sort_values(by, ascending=False, ignore_index=True)


def _error(score: Tensor) -> Tensor:
    return score.double().std() / len(score) ** 0.5
