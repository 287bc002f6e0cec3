"""The noise of an objective's gradient: how estimators compare on one program.

For draws g_1, ..., g_S of the gradient of minus the bound (nats per datum) in P parameters, at the same parameters and
data, with the mean m,

    variance  1/(S - 1) sum_s |g_s - m|^2                    the trace of the covariance
    norm      sqrt(|m|^2 - variance / S)                     of the expected gradient, its own noise taken off
    snr       norm / sqrt(variance)                          as in Rainforth et al. (2018), of all P together

Intervals are of 95 %, by the jackknife (of the logarithm, for the variance).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from pyro import poutine
from torch import Tensor

from pyrolvm.diagnostics.measures import Measure, measure_seed
from pyrolvm.errors import SettingError, count
from pyrolvm.inference.engine.optimizers import OptimizerSpec
from pyrolvm.inference.engine.problem import Problem, schedules_of
from pyrolvm.inference.objectives import prepare
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import sample_sites
from pyrolvm.inference.training.setup import adopt_modules, set_up
from pyrolvm.progress import watched

OWN = "objective."
"""What the names of the objective's own parameters begin with; they are in no group."""


def gradient_variance(
    model: Any,
    objective: Any,
    x: Any,
    *,
    guide: Any = None,
    num_samples: int = 200,
    groups: Mapping[str, Sequence[str]] | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Mean, variance and signal-to-noise ratio of gradients, per objective and group of parameters.

    Nothing is trained. A fitted model is taken at its parameters, anything else as it is passed.

    Parameters
    ----------
    model : FittedModel, LatentVariableModel or callable
        As `fit` takes them, with `guide` for a callable.
    objective : objective, name or dict
        As `fit` takes it; a dict of several, by names of your own.
    x : data as `fit` takes them
        All rows are used in every draw, so that the noise is that of the guide's draws alone.
    num_samples : int
        S, draws of the gradient; S x P numbers are held.
    groups : dict, optional
        Group -> names of its parameters. By default "model", "guide" and "all": what the log-densities of model and
        guide depend on. A parameter of both is in both.
    dtype : torch.dtype, optional
        Of the program, if it is not fitted.
    seed : int
        Of the draws; all objectives begin with the same ones.

    Returns
    -------
    DataFrame
        One row per objective and group: `objective`, `group`, `num_parameters`, `bound` (nats per datum), `norm`,
        `variance`, `variance_low`, `variance_high`, `snr`, `snr_low`, `snr_high`, and `seconds` of one gradient, eager.

    Raises
    ------
    SettingError
        An objective is wrong for the program, a group names an unknown parameter, or `num_samples` is below 3.

    Notes
    -----
    Rainforth et al. (2018), "Tighter variational bounds are not necessarily better".
    """
    objectives = objective if isinstance(objective, Mapping) else {_name(objective): objective}
    num_samples = count("num_samples", num_samples, 3)
    problem = _problem(model, x, guide, dtype, seed)
    names = _checked(groups, problem) if groups is not None else _groups(problem, seed)
    tables = []
    for name, one in objectives.items():
        draws, bound, seconds = _draws(_with(problem, one, seed), num_samples, seed, name, progress=progress)
        rows = [
            {"objective": name, "group": group, **_moments(_flat(draws, members)), "bound": bound}
            for group, members in names.items()
        ]
        tables.append(pd.DataFrame(rows).assign(seconds=seconds))
    table = pd.concat(tables, ignore_index=True)
    table.insert(3, "bound", table.pop("bound"))
    return table


def gradient_draws(
    model: Any,
    objective: Any,
    x: Any,
    *,
    guide: Any = None,
    num_samples: int = 200,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Draws of the gradient of minus the bound, nats per datum: parameter -> [num_samples, ...].

    Arguments as of `gradient_variance`; parameters are unconstrained, as the optimiser sees them.
    """
    problem = _with(_problem(model, x, guide, dtype, seed), objective, seed)
    return _draws(problem, num_samples, seed, _name(objective), progress=progress)[0]


def _name(objective: Any) -> str:
    one = objective[0] if isinstance(objective, tuple) else objective
    return one if isinstance(one, str) else "default" if one is None else type(one).__name__


def _problem(model: Any, x: Any, guide: Any, dtype: torch.dtype | None, seed: int) -> Problem:
    """The program on the data, with the objective that suits it by default."""
    if isinstance(model, FittedModel):
        batch, structure = model.batch(x), model.structure
        rows, plate = len(batch.indices), structure.data_plate
        if plate is not None:  # per datum of these data, which need not be as many as were fitted
            structure = replace(structure, data_plate=replace(plate, size=rows, full_size=rows))
        return Problem(
            model.program, structure, prepare(None, structure), OptimizerSpec(), batch, False, rows
        )
    device, spec = torch.device("cpu"), OptimizerSpec()
    setup = set_up(
        model, x, guide, None, spec, controls=None, kl_warmup=0.0, num_steps=1, num_epochs=None, batch_size=None,
        validation=None, device=device, dtype=dtype or torch.float32, seed=seed, init="own",
    )  # fmt: skip
    return setup.problem


def _with(problem: Problem, objective: Any, seed: int) -> Problem:
    """The same program with another objective, whose modules do not stay with it."""
    program = copy.copy(problem.program)
    program.modules = {k: m for k, m in program.modules.items() if not k.startswith(OWN)}
    program.parameters = {k: p for k, p in program.parameters.items() if not k.startswith(OWN)}
    program.buffers, program._frozen = dict(program.buffers), list(program._frozen)
    prepared = prepare(objective, problem.structure)
    schedules = schedules_of({}, prepared, dict(program.controls), 0.0)
    found = replace(problem, program=program, objective=prepared, schedules=schedules)
    adopt_modules(found, _rows(found), seed)
    return found


def _rows(problem: Problem) -> Tensor:
    return torch.arange(problem.num_rows, device=problem.program.device)


def _draws(
    problem: Problem, num_samples: int, seed: int, name: str, *, progress: bool
) -> tuple[dict[str, Tensor], float, float]:
    """(parameter -> draws of its gradient, the bound, seconds of one)."""
    program, rows = problem.program, _rows(problem)
    values = problem.controls(0, 1)[0].tolist()[1:]
    parts: list[list[Tensor]] = []
    bounds, seconds = [], []
    for index in watched(range(num_samples), f"gradients, {name}", num_samples, enabled=progress):
        with ExitStack() as stack:
            stack.enter_context(program.untouched())
            stack.enter_context(program.scope())
            stack.enter_context(seeded(measure_seed(seed, Measure.GRADIENTS, index), program.device))
            start = time.perf_counter()
            found, terms = problem.gradients(rows, values)
            seconds.append(time.perf_counter() - start)
        leaves = program.parameters.values()
        parts.append([torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)])
        bounds.append(terms[0].item())
    stacked = {
        k: torch.stack(column) for k, column in zip(program.parameters, zip(*parts, strict=True), strict=True)
    }
    mine = {k: v.detach() for k, v in stacked.items() if not k.startswith(OWN)}
    return mine, sum(bounds) / len(bounds), sorted(seconds)[len(seconds) // 2]


def _groups(problem: Problem, seed: int) -> dict[str, list[str]]:
    """Names of the parameters that the densities of the model, and of the guide, depend on, and of all."""
    program, batch = problem.program, problem.data.of(problem.num_rows)
    pair = Pair(program, problem.structure, batch, "train")
    names = [k for k in program.parameters if not k.startswith(OWN)]
    leaves = [program.parameters[k] for k in names]
    noise = seeded(measure_seed(seed, Measure.GRADIENTS), program.device)
    with program.untouched(), program.scope(batch), noise, torch.enable_grad():
        guide = pair.guide()
        held = _detached(guide)
        model = pair.model(None, lambda f: poutine.replay(f, trace=held))
        drawn = [s["value"].sum() for s in sample_sites(guide) if s["value"].is_floating_point()]
        depends = {"model": model.log_prob_sum(), "guide": guide.log_prob_sum() + sum(drawn)}
        found = {k: _reached(total, leaves) for k, total in depends.items()}
    groups = {k: [n for n, g in zip(names, r, strict=True) if g] for k, r in found.items()}
    return {k: members for k, members in {**groups, "all": names}.items() if members}


def _detached(guide: Any) -> Any:
    held = guide.copy()
    for site in sample_sites(held):
        held.nodes[site["name"]] = dict(site, value=site["value"].detach())
    return held


def _reached(total: Any, leaves: list[Tensor]) -> list[bool]:
    if not (isinstance(total, Tensor) and total.requires_grad):
        return [False] * len(leaves)
    return [g is not None for g in torch.autograd.grad(total, leaves, allow_unused=True)]


def _checked(groups: Mapping[str, Sequence[str]], problem: Problem) -> dict[str, list[str]]:
    known = [k for k in problem.program.parameters if not k.startswith(OWN)]
    for group, members in groups.items():
        for name in members:
            if name not in known:
                raise SettingError(
                    f"group '{group}' names '{name}', which is no parameter: {', '.join(known)}"
                )
    return {group: list(members) for group, members in groups.items() if len(members)}


def _flat(draws: Mapping[str, Tensor], members: Sequence[str]) -> Tensor:
    """[num_samples, P], float64."""
    return torch.cat([draws[name].reshape(len(draws[name]), -1).double() for name in members], 1)


def _moments(g: Tensor) -> dict[str, float]:
    """Norm, variance and signal-to-noise ratio of draws [S, P], with their intervals."""
    S, m = len(g), g.mean(0)
    n = S - 1
    c = g - m
    d, p, mm = c.square().sum(1), c @ m, m @ m  # [S], [S], []
    variance = d.sum() / n
    square = mm - variance / S
    # without draw s: the mean is m - c_s / n, and sum_t |c_t|^2 becomes sum_t |c_t|^2 - |c_s|^2 - |c_s|^2 / n
    variances = (d.sum() - d - d / n).clamp(min=0) / (n - 1)  # [S]
    squares = mm - 2 * p / n + d / n**2 - variances / n
    snr, snrs = (_ratio(*pair) for pair in ((square, variance), (squares, variances)))
    tiny = torch.finfo(g.dtype).tiny
    wide = math.exp(1.96 * _jackknife(variances.clamp(min=tiny).log()))
    margin = 1.96 * _jackknife(snrs)
    return {
        "num_parameters": g.shape[1],
        "norm": square.clamp(min=0).sqrt().item(),
        "variance": variance.item(),
        "variance_low": variance.item() / wide,
        "variance_high": variance.item() * wide,
        "snr": snr.item(),
        "snr_low": max(0.0, snr.item() - margin),
        "snr_high": snr.item() + margin,
    }


def _ratio(square: Tensor, variance: Tensor) -> Tensor:
    return (square.clamp(min=0) / variance).sqrt()


def _jackknife(values: Tensor) -> float:
    """The standard error of a statistic from its values without each draw."""
    n = len(values)
    return math.sqrt((n - 1) / n * (values - values.mean()).square().sum().item())
