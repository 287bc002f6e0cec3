"""From a run of a pair to its structure: what each site is, what depends on what, which parameters belong to rows."""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro.distributions import Delta, TransformedDistribution
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.data.batch import Batch
from pyrolvm.inference.program.hints import why_fails
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.rows_plate import find_data_plate, holds_some
from pyrolvm.inference.program.running import every_row, explained
from pyrolvm.inference.program.structure import (
    LEFT_TO_PRIOR,
    LOSS,
    Plate,
    Site,
    Structure,
    base,
    in_plate,
    is_bound,
    is_deterministic,
    is_discrete,
    is_factor,
    mask_of,
    sample_sites,
    with_sizes,
)
from pyrolvm.plates import Rows


def trial_traces(program: Program, batch: Batch) -> tuple[Trace, Trace, Rows]:
    """(model trace, guide trace, rows with the plates and tables that were used) of one run with all validation on."""
    with program.untouched(), program.scope(batch, validate=True) as rows, torch.no_grad():
        with explained(batch, "guide"):
            guide_trace = with_sizes(pyro.poutine.trace(program.guide).get_trace(*batch.args, **batch.kwargs))
        with suppress(
            Exception
        ):  # what is wrong is said later; a flow without inverse knows its last draw only
            guide_trace.compute_log_prob()
        replayed = pyro.poutine.replay(program.model, trace=guide_trace)
        with explained(batch, "model", lambda: why_fails(guide_trace, program, batch)):
            model_trace = with_sizes(pyro.poutine.trace(replayed).get_trace(*batch.args, **batch.kwargs))
    assert rows is not None
    return model_trace, guide_trace, rows


def read_structure(
    program: Program, batch: Batch, model: Trace, guide: Trace, rows: Rows | None = None
) -> Structure:
    """The structure that a pair of traces shows, and the plates and tables that the program used under `rows`."""
    made = rows.made if rows else ()
    tables = tuple(n for n, p in program.parameters.items() if rows and id(p) in rows.tables)
    subsamples = holds_some(model, made, batch.num_rows) and _runs_whole(program, batch, made)
    plate = find_data_plate(
        model, len(batch.indices), drawn=subsamples, named=made, arguments=batch.carrying()
    )
    drawn = {s["name"]: s for s in sample_sites(guide)}
    sources = _sources(program, batch, guide)
    whole = len(batch.indices) == batch.total_rows
    return Structure(
        tuple(_site(s, plate, drawn, sources, batch) for s in sample_sites(model)),
        plate,
        _nesting(model, guide),
        per_datum=tuple(dict.fromkeys(tables + _per_datum(program, batch, guide, plate))),
        joint_guide=_joint(guide, plate),
        takes_any_rows=plate is not None
        and (not whole or (plate.name in made and _takes_some(program, batch))),
        mixed=_mixed(guide, sources),
        tempered=_is_tempered(model, guide),
        row_tables=tables,
        whole=subsamples,
        weighted=_is_weighted(model, guide),
    )


def _runs_whole(program: Program, batch: Batch, made: Collection[str]) -> bool:
    """Whether the program runs where its plates hold all of their rows: it indexes the data by those of the plate."""
    with (
        program.untouched(),
        program.scope(batch, "predict", validate=True),
        every_row(batch),
        torch.no_grad(),
        suppress(Exception),  # whatever a program raises that was given a minibatch of its own
    ):
        guide = pyro.poutine.trace(program.guide).get_trace(*batch.args, **batch.kwargs)
        replayed = pyro.poutine.replay(program.model, trace=guide)
        model = pyro.poutine.trace(replayed).get_trace(*batch.args, **batch.kwargs)
        model.compute_log_prob()
        return not holds_some(model, made)
    return False


def _takes_some(program: Program, batch: Batch) -> bool:
    """Whether the pair runs on two of its rows: nothing in it that is no argument is of all of them."""
    if batch.num_rows <= 2:
        return True
    few = batch.take(torch.arange(2, device=batch.indices.device))
    with program.untouched(), program.scope(few, "predict"), torch.no_grad(), suppress(Exception):
        guide = pyro.poutine.trace(program.guide).get_trace(*few.args, **few.kwargs)
        model = pyro.poutine.replay(program.model, trace=guide)
        pyro.poutine.trace(model).get_trace(*few.args, **few.kwargs).compute_log_prob()
        return True
    return False


def _site(
    site: dict[str, Any],
    plate: Plate | None,
    drawn: dict[str, Any],
    sources: dict[str, frozenset[str]],
    batch: Batch,
) -> Site:
    fn, name = site["fn"], site["name"]
    kind = _kind(site, plate, batch)
    enumerated = site["infer"].get("enumerate") is not None and kind == "latent"
    return Site(
        name=name,
        kind=kind,
        local=in_plate(site, plate),
        family=_family(fn),
        batch_shape=tuple(fn.batch_shape),
        event_shape=tuple(fn.event_shape),
        plates=tuple(f.name for f in site["cond_indep_stack"] if f.vectorized),
        enumerated=enumerated,
        in_guide=name in drawn,
        num_states=len(fn.enumerate_support(expand=False)) if enumerated else 1,
        discrete=kind == "latent" and is_discrete(fn),
        point=name in drawn and isinstance(base(drawn[name]["fn"]), Delta) and not sources.get(name),
        left_to_prior=bool(site["infer"].get(LEFT_TO_PRIOR)) and name not in drawn,
        bound=is_bound(fn),
        markov="_markov_scope" in site["infer"],
        masked=(mask := mask_of(site)) is not None and not bool(torch.as_tensor(mask).all()),
    )


def _family(fn: Any) -> str:
    """The name of a distribution below `to_event` and masks; of a flow, not that of its base."""
    while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    return type(fn).__name__


def _kind(site: dict[str, Any], plate: Plate | None, batch: Batch) -> str:
    if not site["is_observed"]:
        return "latent"
    if is_factor(site):
        return "factor"
    if is_deterministic(site):
        return "deterministic"
    outside = plate is not None and not in_plate(site, plate)
    return "given" if outside and not _is_argument(site["value"], batch) else "data"


def _is_argument(value: Tensor, batch: Batch) -> bool:
    """Whether a value lies in the memory of one of the program's arguments, or is equal to one."""
    for _, tensor in batch.tensors():
        if value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            return True
        if value.shape == tensor.shape and torch.equal(value, tensor.to(value.dtype)):
            return True
    return False


def _nesting(*traces: Trace) -> int:
    dims = [f.dim for t in traces for s in sample_sites(t) for f in s["cond_indep_stack"] if f.vectorized]
    return -min(dims, default=0)


def _is_tempered(model: Trace, guide: Trace) -> bool:
    """Whether data are weighted otherwise than latents, apart from the plates: a power of the likelihood, or a loss.

    A weight of rows around the whole program is none; around the model alone it is a power of its joint density.
    """
    if any(s["infer"].get(LOSS) for s in sample_sites(model)):
        return True
    data = [_own_scale(s) for s in sample_sites(model) if s["is_observed"]]
    latent = [_own_scale(s) for s in sample_sites(model) if not s["is_observed"]]
    usual = latent[0] if latent else torch.ones((), dtype=torch.float64)
    if any(bool((scale - usual).abs().max() > 1e-6) for scale in data):
        return True
    return bool((usual - 1).abs().max() > 1e-6) and not _is_weighted(model, guide)


def _is_weighted(model: Trace, guide: Trace) -> bool:
    """Whether all sites of both have one scale, other than 1, apart from the plates."""
    scales = [_own_scale(s) for trace in (model, guide) for s in sample_sites(trace)]
    usual = scales[0] if scales else torch.ones((), dtype=torch.float64)
    alike = all(scale.shape == usual.shape and torch.allclose(scale, usual) for scale in scales)
    return alike and not torch.allclose(usual, torch.ones_like(usual))


def _own_scale(site: dict[str, Any]) -> Tensor:
    """The scale of a site without that of its plates."""
    plates = math.prod(f.full_size / f.size for f in site["cond_indep_stack"] if f.vectorized)
    return torch.as_tensor(site["scale"], dtype=torch.float64) / plates


def _sources(program: Program, batch: Batch, guide: Trace) -> dict[str, frozenset[str]]:
    """Guide site -> the auxiliary sites that its distribution depends on; empty where it has none to depend on."""
    drawn = [s for s in sample_sites(guide) if not s["is_observed"]]  # a factor is no draw
    auxiliary = {s["name"] for s in drawn if s["infer"].get("is_auxiliary")}
    if not auxiliary:
        return {}
    with program.untouched(), program.scope(batch), torch.no_grad(), TrackProvenance():
        try:
            tracked = pyro.poutine.trace(program.guide).get_trace(*batch.args, **batch.kwargs)
            return {
                s["name"]: get_provenance(s["fn"].log_prob(detach_provenance(s["value"]))) & auxiliary
                for s in sample_sites(tracked)
            }
        except (
            Exception
        ):  # an operation that tracked tensors do not pass: each draw may depend on all of them
            return {s["name"]: frozenset(auxiliary) for s in drawn}


def _mixed(guide: Trace, sources: dict[str, frozenset[str]]) -> tuple[str, ...]:
    mixed: set[str] = set()
    for site in sample_sites(guide):
        if not site["infer"].get("is_auxiliary") and not isinstance(base(site["fn"]), Delta):
            mixed |= sources.get(site["name"], frozenset())
    return tuple(sorted(mixed))


def _joint(guide_trace: Trace, plate: Plate | None) -> str | None:
    """An auxiliary draw for all data at once (AutoMultivariateNormal, say): no density per datum."""
    if plate is None:
        return None
    inside = {s["name"]: in_plate(s, plate) for s in sample_sites(guide_trace)}
    auxiliary = [s["name"] for s in sample_sites(guide_trace) if s["infer"].get("is_auxiliary")]
    outside = [name for name in auxiliary if not inside[name]]
    computed = any(inside[s["name"]] and isinstance(base(s["fn"]), Delta) for s in sample_sites(guide_trace))
    local_auxiliary = any(inside[name] for name in auxiliary)
    return outside[0] if outside and computed and not local_auxiliary else None


def _per_datum(program: Program, batch: Batch, guide: Trace, plate: Plate | None) -> tuple[str, ...]:
    """Parameters of which each row has its own entry: declared in the plate, or picked by the row's number."""
    declared = _declared_in_plate(guide, plate)
    return declared or (_picked_by_row(program, batch) if plate is not None else ())


def _declared_in_plate(guide: Trace, plate: Plate | None) -> tuple[str, ...]:
    found = []
    nodes: dict[str, Any] = guide.nodes
    for name, site in nodes.items():
        inside = plate is not None and any(f.name == plate.name for f in site.get("cond_indep_stack", ()))
        if site["type"] == "param" and inside and site["kwargs"].get("event_dim") is not None:
            assert plate is not None
            shape, dim = site["value"].shape, plate.dim - site["kwargs"]["event_dim"]
            if len(shape) >= -dim and shape[dim] > 1:
                found.append(name)
    return tuple(found)


def _picked_by_row(program: Program, batch: Batch) -> tuple[str, ...]:
    """Parameters whose gradient moves to other entries when the same data get other row numbers."""
    total = batch.total_rows
    if total < 2 or not batch.num_rows:
        return ()
    first = torch.arange(min(2, total // 2), device=batch.indices.device)
    few = batch.take(first.clamp(max=batch.num_rows - 1))
    try:
        here, there = (_gradients(program, few.numbered(rows)) for rows in (first, total - 1 - first))
    except Exception:  # a program that takes no other number of rows has none to confuse
        return ()
    return tuple(name for name in here if name not in there or _moved(here[name], there[name]))


def _moved(here: Tensor, there: Tensor) -> bool:
    """Whether a gradient is at other entries; that it is rounded otherwise (on a GPU, say) does not count."""
    elsewhere = bool(((here != 0) != (there != 0)).any())
    return elsewhere and not torch.allclose(here, there, rtol=1e-3, equal_nan=True)


def _gradients(program: Program, batch: Batch) -> dict[str, Tensor]:
    """The gradient of the sum of all log-densities, by the same noise each time."""
    names, leaves = list(program.parameters), list(program.parameters.values())
    with program.untouched(), seeded(0, program.device), program.scope(batch, "predict"), torch.enable_grad():
        guide = pyro.poutine.trace(program.guide).get_trace(*batch.args, **batch.kwargs)
        replayed = pyro.poutine.replay(program.model, trace=guide)
        model = pyro.poutine.trace(replayed).get_trace(*batch.args, **batch.kwargs)
        total = torch.as_tensor(model.log_prob_sum() + guide.log_prob_sum())
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}
