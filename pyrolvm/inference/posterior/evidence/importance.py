"""Importance sampling: from the guide (`importance`, `iwae`) or from the prior (`prior`).

    importance  log (1/S) sum_s w_s,   w_s = p(x, z_s) / q(z_s | x),   z_s ~ q(z | x)
    prior       the same with q = p(z), so that w_s = p(x | z_s)
    iwae        L_K, the mean of the first over S / K groups of K draws (Burda et al. 2016, equation 8)

Discrete latents that the guide does not draw are summed out of p(x, z_s).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import SettingError
from pyrolvm.inference.posterior.evidence.enumeration import summed_out
from pyrolvm.inference.posterior.evidence.psis import tail_length
from pyrolvm.inference.posterior.evidence.runs import Run, can_repeat, chunks
from pyrolvm.inference.posterior.evidence.streams import LargestWeights, StreamingBound, StreamingLogMeanExp
from pyrolvm.inference.program.draws import refuse_enumeration
from pyrolvm.inference.program.handlers import Fixed
from pyrolvm.inference.program.structure import Structure, sample_sites
from pyrolvm.progress import PATIENCE, Bar, progress_bar

if TYPE_CHECKING:
    from pyrolvm.inference.posterior.fitted import FittedModel

NUM_PARTICLES = 50


def importance_evidence(
    fitted: FittedModel,
    x: Any,
    method: str,
    num_samples: int,
    num_particles: int | None,
    seed: int,
    *,
    tails: bool = True,
    progress: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """For some rows at a time: log_evidence, standard_error, effective_sample_size and k_hat, each [rows].

    The last two are of all S weights, whatever the groups. Memory does not grow with S, but for the
    3 sqrt(S) largest weights of each datum of which k-hat is computed if `tails`.
    """
    group_size = check_samples(method, num_samples, num_particles)
    for like, parts in streams_of_weights(fitted, x, method, num_samples, seed, progress=progress):
        weights, bound = StreamingLogMeanExp.empty(like), StreamingBound.empty(like, group_size)
        tail = LargestWeights(tail_length(num_samples) + 1)
        for log_weight in parts:
            weights.add(log_weight)
            if method == "iwae":
                bound.add(log_weight)
            if tails:
                tail.add(log_weight)
        yield _columns(weights, bound if method == "iwae" else weights, tail)


def streams_of_weights(
    fitted: FittedModel, x: Any, method: str, num_samples: int, seed: int, *, progress: bool
) -> Iterator[tuple[Tensor, Iterator[Tensor]]]:
    """For some rows at a time, ([1, rows] zeros, their log-weights in parts [some draws, rows])."""
    from_prior = method == "prior"
    check_guide(fitted.structure, method, from_prior)
    total = max(1, fitted.batch(x).num_rows) * num_samples
    with progress_bar(f"log p(x), {method}", total, enabled=progress, unit="draws", after=PATIENCE) as bar:
        for run, at_once in chunks(fitted, x, num_samples, seed):
            yield (
                torch.zeros(1, run.num_rows, device=fitted.program.device),
                _parts(run, split(num_samples, at_once), fitted.vectorized, from_prior, bar),
            )


def _parts(run: Run, counts: list[int], vectorized: bool, from_prior: bool, bar: Bar) -> Iterator[Tensor]:
    for count in counts:
        yield log_weights(run, count, vectorized=vectorized, from_prior=from_prior)
        bar.advance(count * run.batch.num_rows)


@torch.no_grad()
def iwae_bounds(
    fitted: FittedModel,
    x: Any,
    num_samples: int = 5000,
    num_particles: Sequence[int] = (1, 50, 5000),
    *,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """The bounds L_K of each datum for several K, all of the same draws, one row per datum, nats.

    num_samples: S, draws per datum; num_particles: the Ks, divisors of S. L_1 is the ELBO, and on average L_K
    rises with K to log p(x) (Burda et al. 2016, theorem 1). Columns: "L_1", "L_50", ..., and `k_hat` of the S weights.

    Raises `SettingError` if a K does not divide S, or where "iwae" cannot answer.
    """
    sizes = [check_samples("iwae", num_samples, K) for K in num_particles]
    tables = []
    for like, parts in streams_of_weights(fitted, x, "iwae", num_samples, seed, progress=progress):
        bounds = [StreamingBound.empty(like, K) for K in sizes]
        tail = LargestWeights(tail_length(num_samples) + 1)
        for log_weight in parts:
            tail.add(log_weight)
            for bound in bounds:
                bound.add(log_weight)
        columns = {f"L_{K}": bound.value for K, bound in zip(sizes, bounds, strict=True)}
        columns["k_hat"] = tail.k_hat(num_samples)
        tables.append(pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()}))
    return pd.concat(tables, ignore_index=True).rename_axis("row")


def _columns(
    weights: StreamingLogMeanExp, estimate: StreamingBound | StreamingLogMeanExp, tail: LargestWeights
) -> dict[str, Tensor]:
    columns = {
        "log_evidence": estimate.value,
        "standard_error": estimate.standard_error,
        "effective_sample_size": weights.effective_sample_size,
    }
    if tail.values is not None:
        columns["k_hat"] = tail.k_hat(weights.count)
    return columns


def check_samples(method: str, num_samples: int, num_particles: int | None) -> int:
    """K, the draws of one group. Raises `SettingError` for numbers that cannot be."""
    if not isinstance(num_samples, int) or num_samples < 1:
        raise SettingError(f"num_samples must be a whole number of at least 1, not {num_samples}")
    if method != "iwae":
        return num_samples
    group = num_particles or min(NUM_PARTICLES, num_samples)
    if group < 1 or num_samples % group:
        raise SettingError(f"num_samples={num_samples} must be a multiple of num_particles={group}")
    return group


def check_guide(structure: Structure, method: str, from_prior: bool) -> None:
    """Raise where the guide, or the prior, has no density for each datum."""
    if from_prior:
        refuse_enumeration(structure, f"method='{method}'")
    elif structure.joint_guide:
        raise SettingError(
            f"the guide draws the latents of all data at once ('{structure.joint_guide}'), so there is no density "
            "per datum: use method='prior', or a guide that is independent over data such as AutoNormal"
        )


def split(total: int, part: int) -> list[int]:
    """`total` in parts of at most `part`, nearly equal."""
    number = math.ceil(total / part)
    return [total // number + (i < total % number) for i in range(number)]


def log_weights(run: Run, num_samples: int, *, vectorized: bool, from_prior: bool) -> Tensor:
    """log p(x, z) - log q(z | x), or log p(x | z) of z from the prior: [num_samples, rows] nats."""
    weigh = _prior_weights if from_prior else _guide_weights
    if vectorized:
        return weigh(run, num_samples)
    if can_repeat(run.structure):
        return weigh(run.repeated(num_samples), None).reshape(num_samples, -1)
    return torch.cat([weigh(run, None) for _ in range(num_samples)])


def _prior_weights(run: Run, num_samples: int | None) -> Tensor:
    held = run.held_draw(num_samples)
    return run.densities(run.model(num_samples, Fixed(held)), Trace(), held).log_likelihood


def _guide_weights(run: Run, num_samples: int | None) -> Tensor:
    guide = run.guide(num_samples)
    held = run.held(guide)
    if all(site.observed or site.name in guide for site in run.structure.sites):
        model = run.model(num_samples, lambda function: poutine.replay(function, trace=guide))
        return run.densities(model, guide, held).log_weight
    drawn = {s["name"]: s["value"] for s in sample_sites(guide)}
    log_joint = summed_out(run, num_samples, Fixed(drawn), held)  # [num_samples, rows]
    return log_joint - run.log_guide(guide, held)
