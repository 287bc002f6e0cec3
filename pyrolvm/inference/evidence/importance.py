"""Importance sampling: from the guide (`importance`, `iwae`) or from the prior (`prior`).

    importance  log (1/S) sum_s w_s,   w_s = p(x, z_s) / q(z_s | x),   z_s ~ q(z | x)
    prior       the same with q = p(z), so that w_s = p(x | z_s)
    iwae        L_K, the mean of the first over S / K groups of K draws (Burda et al. 2016, equation 8)

Discrete latents that the guide does not draw are summed out of p(x, z_s).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import SettingError
from pyrolvm.inference.draws import refuse_enumeration
from pyrolvm.inference.evidence.enumeration import summed_out
from pyrolvm.inference.evidence.psis import khat_of_largest, tail_length
from pyrolvm.inference.evidence.runs import Run, can_repeat, chunks
from pyrolvm.inference.evidence.streams import LargestWeights, StreamingBound, StreamingLogMeanExp
from pyrolvm.inference.handlers import Fixed
from pyrolvm.inference.structure import Structure, sample_sites

if TYPE_CHECKING:
    from pyrolvm.inference.fitted import FittedModel

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
) -> Iterator[dict[str, Tensor]]:
    """For some rows at a time: log_evidence, standard_error, effective_sample_size and k_hat, each [rows].

    The last two are of all S weights, whatever the groups. Memory does not grow with S, but for the
    3 sqrt(S) largest weights of each datum of which k-hat is computed if `tails`.
    """
    group_size = check_samples(method, num_samples, num_particles)
    from_prior = method == "prior"
    check_guide(fitted.structure, method, from_prior)
    for run, at_once in chunks(fitted, x, num_samples, seed):
        like = torch.empty(1, run.num_rows, device=fitted.program.device)
        weights, bound = StreamingLogMeanExp.empty(like), StreamingBound.empty(like, group_size)
        tail = LargestWeights(tail_length(num_samples) + 1)
        for count in split(num_samples, at_once):
            log_weight = log_weights(run, count, vectorized=fitted.vectorized, from_prior=from_prior)
            weights.add(log_weight)
            if method == "iwae":
                bound.add(log_weight)
            if tails:
                tail.add(log_weight)
        yield _columns(weights, bound if method == "iwae" else weights, tail)


def _columns(
    weights: StreamingLogMeanExp, estimate: StreamingBound | StreamingLogMeanExp, tail: LargestWeights
) -> dict[str, Tensor]:
    columns = {
        "log_evidence": estimate.value,
        "standard_error": estimate.standard_error,
        "effective_sample_size": weights.effective_sample_size,
    }
    if tail.values is not None:
        columns["k_hat"] = khat_of_largest(tail.values, tail_length(weights.count))
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
