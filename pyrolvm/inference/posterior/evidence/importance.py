"""Importance sampling: from the guide (`importance`, `iwae`) or from the prior (`prior`).

    importance  log (1/S) sum_s w_s,   w_s = p(x, z_s) / q(z_s | x),   z_s ~ q(z | x)
    prior       the same with q = p(z), so that w_s = p(x | z_s)
    iwae        L_K, the mean of the first over S / K groups of K draws (Burda et al. 2016, equation 8)

Discrete latents that the guide does not draw are summed out of p(x, z_s).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import SettingError, count
from pyrolvm.inference.log_joint.psis import tail_length
from pyrolvm.inference.posterior.evidence.chunks import evidence_chunks
from pyrolvm.inference.posterior.evidence.enumeration import summed_out
from pyrolvm.inference.posterior.evidence.streams import LargestWeights, StreamingBound, StreamingLogMeanExp
from pyrolvm.inference.program.draws import refuse_enumeration
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import Structure, refuse_bound, sample_sites
from pyrolvm.progress import PATIENCE, Bar, progress_bar
from pyrolvm.seeds import Purpose, derived_seed

NUM_PARTICLES = 50


def importance_evidence(
    pair: Pair,
    method: str,
    num_samples: int,
    num_particles: int | None,
    seed: int,
    *,
    tails: bool = True,
    progress: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """Yield log_evidence, standard_error and, if `tails`, the other columns, each [rows], of some rows at a time.

    These others are of all S weights, also with groups. Memory does not grow with S, except for the
    3 sqrt(S) largest weights of each datum, kept for k-hat.
    """
    group_size = check_samples(method, num_samples, num_particles)
    for like, parts in streams_of_weights(pair, method, num_samples, seed, progress=progress):
        weights, elbo = StreamingLogMeanExp.empty(like), StreamingBound.empty(like, 1)
        groups = [StreamingBound.empty(like, group_size)] if method == "iwae" else []
        tail = LargestWeights(tail_length(num_samples) + 1)
        for log_weight in parts:
            for total in (weights, *groups, *((elbo, tail) if tails else ())):
                total.add(log_weight)
        estimate = groups[0] if groups else weights
        columns = {"log_evidence": estimate.value, "standard_error": estimate.standard_error}
        if tails:
            columns["effective_sample_size"] = weights.effective_sample_size
            columns["k_hat"] = tail.k_hat(num_samples)
            columns |= {"elbo": elbo.value} if method != "prior" else {}
        yield columns


def streams_of_weights(
    pair: Pair, method: str, num_samples: int, seed: int, *, progress: bool
) -> Iterator[tuple[Tensor, Iterator[Tensor]]]:
    """Yield, for some rows at a time, (zeros [1, rows], their log-weights in parts [some draws, rows])."""
    from_prior = method == "prior"
    check_guide(pair.structure, method, from_prior)
    total = len(pair.batch.indices) * num_samples
    with progress_bar(f"log p(x), {method}", total, enabled=progress, unit="draws", after=PATIENCE) as bar:
        for index, (part, at_once) in enumerate(evidence_chunks(pair, num_samples)):
            stream = _Stream(part, derived_seed(seed, Purpose.EVIDENCE, index), from_prior, bar)
            yield torch.zeros(1, part.num_rows, device=pair.device), stream.parts(split(num_samples, at_once))


@dataclass
class _Stream:
    """The weights of some rows, some draws at a time, from a stream of noise of its own."""

    pair: Pair
    seed: int
    from_prior: bool
    bar: Bar

    def parts(self, counts: list[int]) -> Iterator[Tensor]:
        """Yield log-weights [some draws, rows]; between two of them the generators are the caller's."""
        for index, number in enumerate(counts):
            with seeded(derived_seed(self.seed, Purpose.EVIDENCE, index), self.pair.device):
                found = log_weights(self.pair, number, from_prior=self.from_prior)
            yield found
            self.bar.advance(number * len(self.pair.batch.indices))


@torch.no_grad()
def iwae_bounds(
    pair: Pair,
    num_samples: int = 5000,
    num_particles: Sequence[int] = (1, 50, 5000),
    *,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """The bounds L_K of each datum for several K, from the same draws.

    L_1 is the ELBO, and on average L_K rises with K to log p(x) (Burda et al. 2016, theorem 1).

    Parameters
    ----------
    pair : Pair
        The program on the data: `fitted.pair(x)`.
    num_samples : int
        S, draws per datum.
    num_particles : sequence of int
        The values of K, divisors of S.
    seed : int
        Of the draws.

    Returns
    -------
    DataFrame
        One row per datum: columns "L_1", "L_50", ..., in nats, and `k_hat` of the S weights.

    Raises
    ------
    SettingError
        A K does not divide S, or "iwae" cannot be used for this program.
    """
    sizes = [check_samples("iwae", num_samples, K) for K in num_particles]
    tables = []
    for like, parts in streams_of_weights(pair, "iwae", num_samples, seed, progress=progress):
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


def check_samples(method: str, num_samples: int, num_particles: int | None) -> int:
    """K, the draws of one group. Raises `SettingError` for numbers that are not valid."""
    num_samples = count("num_samples", num_samples)
    if method != "iwae":
        return num_samples
    group = num_particles or min(NUM_PARTICLES, num_samples)
    if group < 1 or num_samples % group:
        raise SettingError(f"num_samples={num_samples} must be a multiple of num_particles={group}")
    return group


def check_guide(structure: Structure, method: str, from_prior: bool) -> None:
    """Raise `SettingError` if the guide, or the prior, has no density for each datum."""
    if from_prior:
        refuse_enumeration(structure, f"method='{method}'")
        return
    if structure.points:
        raise SettingError(
            f"the guide is a point estimate of '{structure.points[0]}': it has no density, so there are no "
            "importance weights and no evidence by it; use method='prior', or a guide with a density"
        )
    refuse_bound(structure, f"method='{method}'")
    if structure.joint_guide:
        raise SettingError(
            f"the guide draws the latents of all data at once ('{structure.joint_guide}'), so there is no density "
            "per datum: use method='prior', or a guide that is independent over data such as AutoNormal"
        )


def split(total: int, part: int) -> list[int]:
    """Nearly equal parts of `total`, each at most `part`."""
    number = math.ceil(total / part)
    return [total // number + (i < total % number) for i in range(number)]


def log_weights(pair: Pair, num_samples: int, *, from_prior: bool) -> Tensor:
    """log p(x, z) - log q(z | x), or log p(x | z) for z from the prior: [num_samples, rows], nats."""
    weigh = _prior_weights if from_prior else _guide_weights
    if pair.vectorized:
        return weigh(pair, num_samples)
    if pair.can_repeat:
        return weigh(pair.repeated(num_samples), None).reshape(num_samples, -1)
    return torch.cat([weigh(pair, None) for _ in range(num_samples)])


def _prior_weights(pair: Pair, num_samples: int | None) -> Tensor:
    held = pair.held_draw(num_samples)
    return pair.densities(pair.model(num_samples, given=held), Trace(), held).log_likelihood


def _guide_weights(pair: Pair, num_samples: int | None) -> Tensor:
    guide = pair.guide(num_samples)
    held = pair.held(guide)
    if all(site.name in guide for site in pair.structure.latents):
        model = pair.model(num_samples, lambda function: poutine.replay(function, trace=guide))
        return pair.densities(model, guide, held).log_weight
    drawn = {s["name"]: s["value"] for s in sample_sites(guide)}
    log_joint = summed_out(pair, num_samples, drawn, held)  # [num_samples, rows]
    return log_joint - pair.log_guide(guide, held)
