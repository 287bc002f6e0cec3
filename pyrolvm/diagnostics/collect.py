"""From a fitted pair to named arrays on the host, a chunk of rows at a time: what `to_inference_data` hands to ArviZ."""

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

from pyrolvm.errors import SettingError, count
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.posterior.saving import model_record, versions
from pyrolvm.inference.program.draws import Draws, tidy
from pyrolvm.inference.program.enumerated import TOGETHER, enumerated_sites
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import Structure, sample_sites
from pyrolvm.progress import watched

POSTERIOR = {"posterior", "posterior_predictive", "log_likelihood", "sample_stats"}
PRIOR = {"prior", "prior_predictive"}
JOINT = ("log_p", "log_q")
ROWS = ("log_p_row", "log_q_row")
GLOBAL = ("log_p_global", "log_q_global")
FEATURE = "feature"

Arrays = dict[str, dict[str, np.ndarray]]
Dims = dict[str, dict[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Collected:
    """Named arrays.

    Attributes
    ----------
    arrays : dict
        Group -> variable -> [draws, plates..., event...], without draws in "observed_data".
    dims : dict
        Group -> variable -> the names of its dimensions after the draws.
    coords : dict
        Dimension -> labels, where there are any but positions.
    attrs : dict
        What a netCDF file can keep: text and numbers.
    """

    arrays: Arrays
    dims: Dims
    coords: dict[str, Any]
    attrs: dict[str, Any]


@dataclass(frozen=True)
class _Layout:
    """The dimensions of a site: the names of its plates, the data plate first, and its event shape."""

    plates: tuple[str, ...]
    event_shape: tuple[int, ...]
    data: bool


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


def collect(
    fitted: FittedModel,
    x: Any,
    num_samples: int,
    groups: Sequence[str],
    dims: Mapping[str, Sequence[str]],
    seed: int,
    *,
    progress: bool = True,
) -> Collected:
    """The wanted groups for the rows of `x`; draws that are not wanted are dropped chunk by chunk."""
    count("num_samples", num_samples)
    pair = fitted.pair(x)
    _check_memory(fitted, pair.num_rows, num_samples, groups)
    parts = _Parts({s.name for s in fitted.structure.sites if s.local} | {TOGETHER, *ROWS}, groups)
    layouts = _observe(pair, parts)
    _check_dims(layouts, dims)
    options: dict[str, Any] = {"seed": seed, "progress": progress}
    if POSTERIOR & set(groups):
        enumerated_sites(fitted.structure)  # those that cannot be drawn are refused, not left at the prior
        for draws in _draws(fitted, pair, num_samples, **options):
            parts.add("posterior", draws.values)
            parts.add("posterior_predictive", draws.predictive)
            parts.add("log_likelihood", draws.pointwise)
            parts.add("sample_stats", _densities(draws))
    if PRIOR & set(groups):
        for draws in _draws(fitted, pair, num_samples, prior=True, **options):
            parts.add("prior", draws.values)
            parts.add("prior_predictive", draws.predictive)
    arrays = {g: v for g in groups if (v := parts.whole(g))}
    attrs = _attrs(fitted, seed)
    if "sample_stats" in arrays:
        arrays["sample_stats"], note = _stats(arrays["sample_stats"], fitted, pair)
        attrs |= {"weights": note} if note else {}
    plate = fitted.structure.data_plate.name if fitted.structure.data_plate else "row"
    named, coords = name_dims(arrays, layouts, dims, plate, row_names(x), fitted.columns or pair.batch.columns)
    return Collected(arrays, named, coords, attrs)


def _draws(fitted: FittedModel, pair: Pair, num_samples: int, *, progress: bool, **options: Any) -> Any:
    parts = fitted.draw_chunks(pair.batch, num_samples, **options)
    what = "draws of the prior" if options.get("prior") else "draws of the posterior"
    return watched(parts, what, len(list(pair.chunks(num_samples))), enabled=progress)


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
def _observe(pair: Pair, parts: _Parts) -> dict[str, _Layout]:
    """The layout of every site, from the model run at the guide's means; its data go to `parts`."""
    layouts: dict[str, _Layout] = {}
    data = {s.name for s in pair.structure.observed}
    for chunk in pair.chunks():
        sites = list(sample_sites(chunk.model(given=chunk.means())))
        layouts = layouts or {s["name"]: _layout(s, pair.structure, s["name"] in data) for s in sites}
        values = {s["name"]: tidy(pair.structure, s, s["value"])[0] for s in sites if s["name"] in data}
        parts.add("observed_data", values)
    return layouts


def _layout(site: Any, structure: Structure, data: bool) -> _Layout:
    """Plates in the order in which draws have them: the data plate, then the others from the left."""
    plate = structure.data_plate.name if structure.data_plate else None
    frames = sorted((f for f in site["cond_indep_stack"] if f.vectorized), key=lambda f: f.dim)
    frames.sort(key=lambda f: f.name != plate)
    return _Layout(tuple(f.name for f in frames), tuple(site["fn"].event_shape), data)


def name_dims(
    arrays: Arrays,
    layouts: Mapping[str, _Layout],
    given: Mapping[str, Sequence[str]],
    row_dim: str,
    rows: Sequence[Any] | None,
    columns: Sequence[str] | None,
) -> tuple[Dims, dict[str, Any]]:
    """Names of all dimensions after the draws, and the labels of rows and features where they fit."""
    variables = {name for group in arrays.values() for name in group} | {"chain", "draw"}
    events = _event_names(layouts) | {k: tuple(v) for k, v in given.items()}
    dims, sizes = {}, dict[str, int]()
    for group, values in arrays.items():
        dims[group] = {
            name: _distinct(_names(group, name, value, layouts, events, row_dim), variables)
            for name, value in values.items()
        }
        for name, value in values.items():
            _measure(dims[group][name], value.shape[group != "observed_data" :], sizes)
    labels = {_clear(row_dim, variables): rows, _clear(FEATURE, variables): columns}
    return dims, {k: list(v) for k, v in labels.items() if v is not None and sizes.get(k) == len(v)}


def _event_names(layouts: Mapping[str, _Layout]) -> dict[str, tuple[str, ...]]:
    """The entries of the first vector of data are features; any other vector's are named after their site."""
    vectors = [k for k, v in layouts.items() if v.data and len(v.event_shape) == 1]
    return {
        k: (FEATURE,) if k in vectors[:1] else (f"{k}_dim",) if n == 1 else tuple(f"{k}_dim_{i}" for i in range(n))
        for k, n in ((k, len(v.event_shape)) for k, v in layouts.items())
    }


def _names(
    group: str,
    name: str,
    value: np.ndarray,
    layouts: Mapping[str, _Layout],
    events: Mapping[str, tuple[str, ...]],
    row_dim: str,
) -> tuple[str, ...]:
    wanted = value.ndim - (group != "observed_data")
    if group == "sample_stats" or name not in layouts:
        return (row_dim,)[:wanted]
    plates = layouts[name].plates
    names = plates[:wanted] if group == "log_likelihood" else plates + events[name]
    # dimensions that the program declares neither by a plate nor by to_event have no name of their own
    return names if len(names) == wanted else tuple(f"{name}_dim_{i}" for i in range(wanted))


def _distinct(names: tuple[str, ...], variables: set[str]) -> tuple[str, ...]:
    return tuple(_clear(name, variables) for name in names)


def _clear(name: str, variables: set[str]) -> str:
    """A dimension may not be called like a variable: a site "data" in a plate "data"."""
    while name in variables:
        name += "_dim"
    return name


def _measure(names: tuple[str, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    for name, size in zip(names, shape, strict=True):
        if sizes.setdefault(name, size) != size:
            raise SettingError(
                f"the dimension '{name}' has {sizes[name]} entries in one site and {size} in another: "
                "name them apart with dims={'site': [...]}"
            )


def _check_dims(layouts: Mapping[str, _Layout], given: Mapping[str, Sequence[str]]) -> None:
    for site, names in given.items():
        if site not in layouts:
            raise SettingError(f"dims names the site '{site}', which is not one of {', '.join(layouts)}")
        shape = layouts[site].event_shape
        if isinstance(names, str) or len(names) != len(shape) or len(set(names)) < len(names):
            raise SettingError(
                f"dims gives '{site}' the names {names!r}, but its event dimensions are {list(shape)}: "
                f"type a list of {len(shape)} different names"
            )


def _densities(draws: Draws) -> dict[str, Tensor]:
    """log p and log q: by row, and what the global latents add."""
    assert draws.log_prior is not None
    assert draws.log_likelihood is not None
    assert draws.log_guide is not None
    shared = zip(GLOBAL, (draws.global_log_prior, draws.global_log_guide), strict=True)
    rows = {"log_p_row": draws.log_prior + draws.log_likelihood, "log_q_row": draws.log_guide}
    return rows | {k: v for k, v in shared if v is not None}


def _stats(parts: dict[str, np.ndarray], fitted: FittedModel, pair: Pair) -> tuple[dict[str, np.ndarray], str]:
    """Log-densities of each row, and of all, where they mean something; and why not, where they do not.

    The joint densities weigh draws of latents that all data share, whose posterior is that of the training data whole:
    of other rows the weights p(x, g) / q(g) would lead to another posterior.
    """
    structure, stats, note = fitted.structure, {}, ""
    if structure.data_plate is not None and structure.joint_guide is None:
        stats = {row: parts[row] for row in ROWS if parts[row].shape[1] == pair.num_rows}
    if structure.global_latents and pair.batch.num_rows != fitted.num_rows:
        note = (
            f"no log_p and log_q: '{structure.global_latents[0].name}' is shared by all data, its guide is fitted to "
            f"{fitted.num_rows} rows, and weights for the {pair.batch.num_rows} rows given would lead to another "
            "posterior"
        )
    else:
        for joint, row, shared in zip(JOINT, ROWS, GLOBAL, strict=True):
            stats[joint] = parts[row].sum(1, dtype=np.float64) + parts.get(shared, 0.0)
    return stats, note


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
