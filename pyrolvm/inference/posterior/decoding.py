"""What the data say about latents that are summed out: their probabilities, and the most probable values together.

With log-potentials e_tk = 0 added to the factor of each state k of each latent z_t,

    d/d e_tk  log sum_z p(x, z) exp(sum e)  =  p(z_t = k | x),
    d/d e_tk  max_z [log p(x, z) + sum e]   =  1 if z_t = k on the best path, else 0,

so that one sum and its gradient are forward-backward smoothing, and one maximum and its gradient are Viterbi's
algorithm, for chains and any other graph that Pyro can contract (`program/sums.py`). Continuous latents are held where
the guide's means are.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.ops.rings import LogRing, MapRing
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.program.handlers import Means
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import rows_dim, sample_sites
from pyrolvm.inference.program.sums import all_states, at_states, differentiated, where_seen


def probabilities(pair: Pair) -> dict[str, Tensor]:
    """p(z | x) of each latent that is summed out: site -> [rows, plates..., states]; nan where a mask hides it."""
    found = differentiated(pair, _states(pair), LogRing)
    return {s["name"]: _by_row(pair, s, where_seen(s, g, float("nan"))) for s, g in found}


def most_probable(pair: Pair) -> dict[str, Tensor]:
    """The values that are most probable together: site -> [rows, plates..., event...]; -1 where a mask hides it."""
    found = {}
    for site, gradient in differentiated(pair, _states(pair), MapRing):
        own = len(site["fn"].event_shape)
        values = where_seen(site, at_states(site, gradient), -1, own)
        found[site["name"]] = _by_row(pair, site, values, own).squeeze(-1 - own)
    return found


def _states(pair: Pair) -> Trace:
    """The model over all states of what is summed out, the rest at the guide's means."""
    names = {s.name for s in pair.structure.enumerated}
    with torch.no_grad():
        given = {s["name"]: s["value"] for s in sample_sites(pair.guide(None, Means()))}
        return all_states(pair, None, lambda s: s["name"] in names, given=given)


def _by_row(pair: Pair, site: Any, values: Tensor, event_dims: int = 0) -> Tensor:
    """`values` as [rows, other plates from the left..., states, event...]."""
    dim, rows = site["infer"]["_enumerate_dim"], rows_dim(site, pair.structure.data_plate)
    frames = sorted((f.dim for f in site["cond_indep_stack"] if f.vectorized), key=lambda d: (d != rows, d))
    batch_dims = values.dim() - event_dims
    order = [d + batch_dims for d in (*frames, dim)]
    others = [d for d in range(batch_dims) if d not in order]
    if any(values.shape[d] > 1 for d in others):
        raise ProgramError(f"the states of '{site['name']}' depend on others that its plates do not name")
    kept = values.permute(*others, *order, *range(batch_dims, values.dim()))
    return kept.reshape(kept.shape[len(others) :])
