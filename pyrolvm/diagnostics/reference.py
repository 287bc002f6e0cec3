"""The guide against a Markov chain: NUTS on the same model, its learned parameters frozen.

No-U-turn sampling (Hoffman and Gelman 2014) draws from the posterior itself, if it has converged: R-hat and
the effective sample size of the reference stand in the table, and a bad one is reported as such. Differences
are in units of the reference's standard deviation.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from pyro.poutine.messenger import Messenger
from scipy.stats import wasserstein_distance
from torch import Tensor

from pyrolvm.diagnostics.measures import Measure, Report, measure_seed, noise, table_of
from pyrolvm.errors import ProgramError, SettingError, count
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import refuse_bound, rows_dim, sample_sites
from pyrolvm.inference.training.many import num_workers, run_all
from pyrolvm.progress import PATIENCE, Bar, progress_bar

QUANTILES = (0.05, 0.95)
R_HAT_LIMIT = 1.05
LEAST_SAMPLES = 100
LEAST_DRAWS = 10


@dataclass(frozen=True, repr=False)
class ReferenceComparison(Report):
    """The guide's posterior beside the reference's.

    Attributes
    ----------
    table : DataFrame
        One row per (site, element): `mean`, `sd` of the guide, `reference_mean`, `reference_sd`; in units of the
        reference's sd `mean_difference`, `q5_difference`, `q95_difference`, `wasserstein`; `sd_ratio` (below 1: the
        guide is too narrow); `r_hat` and `effective_sample_size` of the reference; `noise`, the standard error that
        the mean difference has of the two sets of draws.
    draws : dict
        Site -> [chains * draws, ...] of the reference.
    num_divergent : int
        Divergent transitions.
    """

    shows = "table"
    table: pd.DataFrame
    draws: dict[str, Tensor]
    num_divergent: int

    @property
    def trustworthy(self) -> bool:
        """Whether the reference converged: R-hat below 1.05, effective sample size above 100, no divergence."""
        worst, least = self.table["r_hat"].max(), self.table["effective_sample_size"].min()
        return bool(worst < R_HAT_LIMIT and least > LEAST_SAMPLES and self.num_divergent == 0)

    @property
    def sites(self) -> pd.DataFrame:
        """One row per site: means of the absolute differences over its elements, and the mean sd ratio."""
        columns = ["mean_difference", "q5_difference", "q95_difference", "wasserstein"]
        table = self.table[columns].abs().assign(sd_ratio=self.table["sd_ratio"])
        return table.groupby(level="site", sort=False).mean()

    @property
    def sentences(self) -> list[str]:
        """The findings in plain words."""
        if not self.trustworthy:
            return [
                f"The reference itself is not to be trusted: largest R-hat {self.table['r_hat'].max():.2f}, smallest "
                f"effective sample size {self.table['effective_sample_size'].min():.0f}, {self.num_divergent} "
                "divergent transitions; give it more warm-up and draws before judging the guide by it."
            ]
        site, element = list(self.table.index)[int(self.table["wasserstein"].argmax())]
        parts = [
            f"{name}: means off by {row['mean_difference']:.2f} sd on average, sd {row['sd_ratio']:.2f} times right"
            for name, row in self.sites.iterrows()
        ]
        farthest = f"{site}[{element}] (Wasserstein {self.table['wasserstein'].max():.2f} sd)"
        return [f"Against NUTS, {'; '.join(parts)}; farthest is {farthest}."]


def compare_with_nuts(
    fitted: FittedModel,
    x: Any,
    num_samples: int = 500,
    warmup_steps: int = 300,
    num_chains: int = 2,
    *,
    num_guide_samples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> ReferenceComparison:
    """Draw from p(z | x) of the fitted model by NUTS, and compare the guide's draws with it.

    Learned parameters stay as they are; enumerated latents are summed out. Generators and Pyro's global
    state are left as found.

    Parameters
    ----------
    x : data as `fit` takes them
        A few rows where all latents are of each datum; the training data whole where some are shared by all.
    num_samples, warmup_steps : int
        Of each of `num_chains` chains, run through joblib (`joblib.parallel_config`); ten draws at least.
    num_guide_samples : int
        Draws of the guide.

    Raises
    ------
    ProgramError
        There are latents that NUTS cannot draw.
    SettingError
        Too few draws or, with shared latents, other rows than the training data's.
    """
    pair = fitted.pair(x)
    names = _check(fitted, pair, num_samples, num_chains)
    total = num_chains * (num_samples + warmup_steps)
    with progress_bar("NUTS", total, enabled=progress, unit="draws", after=PATIENCE) as bar:
        lengths = (num_samples, warmup_steps, num_chains)
        chains, divergent = _chains(pair, names, lengths, seed, bar)
    guide = fitted.draws(pair.batch, num_guide_samples, seed=measure_seed(seed, Measure.REFERENCE, 1)).values
    table = pd.concat([_compare(name, guide[name], chains[name]) for name in names])
    return ReferenceComparison(table, {n: v.flatten(0, 1) for n, v in chains.items()}, divergent)


def _check(fitted: FittedModel, pair: Pair, num_samples: int, num_chains: int) -> list[str]:
    structure = fitted.structure
    count("num_samples", num_samples, LEAST_DRAWS)
    count("num_chains", num_chains)
    if structure.global_latents and not fitted.is_whole(pair):
        raise SettingError(
            f"'{structure.global_latents[0].name}' is shared by all data, so that the guide's posterior is that of "
            f"all {fitted.num_rows} training rows: pass these, not {pair.num_rows} others"
        )
    refuse_bound(structure, "NUTS")
    latents = [s for s in structure.latents if not s.enumerated]
    discrete = [s.name for s in structure.latents if s.discrete and (not s.enumerated or s.in_guide)]
    if discrete or not latents:
        what = f"'{discrete[0]}' is discrete" if discrete else "there are no latents"
        raise ProgramError(f"NUTS draws real latents and {what}: enumerate it in the model, or omit NUTS")
    return [s.name for s in latents]


def _chains(
    pair: Pair, names: list[str], lengths: tuple[int, int, int], seed: int, bar: Bar
) -> tuple[dict[str, Tensor], int]:
    """site -> [chains, draws, ...], and the number of divergent transitions; lengths: draws, warm-up, chains."""
    num_samples, warmup_steps, num_chains = lengths
    with noise(pair, seed, Measure.REFERENCE, 0):
        model, nodes = _unscaled(pair), dict[str, Any](pair.model().nodes)
    here = num_workers() == 1  # a bar does not reach another process
    hook = (lambda *_: bar.advance()) if here else None
    calls = [(pair, model, num_samples, warmup_steps, seed, chain, hook) for chain in range(num_chains)]
    found, divergent = [], 0
    for draws, number in run_all(_chain, calls):
        bar.advance(0 if here else num_samples + warmup_steps)
        found.append(draws)
        divergent += number
    return {n: _rows_first(pair, nodes[n], torch.stack([f[n] for f in found])) for n in names}, divergent


def _rows_first(pair: Pair, site: Any, value: Tensor) -> Tensor:
    """[chains, draws, ...] of a site with the rows before its other plates, as the guide's draws have them."""
    rows = rows_dim(site, pair.structure.data_plate)
    return value if rows is None else value.movedim(rows - len(site["fn"].event_shape), 2)


def _chain(
    pair: Pair, model: Any, num_samples: int, warmup_steps: int, seed: int, chain: int, hook: Any
) -> tuple[dict[str, Tensor], int]:
    """site -> [draws, ...] of one chain, and its divergent transitions."""
    scope = pair.program.scope(pair.batch, pair.mode)
    with scope, noise(pair, seed, Measure.REFERENCE, 2 + chain), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel = NUTS(model, max_plate_nesting=pair.structure.max_plate_nesting)
        mcmc = MCMC(kernel, num_samples, warmup_steps, disable_progbar=True, hook_fn=hook)
        mcmc.run(*pair.batch.args, **pair.batch.kwargs)
        divergent = sum(len(v) for v in mcmc.diagnostics().get("divergences", {}).values())
        return {n: v.detach() for n, v in mcmc.get_samples().items()}, divergent


class _EachOnce(Messenger):
    """No site is scaled."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["scale"] = 1.0


def _unscaled(pair: Pair) -> Any:
    """The model of these rows alone: scaled to N rows, the likelihood of each would count several times.

    Nor does a scale around the whole program change its posterior.
    """
    if pair.structure.weighted:
        return _EachOnce()(pair.program.model)
    plate = pair.structure.data_plate
    frames = (
        f for s in sample_sites(pair.model()) for f in s["cond_indep_stack"] if plate and f.name == plate.name
    )
    frame = next(frames, None)
    if frame is None or frame.size == frame.full_size:
        return pair.program.model
    return poutine.scale(pair.program.model, scale=frame.size / frame.full_size)


def _compare(name: str, guide: Tensor, chains: Tensor) -> pd.DataFrame:
    """guide: [draws, ...]; chains: [chains, draws, ...]."""
    q = guide.detach().reshape(len(guide), -1).cpu().double()
    c = chains.reshape(*chains.shape[:2], -1).cpu().double()
    p = c.flatten(0, 1)
    sd, ess = p.std(0), effective_sample_size(c, 0, 1)
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    low, high = (q.quantile(levels, dim=0) - p.quantile(levels, dim=0)) / sd
    distance = [wasserstein_distance(a, b) for a, b in zip(q.T.numpy(), p.T.numpy(), strict=True)]
    noise = (q.var(0) / len(q) + p.var(0) / ess).sqrt() / sd
    columns = {
        "mean": q.mean(0),
        "sd": q.std(0),
        "reference_mean": p.mean(0),
        "reference_sd": sd,
        "mean_difference": (q.mean(0) - p.mean(0)) / sd,
        "noise": noise,
        "sd_ratio": q.std(0) / sd,
        "q5_difference": low,
        "q95_difference": high,
        "wasserstein": torch.tensor(np.array(distance)) / sd,
        "r_hat": split_gelman_rubin(c, 0, 1),
        "effective_sample_size": ess,
    }
    return table_of(columns, name)
