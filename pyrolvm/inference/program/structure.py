"""What a program is made of: its sites, its plates, and whether its parts fit together.

Looked up once, before the first step, with all of Pyro's validation on. What Pyro only warns of
(a site the guide forgot) or cannot know (the size of the whole data set) is an error here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.data.arrays import Batch
from pyrolvm.errors import ProgramError
from pyrolvm.inference.program.program import Program, explained

LEFT_TO_PRIOR = "left_to_prior"


@dataclass(frozen=True)
class Plate:
    """A vectorised plate: `size` rows in the batch, `full_size` in the whole data."""

    name: str
    dim: int
    size: int
    full_size: int


@dataclass(frozen=True)
class Site:
    """A sample site: shapes as in the batch that was looked at. `num_states`: those summed over if enumerated."""

    name: str
    observed: bool
    local: bool
    family: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    plates: tuple[str, ...]
    enumerated: bool = False
    num_states: int = 1
    in_guide: bool = True
    discrete: bool = False


@dataclass(frozen=True)
class Structure:
    """The static structure of a program.

    `data_plate` is the plate over the rows of the data, None if the program has none;
    `num_data` what bounds are divided by: the rows of the whole data, 1 without a data plate;
    `per_datum` the guide's parameters that have one entry per row of the training data;
    `joint_guide` a guide site outside the data plate that local latents are computed from, if there is one;
    `takes_any_rows` whether the program runs on other numbers of rows than those it was fitted to.
    """

    sites: tuple[Site, ...]
    data_plate: Plate | None
    max_plate_nesting: int
    per_datum: tuple[str, ...] = ()
    joint_guide: str | None = None
    takes_any_rows: bool = False

    @property
    def num_data(self) -> int:
        """Rows of the whole data that bounds are per datum of; 1 if the program has no data plate."""
        return self.data_plate.full_size if self.data_plate else 1

    @property
    def observed(self) -> tuple[Site, ...]:
        """The observed sites."""
        return tuple(s for s in self.sites if s.observed)

    @property
    def local_latents(self) -> tuple[Site, ...]:
        """Latents inside the data plate, one value per datum."""
        return tuple(s for s in self.sites if not s.observed and s.local)

    @property
    def global_latents(self) -> tuple[Site, ...]:
        """Latents outside the data plate, shared by all data."""
        return tuple(s for s in self.sites if not s.observed and not s.local)

    def table(self) -> str:
        """One line per site: name, role, distribution, batch and event shape, plates."""
        return site_table(self.sites)


def site_table(sites: tuple[Site, ...]) -> str:
    """The sites as text, for errors and reports."""
    rows = [("site", "role", "distribution", "batch shape", "event shape", "plates")]
    for s in sites:
        role = "observed" if s.observed else ("local" if s.local else "global") + " latent"
        plates = ", ".join(s.plates) or "-"
        rows.append((s.name, role, s.family, str(s.batch_shape), str(s.event_shape), plates))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)


def inspect_program(program: Program, batch: Batch, rows: tuple[int, Tensor]) -> Structure:
    """Run the pair once, check it, and return its structure.

    `rows` is (N, indices [batch]). Raises `ProgramError` that names the site and what to type.
    """
    model_trace, guide_trace, made = _traces(program, batch, rows)
    plate = find_data_plate(model_trace, rows[0], len(rows[1]))
    in_guide = {s["name"] for s in sample_sites(guide_trace)}
    sites = tuple(_site(s, plate, s["name"] in in_guide) for s in sample_sites(model_trace))
    _check_match(model_trace, guide_trace)
    _check_shapes(model_trace, guide_trace, sites)
    _check_scale(model_trace, sites, plate, rows)
    nesting = _nesting(model_trace, guide_trace)
    structure = Structure(
        sites,
        plate,
        nesting,
        per_datum=_per_datum(guide_trace, plate),
        joint_guide=_joint(guide_trace, plate),
        takes_any_rows=plate is not None and (plate.name in made or len(rows[1]) < rows[0]),
    )
    if plate is not None and len(rows[1]) < rows[0]:
        _check_other_size(program, batch, rows)
    return structure


def sample_sites(trace: Trace) -> Iterator[Any]:
    """The sample sites of a trace, without the subsampling of plates."""
    for site in trace.nodes.values():
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample):
            yield site


def _traces(program: Program, batch: Batch, rows: tuple[int, Tensor]) -> tuple[Trace, Trace, set[str]]:
    with program.scope(rows, validate=True) as said, torch.no_grad():
        with explained(batch, "guide"):
            guide_trace = pyro.poutine.trace(program.guide).get_trace(*batch.args, **batch.kwargs)
        replayed = pyro.poutine.replay(program.model, trace=guide_trace)
        with explained(batch, "model"):
            model_trace = pyro.poutine.trace(replayed).get_trace(*batch.args, **batch.kwargs)
    return model_trace, guide_trace, said.made if said else set()


def _site(site: dict[str, Any], plate: Plate | None, in_guide: bool) -> Site:
    frames = [f for f in site["cond_indep_stack"] if f.vectorized]
    fn = site["fn"]
    enumerated = site["infer"].get("enumerate") is not None and not site["is_observed"]
    return Site(
        name=site["name"],
        observed=bool(site["is_observed"]),
        local=plate is not None and any(f.name == plate.name for f in frames),
        family=_family(fn),
        batch_shape=tuple(fn.batch_shape),
        event_shape=tuple(fn.event_shape),
        plates=tuple(f.name for f in frames),
        enumerated=enumerated,
        in_guide=in_guide,
        num_states=len(fn.enumerate_support(expand=False)) if enumerated else 1,
        discrete=not site["is_observed"] and _is_discrete(fn),
    )


def _family(fn: Any) -> str:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:
        return False


def find_data_plate(model_trace: Trace, num_rows: int, batch_rows: int) -> Plate | None:
    """The outermost plate of an observed site that runs over the rows of the data."""
    frames = {f for s in sample_sites(model_trace) if s["is_observed"] for f in s["cond_indep_stack"]}
    over_rows = [
        f
        for f in frames
        if f.vectorized
        and f.size == batch_rows
        and (f.full_size in (num_rows, batch_rows) or f.size < f.full_size)
    ]
    if not over_rows:
        return None
    frame = min(over_rows, key=lambda f: f.dim)
    return Plate(frame.name, frame.dim, frame.size, frame.full_size)


def _per_datum(guide_trace: Trace, plate: Plate | None) -> tuple[str, ...]:
    """Parameters with a batch dimension along the data plate: local variational parameters."""
    found = []
    sites: dict[str, Any] = guide_trace.nodes
    for name, site in sites.items():
        inside = plate is not None and any(f.name == plate.name for f in site.get("cond_indep_stack", ()))
        if site["type"] == "param" and inside and site["kwargs"].get("event_dim") is not None:
            assert plate is not None
            shape, dim = site["value"].shape, plate.dim - site["kwargs"]["event_dim"]
            if len(shape) >= -dim and shape[dim] > 1:
                found.append(name)
    return tuple(found)


def _joint(guide_trace: Trace, plate: Plate | None) -> str | None:
    """An auxiliary draw for all data at once (AutoMultivariateNormal, say): no density per datum."""
    if plate is None:
        return None
    inside = {
        s["name"]: any(f.name == plate.name for f in s["cond_indep_stack"]) for s in sample_sites(guide_trace)
    }
    auxiliary = [s["name"] for s in sample_sites(guide_trace) if s["infer"].get("is_auxiliary")]
    outside = [name for name in auxiliary if not inside[name]]
    computed = any(inside[s["name"]] and _family(s["fn"]) == "Delta" for s in sample_sites(guide_trace))
    local_auxiliary = any(inside[name] for name in auxiliary)
    return outside[0] if outside and computed and not local_auxiliary else None


def _nesting(*traces: Trace) -> int:
    dims = [f.dim for t in traces for s in sample_sites(t) for f in s["cond_indep_stack"] if f.vectorized]
    return -min(dims, default=0)


def _check_match(model_trace: Trace, guide_trace: Trace) -> None:
    in_model = {s["name"]: s for s in sample_sites(model_trace)}
    in_guide = {s["name"]: s for s in sample_sites(guide_trace)}
    latents = [n for n, s in in_model.items() if not s["is_observed"]]
    for name, site in in_guide.items():
        if name not in latents and not site["infer"].get("is_auxiliary"):
            raise ProgramError(
                f"the guide samples '{name}', which is no latent site of the model (its latents: "
                f"{', '.join(latents) or 'none'}): give both the same name, or mark it "
                "infer={'is_auxiliary': True}"
            )
    for name in latents:
        infer = in_model[name]["infer"]
        if name not in in_guide and not infer.get("enumerate") and not infer.get(LEFT_TO_PRIOR):
            raise ProgramError(
                f"the guide has no site '{name}', so it would be left at its prior: sample '{name}' in the "
                "guide, or mark it in the model with infer={'enumerate': 'parallel'} if it is discrete, or "
                f"infer={{'{LEFT_TO_PRIOR}': True}} if that is meant"
            )


def _check_shapes(model_trace: Trace, guide_trace: Trace, sites: tuple[Site, ...]) -> None:
    for role, trace in (("model", model_trace), ("guide", guide_trace)):
        try:
            trace.compute_log_prob()
            for site in sample_sites(trace):
                pyro.util.check_site_shape(site, math.inf)  # type: ignore[arg-type]
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().replace("\n", "\n  ")
            raise ProgramError(f"the {role}'s shapes do not fit:\n  {reason}\n{site_table(sites)}") from error


def _check_scale(
    model_trace: Trace, sites: tuple[Site, ...], plate: Plate | None, rows: tuple[int, Tensor]
) -> None:
    """A minibatch must weigh N/B against the global latents, and its plate must exist."""
    num_rows, batch_rows = rows[0], len(rows[1])
    if batch_rows == num_rows:
        return
    if plate is None:
        raise ProgramError(
            f"batch_size={batch_rows} takes rows, but no plate of the model runs over the rows of the data: "
            "put the observed site inside `with pyrolvm.data_plate(x):`, or leave batch_size out"
        )
    shared = [s.name for s in sites if not s.observed and not s.local]
    if shared and plate.full_size == batch_rows:
        raise ProgramError(
            f"'{shared[0]}' is shared by all data, but the plate '{plate.name}' says that there are only the "
            f"{batch_rows} rows of the batch, not {num_rows}, so its posterior would be too wide: write "
            f"`with pyrolvm.data_plate(x):` instead of pyro.plate('{plate.name}', len(x))"
        )


def _check_other_size(program: Program, batch: Batch, rows: tuple[int, Tensor]) -> None:
    """One row more: a dimension that only happens to equal the batch size shows itself."""
    indices = torch.cat([rows[1], rows[1][:1]])
    positions = torch.arange(len(indices), device=indices.device) % len(rows[1])
    larger = batch.take(positions)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found .* in .* but not", UserWarning)
        try:
            for trace in _traces(program, larger, (rows[0], indices))[:2]:
                trace.compute_log_prob()
        except (ProgramError, ValueError, RuntimeError) as error:
            raise ProgramError(
                f"the program runs on a batch of {len(rows[1])} rows but not on {len(indices)}: some shape in it "
                f"only happens to equal the batch size ({error})"
            ) from error
