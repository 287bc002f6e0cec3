"""From a fitted pair to plain arrays on the host, a chunk of rows at a time: what `to_inference_data` names."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from torch import Tensor

from pyrolvm.data.arrays import Batch
from pyrolvm.diagnostics.tables import Arrays, Layout
from pyrolvm.errors import SettingError
from pyrolvm.inference.posterior.fitted import FittedModel, check_count
from pyrolvm.inference.posterior.saving import model_record, versions
from pyrolvm.inference.program.draws import Draws, tidy
from pyrolvm.inference.program.enumerated import TOGETHER, enumerated_sites
from pyrolvm.inference.program.handlers import Fixed
from pyrolvm.inference.program.structure import Structure, sample_sites
from pyrolvm.progress import watched

POSTERIOR = {"posterior", "posterior_predictive", "log_likelihood", "sample_stats"}
PRIOR = {"prior", "prior_predictive"}
JOINT = ("log_p", "log_q")
ROWS = ("log_p_row", "log_q_row")
GLOBAL = ("log_p_global", "log_q_global")


@dataclass(frozen=True)
class Collected:
    """group -> variable -> array, and what is needed to name their dimensions."""

    arrays: Arrays
    layouts: dict[str, Layout]
    row_dim: str | None
    row_names: Sequence[Any] | None
    columns: list[str] | None
    attrs: dict[str, Any]


@dataclass
class _Parts:
    """Arrays of row chunks; those of sites in the data plate are joined along `axis`."""

    local: set[str]
    groups: dict[str, dict[str, list[np.ndarray]]] = field(default_factory=dict)

    def add(self, group: str, values: dict[str, Tensor], wanted: Sequence[str]) -> None:
        if group not in wanted:
            return
        parts = self.groups.setdefault(group, {})
        for name, value in values.items():
            if name in self.local or name not in parts:  # what all rows share is kept once
                parts.setdefault(name, []).append(value.detach().cpu().numpy())

    def add_draws(self, draws: Draws, latents: str, predictions: str, wanted: Sequence[str]) -> None:
        self.add(latents, draws.values, wanted)
        self.add(predictions, draws.predictive, wanted)

    def whole(self, group: str) -> dict[str, np.ndarray]:
        axis = 0 if group == "observed_data" else 1
        parts = self.groups.get(group, {})
        return {k: np.concatenate(v, axis) if len(v) > 1 else v[0] for k, v in parts.items()}


def collect(
    fitted: FittedModel, x: Any, num_samples: int, groups: Sequence[str], seed: int, *, progress: bool = True
) -> Collected:
    """The wanted groups for the rows of `x`; draws that are not wanted are dropped chunk by chunk."""
    check_count("num_samples", num_samples)
    batch = fitted.batch(x)
    _check_memory(fitted, batch.num_rows, num_samples, groups)
    chunks = len(fitted._chunks(batch, per_row=num_samples))
    parts = _Parts({s.name for s in fitted.structure.sites if s.local} | {TOGETHER, *ROWS})
    layouts = _observe(fitted, batch, parts)
    if POSTERIOR & set(groups):
        enumerated_sites(fitted.structure)  # those that cannot be drawn are refused, not left at the prior
        found = fitted.draw_chunks(batch, num_samples, seed=seed)
        for draws in watched(found, "draws of the posterior", chunks, enabled=progress):
            parts.add_draws(draws, "posterior", "posterior_predictive", groups)
            parts.add("log_likelihood", draws.pointwise, groups)
            parts.add("sample_stats", _densities(draws), groups)
    if PRIOR & set(groups):
        found = fitted.draw_chunks(batch, num_samples, prior=True, seed=seed)
        for draws in watched(found, "draws of the prior", chunks, enabled=progress):
            parts.add_draws(draws, "prior", "prior_predictive", groups)
    arrays = {g: v for g in groups if (v := parts.whole(g))}
    if "sample_stats" in arrays:
        arrays["sample_stats"] = _stats(arrays["sample_stats"], fitted.structure, batch.num_rows)
    plate = fitted.structure.data_plate
    name = plate.name if plate else None
    return Collected(arrays, layouts, name, row_names(x), batch.columns, _attrs(fitted, seed))


def physical_memory() -> float:
    """Bytes of this machine's memory; infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _check_memory(fitted: FittedModel, num_rows: int, num_samples: int, groups: Sequence[str]) -> None:
    """Raise `SettingError` if the arrays, and once more while they are put together, do not fit into memory."""
    size = 2 * num_samples * numbers_per_draw(fitted.structure, num_rows, groups)
    size *= torch.finfo(fitted.program.dtype).bits // 8
    memory = physical_memory()
    if size > memory:
        raise SettingError(
            f"{num_samples} draws for {num_rows} rows take {size / 2**30:.1f} GiB and this machine has "
            f"{memory / 2**30:.1f}: pass fewer rows, a smaller num_samples, or only the groups you need, such as "
            "groups=['posterior', 'log_likelihood']"
        )


def numbers_per_draw(structure: Structure, num_rows: int, groups: Sequence[str]) -> int:
    """How many numbers the groups hold for each draw."""
    share = num_rows / structure.data_plate.size if structure.data_plate else 1
    total = 0.0
    for site in structure.sites:
        cells = math.prod(site.batch_shape) * (share if site.local or site.observed else 1)
        whole = cells * math.prod(site.event_shape)
        held = ("posterior_predictive", "prior_predictive") if site.observed else ("posterior", "prior")
        total += whole * sum(group in groups for group in held)
        total += cells * (site.observed and "log_likelihood" in groups)
    return round(total + 2 * num_rows * ("sample_stats" in groups))


@torch.no_grad()
def _observe(fitted: FittedModel, x: Batch, parts: _Parts) -> dict[str, Layout]:
    """The layout of every site, from the model run at the guide's means; its observed values go to `parts`."""
    layouts: dict[str, Layout] = {}
    for batch in fitted._chunks(x):
        guide = fitted._guide_trace(batch)
        with fitted._scope(batch), Fixed({s["name"]: s["value"] for s in sample_sites(guide)}):
            trace = pyro.poutine.trace(fitted.program.model).get_trace(*batch.args, **batch.kwargs)
        sites = list(sample_sites(trace))
        layouts = layouts or {s["name"]: _layout(s, fitted.structure) for s in sites}
        values = {s["name"]: tidy(fitted.structure, s, s["value"])[0] for s in sites if s["is_observed"]}
        parts.add("observed_data", values, ("observed_data",))
    return layouts


def _layout(site: Any, structure: Structure) -> Layout:
    """Plates in the order in which draws have them: the data plate, then the others from the left."""
    plate = structure.data_plate.name if structure.data_plate else None
    frames = sorted((f for f in site["cond_indep_stack"] if f.vectorized), key=lambda f: f.dim)
    frames.sort(key=lambda f: f.name != plate)
    known = next(s for s in structure.sites if s.name == site["name"])
    categories = None
    if known.family == "Categorical":
        categories = len(site["fn"].enumerate_support(expand=False))
    plates = tuple(f.name for f in frames)
    return Layout(plates, tuple(site["fn"].event_shape), known.observed, known.local, categories)


def _densities(draws: Draws) -> dict[str, Tensor]:
    """log p and log q: by row, and what the global latents add."""
    given = (draws.log_prior, draws.log_likelihood, draws.log_guide)
    prior, likelihood, guide = (t for t in given if t is not None)
    shared = (draws.global_log_prior, draws.global_log_guide)
    return {"log_p_row": prior + likelihood, "log_q_row": guide} | {
        k: v for k, v in zip(GLOBAL, shared, strict=True) if v is not None
    }


def _stats(parts: dict[str, np.ndarray], structure: Structure, num_rows: int) -> dict[str, np.ndarray]:
    """Joint log-densities [draws], and those of each row [draws, rows] where they mean something."""
    stats = {}
    for joint, row, shared in zip(JOINT, ROWS, GLOBAL, strict=True):
        stats[joint] = parts[row].sum(1, dtype=np.float64) + parts[shared]
    by_row = structure.data_plate is not None and structure.joint_guide is None
    if by_row and parts[ROWS[0]].shape[1] == num_rows:
        stats |= {row: parts[row] for row in ROWS}
    return stats


def row_names(x: Any) -> Sequence[Any] | None:
    """The index of the first table among the data, if it says more than the position and names each row once."""
    parts = x.values() if isinstance(x, Mapping) else x if isinstance(x, tuple | list) else (x,)
    for part in parts:
        if isinstance(part, pd.DataFrame | pd.Series):
            index = part.index
            positions = index.equals(pd.RangeIndex(len(index)))
            if positions or not index.is_unique:
                return None
            return _labels(index)
    return None


def _labels(index: pd.Index) -> Any:
    """Labels that a file can keep: numbers and dates as they are, all else as text."""
    if index.inferred_type in ("integer", "floating") or isinstance(index, pd.DatetimeIndex):
        return index.to_numpy()
    return [str(label) for label in index]


def _attrs(fitted: FittedModel, seed: int) -> dict[str, Any]:
    """What a netCDF file can keep: text and numbers."""
    found = versions()
    return {
        "model": model_record(fitted.model)["name"],
        "objective": str(fitted.settings.get("objective", "")),
        "seed": seed,
        "sampling": "independent draws from the guide",
        "created_at": datetime.now(UTC).isoformat(),
        "inference_library": "pyrolvm",
        "inference_library_version": found.pop("pyrolvm"),
        **{f"{k}_version": str(v) for k, v in found.items()},  # torch's is no plain text
    }
