"""Draws for programs whose discrete latents are summed out: the exact p(k | x, z) stands for their guide.

With k enumerated, a program's joint density has one value per state of k. Under q(z | x) for the rest,

    k ~ p(k | x, z)  proportional to  p(x, z, k),       log p(x | z) = log sum_k p(x, z, k) - log sum_k p(z, k),

so that predictions go on from a k that the datum speaks for, and likelihoods have no noise of k in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import Structure, sample_sites

TOGETHER = "observed"
"""The name of the likelihood of several observed sites that share a summed-out latent."""


def enumerated_sites(structure: Structure) -> list[str]:
    """The latents that are summed out. Raises `ProgramError` if one is not in the data plate alone."""
    sites = structure.enumerated
    for site in sites:
        if site.markov:
            raise ProgramError(
                f"'{site.name}' and others are states of a Markov chain (pyro.markov), whose probabilities are no sum "
                "over the states of each datum at once: pyro.infer.infer_discrete draws or decodes them"
            )
        if structure.data_plate is None or site.plates != (structure.data_plate.name,):
            raise ProgramError(
                f"draws of '{site.name}', which is summed out, are taken datum by datum, but its plates are "
                f"{list(site.plates)}: put it inside `with pyrolvm.data_plate(x):` and no other plate, or give the "
                "guide a site for it"
            )
    return [s.name for s in sites]


def can_be_drawn(structure: Structure) -> bool:
    """Whether there are latents that are summed out, all of them datum by datum."""
    try:
        return bool(enumerated_sites(structure))
    except ProgramError:
        return False


@dataclass(frozen=True)
class Summed:
    """States of the latents that are summed out, per draw and row.

    Attributes
    ----------
    values : dict
        Site -> its drawn value, in the program's shape.
    joint, prior : tensor [states, draws, rows]
        log p(k, x) and log p(k) of all that depends on the state k, nats.
    chosen : tensor [draws, rows]
        The number of the state that was drawn.
    observed : list of str
        The data sites whose density depends on the state.
    """

    values: dict[str, Tensor]
    joint: Tensor
    prior: Tensor
    chosen: Tensor
    observed: list[str]


def draw_summed(pair: Pair, num_draws: int | None, given: dict[str, Tensor]) -> tuple[Summed, Trace, Trace]:
    """(states, model trace, guide trace): z ~ q(z | x), then k ~ p(k | x, z)."""
    guide = pair.guide(num_draws, given=given)
    states, joint, prior = by_state(pair, num_draws, guide, given)
    chosen = dist.Categorical(logits=joint.movedim(0, -1)).sample()  # [draws, rows]
    values = _values(pair, states, chosen, together=num_draws is not None)
    model = pair.model(num_draws, _replay(guide), given={**given, **values})
    observed = [s["name"] for s in _dependent(pair, num_draws, states) if s["is_observed"]]
    return Summed(values, joint, prior, chosen, observed), model, guide


def responsibilities(pair: Pair, guide: Trace) -> dict[str, Tensor]:
    """p(k | x, z) of each latent that is summed out, at one draw of the guide: site -> [rows, states]."""
    names = enumerated_sites(pair.structure)
    states, joint, _ = by_state(pair, None, guide, {})
    weight = joint[:, 0].softmax(0)  # [states, rows]
    sites = _by_dim(states)
    weight = weight.reshape(*(s["value"].numel() for s in sites), -1)
    found = {}
    for i, site in enumerate(sites):
        others = [j for j in range(len(sites)) if j != i]
        found[site["name"]] = (weight.sum(others) if others else weight).movedim(-1, 0)
    return {name: found[name] for name in names}


def by_state(
    pair: Pair, num_draws: int | None, guide: Trace, given: dict[str, Tensor]
) -> tuple[Trace, Tensor, Tensor]:
    """The model's trace over all states, and log p(k, x) and log p(k), each [states, draws, rows], nats."""
    states = pair.model(num_draws, _replay(guide), lambda f: _parallel(pair, num_draws, f), given=given)
    sites = _dependent(pair, num_draws, states)
    joint, prior = (
        _total(pair, num_draws, [s for s in sites if observed or not s["is_observed"]])
        for observed in (True, False)
    )
    return states, joint, prior


def _replay(guide: Trace) -> Callable:
    return lambda function: pyro.poutine.replay(function, trace=guide)


def _depth(pair: Pair, num_draws: int | None) -> int:
    """The dimensions right of those of the states: draws and plates."""
    return int(num_draws is not None) + pair.structure.max_plate_nesting


def _parallel(pair: Pair, num_draws: int | None, model: Callable) -> Callable:
    names = {s.name for s in pair.structure.enumerated}
    marked = pyro.poutine.infer_config(
        model, config_fn=lambda s: {"enumerate": "parallel"} if s["name"] in names else {}
    )
    return pyro.poutine.enum(marked, first_available_dim=-1 - _depth(pair, num_draws))


def _dependent(pair: Pair, num_draws: int | None, states: Trace) -> list[Any]:
    """The sites whose log-density differs by state."""
    depth = _depth(pair, num_draws)
    return [s for s in sample_sites(states) if s["unscaled_log_prob"].dim() > depth]


def _total(pair: Pair, num_draws: int | None, sites: list[Any]) -> Tensor:
    """The sum of the log-densities of `sites`: [states, draws, rows], nats."""
    assert pair.structure.data_plate is not None  # see `enumerated_sites`
    row_dim, nesting = pair.structure.data_plate.dim, pair.structure.max_plate_nesting
    terms = [scale_and_mask(s["unscaled_log_prob"], mask=s["mask"]) for s in sites]
    inner = [d for d in range(-nesting, 0) if d != row_dim]
    total = sum(t.sum(inner, keepdim=True) if inner else t for t in terms)
    assert isinstance(total, Tensor)  # an enumerated site depends on itself
    together = num_draws is not None
    return total.reshape(-1, total.shape[-1 - nesting] if together else 1, total.shape[row_dim])


def _by_dim(states: Trace) -> list[Any]:
    """The enumerated sites, leftmost dimension first, as states are numbered."""
    sites = [s for s in sample_sites(states) if "_enumerate_dim" in s["infer"]]
    return sorted(sites, key=lambda s: s["infer"]["_enumerate_dim"])


def _values(pair: Pair, states: Trace, chosen: Tensor, *, together: bool) -> dict[str, Tensor]:
    """Each enumerated site's value in the states numbered `chosen` [draws, rows], in the program's shape."""
    assert pair.structure.data_plate is not None
    sites = _by_dim(states)
    places = torch.unravel_index(chosen, [s["value"].numel() for s in sites])
    shape = [len(chosen)] * together + [1] * pair.structure.max_plate_nesting
    shape[pair.structure.data_plate.dim] = chosen.shape[1]
    return {s["name"]: s["value"].flatten()[i].reshape(shape) for s, i in zip(sites, places, strict=True)}
