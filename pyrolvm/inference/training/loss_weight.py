"""The weight w of a loss, from the data: exp(-w loss) has no scale of its own (Wu and Martin 2023 compare the ways).

information: the weight at which the belief holds as much Fisher information as the loss-likelihood bootstrap,

    w = tr(J I^-1 J) / tr(J),    J = mean Hessian of the loss,  I = mean outer product of its gradients,

both at the minimiser of the total loss (Lyddon, Holmes and Walker 2019, section 3). It needs a loss with second
derivatives, and is 1 where the loss is -log p of the right model.

coverage: the weight at which regions of the belief have their nominal coverage under resampling of the rows
(Syring and Martin 2019): for bootstrap samples b, the share of regions C_w(x_b) that hold the centre of the
belief from the data themselves. Coverage falls as w grows; the weight is found by bisection on log w, with the
same samples at each w (their algorithm 1 uses stochastic approximation).

S. P. Lyddon, C. C. Holmes and S. G. Walker, "General Bayesian updating and the loss-likelihood bootstrap",
Biometrika 106, 2019.
N. Syring and R. Martin, "Calibrating general posterior credible regions", Biometrika 106, 2019.
P.-S. Wu and R. Martin, "A comparison of learning rate selection methods in generalized Bayesian inference",
Bayesian Analysis 18, 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyrolvm.data.arrays import as_batch
from pyrolvm.data.batch import Batch
from pyrolvm.errors import ProgramError, SettingError, count, one_of
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import contract_of
from pyrolvm.inference.program.structure import LOSS, sample_sites
from pyrolvm.inference.training.fit import fit
from pyrolvm.progress import progress_bar
from pyrolvm.seeds import Purpose, derived_seed

WEIGHT = "loss_weight"
METHODS = ("information", "coverage")
FITTING = {"guide": "AutoMultivariateNormal", "num_steps": 1000}
REACH = 4.0
"""The factor by which a bracket of the weight is widened."""


@dataclass(frozen=True)
class LossWeight:
    """A calibrated weight.

    Attributes
    ----------
    weight : float
        w, in units of 1 / loss.
    method : str
    table : DataFrame
        Of "coverage": the weights tried and the coverage of each, with its standard error; else empty.
    """

    weight: float
    method: str
    table: pd.DataFrame


def calibrate_loss(
    model: Any,
    data: Any,
    method: str = "information",
    *,
    level: float = 0.9,
    num_bootstrap: int = 50,
    num_rounds: int = 6,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> LossWeight:
    """The weight of a loss that the data support, for a program whose latents are all global.

    Parameters
    ----------
    model : GeneralisedBayes
    data : tensor, array, DataFrame or Dataset, or a tuple or dict of them
        As for `fit`.
    method : {"information", "coverage"}
        "information" for losses with second derivatives, at once; "coverage" for any, by
        (num_bootstrap + 1) * (num_rounds + 2) fits or so.
    level : float
        The nominal coverage, between 0 and 1.
    num_bootstrap, num_rounds : int
        Samples of the rows, and halvings of the bracket.
    **options
        Of the fits; guide="AutoMultivariateNormal", num_steps=1000 and a falling learning rate by default.

    Raises
    ------
    SettingError
        An unknown method or a level outside (0, 1); a loss without curvature under "information"; no weight with that
        coverage.
    ProgramError
        The program has no loss, or latents of each row.
    """
    one_of("method", method, METHODS)
    if not 0 < level < 1:
        raise SettingError(f"level={level} is a probability: between 0 and 1, e.g. level=0.9")
    if "controls" in options:
        raise SettingError("the controls of the fits are set here: leave controls out")
    settings = {**FITTING, "learning_rate": _falling, "seed": seed, "progress": False, **options}
    batch = as_batch(data, torch.get_default_dtype(), torch.device("cpu"))
    batch.check_rows()

    def fitted_to(part: Any, weight: float) -> FittedModel:
        # as a function of the share, which takes no new compilation for a new number
        return fit(model, part, controls={WEIGHT: lambda share: weight}, **settings)

    own = contract_of(model)
    start = 1.0 if own is None else float(own.controls().get(WEIGHT, 1.0))
    if method == "information":
        return LossWeight(_by_information(fitted_to(data, start), data, start), method, pd.DataFrame())
    count("num_bootstrap", num_bootstrap, 2)
    count("num_rounds", num_rounds)
    generator = torch.Generator().manual_seed(derived_seed(seed, Purpose.PLAN))
    size = batch.num_rows
    rows = [torch.randint(size, (size,), generator=generator) for _ in range(num_bootstrap)]
    samples = [_as_given(batch.take(r)) for r in rows]
    total = (num_rounds + 2) * num_bootstrap
    with progress_bar("coverage", total, enabled=progress) as bar:

        def coverage(weight: float) -> float:
            centre, held = _draws(fitted_to(data, weight), data).mean(0), 0
            for sample in samples:
                held += _holds(_draws(fitted_to(sample, weight), sample), centre, level)
                bar.update(1)
            return held / len(samples)

        weight, tried = _bisect(coverage, start, level, num_rounds)
    table = pd.DataFrame(tried, columns=["weight", "coverage"]).sort_values("weight", ignore_index=True)
    table["standard_error"] = (table["coverage"] * (1 - table["coverage"]) / num_bootstrap) ** 0.5
    return LossWeight(weight, method, table)


def _falling(share: float) -> float:
    return 0.05 * (1.0 - share) + 1e-4


def _as_given(batch: Batch) -> Any:
    """The arguments of a batch as `fit` takes them."""
    if batch.kwargs:
        return dict(batch.kwargs)
    return batch.args if len(batch.args) > 1 else batch.args[0]


def _check(fitted: FittedModel) -> None:
    if not any(s.kind == "factor" for s in fitted.structure.sites) or WEIGHT not in fitted.program.controls:
        raise ProgramError("the program has no loss to weigh: wrap it, GeneralisedBayes(program, loss=...)")
    if fitted.structure.local_latents:
        raise ProgramError(
            f"'{fitted.structure.local_latents[0].name}' has a value for each row, and a weight is calibrated for "
            "latents that all rows share: choose the weight yourself"
        )


# ------------------------------------------------------------------ information


def _by_information(fitted: FittedModel, data: Any, weight: float) -> float:
    """tr(J I^-1 J) / tr(J) at the minimiser of the total loss."""
    _check(fitted)
    pair = fitted.pair(data)
    losses, start = _loss_function(pair, weight)
    with torch.enable_grad():
        z = _minimiser(losses, start)
        J, information = _curvature(losses, z), _information(losses, z)
    smallest = torch.linalg.eigvalsh(J).min()
    if not smallest > 1e-8 * J.diagonal().abs().max().clamp(min=1e-30):
        raise SettingError(
            "the loss has no curvature at its minimum (an absolute value, say, or two latents with one meaning), so "
            'that its information is not defined: use method="coverage"'
        )
    return float((J @ torch.linalg.solve(information, J)).trace() / J.trace())


def _loss_function(pair: Pair, weight: float) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(flat unconstrained latents [P] -> loss [rows], where to start: the guide's means)."""
    names = [s.name for s in pair.structure.global_latents]
    means = pair.means()
    with torch.no_grad():
        nodes: dict[str, Any] = pair.model(given=means).nodes
    maps = {n: biject_to(nodes[n]["fn"].support) for n in names}
    free = {n: maps[n].inv(means[n]) for n in names}
    sizes = [free[n].numel() for n in names]

    def losses(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), strict=True)
        given = {n: maps[n](part.reshape(free[n].shape).to(free[n].dtype)) for n, part in parts}
        trace = pair.model(given=given)
        return -pair.log_prob(trace, lambda s: bool(s["infer"].get(LOSS)))[0] / weight

    return losses, torch.cat([free[n].reshape(-1) for n in names]).double()


def _minimiser(losses: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    z = start.detach().clone().requires_grad_()
    search = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        total = losses(z).mean()
        total.backward()
        return total

    search.step(closure)
    return z


def _curvature(losses: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """J: the Hessian [P, P] of the mean loss."""
    (gradient,) = torch.autograd.grad(losses(z).mean(), z, create_graph=True)
    if not gradient.requires_grad:
        return torch.zeros(len(z), len(z), dtype=z.dtype)
    rows = [torch.autograd.grad(g, z, retain_graph=True, materialize_grads=True)[0] for g in gradient]
    return torch.stack(rows)


def _information(losses: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """I: the mean outer product [P, P] of the gradients of the rows' losses."""
    found = losses(z)
    ones = torch.ones_like(found, requires_grad=True)
    (gradient,) = torch.autograd.grad(found @ ones, z, create_graph=True)
    # the gradient is linear in `ones`: its derivatives are the rows' own gradients
    by_row = torch.stack([torch.autograd.grad(g, ones, retain_graph=True)[0] for g in gradient])  # [P, rows]
    return by_row @ by_row.mT / by_row.shape[1]


# ------------------------------------------------------------------ coverage


def _draws(fitted: FittedModel, data: Any, num_draws: int = 1000) -> Tensor:
    """Draws [num_draws, P] of the belief, unconstrained."""
    _check(fitted)
    pair, values = fitted.pair(data), fitted.posterior(data, num_draws)
    sites = {s["name"]: s["fn"] for s in sample_sites(pair.model(given=pair.means()))}
    free = [biject_to(sites[n].support).inv(v).reshape(num_draws, -1) for n, v in values.items()]
    return torch.cat(free, -1).double()


def _holds(draws: Tensor, point: Tensor, level: float) -> bool:
    """Whether the ellipsoid around the mean that holds a share `level` of the draws also holds `point`."""
    mean, covariance = draws.mean(0), torch.cov(draws.T).reshape(draws.shape[1], draws.shape[1])
    root = torch.linalg.cholesky(covariance)

    def distance(z: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root, (z - mean).mT, upper=False).square().sum(0)

    return bool(distance(point[None])[0] <= distance(draws).quantile(level))


def _bisect(
    coverage: Callable[[float], float], start: float, level: float, num_rounds: int
) -> tuple[float, list[tuple[float, float]]]:
    """The weight at which the coverage, which falls with it, crosses `level`; and all that were tried."""
    tried = [(start, coverage(start))]
    factor = REACH if tried[0][1] > level else 1 / REACH
    while (tried[-1][1] > level) == (factor > 1):
        if len(tried) > 2 + num_rounds:
            raise SettingError(
                f"no weight between {start:.3g} and {tried[-1][0]:.3g} has a coverage of {level}: it is "
                f"{tried[-1][1]:.3g} at the last; start elsewhere, GeneralisedBayes(..., weight=...), or take more rows"
            )
        weight = tried[-1][0] * factor
        tried.append((weight, coverage(weight)))
    low, high = sorted(w for w, _ in tried[-2:])
    for _ in range(num_rounds):
        middle = (low * high) ** 0.5
        tried.append((middle, coverage(middle)))
        low, high = (middle, high) if tried[-1][1] > level else (low, middle)
    return (low * high) ** 0.5, tried
