"""What is asked about each row, as columns of numbers: codes, evidence, draws in numbers, k-hats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from pyro.distributions import Delta
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.posterior.evidence import DRAWS, evidence_table
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.draws import tidy
from pyrolvm.inference.program.handlers import Means
from pyrolvm.inference.program.structure import base

QUANTILES = (0.05, 0.5, 0.95)

Columns = dict[str, np.ndarray]


def _encode(fitted: FittedModel, x: Any, *, seed: int) -> Columns:
    means = fitted.encode(x, seed=seed)
    if not isinstance(means, dict):
        names = [s.name for s in fitted.structure.local_latents if s.in_guide]
        means = {(names or [fitted.structure.enumerated[0].name])[0]: means}
    return {
        k: _array(v) for k, v in (means | {f"{n}_sd": sd for n, sd in deviations(fitted, x).items()}).items()
    }


def _log_evidence(
    fitted: FittedModel, x: Any, method: str = "importance", num_samples: int | None = None, **options: Any
) -> Columns:
    table = evidence_table(fitted.pair(x), method, num_samples, progress=False, **options)
    return {name: table[name].to_numpy() for name in table.columns}


def _diagnose(fitted: FittedModel, x: Any, num_samples: int = DRAWS, *, seed: int) -> Columns:
    found = _log_evidence(fitted, x, num_samples=num_samples, seed=seed)
    return {n: found[n] for n in ("k_hat", "effective_sample_size", "log_evidence", "elbo")}


def _posterior(fitted: FittedModel, x: Any, num_samples: int = 100, *, seed: int) -> Columns:
    sites = [s for s in fitted.structure.local_latents if not s.point]
    if not sites:
        raise ProgramError("the program draws no latents of each row: ask for encode, or log_evidence")
    parts: dict[str, list[np.ndarray]] = {}
    for draws in fitted.draw_chunks(x, num_samples, seed=seed):
        for site in sites:
            for name, value in _summary(site.name, draws.values[site.name], site.discrete):
                parts.setdefault(name, []).append(_array(value))
    return {name: np.concatenate(found) for name, found in parts.items()}


def _summary(name: str, draws: Tensor, discrete: bool) -> Iterator[tuple[str, Tensor]]:
    """Of draws [draws, rows, ...]: the most frequent value and its share if discrete, else moments and quantiles."""
    if discrete:
        mode = draws.mode(0).values
        yield f"{name}_mode", mode
        yield f"{name}_share", (draws == mode).float().mean(0)
        return
    yield f"{name}_mean", draws.mean(0)
    yield f"{name}_sd", draws.std(0)
    for q, value in zip(QUANTILES, _quantiles(draws), strict=True):
        yield f"{name}_q{100 * q:.0f}", value


def _quantiles(draws: Tensor) -> Tensor:
    """Linear between order statistics, [quantiles, rows, ...]; torch's own refuses 2^24 numbers."""
    ordered = draws.sort(0).values
    place = torch.tensor(QUANTILES, dtype=draws.dtype) * (len(draws) - 1)
    low = place.floor().long()
    high = (low + 1).clamp(max=len(draws) - 1)
    share = (place - low).reshape(-1, *[1] * (draws.dim() - 1)).to(draws.device)
    return ordered[low] + share * (ordered[high] - ordered[low])


@torch.no_grad()
def deviations(fitted: FittedModel, x: Any) -> dict[str, Tensor]:
    """Standard deviations of q(z | x) at the guide's means, site -> [rows, ...], where there is a closed form."""
    names = [s.name for s in fitted.structure.local_latents if not s.discrete and not s.point]
    parts: list[dict[str, Tensor]] = []
    for pair in fitted.pair(x).chunks():
        trace = pair.guide(None, Means())
        found: Any = {n: trace.nodes[n]["fn"] for n in names if n in trace.nodes}
        # an AutoGuide computes its latents from auxiliary draws: of such a point the spread is not 0 but unknown
        found = {n: fn for n, fn in found.items() if not isinstance(base(fn), Delta)}
        try:
            parts.append({n: tidy(pair.structure, trace.nodes[n], d.stddev)[0] for n, d in found.items()})
        except NotImplementedError:
            return {}
    return {n: torch.cat([p[n] for p in parts]) for n in parts[0]}


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


QUESTIONS: dict[str, Callable[..., Columns]] = {
    "encode": _encode,
    "log_evidence": _log_evidence,
    "posterior": _posterior,
    "diagnose": _diagnose,
}
