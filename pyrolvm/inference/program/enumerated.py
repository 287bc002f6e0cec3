"""Draws for programs whose discrete latents are summed out: the exact p(k | x, z) stands for their guide.

Under q(z | x) for the rest, all discrete latents k of a row are drawn together,

    k ~ p(k | x, z)  proportional to  p(x, z, k),       log p(x | z) = log sum_k p(x, z, k) - log sum_k p(z, k),

so that predictions go on from a k that the datum speaks for, and likelihoods have no noise of k in them. Of a chain a
draw is a whole path. See `sums.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import Structure, sample_sites
from pyrolvm.inference.program.sums import Drawing, all_states, at_states, differentiated, log_sums

TOGETHER = "observed"
"""The name of the likelihood of several observed sites that share a summed-out latent."""


def enumerated_sites(structure: Structure) -> list[str]:
    """The latents that are summed out. Raises `ProgramError` if one is shared by all data."""
    for site in structure.enumerated:
        if structure.data_plate is not None and not site.local:
            raise ProgramError(
                f"'{site.name}', which is summed out, is shared by all data, so that the rows have no densities of "
                "their own: put it inside `with pyrolvm.data_plate(x):`, or give the guide a site for it"
            )
    return [s.name for s in structure.enumerated]


def apart(structure: Structure) -> bool:
    """Whether what is summed out belongs to one row each."""
    return structure.data_plate is None or all(s.local for s in structure.enumerated)


@dataclass(frozen=True)
class Summed:
    """States of the latents that are summed out, and the densities without them.

    Attributes
    ----------
    values : dict
        Site -> its drawn value, in the program's shape.
    log_joint, log_prior : tensor [draws, rows] or None
        log sum_k p(x, z, k) and log sum_k p(z, k) of each row, nats; None if a state is shared by all rows.
    observed : list of str
        The data sites whose density depends on the states.
    """

    values: dict[str, Tensor]
    log_joint: Tensor | None
    log_prior: Tensor | None
    observed: list[str]


def draw_summed(pair: Pair, num_draws: int | None, given: dict[str, Tensor]) -> tuple[Summed, Trace, Trace]:
    """(states, model trace, guide trace): z ~ q(z | x), then k ~ p(k | x, z)."""
    guide = pair.guide(num_draws, given=given)
    names = {s.name for s in pair.structure.enumerated}
    states = all_states(pair, num_draws, lambda s: s["name"] in names, handlers=[_replay(guide)], given=given)
    values = _drawn_values(pair, num_draws, states)
    model = pair.model(num_draws, _replay(guide), given={**given, **values})
    held = {*pair.held(guide), *_outside(pair, states)}
    seen = [s["name"] for s in sample_sites(states) if s["is_observed"]]
    sums: list[Tensor | None] = [None, None]
    if apart(pair.structure):
        sums = [log_sums(pair, states, num_draws or 1, {*held, *left}) for left in ((), seen)]
    return Summed(values, sums[0], sums[1], _dependent(pair, num_draws, states, seen)), model, guide


def _outside(pair: Pair, trace: Trace) -> set[str]:
    """The sites that no row has for itself; none, if the data are one."""
    whole = pair.structure.data_plate is None
    return set() if whole else {s["name"] for s in sample_sites(trace) if not pair.is_local(s)}


def _drawn_values(pair: Pair, num_draws: int | None, states: Trace) -> dict[str, Tensor]:
    """Each enumerated site's value at one draw of all, in the program's shape."""
    depth = _depth(pair, num_draws)
    found = {}
    for site, chosen in differentiated(pair, states, Drawing):
        value, event = at_states(site, chosen), site["fn"].event_shape
        batch = value.shape[: value.dim() - len(event)]
        found[site["name"]] = value.reshape((*batch[len(batch) - depth :], *event))
    return found


def _replay(guide: Trace) -> Callable:
    return lambda function: pyro.poutine.replay(function, trace=guide)


def _depth(pair: Pair, num_draws: int | None) -> int:
    """The dimensions right of those of the states: draws and plates."""
    return int(num_draws is not None) + pair.structure.max_plate_nesting


def _dependent(pair: Pair, num_draws: int | None, states: Trace, names: list[str]) -> list[str]:
    """The sites of these names whose log-density differs by state."""
    depth, nodes = _depth(pair, num_draws), dict[str, Any](states.nodes)
    return [name for name in names if nodes[name]["unscaled_log_prob"].dim() > depth]
