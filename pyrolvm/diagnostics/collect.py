"""From a fitted pair to named arrays on the host, a chunk of rows at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrolvm.diagnostics.dims import Arrays, Dims, Layout, check_dims, name_dims
from pyrolvm.diagnostics.predictive import observed_mask
from pyrolvm.errors import SettingError, count
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.posterior.record import model_record
from pyrolvm.inference.posterior.saving import versions
from pyrolvm.inference.program.devices import placed
from pyrolvm.inference.program.draws import tidy
from pyrolvm.inference.program.enumerated import TOGETHER, enumerated_sites
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.running import explained
from pyrolvm.inference.program.structure import Structure, sample_sites
from pyrolvm.progress import watched

POSTERIOR = {"posterior", "posterior_predictive", "log_likelihood", "sample_stats"}
PRIOR = {"prior", "prior_predictive"}
ROWS = ("log_p_row", "log_q_row")


@dataclass
class _Parts:
    """Arrays of row chunks; those of sites in the data plate are joined along their rows."""

    local: set[str]
    wanted: Sequence[str]
    groups: dict[str, dict[str, list[np.ndarray]]] = field(default_factory=dict)

    def add(self, group: str, values: Mapping[str, Tensor]) -> None:
        if group not in self.wanted:
            return
        parts = self.groups.setdefault(group, {})
        for name, value in values.items():
            if name in self.local or name not in parts:  # what all rows share is kept once
                parts.setdefault(name, []).append(value.detach().cpu().numpy())

    def whole(self, group: str) -> dict[str, np.ndarray]:
        axis = 0 if group == "observed_data" else 1
        parts = self.groups.get(group, {})
        return {k: np.concatenate(v, axis) if len(v) > 1 else v[0] for k, v in parts.items()}


@placed
def collect(
    fitted: FittedModel,
    x: Any,
    num_samples: int,
    prior_samples: int | None,
    rows: Sequence[int] | None,
    groups: Sequence[str],
    dims: Mapping[str, Sequence[str]],
    seed: int,
    progress: bool,
) -> tuple[Arrays, Dims, dict[str, Any], dict[str, Any]]:
    """The wanted groups for the rows of `x`; draws that are not wanted are dropped chunk by chunk.

    Returns
    -------
    arrays, dims, coords, attrs : dict
        As `to_arviz` takes them.
    """
    prior_samples = num_samples if prior_samples is None else prior_samples
    numbers = {"posterior": count("num_samples", num_samples), "prior": count("prior_samples", prior_samples)}
    pair, names = _chosen_rows(fitted.pair(x), rows, row_names(x))
    _check_memory(fitted, pair.num_rows, max(numbers.values()), groups)
    parts = _Parts({s.name for s in fitted.structure.sites if s.local} | {TOGETHER, *ROWS}, groups)
    layouts = _observe(pair, parts)
    check_dims(layouts, dims)
    if POSTERIOR & set(groups):
        enumerated_sites(fitted.structure)  # those that cannot be drawn are refused, not left at the prior
        _draw("posterior", fitted, pair, parts, numbers["posterior"], seed, progress)
    if PRIOR & set(groups):
        _draw("prior", fitted, pair, parts, numbers["prior"], seed, progress)
    arrays, attrs = {g: parts.whole(g) for g in groups}, _attrs(fitted, seed)
    if arrays.get("sample_stats"):
        arrays["sample_stats"], note = _stats(arrays["sample_stats"], fitted, pair)
        attrs |= {"weights": note} if note else {}
    arrays = {group: values for group, values in arrays.items() if values}
    plate = fitted.structure.data_plate.name if fitted.structure.data_plate else "row"
    columns = fitted.columns or pair.batch.columns
    named, coords = name_dims(arrays, layouts, dims, plate, names, columns)
    return arrays, named, coords, attrs


def _chosen_rows(pair: Pair, rows: Sequence[int] | None, names: Any) -> tuple[Pair, Any]:
    """The pair on these rows and their names, which are their numbers where the data have none of their own."""
    if rows is None:
        return pair, names
    if not pair.structure.chunkable:
        raise SettingError("rows= needs rows that can be taken apart, and this program takes its data whole")
    chosen = np.asarray(rows)
    if chosen.dtype.kind not in "iu" or not len(chosen) or chosen.min() < 0 or chosen.max() >= pair.num_rows:
        raise SettingError(f"rows must be numbers from 0 to {pair.num_rows - 1}, one at least")
    part = pair.take(torch.as_tensor(chosen, device=pair.device))
    return part, chosen if names is None else np.asarray(names)[chosen]


def _draw(
    source: str, fitted: FittedModel, pair: Pair, parts: _Parts, num_samples: int, seed: int, progress: bool
) -> None:
    """Add the draws of a source, "posterior" or "prior", to the parts."""
    prior = source == "prior"
    chunks = fitted.draw_chunks(pair.batch, num_samples, seed=seed, prior=prior)
    number = len(list(pair.chunks(num_samples)))
    for draws in watched(chunks, f"draws of the {source}", number, enabled=progress):
        parts.add(source, draws.values)
        parts.add(f"{source}_predictive", draws.predictive)
        if not prior:
            parts.add("log_likelihood", draws.pointwise)
            parts.add("sample_stats", _densities(draws))


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
def _observe(pair: Pair, parts: _Parts) -> dict[str, Layout]:
    """The layout of every site, from the model run at the guide's means; its data go to `parts`."""
    layouts: dict[str, Layout] = {}
    data = {s.name for s in pair.structure.observed}
    for chunk in pair.chunks():
        with explained(chunk.batch, "program"):
            sites = list(sample_sites(chunk.model(given=chunk.means())))
        layouts = layouts or {s["name"]: _layout(s, pair.structure, s["name"] in data) for s in sites}
        values = {s["name"]: _with_gaps(chunk, s) for s in sites if s["name"] in data}
        parts.add("observed_data", values)
    return layouts


def _with_gaps(pair: Pair, site: Any) -> Tensor:
    """The observed values of a site, [rows, ...]; numbers that a mask leaves out are NaN."""
    value, kept = tidy(pair.structure, site, site["value"])[0], observed_mask(pair, site)
    return value if kept is None or not value.is_floating_point() else value.masked_fill(~kept, torch.nan)


def _layout(site: Any, structure: Structure, data: bool) -> Layout:
    """Plates in the order in which draws have them: the data plate, then the others from the left."""
    plate = structure.data_plate.name if structure.data_plate else None
    frames = sorted((f for f in site["cond_indep_stack"] if f.vectorized), key=lambda f: f.dim)
    frames.sort(key=lambda f: f.name != plate)
    return Layout(tuple(f.name for f in frames), tuple(site["fn"].event_shape), data)


def _densities(draws: Any) -> dict[str, Tensor]:
    """log p and log q: by row, and what the global latents add."""
    found = {
        "log_p_row": draws.log_prior + draws.log_likelihood,
        "log_q_row": draws.log_guide,
        "log_p_global": draws.global_log_prior,
        "log_q_global": draws.global_log_guide,
    }
    return {name: value for name, value in found.items() if value is not None}


def _stats(
    parts: dict[str, np.ndarray], fitted: FittedModel, pair: Pair
) -> tuple[dict[str, np.ndarray], str]:
    """Log-densities of each row, and of all, where they mean something; and why not, where they do not."""
    structure, stats = fitted.structure, {}
    if structure.data_plate is not None and structure.joint_guide is None:
        stats = {row: parts[row] for row in ROWS if parts[row].shape[1] == pair.num_rows}
    if structure.points:
        stats.pop("log_q_row", None)
        return stats, f"no log_q: the guide is a point estimate of '{structure.points[0]}', without a density"
    if structure.global_latents and not fitted.is_whole(pair):
        return stats, (
            f"no log_p and log_q: '{structure.global_latents[0].name}' is shared by all data, its guide is fitted to "
            f"{fitted.num_rows} rows, and weights for the {pair.num_rows} rows given, which are others, would lead to "
            "another posterior"
        )
    for joint in ("log_p", "log_q"):
        shared = parts.get(f"{joint}_global", 0.0)
        stats[joint] = parts[f"{joint}_row"].sum(1, dtype=np.float64) + shared
    return stats, ""


def row_names(x: Any) -> Any:
    """The index of the first table among the data, if it differs from the position and names each row once."""
    parts = x.values() if isinstance(x, Mapping) else x if isinstance(x, tuple | list) else (x,)
    for part in parts:
        if isinstance(part, pd.DataFrame | pd.Series):
            index = part.index
            if index.equals(pd.RangeIndex(len(index))) or not index.is_unique:
                return None
            # a file keeps numbers and dates as they are, and all else as text
            numbers = index.inferred_type in ("integer", "floating") or isinstance(index, pd.DatetimeIndex)
            return index.to_numpy() if numbers else [str(label) for label in index]
    return None


def _attrs(fitted: FittedModel, seed: int) -> dict[str, Any]:
    """What a netCDF file can keep: text and numbers."""
    found = versions()
    return {
        "model": model_record(fitted.model)["name"],
        "objective": str(fitted.settings.get("objective", "")),
        "seed": seed,
        "sampling": "independent draws from the guide",
        "converged": fitted.convergence.word,
        "convergence": fitted.convergence.sentence,
        "created_at": datetime.now(UTC).isoformat(),
        "inference_library": "pyrolvm",
        "inference_library_version": found.pop("pyrolvm"),
        **{f"{k}_version": str(v) for k, v in found.items()},  # torch's is no plain text
    }
