"""Sums over the states of discrete latents, by variable elimination, and draws of these states from the same sums.

    log sum_k p(x, z, k)

is computed by Pyro's plated variable elimination (Obermeyer et al. 2019, "Tensor variable elimination for plated factor
graphs"), which exploits chains and nested plates. With log-potentials e_tk = 0 added to the factor of each state k of
each latent k_t, the gradient of the sum is p(k_t = k | x, z), and of a maximum in its place 1 on the best path, else 0
(Darwiche 2003, "A differential approach to inference in Bayesian networks"). If each single sum of the elimination
passes its gradient on to one of its terms, drawn by their weights, then the gradient is 1 at the states of one draw of
all k_t together: of a chain, backward sampling after the forward recursion (Scott 2002, "Bayesian methods for hidden
Markov models").
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.packed import broadcast_all, pack
from pyro.ops.rings import LogRing, MapRing
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import Structure, sample_sites
from pyrolvm.inference.program.weights import PARTICLES


def all_states(pair: Pair, num_draws: int | None, which: Callable[[Any], bool], **options: Any) -> Trace:
    """The model over all states of the sites that `which` is true of; `options` are those of `Pair.model`."""
    first = -1 - int(num_draws is not None) - pair.structure.max_plate_nesting
    handlers = options.pop("handlers", ())
    trace = pair.model(
        num_draws,
        *handlers,
        lambda f: poutine.infer_config(f, lambda s: {"enumerate": "parallel"} if which(s) else {}),
        lambda f: poutine.enum(f, first_available_dim=first),
        **options,
    )
    trace.symbolize_dims()
    return trace


def log_sums(pair: Pair, trace: Trace, num_draws: int, held: Collection[str]) -> Tensor:
    """The log of the sum over all states, [draws, rows], nats; `held` sites do not count.

    Raises `ProgramError` if the sum couples data.
    """
    plate = pair.structure.data_plate
    keep = {PARTICLES: num_draws, **({plate.name: pair.num_rows} if plate else {})}
    sizes = {
        trace.plate_to_symbol[name]: size for name, size in keep.items() if name in trace.plate_to_symbol
    }
    total = torch.zeros([*sizes.values()], device=pair.device)
    for ordinal, terms in contracted(pair, trace, held).items():
        if plate is not None and trace.plate_to_symbol[plate.name] not in ordinal:
            raise ProgramError(_coupled(pair.structure))
        total = sum((_aligned(term, sizes) for term in terms), total)
    return total.reshape(-1, pair.num_rows).expand(num_draws, -1)


def _coupled(structure: Structure) -> str:
    """Why data have no evidence each: a latent of something else than the rows is summed out."""
    site = next((s for s in structure.enumerated if not s.local), None)
    why = "is summed out, so that the data depend on each other and have no evidence each"
    if site is None or not site.plates or structure.data_plate is None:
        return f"a discrete latent outside the data plate {why}: draw it in the guide"
    return (
        f"'{site.name}', one for each of '{site.plates[0]}', {why}, as the rows of the data are those of "
        f"'{structure.data_plate.name}': if the data are those of '{site.plates[0]}', pass them with this dimension "
        "first and turn them in the model; or draw the latent in the guide"
    )


def contracted(
    pair: Pair,
    trace: Trace,
    held: Collection[str],
    ring: type[LogRing] = LogRing,
    potentials: Mapping[str, Tensor] | None = None,
) -> dict[frozenset, list[Tensor]]:
    """Plates -> log-factors with all enumerated latents summed out, or what another ring does in place of a sum.

    `potentials` are added to the log-density of the sites of these names; `held` sites do not count. A scale that all
    factors with states have (weights of data, `poutine.scale` around the program) stands outside of the sum, as in
    Pyro's own, and is left out.
    """
    plate, sizes = pair.structure.data_plate, dict[str, int]()
    factors: OrderedDict[frozenset, list[Tensor]] = OrderedDict()
    sites = [s for s in sample_sites(trace) if s["name"] not in held]
    common = _common_scale(trace, sites)
    for site in sites:
        frames = _plates(site)
        outside = next((f.full_size / f.size for f in frames if plate and f.name == plate.name), 1.0)
        # the states of a latent that a mask leaves out still sum to one, as in Pyro's own sum; a maximum skips it
        every_state = "_enumerate_dim" in site["infer"] and ring is not MapRing
        mask = None if every_state else site["mask"]
        scale = _of_plates(site) if _alike(_own_scale(site), common) else site["scale"]
        factor = scale_and_mask(site["unscaled_log_prob"], scale / outside, mask)
        factor = factor + (potentials or {}).get(site["name"], 0.0)
        factor = pack(factor, site["infer"]["_dim_to_symbol"])
        ordinal = frozenset(trace.plate_to_symbol[f.name] for f in frames)
        factors.setdefault(ordinal, []).append(factor)
        sizes.update(zip(factor._pyro_dims, factor.shape, strict=True))
    summed = set(sizes) - set(trace.plate_to_symbol.values())
    return contract_tensor_tree(factors, summed, ring=ring(dim_to_size=sizes))


def _plates(site: Any) -> list[Any]:
    return [f for f in site["cond_indep_stack"] if f.vectorized]


def _of_plates(site: Any) -> float:
    """N/B of the plates of a site."""
    return math.prod(f.full_size / f.size for f in _plates(site))


def _own_scale(site: Any) -> Any:
    """The scale of a site without that of its plates: a number, or a tensor of weights."""
    return site["scale"] / _of_plates(site)


def _common_scale(trace: Trace, sites: list[Any]) -> Any:
    """The scale that all factors with states have, without those of plates; 1 if they differ."""
    plates = set(trace.plate_to_symbol.values())
    scales = [
        _own_scale(s)
        for s in sites
        if set(pack(s["unscaled_log_prob"], s["infer"]["_dim_to_symbol"])._pyro_dims) - plates
    ]
    return scales[0] if scales and all(_alike(scale, scales[0]) for scale in scales) else 1.0


def _alike(a: Any, b: Any) -> bool:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return a.shape == b.shape and torch.allclose(a, b)


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


@torch.enable_grad()
def differentiated(
    pair: Pair, trace: Trace, ring: type[LogRing], held: Collection[str] = ()
) -> list[tuple[Any, Tensor]]:
    """(site, d/d e of its states) of each enumerated site: [states at the site's own dimension, plates...]."""
    sites = [s for s in sample_sites(trace) if "_enumerate_dim" in s["infer"]]
    potentials = {
        s["name"]: torch.zeros(_shape(s)).to(s["unscaled_log_prob"]).requires_grad_() for s in sites
    }
    total: Any = 0.0
    for terms in contracted(pair, trace, held, ring, potentials).values():
        total = total + sum(term.sum() for term in terms)
    return list(zip(sites, torch.autograd.grad(total, [*potentials.values()]), strict=True))


def states_of(site: Any) -> Tensor:
    """The values that an enumerated site can have: [states, event...]."""
    return site["value"].reshape(-1, *site["fn"].event_shape)


def at_states(site: Any, chosen: Tensor) -> Tensor:
    """The site's values [plates..., event...] where `chosen` is 1: [states at the site's own dimension, plates...]."""
    dim = site["infer"]["_enumerate_dim"]
    return states_of(site)[chosen.argmax(dim, keepdim=True)]


def where_seen(site: Any, values: Tensor, hidden: float, event_dims: int = 0) -> Tensor:
    """`values`, and `hidden` where the program's mask leaves the site out."""
    mask = site["mask"]
    if mask is None or mask is True:
        return values
    mask = torch.as_tensor(mask, device=values.device)
    return torch.where(mask.reshape(*mask.shape, *(1,) * event_dims), values, torch.full_like(values, hidden))


def _shape(site: Any) -> list[int]:
    """The states at the site's own dimension, beside its plates."""
    dim = site["infer"]["_enumerate_dim"]
    shape = [1] * -dim
    for frame in site["cond_indep_stack"]:
        if frame.vectorized:
            shape[frame.dim] = frame.size
    shape[dim] = len(states_of(site))
    return shape


class Drawing(LogRing):
    """Sums whose gradient is 1 at one draw of the states, in place of their probabilities."""

    def sumproduct(self, terms: Any, dims: Collection[str]) -> Tensor:
        """log sum over `dims` of the product of `terms`, one dimension at a time, the cheapest first."""
        owned = {d: [t for t in terms if d in t._pyro_dims] for d in sorted(dims)}
        left = list(terms)
        while owned:
            dim = min(owned, key=lambda d: self._size(owned[d]))
            used = owned.pop(dim)
            made = _drawn(_product(used), dim)
            left = [t for t in left if not _among(t, used)] + [made]
            for d in made._pyro_dims:
                if d in owned:
                    owned[d] = [t for t in owned[d] if not _among(t, used)] + [made]
        return _product(left)

    def _size(self, terms: list[Any]) -> int:
        """Numbers in the product of these terms."""
        size = 1
        for dim in set("".join(t._pyro_dims for t in terms)):
            size *= self._dim_to_size[dim]
        return size


def _among(term: Tensor, terms: list[Any]) -> bool:
    return any(term is t for t in terms)


def _product(terms: list[Any]) -> Any:
    """The sum of log-factors over the union of their dimensions."""
    wide = broadcast_all(*terms)
    total = sum(wide[1:], wide[0])
    if total is terms[0]:
        total = total[...]  # what is eliminated next is told apart by identity
    total._pyro_dims = wide[0]._pyro_dims
    return total


def _drawn(term: Any, dim: str) -> Any:
    place = term._pyro_dims.index(dim)
    found: Any = _OneTerm.apply(term, place)
    found._pyro_dims = term._pyro_dims.replace(dim, "")
    return found


class _OneTerm(torch.autograd.Function):
    """logsumexp over one dimension; the gradient goes to one of its terms, drawn by their weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dim = dim
        return x.logsumexp(dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        # the smallest of exponential times with these rates comes first as often as its rate says
        first = (x - torch.empty_like(x).exponential_().log()).argmax(ctx.dim, keepdim=True)
        return torch.zeros_like(x).scatter_(ctx.dim, first, gradient.unsqueeze(ctx.dim)), None
