"""k-hat of a guide: one per datum for the latents of each datum, one for the latents shared by all.

Importance weights w = p(x, z) / q(z | x) have a heavy tail where the guide is too narrow or looks in the
wrong place (Yao et al. 2018, "Yes, but did it work?"; Vehtari et al. 2024, JMLR 25(72)). The weight of the
latents of a whole data set is a product over the data: its k-hat grows with their number, whatever the guide,
and is not computed here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyrolvm.data.arrays import Batch
from pyrolvm.diagnostics.pair import Pair, Values, local_sites, row_chunks
from pyrolvm.errors import SettingError
from pyrolvm.inference.posterior.evidence import pareto_khat
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.structure import sample_sites
from pyrolvm.progress import PATIENCE, Bar, progress_bar, watched
from pyrolvm.seeds import Purpose, derived_seed

NOISE_LIMIT = 0.5
"""Largest standard error, in nats, of a global latent's log-weight whose tail still is its own."""


@dataclass(frozen=True)
class GlobalTail:
    """k-hat of the latents shared by all data; None with the `reason` why there is none."""

    k_hat: float | None
    names: tuple[str, ...] = ()
    reason: str = ""


@torch.no_grad()
def local_khat(
    fitted: FittedModel, x: Any, num_samples: int = 1000, *, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """One row per datum: `k_hat`, `effective_sample_size`, `log_evidence`, `standard_error` and `elbo`, of its weights.

    k-hat is -inf where all weights are the same. Global latents stay at the guide's means. `log_evidence` is the
    importance estimate, a lower bound on average, with its `standard_error`; `elbo` the mean log-weight; in nats.

    Raises `ProgramError` for a program without latents of each datum, with enumerated ones, or with a guide that
    draws those of all data at once.
    """
    local_sites(fitted, "k-hat")
    if num_samples < 25:
        raise SettingError(f"num_samples={num_samples} draws have no tail: k-hat needs at least 25")
    data = fitted.batch(x)
    whole = bool(fitted.structure.per_datum) or not fitted.structure.takes_any_rows
    tables = []
    with seeded(derived_seed(seed, Purpose.DIAGNOSE), fitted.program.device):
        given = Pair(fitted, data).global_means()
        chunks = list(row_chunks(data, num_samples, fitted.program.device, whole))
        for rows in watched(chunks, "k-hat", len(chunks), enabled=progress):
            log_weight = _local_log_weight(Pair(fitted, rows), given, num_samples)
            log_sum = log_weight.logsumexp(0)
            ess = (2 * log_sum - (2 * log_weight).logsumexp(0)).exp()
            columns = {
                "k_hat": pareto_khat(log_weight),
                "effective_sample_size": ess,
                "log_evidence": log_sum - math.log(num_samples),
                "standard_error": ((num_samples / ess - 1).clamp_min(0) / (num_samples - 1)).sqrt(),
                "elbo": log_weight.mean(0),
            }
            tables.append(pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()}))
    table = pd.concat(tables, ignore_index=True)
    return table.rename_axis("row")


def _local_log_weight(pair: Pair, given: Values, num_samples: int) -> Tensor:
    """log p(x_n, z_n) - log q(z_n | x_n), [num_samples, rows], of draws given the global latents."""
    parts = []
    for model, guide in pair.draws(num_samples, given):
        parts.append(pair.log_prob(model, pair.is_local) - pair.log_prob(guide, pair.is_local))
    return torch.cat(parts)


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
    """
    structure = fitted.structure
    names = tuple(s.name for s in structure.global_latents)
    data = fitted.batch(x)
    reason = _why_not(fitted, data, names)
    if reason:
        return GlobalTail(None, names, reason)
    whole = bool(structure.per_datum) or not structure.takes_any_rows
    with seeded(derived_seed(seed, Purpose.DIAGNOSE), fitted.program.device):
        chunks = list(row_chunks(data, num_samples, fitted.program.device, whole))
        first, totals, noise = Pair(fitted, chunks[0]), [], []
        with progress_bar(
            "k-hat, shared latents", num_samples, enabled=progress, unit="draws", after=PATIENCE
        ) as bar:
            for model, guide in first.draws(num_samples):
                log_weight, variance = _global_log_weight(fitted, first, model, guide, chunks, num_inner, bar)
                totals.append(log_weight)
                noise.append(variance)
    error = float(torch.cat(noise).mean().sqrt())
    if error > NOISE_LIMIT:
        found = f"integrating out the latents of each datum leaves {error:.1f} nats of noise in the weights"
        return GlobalTail(None, names, f"{found}: raise num_inner, or improve the guide of each datum")
    return GlobalTail(float(pareto_khat(torch.cat(totals).unsqueeze(1))), names)


def _why_not(fitted: FittedModel, data: Batch, names: tuple[str, ...]) -> str:
    structure = fitted.structure
    if not names:
        return "no latents are shared by all data"
    if structure.joint_guide:
        return f"the guide draws the latents of all data at once ('{structure.joint_guide}')"
    if any(s.enumerated for s in structure.sites):
        return "some latents are summed out"
    if data.num_rows != fitted.num_rows:
        return (
            f"their posterior is that of all {fitted.num_rows} training rows, and {data.num_rows} were given"
        )
    guide = Pair(fitted, data).run(1)[1]
    shared = [s for s in sample_sites(guide) if s["name"] in names]
    drawn = [s for s in shared if getattr(s["fn"], "variance", None) is None or _varies(guide, s)]
    return "" if drawn else "the guide holds them at points"


def _varies(guide: Any, site: dict[str, Any]) -> bool:
    auxiliary = f"{site['name']}_unconstrained" in guide.nodes or "_AutoGuide_latent" in " ".join(guide.nodes)
    return auxiliary or bool((site["fn"].variance > 0).any())


def _global_log_weight(
    fitted: FittedModel, pair: Pair, model: Any, guide: Any, chunks: list[Batch], num_inner: int, bar: Bar
) -> tuple[Tensor, Tensor]:
    """log p(x, g) - log q(g) [draws], and the variance [draws] that integrating out has left in it."""
    values = {s["name"]: s["value"] for s in sample_sites(guide) if not pair.is_local(s)}
    total = pair.log_prob(model, lambda s: not pair.is_local(s) and not s["is_observed"])[:, 0]
    total = total - pair.log_prob(guide, lambda s: not pair.is_local(s))[:, 0]
    variance = torch.zeros_like(total)
    repeats = num_inner if fitted.structure.local_latents else 1
    for rows in chunks:
        part, found = Pair(fitted, rows), []
        for _ in range(repeats):
            found.append(_inner(part, values, len(total)))
            bar.advance(len(total) / (repeats * len(chunks)))
        inner = torch.stack(found)
        total = total + (inner.logsumexp(0) - math.log(len(inner))).sum(1)
        weight = (inner - inner.logsumexp(0)).exp()  # [inner, draws, rows], summing to one
        variance = variance + (weight.square().sum(0) - 1 / len(inner)).clamp_min(0).sum(1)
    return total, variance


def _inner(pair: Pair, values: Values, count: int) -> Tensor:
    """log p(x_n, z_n | g) - log q(z_n | x_n) of one draw of z_n for each draw of g: [draws, rows]."""
    model, guide = pair.run(count, values)
    log_weight = pair.log_prob(model, pair.is_local) - pair.log_prob(guide, pair.is_local)
    return log_weight.expand(count, pair.batch.num_rows)
