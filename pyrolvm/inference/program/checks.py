"""Whether the parts of a program fit together: what Pyro only warns of or cannot know is an error here."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace

from pyrolvm.data.batch import Batch
from pyrolvm.errors import ProgramError, did_you_mean
from pyrolvm.inference.program.hints import reason_of
from pyrolvm.inference.program.masked import check_apart
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.reading import read_structure, trial_traces
from pyrolvm.inference.program.structure import (
    BOUND,
    LEFT_TO_PRIOR,
    Site,
    Structure,
    in_plate,
    is_bound,
    is_discrete,
    sample_sites,
    site_table,
)


def inspect_program(program: Program, batch: Batch) -> Structure:
    """Run the pair once, check it, and return its structure.

    The guide is completed by the sites that it leaves to the prior. Raises `ProgramError` that names the site and
    what to type.
    """
    model, guide, rows = trial_traces(program, batch)
    _check_match(model, guide)
    left = [s["name"] for s in sample_sites(model) if s["infer"].get(LEFT_TO_PRIOR) and _is_missing(s, guide)]
    _check_own_guide(model, guide)
    structure = read_structure(program, batch, model, guide, rows)
    program.complete_guide(left)
    _check_mixed(structure)
    _check_plates(model, guide)
    _check_events(model, guide)
    _check_shapes(model, guide, structure.sites)
    _check_masks(model, guide)
    if program.auto_guide is not None:
        check_apart(model, guide)
    _check_values(model, structure)
    _check_scale(structure, batch)
    if structure.data_plate is not None and len(batch.indices) < batch.total_rows:
        _check_other_size(program, batch)
    return structure


def _is_missing(site: dict, guide: Trace) -> bool:
    return not site["is_observed"] and site["name"] not in guide.nodes


def _check_match(model_trace: Trace, guide_trace: Trace) -> None:
    in_model = {s["name"]: s for s in sample_sites(model_trace)}
    latents = [n for n, s in in_model.items() if not s["is_observed"]]
    for site in sample_sites(guide_trace):
        name = site["name"]
        if name not in latents and not site["infer"].get("is_auxiliary"):
            near = did_you_mean(name, latents)
            raise ProgramError(
                f"the guide samples '{name}', which is no latent site of the model (its latents: "
                f"{', '.join(latents) or 'none'}): {near}give both the same name; if '{name}' is an auxiliary draw "
                f"that the latents are computed from, mark it infer={{'is_auxiliary': True}}"
            )
    for name in latents:
        site = in_model[name]
        infer = site["infer"]
        if name not in guide_trace.nodes and not infer.get("enumerate") and not infer.get(LEFT_TO_PRIOR):
            _refuse_forgotten(name, latents if len(latents) == len(in_model) else (), is_discrete(site["fn"]))


def _refuse_forgotten(name: str, unobserved: Sequence[str], discrete: bool) -> None:
    """`unobserved` are all sites of the model, if none of them is data."""
    if unobserved:
        raise ProgramError(
            f"no site of the model is observed, and the guide has no site '{name}': if that is the data, give it "
            f"pyro.sample('{name}', ..., obs=...); else sample it in the guide"
        )
    original = name.removesuffix("_unobserved")
    if original != name and discrete:
        raise ProgramError(
            f"'{original}' is observed with an obs_mask, so its missing entries are the latent '{name}', which is not "
            "marked to be summed out, as Pyro passes no infer= on to it: pass pyro.infer.config_enumerate(model, "
            f"default='parallel') as the model, or sample '{name}' in the guide"
        )
    if original != name:
        raise ProgramError(
            f"'{original}' is observed with an obs_mask, so its missing entries are the latent '{name}', which the "
            f"guide does not draw: leave them out of the likelihood by "
            f"pyro.poutine.mask(mask=...) around the site, or sample '{name}' in the guide"
        )
    raise ProgramError(
        f"the guide has no site '{name}', so it would be left at its prior: sample '{name}' in the "
        "guide, or mark it in the model with infer={'enumerate': 'parallel'} if it is discrete, or "
        f"infer={{'{LEFT_TO_PRIOR}': True}} if that is meant"
    )


def _check_mixed(structure: Structure) -> None:
    if structure.mixed:
        name = structure.mixed[0]
        raise ProgramError(
            f"the guide draws latents from a distribution that depends on the auxiliary '{name}', so that "
            f"their density is an integral over '{name}' that nothing computes, and the objective would be no bound: "
            f"compute the latents from '{name}' (dist.Delta), or give the model a density of '{name}' given the "
            f"latents, pyro.sample('{name}', ...) at its end, and take is_auxiliary off; or draw the latents from "
            "pyrolvm.SemiImplicit, whose density is a bound"
        )


def _check_own_guide(model: Trace, guide: Trace) -> None:
    """A site whose log p stands for a bound means what it says under the guide that it was written for only."""
    for site in sample_sites(model):
        other: Any = guide.nodes.get(site["name"])
        if is_bound(site["fn"]) and not (other is not None and other["infer"].get(BOUND)):
            raise ProgramError(
                f"the model has no density of '{site['name']}' but a bound that holds under its own guide only: leave "
                f"out guide=, or mark the guide's '{site['name']}' with infer={{'{BOUND}': True}} if it is that guide"
            )


def _check_shapes(model_trace: Trace, guide_trace: Trace, sites: tuple[Site, ...]) -> None:
    for role, trace in (("model", model_trace), ("guide", guide_trace)):
        try:
            trace.compute_log_prob()
            for site in sample_sites(trace):
                _check_batch(site, role, trace)
                pyro.util.check_site_shape(site, math.inf)  # type: ignore[arg-type]
        except ProgramError as error:
            raise ProgramError(f"{error}\n{site_table(sites)}") from None
        except KeyError as error:  # of a flow that knows the density of its own draws alone
            raise ProgramError(
                f"the {role}'s densities cannot be computed at given values ({error.args[0]}): take a flow that has an "
                "inverse, such as pyro.distributions.transforms.affine_coupling or spline"
            ) from error
        except (ValueError, RuntimeError) as error:
            reason = reason_of(error).replace("\n", "\n  ")
            what = "values are outside a support" if "within the support" in reason else "shapes do not fit"
            hint = _outside(reason, model_trace)
            raise ProgramError(f"the {role}'s {what}:\n  {reason}{hint}\n{site_table(sites)}") from error


def _outside(reason: str, model: Trace) -> str:
    """What to type where a value is outside the support of its distribution."""
    found = re.search(r"site '(\S+)':\s+Expected value argument", reason)
    if found is None:
        return ""
    nodes: dict[str, Any] = model.nodes
    if nodes[found.group(1)]["is_observed"]:
        return "\n  give the site a distribution on what the data are, or rescale them"
    return (
        "\n  the guide draws values that the model does not have: take a guide's distribution on that support, such as "
        "dist.LogNormal for positive values"
    )


def _check_batch(site: Any, role: str, trace: Trace) -> None:
    """Every dimension of a batch must be one of the site's plates."""
    plates = {f.dim: f for f in site["cond_indep_stack"] if f.vectorized}
    shape = tuple(site["fn"].batch_shape)
    free = [d for d in range(-len(shape), 0) if shape[d] > 1 and d not in plates]
    misplaced = [f for f in plates.values() for d in free if f.dim < d and f.size == shape[d]]
    if misplaced:
        plate, where = misplaced[0], next(d for d in free if shape[d] == misplaced[0].size)
        raise ProgramError(
            f"the plate '{plate.name}' is at dimension {plate.dim}, but the rows of '{site['name']}' are at dimension "
            f"{where} in the {role}: write dim={where} at the plate, in model and guide"
        )
    if free:
        _check_rows_once(site, trace)
        names = " and ".join(f"'{plates[d].name}'" for d in sorted(plates)) or "no plate"
        raise ProgramError(
            f"'{site['name']}' has the batch shape {list(shape)} in the {role}, but stands in {names}: if the "
            f"{' x '.join(str(shape[d]) for d in free)} are rows, put it inside their plate "
            f"(`with pyrolvm.data_plate(x):`); if they belong to one value, write .to_event({len(free)}) at "
            f"'{site['name']}'"
        )


def _check_rows_once(site: Any, trace: Trace) -> None:
    """Where a site has too many dimensions, a latent before it may hold the rows twice: in its plate and its event."""
    for other in sample_sites(trace):
        event = tuple(other["fn"].event_shape)
        twice = [
            f for f in other["cond_indep_stack"] if f.vectorized and event[:1] == (f.size,) and f.size > 1
        ]
        if other["name"] != site["name"] and twice and len(event) > 1:
            raise ProgramError(
                f"'{site['name']}' has the batch shape {list(site['fn'].batch_shape)}, because '{other['name']}' has "
                f"the rows of '{twice[0].name}' in its event shape {event}, too: take one dimension off its "
                ".to_event(...), in model and guide"
            )


def _check_plates(model: Trace, guide: Trace) -> None:
    """A plate is of as many rows in the guide as in the model: else the two would be scaled apart."""
    sizes = {f.name: f.full_size for s in sample_sites(model) for f in s["cond_indep_stack"] if f.vectorized}
    for site in sample_sites(guide):
        for frame in (f for f in site["cond_indep_stack"] if f.vectorized):
            other = sizes.get(frame.name, frame.full_size)
            if other != frame.full_size:
                raise ProgramError(
                    f"the plate '{frame.name}' is of {other} rows in the model and of {frame.full_size} in the guide: "
                    "make it of the same size in both"
                )


def _check_events(model: Trace, guide: Trace) -> None:
    """A latent must have the same event shape in model and guide."""
    for site in sample_sites(guide):
        other: Any = model.nodes.get(site["name"])
        if other is not None and other["fn"].event_shape != site["fn"].event_shape:
            shapes = [tuple(s["fn"].event_shape) for s in (other, site)]
            raise ProgramError(
                f"'{site['name']}' has event shape {shapes[0]} in the model and {shapes[1]} in the guide: give its "
                "distribution the same .to_event(...) and size in both"
            )


def _check_masks(model: Trace, guide: Trace) -> None:
    """What the model masks the guide must mask: else log q counts where log p does not.

    `mask=False` around all of a latent leaves nothing out: it makes the prior flat.
    """
    for site in sample_sites(guide):
        other: Any = model.nodes.get(site["name"])
        flat = other is not None and other["mask"] is False
        if other is not None and not flat and not _same_mask(other["mask"], site["mask"]):
            raise ProgramError(
                f"'{site['name']}' is masked otherwise in the guide than in the model, so that its log q would count "
                "where its log p does not: put the same `with pyro.poutine.mask(mask=...):` around it in both"
                + (" (of an obs_mask, its negation)" if site["name"].endswith("_unobserved") else "")
            )


def _same_mask(one: Any, other: Any) -> bool:
    one, other = (torch.tensor(True) if m is None else torch.as_tensor(m) for m in (one, other))
    return bool((one == other).all())


def _check_values(model: Trace, structure: Structure) -> None:
    """Data must fill the rows of their plate: broadcast over them, they would count once for every row."""
    names, plate = {s.name for s in structure.observed}, structure.data_plate
    for site in (s for s in sample_sites(model) if s["name"] in names):
        event, found = tuple(site["fn"].event_shape), tuple(site["value"].shape)
        if plate is None or plate.size == 1 or not in_plate(site, plate):
            continue
        rows = plate.dim - len(event)
        if len(found) < -rows or found[rows] != plate.size:
            raise ProgramError(
                f"'{site['name']}' stands in the plate '{plate.name}', but its value of shape {list(found)} has no "
                f"dimension of rows beside the event shape {event}, so that it would count once for every row: take "
                "one dimension off its .to_event(...)"
            )


def _check_scale(structure: Structure, batch: Batch) -> None:
    """A minibatch must weigh N/B against the global latents, and its plate must exist."""
    num_rows, batch_rows, plate = batch.total_rows, len(batch.indices), structure.data_plate
    if batch_rows == num_rows:
        return
    if plate is None:
        raise ProgramError(
            f"batch_size={batch_rows} takes rows, but no plate of the model runs over the rows of the data: "
            "put the observed site inside `with pyrolvm.data_plate(x):`, or leave batch_size out"
        )
    shared = [s.name for s in structure.global_latents]
    if shared and plate.full_size == batch_rows:
        raise ProgramError(
            f"'{shared[0]}' is shared by all data, but the plate '{plate.name}' says that there are only the "
            f"{batch_rows} rows of the batch, not {num_rows}, so its posterior would be too wide: write "
            f"`with pyrolvm.data_plate(x):` instead of pyro.plate('{plate.name}', len(x))"
        )


def _check_other_size(program: Program, batch: Batch) -> None:
    """One row more: a dimension that only happens to equal the batch size shows itself."""
    size = len(batch.indices)
    larger = batch.take(torch.arange(size + 1, device=batch.indices.device) % size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found .* in .* but not", UserWarning)
        try:
            for trace in trial_traces(program, larger)[:2]:
                trace.compute_log_prob()
        except (ProgramError, ValueError, RuntimeError) as error:
            raise ProgramError(
                f"the program runs on a batch of {size} rows but not on {size + 1}: some shape in it "
                f"only happens to equal the batch size ({error})"
            ) from error
