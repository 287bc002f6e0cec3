"""What the data say about latents that are summed out: their probabilities, and the most probable values together.

With log-potentials e_tk = 0 added to the factor of each state k of each latent z_t,

    d/d e_tk  log sum_z p(x, z) exp(sum e)  =  p(z_t = k | x),
    d/d e_tk  max_z [log p(x, z) + sum e]   =  1 if z_t = k on the best path, else 0

(Darwiche 2003, "A differential approach to inference in Bayesian networks"), so that one sum and its gradient are
forward-backward smoothing, and one maximum and its gradient are Viterbi's algorithm, for chains and any other graph
that Pyro can contract. Continuous latents are held where the guide's means are.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.ops.rings import LogRing, MapRing
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.posterior.evidence.enumeration import contracted
from pyrolvm.inference.program.handlers import Means
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import sample_sites


def probabilities(pair: Pair) -> dict[str, Tensor]:
    """p(z | x) of each latent that is summed out: site -> [rows, plates..., states]; nan where a mask hides it."""
    sites, gradients = _differentiated(pair, LogRing)
    return {
        s["name"]: _by_row(pair, s, _where_seen(s, g, float("nan")))
        for s, g in zip(sites, gradients, strict=True)
    }


def most_probable(pair: Pair) -> dict[str, Tensor]:
    """The values that are most probable together: site -> [rows, plates...]; -1 where a mask hides the site."""
    sites, gradients = _differentiated(pair, MapRing)
    found = {}
    for site, gradient in zip(sites, gradients, strict=True):
        dim = site["infer"]["_enumerate_dim"]
        values = site["value"].flatten()[gradient.argmax(dim, keepdim=True)]
        found[site["name"]] = _by_row(pair, site, _where_seen(site, values, -1)).squeeze(-1)
    return found


@torch.enable_grad()
def _differentiated(pair: Pair, ring: type[LogRing]) -> tuple[list[Any], list[Tensor]]:
    """The sites that are summed out, and d/d e of each: [states at the site's own dimension, plates...]."""
    trace = _states(pair)
    sites = [s for s in sample_sites(trace) if "_enumerate_dim" in s["infer"]]
    potentials = {
        s["name"]: torch.zeros(_shape(s)).to(s["unscaled_log_prob"]).requires_grad_() for s in sites
    }
    total: Any = 0.0
    for terms in contracted(pair, trace, {}, ring, potentials).values():
        total = total + sum(term.sum() for term in terms)
    return sites, list(torch.autograd.grad(total, [*potentials.values()]))


def _states(pair: Pair) -> Trace:
    """The model over all states of what is summed out, the rest at the guide's means."""
    names = {s.name for s in pair.structure.enumerated}
    with torch.no_grad():
        given = {s["name"]: s["value"] for s in sample_sites(pair.guide(None, Means()))}
        trace = pair.model(
            None,
            lambda f: poutine.infer_config(
                f, lambda s: {"enumerate": "parallel"} if s["name"] in names else {}
            ),
            lambda f: poutine.enum(f, first_available_dim=-1 - pair.structure.max_plate_nesting),
            given=given,
        )
    trace.symbolize_dims()
    return trace


def _shape(site: Any) -> list[int]:
    """The states at the site's own dimension, beside its plates."""
    dim = site["infer"]["_enumerate_dim"]
    shape = [1] * -dim
    for frame in site["cond_indep_stack"]:
        if frame.vectorized:
            shape[frame.dim] = frame.size
    shape[dim] = site["value"].numel()
    return shape


def _where_seen(site: Any, values: Tensor, hidden: float) -> Tensor:
    """`values`, and `hidden` where the program's mask leaves the site out."""
    mask = site["mask"]
    if mask is None or mask is True:
        return values
    return torch.where(torch.as_tensor(mask, device=values.device), values, torch.full_like(values, hidden))


def _by_row(pair: Pair, site: Any, values: Tensor) -> Tensor:
    """`values` as [rows, other plates from the left..., states]."""
    dim, plate = site["infer"]["_enumerate_dim"], pair.structure.data_plate
    frames = sorted(f.dim for f in site["cond_indep_stack"] if f.vectorized)
    if plate is not None and plate.dim in frames:
        frames = [plate.dim, *(d for d in frames if d != plate.dim)]
    order = [d + values.dim() for d in (*frames, dim)]
    others = [d for d in range(values.dim()) if d not in order]
    if any(values.shape[d] > 1 for d in others):
        raise ProgramError(f"the states of '{site['name']}' depend on others that its plates do not name")
    kept = values.permute(*others, *order)
    return kept.reshape(kept.shape[len(others) :])
