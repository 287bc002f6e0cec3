"""Names for the dimensions of draws, from plates and roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyrolvm.errors import SettingError

FEATURE = "feature"

Arrays = dict[str, dict[str, np.ndarray]]
Dims = dict[str, dict[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Layout:
    """The dimensions of a site: the names of its plates, the data plate first, and its event shape."""

    plates: tuple[str, ...]
    event_shape: tuple[int, ...]
    data: bool


def name_dims(
    arrays: Arrays,
    layouts: Mapping[str, Layout],
    given: Mapping[str, Sequence[str]],
    row_dim: str,
    rows: Sequence[Any] | None,
    columns: Sequence[str] | None,
) -> tuple[Dims, dict[str, Any]]:
    """Names of all dimensions after the draws, and the labels of rows and features where they fit."""
    variables = {name for group in arrays.values() for name in group} | {"chain", "draw"}
    # the entries of the first vector of data are features; any other vector's are named after their site
    vectors = [k for k, v in layouts.items() if v.data and len(v.event_shape) == 1]
    events = {k: _numbered(k, len(v.event_shape)) for k, v in layouts.items()}
    events |= dict.fromkeys(vectors[:1], (FEATURE,)) | {k: tuple(v) for k, v in given.items()}
    dims: Dims = {}
    sizes: dict[str, int] = {}
    for group, values in arrays.items():
        dims[group] = {}
        for name, value in values.items():
            names = _names(group, name, value, layouts, events, row_dim)
            dims[group][name] = tuple(_clear(n, variables) for n in names)
            _measure(dims[group][name], value.shape[group != "observed_data" :], sizes)
    labels = {_clear(row_dim, variables): rows, _clear(FEATURE, variables): columns}
    return dims, {k: list(v) for k, v in labels.items() if v is not None and sizes.get(k) == len(v)}


def _numbered(site: str, number: int) -> tuple[str, ...]:
    """Names after the site: one without a number, several with theirs."""
    return (f"{site}_dim",) if number == 1 else tuple(f"{site}_dim_{i}" for i in range(number))


def _names(
    group: str,
    name: str,
    value: np.ndarray,
    layouts: Mapping[str, Layout],
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


def check_dims(layouts: Mapping[str, Layout], given: Mapping[str, Sequence[str]]) -> None:
    """Raise `SettingError` for names of unknown sites, or of another number of dimensions."""
    for site, names in given.items():
        if site not in layouts:
            raise SettingError(f"dims names the site '{site}', which is not one of {', '.join(layouts)}")
        shape = layouts[site].event_shape
        if isinstance(names, str) or len(names) != len(shape) or len(set(names)) < len(names):
            raise SettingError(
                f"dims gives '{site}' the names {names!r}, but its event dimensions are {list(shape)}: "
                f"type a list of {len(shape)} different names"
            )
