"""Whether the guide is right on data that the model itself made.

Simulation-based calibration (Talts et al. 2018, "Validating Bayesian inference algorithms with
simulation-based calibration"): for (z, x) ~ p(z, x) and draws z_1, ..., z_S from the exact posterior
p(z | x), the rank of z among the draws is uniform on 0, ..., S. Of a guide's draws the ranks also show how it
is wrong: low or high for a shift, at both ends for a guide that is too narrow, in the middle for too wide.

VSBC (Yao et al. 2018, "Yes, but did it work?", section 3.2) asks less of a guide, that its marginals are not
shifted on average: the probabilities

    p_j = Pr(z_s < z | x_j),    z_s ~ q(z | x_j),

are then symmetric around 1/2, whether or not the guide is too narrow.

Latents of each datum need one simulation of many rows, and no refit. Latents shared by all data need a
refit for every simulated data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import binom

from pyrolvm.diagnostics.measures import Measure, Report, measure_seed
from pyrolvm.diagnostics.simulated import Arrays, simulations
from pyrolvm.diagnostics.uniformity import ecdf_band, p_values
from pyrolvm.errors import ProgramError, SettingError, count
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.training.many import run_all
from pyrolvm.progress import watched

SIMULATIONS, REFITS = 1000, 100
SHOWN = 8


@dataclass(frozen=True, repr=False)
class Calibration(Report):
    """Ranks of true latents among the guide's draws, over R simulations.

    Attributes
    ----------
    ranks : DataFrame
        Whole numbers [R, quantities], 0 to num_samples.
    uniforms : DataFrame
        (rank + U) / (num_samples + 1), U uniform: uniform on [0, 1] if the guide is exact.
    num_samples : int
        Draws of the guide per simulation.
    alpha : float
        The level of `table`'s verdicts, all quantities and tests together (Bonferroni).
    """

    ranks: pd.DataFrame
    uniforms: pd.DataFrame
    num_samples: int
    alpha: float = 0.05

    @property
    def probabilities(self) -> pd.DataFrame:
        """VSBC's p_j = Pr(z_s < z): [R, quantities]."""
        return self.ranks / self.num_samples

    @property
    def table(self) -> pd.DataFrame:
        """One row per quantity: p-values of uniformity and symmetry, and what the ranks look like.

        `kolmogorov_p`, `chi_square_p`: uniform ranks; `symmetry_p`: no shift (VSBC). `mean` is 0.5 and `spread`
        (sd over that of a uniform) is 1 for an exact guide: above 1 it is too narrow, below 1 too wide.
        `verdict`: "calibrated", "shifted", "too narrow", "too wide" or "not uniform".
        """
        rows = {name: self._row(u.to_numpy()) for name, u in self.uniforms.items()}
        return pd.DataFrame.from_dict(rows, orient="index")

    def _row(self, u: np.ndarray) -> dict[str, Any]:
        # half of a quantity's level for uniformity, shared by two tests, and half for symmetry
        symmetry = self.alpha / max(self.ranks.shape[1], 1) / 2
        p = p_values(u)
        spread = float(u.std() * np.sqrt(12))
        uniform = min(p["kolmogorov_p"], p["chi_square_p"]) >= symmetry / 2
        verdict = "calibrated" if uniform else "not uniform"
        if p["symmetry_p"] < symmetry:
            verdict = "shifted"
        elif not uniform and abs(spread - 1) > 2 / np.sqrt(len(u)):
            verdict = "too narrow" if spread > 1 else "too wide"
        return {**p, "mean": float(u.mean()), "spread": spread, "verdict": verdict}

    @property
    def passed(self) -> bool:
        """Whether no quantity shows that the guide is wrong."""
        return bool((self.table["verdict"] == "calibrated").all())

    def histogram(self, quantity: Any, bins: int = 20) -> pd.DataFrame:
        """Ranks in bins of equal width: `count`, and the `lower`, `upper` that 95 % of exact ones lie in."""
        u = self.uniforms[quantity].to_numpy()
        counts, edges = np.histogram(u, bins=bins, range=(0, 1))
        lower, upper = binom.ppf([0.025, 0.975], len(u), 1 / bins)
        index = pd.Index(edges[:-1] * (self.num_samples + 1), name="rank")
        return pd.DataFrame({"count": counts, "lower": lower, "upper": upper}, index=index)

    def ecdf(self, quantity: Any, level: float = 0.95, points: int = 100) -> pd.DataFrame:
        """`difference` of the ranks' distribution function and the uniform's, with a band for all points at once.

        An exact guide leaves the band anywhere in 1 - `level` of such plots (Säilynoja et al. 2022).
        """
        u = np.sort(self.uniforms[quantity].to_numpy())
        z = np.arange(1, points) / points
        lower, upper = ecdf_band(len(u), points, level)
        share = np.searchsorted(u, z, side="right") / len(u)
        columns = {"difference": share - z, "lower": lower - z, "upper": upper - z}
        return pd.DataFrame(columns, index=pd.Index(z, name="uniform"))

    @property
    def sentences(self) -> list[str]:
        """The findings in plain words."""
        verdicts = self.table["verdict"]
        wrong = verdicts[verdicts != "calibrated"]
        about = f"{len(self.ranks)} simulations, {self.num_samples} draws each"
        if not len(wrong):
            return [f"The guide is calibrated on data of the model itself ({about})."]
        found = ", ".join(f"{name} {verdict}" for name, verdict in wrong.head(SHOWN).items())
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        return [f"The guide is wrong on data of the model itself ({about}): {found}{more}."]

    @property
    def shown(self) -> str:
        """The quantities."""
        return self.table.to_string(float_format="{:z.3f}".format)


def calibration_of(truth: Arrays, draws: Arrays, *, seed: int = 0, alpha: float = 0.05) -> Calibration:
    """Calibration from arrays: truth, name -> [R, ...]; draws, name -> [S, R, ...]. Ties are broken at random.

    Raises `SettingError` if the shapes do not fit.
    """
    rng = np.random.default_rng(seed)
    ranks, num_samples = {}, 0
    for name, true in truth.items():
        z = draws[name]
        if z.shape[1:] != true.shape:
            wanted = f"[num_samples, *{list(true.shape)}] wanted"
            raise SettingError(f"draws of '{name}' are {list(z.shape)}: {wanted}")
        num_samples, below, ties = len(z), (z < true).sum(0), (z == true).sum(0)
        rank = (below + rng.integers(0, ties + 1)).reshape(len(true), -1)
        labels = [name] if true.ndim == 1 else [f"{name}[{d}]" for d in range(rank.shape[1])]
        ranks.update(dict(zip(labels, rank.T, strict=True)))
    table = pd.DataFrame(ranks)
    uniforms = (table + rng.random(table.shape)) / (num_samples + 1)
    return Calibration(table, uniforms, num_samples, alpha)


@torch.no_grad()
def calibrate(
    fitted: FittedModel,
    x: Any = None,
    *,
    num_simulations: int | None = None,
    num_samples: int = 200,
    refit: Callable[[Any], FittedModel] | None = None,
    map: Callable[..., Iterable[Any]] | None = None,
    sites: list[str] | None = None,
    rebuild: Callable[[Any, dict[str, torch.Tensor]], Any] | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Simulate (z, x) from the fitted model and rank the true z among the guide's draws.

    Without `refit`: the local latents of an amortised guide, `num_simulations` (1000) rows in one go.
    With it: the latents shared by all data, over `num_simulations` (100) data sets shaped like `x`, each
    fitted anew. `refit` takes simulated data, as `fit` would, and returns a `FittedModel`.

    Parameters
    ----------
    x : data as `fit` takes them, optional
        Data whose rows (and covariates) the simulations are shaped by; the fit's own example by default.
    num_samples : int
        Draws of the guide per simulation; ranks run from 0 to it.
    map : callable, optional
        How refits are run, as the built-in `map` takes its arguments; by default through joblib:
        `with joblib.parallel_config(n_jobs=4): calibrate(...)` spreads them over processes.
    sites : list of str, optional
        Latents to rank; all (of the kind) by default.
    rebuild : callable, optional
        (arguments of `x`, simulated observed sites) -> arguments, for a program whose observed values are not
        themselves arguments.
    alpha : float
        Level of the verdicts, all quantities together.

    Raises
    ------
    ProgramError
        The guide is not amortised or a point estimate, or no latent is left to rank.
    SettingError
        The simulated values cannot be put where the data were.
    """
    count("num_samples", num_samples)
    default = SIMULATIONS if refit is None else REFITS
    number = count("num_simulations", default if num_simulations is None else num_simulations)
    names = sites or _ranked(fitted, refit is not None)
    if refit is not None and x is None and fitted.structure.takes_any_rows:
        raise SettingError("refits need data sets of the real size: pass the training data as x")
    pair = fitted.pair(x if x is not None else fitted.example)
    simulated = simulations(pair, number, rebuild, rows=refit is None, seed=_seed(seed, 0))
    if refit is None:
        [simulation] = simulated
        truth = simulation.truth
        draws = _posterior(fitted, names, num_samples, simulation.data, _seed(seed, 1))
    else:
        every = list(simulated)
        # noise of its own for each: common noise would make the ranks depend on each other
        seeds = [_seed(seed, 2, i) for i in range(len(every))]
        ranked, sets = partial(_posterior, refit, names, num_samples), [s.data for s in every]
        results = map(ranked, sets, seeds) if map else run_all(ranked, list(zip(sets, seeds, strict=True)))
        found = list(watched(results, "calibration", len(every), enabled=progress, unit="fits"))
        truth = {n: np.stack([s.truth[n] for s in every]) for n in names}
        draws = {n: np.stack([f[n] for f in found], axis=1) for n in names}
    return calibration_of({n: truth[n] for n in names}, draws, seed=seed, alpha=alpha)


def _seed(seed: int, *index: int) -> int:
    return measure_seed(seed, Measure.CALIBRATION, *index)


def _ranked(fitted: FittedModel, shared: bool) -> list[str]:
    structure = fitted.structure
    kind = structure.global_latents if shared else structure.local_latents
    names = [s.name for s in kind if not s.enumerated or s.in_guide]
    points = [s.name for s in kind if s.point]
    if not shared and structure.global_latents:
        raise ProgramError(
            f"'{structure.global_latents[0].name}' is shared by all data, so that its posterior is another one for "
            "every simulated data set: pass refit=lambda x: pyrolvm.fit(model, x, ...)"
        )
    if not shared and structure.per_datum:
        raise ProgramError(
            f"the guide has parameters for each training row ('{structure.per_datum[0]}') and none for simulated "
            "ones: pass refit=..., or use an amortised guide"
        )
    if points:
        raise ProgramError(
            f"the guide is a point estimate: it holds '{points[0]}' at one value, whose rank has no distribution"
        )
    if not names:
        where = "shared by all data" if shared else "of each datum"
        raise ProgramError(f"the program has no sampled latents {where} to calibrate")
    return names


def _posterior(
    of: FittedModel | Callable[[Any], FittedModel], names: list[str], num_samples: int, data: Any, seed: int
) -> Arrays:
    """Draws of a fit, or of the one that a function makes of the data: site -> [num_samples, rows, ...]."""
    if not isinstance(of, FittedModel):
        with torch.enable_grad():
            of = of(data)
    found = of.draws(data, num_samples, seed=seed).values
    return {n: found[n].detach().cpu().double().numpy() for n in names}
