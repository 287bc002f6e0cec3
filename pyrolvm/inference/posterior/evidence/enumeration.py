"""log p(x) by summing out discrete latents: exact, per datum.

    log p(x_n) = log sum_k p(k) p(x_n | k)

with the sums done by Pyro's plated variable elimination (Obermeyer et al. 2019, "Tensor variable
elimination for plated factor graphs"), which exploits chains and nested plates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.packed import pack
from pyro.ops.rings import LogRing
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import sample_sites
from pyrolvm.inference.program.weights import PARTICLES


def summed_out(
    pair: Pair, num_samples: int | None, given: dict[str, Tensor], held: dict[str, Tensor]
) -> Tensor:
    """log sum p(x, z) over every latent without a value in `given`.

    Returns
    -------
    tensor [draws, rows]
        In nats.

    Raises
    ------
    ProgramError
        The sum couples data.
    """
    first_free = -2 - pair.structure.max_plate_nesting
    handlers = (
        lambda f: poutine.infer_config(f, _enumerate_in_parallel),
        lambda f: poutine.enum(f, first_available_dim=first_free),
    )
    trace = pair.model(num_samples, *handlers, given={**given, **held})
    trace.symbolize_dims()
    plate = pair.structure.data_plate
    keep = {PARTICLES: num_samples or 1, **({plate.name: pair.num_rows} if plate else {})}
    sizes = {
        trace.plate_to_symbol[name]: size for name, size in keep.items() if name in trace.plate_to_symbol
    }
    total = torch.zeros([*sizes.values()], device=pair.device)
    for ordinal, terms in contracted(pair, trace, held).items():
        if plate is not None and trace.plate_to_symbol[plate.name] not in ordinal:
            raise ProgramError(
                "a discrete latent outside the data plate is summed out, so that the data depend on each other "
                "and have no evidence each: draw it in the guide"
            )
        total = sum((_aligned(term, sizes) for term in terms), total)
    return total.reshape(num_samples or 1, pair.num_rows)


def enumerable(fn: Any) -> bool:
    """Whether a distribution is discrete and can enumerate its values; vectors of independent ones cannot."""
    if getattr(fn, "reinterpreted_batch_ndims", 0) > 0:
        return False
    return bool(getattr(fn, "has_enumerate_support", False))


def _enumerate_in_parallel(site: Any) -> Any:
    return {"enumerate": "parallel"} if not site["is_observed"] and enumerable(site["fn"]) else {}


def contracted(
    pair: Pair,
    trace: Trace,
    held: Collection[str],
    ring: type[LogRing] = LogRing,
    potentials: Mapping[str, Tensor] | None = None,
) -> dict[frozenset, list[Tensor]]:
    """Plates -> log-factors with all enumerated latents summed out, or maximised over by another ring.

    `potentials` are added to the log-density of the sites of these names; `held` sites do not count.
    """
    plate, sizes = pair.structure.data_plate, dict[str, int]()
    factors: OrderedDict[frozenset, list[Tensor]] = OrderedDict()
    for site in sample_sites(trace):
        if site["name"] in held:
            continue
        frames = [f for f in site["cond_indep_stack"] if f.vectorized]
        outside = next((f.full_size / f.size for f in frames if plate and f.name == plate.name), 1.0)
        # the states of a latent that a mask leaves out still sum to one, as in Pyro's own sum; a maximum skips it
        every_state = "_enumerate_dim" in site["infer"] and ring is LogRing
        mask = None if every_state else site["mask"]
        factor = scale_and_mask(site["unscaled_log_prob"], site["scale"] / outside, mask)
        factor = factor + (potentials or {}).get(site["name"], 0.0)
        factor = pack(factor, site["infer"]["_dim_to_symbol"])
        ordinal = frozenset(trace.plate_to_symbol[f.name] for f in frames)
        factors.setdefault(ordinal, []).append(factor)
        sizes.update(zip(factor._pyro_dims, factor.shape, strict=True))
    summed = set(sizes) - set(trace.plate_to_symbol.values())
    return contract_tensor_tree(factors, summed, ring=ring(dim_to_size=sizes))


def _aligned(term: Any, sizes: dict[str, int]) -> Tensor:
    """A packed term with all dimensions except `sizes` summed out, expanded and in their order."""
    dims = term._pyro_dims
    others = [i for i, d in enumerate(dims) if d not in sizes]
    term = term.sum(others) if others else term
    left = [d for d in dims if d in sizes]
    order = sorted(range(len(left)), key=lambda i: list(sizes).index(left[i]))
    term = term.permute(order)
    shape = [sizes[d] if d in left else 1 for d in sizes]
    return term.reshape(shape).expand([*sizes.values()])
