"""k-hat of a guide: one per datum for the latents of each datum, one for the latents shared by all.

Importance weights w = p(x, z) / q(z | x) have a heavy tail where the guide is too narrow or looks in the
wrong place (Yao et al. 2018, "Yes, but did it work?"; Vehtari et al. 2024, JMLR 25(72)). The weight of the
latents of a whole data set is a product over the data: its k-hat grows with their number, whatever the guide.
It is computed only where the guide draws all latents jointly, so that no other weight is defined.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.data.batch import Batch
from pyrolvm.diagnostics.measures import (
    KhatReport,
    Measure,
    compared,
    local_sites,
    measure_seed,
    noise,
)
from pyrolvm.errors import count
from pyrolvm.inference.posterior.evidence import evidence_table, pareto_khat
from pyrolvm.inference.posterior.evidence.chunks import joint_draws
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.pair import Pair, Values
from pyrolvm.inference.program.structure import Structure, sample_sites
from pyrolvm.progress import PATIENCE, Bar, progress_bar

LEAST_DRAWS = 25
WORST = 5
NOISE_LIMIT = 0.5
"""Largest standard error, in nats, of a global latent's log-weight whose tail still is its own."""


@dataclass(frozen=True, repr=False)
class LocalTails(KhatReport):
    """k-hat of every datum.

    Attributes
    ----------
    table : DataFrame
        As `local_khat` returns it.
    num_samples : int
        Draws per datum.
    """

    table: pd.DataFrame
    num_samples: int

    @property
    def num_above(self) -> int:
        """Data whose k-hat is above the threshold, or undefined."""
        return int((~(self.table["k_hat"] <= self.threshold)).sum())

    @property
    def worst(self) -> pd.DataFrame:
        """The data of largest k-hat, largest first."""
        return self.table.sort_values("k_hat", ascending=False).head(WORST)

    @property
    def sentences(self) -> list[str]:
        """The findings in plain words."""
        k, worst = self.table["k_hat"], self.worst["k_hat"]
        if bool((k == -math.inf).all()):
            return ["The importance weights of every datum are all the same: the guide is the posterior."]
        values, limit = compared(list(worst), self.threshold)
        about = f"the limit for {self.num_samples} draws"
        if not self.num_above:
            words = f"k-hat is at most {limit}, {about}, for every datum (largest {values[0]})"
            return [f"{words}: the guide is close to each posterior."]
        each = [f"{row} ({value})" for row, value in zip(worst.index, values, strict=True)]
        words = f"k-hat is above {limit}, {about}, for {self.num_above} of {len(k)} data"
        return [
            f"{words}, most for rows {', '.join(each[: self.num_above])}: there the approximation is poor or the model "
            "is wrong for these data, and k-hat alone cannot tell which; estimates of their log p(x) by importance "
            "sampling are not to be trusted."
        ]


@dataclass(frozen=True, repr=False)
class GlobalTail(KhatReport):
    """One k-hat for latents that all data share.

    Attributes
    ----------
    k_hat : float or None
        None with the `reason` why there is none.
    names : tuple of str
        The latents: those shared by all data, or all latents where the guide draws them jointly.
    num_samples : int
        Draws of the guide.
    joint : bool
        Whether the latents of each datum are among them.
    """

    k_hat: float | None
    names: tuple[str, ...] = ()
    reason: str = ""
    num_samples: int = 1000
    joint: bool = False

    @property
    def sentences(self) -> list[str]:
        """The findings in plain words; none without such latents."""
        if not self.names:
            return []
        which = "of all data together" if self.joint else "shared by all data"
        names = f"the latents {which} ({', '.join(self.names)})"
        if self.k_hat is None:
            return [f"There is no k-hat for {names}: {self.reason}."]
        if self.k_hat == -math.inf:
            return [f"For {names} the guide is the posterior."]
        [value], limit = compared([self.k_hat], self.threshold)
        if self.k_hat <= self.threshold:
            return [f"For {names} k-hat is {value}, at most {limit}: the guide is close to their posterior."]
        wrong = "the approximation is poor or the model is wrong"
        what = "a guide with correlations (AutoMultivariateNormal) or a comparison with NUTS"
        if self.joint:
            wrong += ", or there are many latents (k-hat of a product of weights grows with their number)"
            what = "a comparison with NUTS"
        return [f"For {names} k-hat is {value}, above {limit}: {wrong}; {what} tells which."]


@torch.no_grad()
def local_khat(
    fitted: FittedModel, x: Any, num_samples: int = 1000, *, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """k-hat of the latents of each datum, and what else their importance weights show.

    Parameters
    ----------
    fitted : FittedModel
    x : data as `fit` takes them
    num_samples : int
        Draws of the guide per datum, at least 25. Global latents stay at the guide's means.

    Returns
    -------
    DataFrame
        One row per datum: `k_hat` (-inf where all weights are the same), `effective_sample_size`, `log_evidence`
        (the importance estimate, a lower bound on average) with its `standard_error`, and `elbo` (the mean
        log-weight), in nats.

    Raises
    ------
    ProgramError
        The program has no latents of each datum, or some are enumerated or held at a point, or the guide draws those
        of all data at once.
    """
    local_sites(fitted.structure, "k-hat", summed_out=True)
    count("num_samples", num_samples, LEAST_DRAWS)
    pair = fitted.pair(x)
    _ = pair.vectorized  # tried out on the program with nothing given
    held, stream = _Held(pair, pair.held_means()), measure_seed(seed, Measure.LOCAL_KHAT)
    table = evidence_table(held, "importance", num_samples, seed=stream, progress=progress)
    return table[["k_hat", "effective_sample_size", "log_evidence", "standard_error", "elbo"]]


class _Held(Pair):
    """A pair whose global latents are given."""

    def __init__(self, pair: Pair, shared: Values) -> None:
        super().__init__(pair.program, pair.structure, pair.batch, pair.mode)
        self.shared = shared

    def guide(self, num_draws: int | None = None, *handlers: Any, given: Values | None = None) -> Trace:
        return super().guide(num_draws, *handlers, given={**self.shared, **(given or {})})

    def on(self, batch: Batch) -> _Held:
        return _Held(super().on(batch), self.shared)


@torch.no_grad()
def global_khat(
    fitted: FittedModel,
    x: Any,
    num_samples: int = 1000,
    num_inner: int = 100,
    *,
    seed: int = 0,
    progress: bool = True,
) -> GlobalTail:
    """k-hat of the latents shared by all data, given the training data `x` whole.

    The latents of each datum are integrated out of the weight, p(x, g) / q(g), by `num_inner` importance
    draws for each datum and g. Where these leave the weight uncertain by more than half a nat there is no
    k-hat, for its tail would be that of the noise.

    Of a guide that draws the latents of all data and the shared ones jointly (AutoMultivariateNormal), it is the
    k-hat of all of them together, p(x, z, g) / q(z, g).

    Returns
    -------
    GlobalTail
        With the `reason` where there is no k-hat.
    """
    structure, pair = fitted.structure, fitted.pair(x)
    joint = bool(structure.joint_guide and structure.local_latents)
    names = judged_together(structure)
    if reason := _why_not(fitted, pair, names):
        return GlobalTail(None, names, reason, num_samples, joint)
    inner = None if joint else num_inner if structure.local_latents else 1
    bars = progress_bar("k-hat, shared latents", num_samples, enabled=progress, unit="draws", after=PATIENCE)
    with bars as bar, noise(pair, seed, Measure.SHARED_KHAT):
        log_weight, variance = _shared_weights(pair, num_samples, inner, bar)
    error = float(variance.mean().sqrt())
    if error > NOISE_LIMIT:
        reason = (
            f"integrating out the latents of each datum leaves {error:.1f} nats of noise in the weights: raise "
            "num_inner, or improve the guide of each datum"
        )
        return GlobalTail(None, names, reason, num_samples)
    return GlobalTail(float(pareto_khat(log_weight.unsqueeze(1))), names, "", num_samples, joint)


def _shared_weights(pair: Pair, num_samples: int, inner: int | None, bar: Bar) -> tuple[Tensor, Tensor]:
    """log p(x, g) / q(g) [num_samples] and its variance; without `inner` draws of the rest, of all latents together."""
    chunks = [pair] if inner is None else list(pair.chunks(num_samples))
    totals, variances = [], []
    for model, guide, draws in joint_draws(chunks[0], num_samples):
        shared: Any = {s["name"]: s["value"] for s in sample_sites(guide) if not pair.is_local(s)}
        outside = _log_ratio(pair, model, guide, lambda s: not pair.is_local(s))[:, 0]
        if inner is None:
            inside = _log_ratio(pair, model, guide, pair.is_local).sum(1)
            variance = torch.zeros_like(outside)
            bar.advance(draws)
        else:
            inside, variance = _integrated(chunks, shared, draws, inner, bar)
        totals.append(outside + inside)
        variances.append(variance)
    return torch.cat(totals), torch.cat(variances)


def judged_together(structure: Structure) -> tuple[str, ...]:
    """The latents that one weight is of: those shared by all data, or all of a joint guide."""
    latents = structure.latents if structure.joint_guide else structure.global_latents
    return tuple(s.name for s in latents)


def _why_not(fitted: FittedModel, pair: Pair, names: tuple[str, ...]) -> str:
    structure = fitted.structure
    if not names:
        return "no latents are shared by all data"
    if any(s.enumerated and not s.in_guide for s in structure.sites):
        return "some latents are summed out"
    if not fitted.is_whole(pair):
        return f"their posterior is that of {fitted.num_rows} training rows, and the {pair.num_rows} given are others"
    if all(s.point for s in structure.latents if s.name in names):
        return "the guide holds them at points, which makes it a point estimate"
    points = [s.name for s in structure.local_latents if s.point]
    return f"the guide holds '{points[0]}' of each datum at a point" if points else ""


def _log_ratio(pair: Pair, model: Trace, guide: Trace, keep: Callable[[Any], bool]) -> Tensor:
    """log p - log q of the kept sites: [draws, rows]."""
    return pair.log_prob(model, keep) - pair.log_prob(guide, keep)


def _integrated(chunks: list[Pair], held: Values, draws: int, num_inner: int, bar: Bar) -> tuple[Any, Any]:
    """log p(x | g) of each draw of g by `num_inner` draws for each datum, and its variance, [draws] both."""
    total: Any = 0.0
    variance: Any = 0.0
    for chunk in chunks:
        found = []
        for _ in range(num_inner):
            model, guide = chunk.draw(draws if chunk.vectorized else None, held)
            found.append(_log_ratio(chunk, model, guide, chunk.is_local).expand(draws, -1))
            bar.advance(draws / (num_inner * len(chunks)))
        inner = torch.stack(found)  # [inner, draws, rows]
        total = total + (inner.logsumexp(0) - math.log(num_inner)).sum(1)
        weight = (inner - inner.logsumexp(0)).exp()  # summing to one
        variance = variance + (weight.square().sum(0) - 1 / num_inner).clamp_min(0).sum(1)
    return total, variance
