"""k-hat of a guide: one per datum for the latents of each datum, one for the latents shared by all.

Importance weights w = p(x, z) / q(z | x) have a heavy tail where the guide is too narrow or looks in the
wrong place (Yao et al. 2018, "Yes, but did it work?"; Vehtari et al. 2024, JMLR 25(72)). The weight of the
latents of a whole data set is a product over the data: its k-hat grows with their number, whatever the guide.
It is computed only where the guide draws all latents jointly, so that no other weight is defined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.data.arrays import Batch
from pyrolvm.diagnostics.measures import (
    Measure,
    Report,
    compared,
    joint_draws,
    local_sites,
    measure_seed,
    noise,
)
from pyrolvm.errors import count
from pyrolvm.inference.posterior.evidence import StreamingLogMeanExp, khat_threshold, pareto_khat
from pyrolvm.inference.posterior.evidence.importance import streams_of_weights
from pyrolvm.inference.posterior.evidence.psis import tail_length
from pyrolvm.inference.posterior.evidence.streams import LargestWeights, StreamingBound
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.pair import Pair, Values
from pyrolvm.inference.program.structure import Structure, sample_sites
from pyrolvm.progress import PATIENCE, Bar, progress_bar

LEAST_DRAWS = 25
WORST = 5
NOISE_LIMIT = 0.5
"""Largest standard error, in nats, of a global latent's log-weight whose tail still is its own."""


@dataclass(frozen=True, repr=False)
class LocalTails(Report):
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
    def threshold(self) -> float:
        """min(1 - 1 / log10 num_samples, 0.7): k-hat should be at most this."""
        return khat_threshold(self.num_samples)

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
            return [
                f"k-hat is at most {limit}, {about}, for every datum (largest {values[0]}): the guide is close to "
                "each posterior."
            ]
        shown = list(zip(worst.index, values, strict=True))[: self.num_above]
        rows = ", ".join(f"{row} ({value})" for row, value in shown)
        return [
            f"k-hat is above {limit}, {about}, for {self.num_above} of {len(k)} data, most for rows {rows}: there the "
            "approximation is poor or the model is wrong for these data, and k-hat alone cannot tell which; "
            "estimates of their log p(x) by importance sampling are not to be trusted."
        ]


@dataclass(frozen=True, repr=False)
class GlobalTail(Report):
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
    def threshold(self) -> float:
        """min(1 - 1 / log10 num_samples, 0.7): k-hat should be at most this."""
        return khat_threshold(self.num_samples)

    @property
    def sentences(self) -> list[str]:
        """The findings in plain words; none without such latents."""
        if not self.names:
            return []
        names = f"the latents {'of all data together' if self.joint else 'shared by all data'} ({', '.join(self.names)})"
        if self.k_hat is None:
            return [f"There is no k-hat for {names}: {self.reason}."]
        if self.k_hat == -math.inf:
            return [f"For {names} the guide is the posterior."]
        [value], limit = compared([self.k_hat], self.threshold)
        if self.k_hat <= self.threshold:
            return [f"For {names} k-hat is {value}, at most {limit}: the guide is close to their posterior."]
        words = f"For {names} k-hat is {value}, above {limit}: the approximation is poor or the model is wrong"
        if self.joint:
            words += ", or there are many data (k-hat of a product of weights grows with their number)"
        return [
            f"{words}; a guide with correlations (AutoMultivariateNormal) or a comparison with NUTS tells which."
        ]


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
    pair, tables = _Held.at_means(fitted.pair(x)), []
    stream = measure_seed(seed, Measure.LOCAL_KHAT)
    for like, parts in streams_of_weights(pair, "importance", num_samples, stream, progress=progress):
        weights, bound = StreamingLogMeanExp.empty(like), StreamingBound.empty(like, 1)
        tail = LargestWeights(tail_length(num_samples) + 1)
        for log_weight in parts:
            for total in (weights, bound, tail):
                total.add(log_weight)
        columns = {
            "k_hat": tail.k_hat(num_samples),
            "effective_sample_size": weights.effective_sample_size,
            "log_evidence": weights.value,
            "standard_error": weights.standard_error,
            "elbo": bound.value,
        }
        tables.append(pd.DataFrame({k: v.double().cpu().numpy() for k, v in columns.items()}))
    return pd.concat(tables, ignore_index=True).rename_axis("row")


class _Held(Pair):
    """A pair whose global latents are given."""

    values: Values

    @classmethod
    def at_means(cls, pair: Pair) -> _Held:
        """The global latents at the guide's means."""
        return cls._of(pair, pair.held_means())

    @classmethod
    def _of(cls, pair: Pair, values: Values) -> _Held:
        held = cls(pair.program, pair.structure, pair.batch, pair.mode)
        held.values = values
        return held

    def guide(self, num_draws: int | None = None, *handlers: Any, given: Values | None = None) -> Trace:
        return super().guide(num_draws, *handlers, given={**self.values, **(given or {})})

    def on(self, batch: Batch) -> _Held:
        return self._of(super().on(batch), self.values)


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
    reason = _why_not(fitted, pair, names)
    if reason:
        return GlobalTail(None, names, reason, num_samples, joint)
    chunks = [pair] if joint else list(pair.chunks(num_samples))
    inner = num_inner if structure.local_latents and not joint else 1
    totals, variances = [], []
    bars = progress_bar("k-hat, shared latents", num_samples, enabled=progress, unit="draws", after=PATIENCE)
    with bars as bar, noise(pair, seed, Measure.SHARED_KHAT):
        for model, guide, draws in joint_draws(chunks[0], num_samples):
            total = _outside(pair, model) - _outside(pair, guide)
            if joint:
                parts = [(_inside(pair, model) - _inside(pair, guide)).sum(1), torch.zeros_like(total)]
                bar.advance(draws)
            else:
                parts = _integrated(chunks, _held(pair, guide), draws, inner, bar)
            totals.append(total + parts[0])
            variances.append(parts[1])
    error = float(torch.cat(variances).mean().sqrt())
    if error > NOISE_LIMIT:
        found = f"integrating out the latents of each datum leaves {error:.1f} nats of noise in the weights"
        reason = f"{found}: raise num_inner, or improve the guide of each datum"
        return GlobalTail(None, names, reason, num_samples)
    return GlobalTail(float(pareto_khat(torch.cat(totals).unsqueeze(1))), names, "", num_samples, joint)


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
    if pair.batch.num_rows != fitted.num_rows:
        given = f"{pair.batch.num_rows} were given"
        return f"their posterior is that of all {fitted.num_rows} training rows, and {given}"
    if all(s.point for s in structure.latents if s.name in names):
        return "the guide holds them at points, which makes it a point estimate"
    points = [s.name for s in structure.local_latents if s.point]
    return f"the guide holds '{points[0]}' of each datum at a point" if points else ""


def _outside(pair: Pair, trace: Trace) -> Tensor:
    """Log-density of what stands outside the data plate: [draws]."""
    return pair.log_prob(trace, lambda s: not pair.is_local(s))[:, 0]


def _inside(pair: Pair, trace: Trace) -> Tensor:
    """Log-density of what stands inside the data plate: [draws, rows]."""
    return pair.log_prob(trace, pair.is_local)


def _held(pair: Pair, guide: Trace) -> Values:
    return {s["name"]: s["value"] for s in sample_sites(guide) if not pair.is_local(s)}


def _integrated(chunks: list[Pair], held: Values, draws: int, num_inner: int, bar: Bar) -> list[Tensor]:
    """log p(x | g) of each draw of g, [draws], and the variance [draws] of its estimate.

    The latents of each datum are integrated out by `num_inner` draws of the guide for each datum and g.
    """
    total: Any = 0.0
    variance: Any = 0.0
    for chunk in chunks:
        found = []
        for _ in range(num_inner):
            model, guide = chunk.draw(draws if chunk.vectorized else None, held)
            found.append((_inside(chunk, model) - _inside(chunk, guide)).expand(draws, -1))
            bar.advance(draws / (num_inner * len(chunks)))
        inner = torch.stack(found)  # [inner, draws, rows]
        total = total + (inner.logsumexp(0) - math.log(num_inner)).sum(1)
        weight = (inner - inner.logsumexp(0)).exp()  # summing to one
        variance = variance + (weight.square().sum(0) - 1 / num_inner).clamp_min(0).sum(1)
    return [total, variance]
