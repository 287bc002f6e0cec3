"""Names for the dimensions of draws, from plates, roles and lengths: arrays in, named arrays out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pyrolvm.errors import SettingError

FEATURE = "feature"
Arrays = dict[str, dict[str, np.ndarray]]


class Layout(NamedTuple):
    """The dimensions of a site, [plates..., event...]; `categories` of a discrete one."""

    plates: tuple[str, ...] = ()
    event_shape: tuple[int, ...] = ()
    observed: bool = False
    local: bool = False
    categories: int | None = None


@dataclass(frozen=True)
class Tables:
    """Plain arrays with names: group -> variable -> (dimensions, values), and the coordinates of each dimension."""

    groups: dict[str, dict[str, tuple[tuple[str, ...], np.ndarray]]]
    coords: dict[str, np.ndarray]
    attrs: dict[str, Any]


def build_tables(
    arrays: Arrays,
    layouts: Mapping[str, Layout],
    *,
    row_dim: str | None = None,
    row_names: Sequence[Any] | None = None,
    columns: Sequence[str] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Tables:
    """Name every dimension of `arrays`: group -> variable -> [draws, plates..., event...].

    "observed_data" has no draws, "log_likelihood" no event dimensions, "sample_stats" is [draws] or
    [draws, rows]. Raises `SettingError` for `dims` of unknown sites or of another number of dimensions.
    """
    events = event_dims(layouts, dims or {})
    variables = {name for group in arrays.values() for name in group}
    groups = {
        group: {
            name: _table(group, value, _dims_of(group, name, value, layouts, events, row_dim), variables)
            for name, value in values.items()
        }
        for group, values in arrays.items()
    }
    labels = {_clear(k, variables): v for k, v in ((row_dim, row_names), (FEATURE, columns)) if k}
    return Tables(groups, _coordinates(groups, labels), dict(attrs or {}))


def _dims_of(
    group: str,
    name: str,
    value: np.ndarray,
    layouts: Mapping[str, Layout],
    events: Mapping[str, tuple[str, ...]],
    row_dim: str | None,
) -> tuple[str, ...]:
    if group == "sample_stats" or name not in layouts:
        return (row_dim or "row",)[: value.ndim - 1]
    if group == "log_likelihood":  # summed over inner plates, where states are summed out
        return layouts[name].plates[: value.ndim - 1]
    return layouts[name].plates + events[name]


def _table(
    group: str, value: np.ndarray, dims: tuple[str, ...], variables: set[str]
) -> tuple[tuple[str, ...], np.ndarray]:
    dims = tuple(_clear(d, variables) for d in dims)
    return (dims, value) if group == "observed_data" else (("chain", "draw", *dims), value[None])


def _clear(name: str, variables: set[str]) -> str:
    """A dimension may not be called like a variable: a site "data" in a plate "data"."""
    while name in variables or name in ("chain", "draw"):
        name += "_dim"
    return name


def event_dims(
    layouts: Mapping[str, Layout], given: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Names of each site's event dimensions: as `given`, else by role and length (see `to_inference_data`)."""
    _check_given(layouts, given)
    own = _own_names(layouts) | {k: tuple(v) for k, v in given.items()}
    named = {
        (name, size)
        for site, dims in own.items()
        for name, size in zip(dims, layouts[site].event_shape, strict=True)
    }
    named |= {(f"{k}_category", v.categories) for k, v in layouts.items() if v.categories}
    lengths = Counter(size for _, size in named)
    known = {size: name for name, size in named if lengths[size] == 1}
    return {site: own.get(site) or _by_length(site, v.event_shape, known) for site, v in layouts.items()}


def _own_names(layouts: Mapping[str, Layout]) -> dict[str, tuple[str, ...]]:
    """The first observed vector has features; every local latent vector has a dimension of its own."""
    vectors = {k: v for k, v in layouts.items() if len(v.event_shape) == 1 and (v.observed or v.local)}
    observed = [k for k, v in vectors.items() if v.observed]
    return {k: (FEATURE,) if k in observed[:1] else (f"{k}_dim",) for k in vectors}


def _by_length(site: str, shape: tuple[int, ...], known: Mapping[int, str]) -> tuple[str, ...]:
    names: list[str] = []
    for i, size in enumerate(shape):
        name = known.get(size, f"{site}_dim" if len(shape) == 1 else f"{site}_dim_{i}")
        while name in names:  # a covariance: feature by feature
            name += "_bis"
        names.append(name)
    return tuple(names)


def _check_given(layouts: Mapping[str, Layout], given: Mapping[str, Sequence[str]]) -> None:
    for site, names in given.items():
        if site not in layouts:
            raise SettingError(f"dims names the site '{site}', which is not one of {', '.join(layouts)}")
        shape = layouts[site].event_shape
        if isinstance(names, str) or len(names) != len(shape) or len(set(names)) < len(names):
            raise SettingError(
                f"dims gives '{site}' the names {names!r}, but its event dimensions are {list(shape)}: "
                f"type a list of {len(shape)} different names"
            )


def _coordinates(
    groups: Mapping[str, Mapping[str, tuple[tuple[str, ...], np.ndarray]]],
    labels: Mapping[str, Sequence[Any] | None],
) -> dict[str, np.ndarray]:
    """Every dimension's labels, where they fit, or positions."""
    sizes: dict[str, int] = {}
    for dims, value in (v for group in groups.values() for v in group.values()):
        for name, size in zip(dims, value.shape, strict=True):
            if sizes.setdefault(name, size) != size:
                raise SettingError(
                    f"the dimension '{name}' has {sizes[name]} entries in one site and {size} in another: "
                    "name them apart with dims={'site': [...]}"
                )
    coords = {}
    for name, size in sizes.items():
        given = labels.get(name.removesuffix("_bis"))
        coords[name] = np.asarray(given) if given is not None and len(given) == size else np.arange(size)
    return coords
