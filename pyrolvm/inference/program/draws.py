"""Draws from a pair: latents, predictions and log-densities per draw and datum."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.program.enumerated import TOGETHER, Summed, draw_summed
from pyrolvm.inference.program.handlers import NoSampleError, drawn
from pyrolvm.inference.program.pair import Pair, slice_of, total_of
from pyrolvm.inference.program.structure import Structure, rows_dim, sample_sites
from pyrolvm.inference.program.sums import where_seen
from pyrolvm.inference.program.weights import log_densities


@dataclass
class Draws:
    """S draws for a batch of B rows.

    Attributes
    ----------
    values : dict
        Latent site -> [S, B, ...] (local) or [S, ...] (global).
    predictive : dict
        Observed site -> [S, B, ...], drawn anew from p(x | z); empty where its distribution cannot be drawn from.
    pointwise : dict
        Observed site -> log p(x | z), [S, B, ...], nats; 0 where a mask leaves the datum out.
    log_prior, log_likelihood, log_guide : tensor [S, rows]
        Nats per datum, unscaled, of all rows together where they share a latent; None for prior draws.
    global_log_prior, global_log_guide : tensor [S]
        The rest: log p and log q outside the data plate, in nats (not per datum); None for prior draws.
    shared : list of dict
        The values outside the data plate as the guide made them, to be used again for other rows.
    undrawn : str
        Why there is no `predictive`.
    """

    values: dict[str, Tensor]
    predictive: dict[str, Tensor]
    pointwise: dict[str, Tensor] = field(default_factory=dict)
    log_prior: Tensor | None = None
    log_likelihood: Tensor | None = None
    log_guide: Tensor | None = None
    global_log_prior: Tensor | None = None
    global_log_guide: Tensor | None = None
    shared: list[dict[str, Tensor]] = field(default_factory=list)
    undrawn: str = ""

    @property
    def predicted(self) -> dict[str, Tensor]:
        """`predictive`; raises `ProgramError` where there is none."""
        if not self.predictive:
            raise ProgramError(self.undrawn)
        return self.predictive

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) - log q(z | x): [S, rows]."""
        if self.log_prior is None or self.log_likelihood is None or self.log_guide is None:
            raise ProgramError(
                "these draws have no importance weights: they are of the prior, or all rows share a discrete latent "
                "that is summed out"
            )
        return self.log_likelihood + self.log_prior - self.log_guide


def draws_of(
    pair: Pair, num_draws: int, *, prior: bool = False, shared: list[dict[str, Tensor]] | None = None
) -> Draws:
    """z ~ q(z | x) with p(x, z) at the draws, or (x, z) ~ p(x, z) for as many rows if `prior`.

    `shared` are global values of draws for other rows. Latents that are summed out are drawn from their exact
    posterior, all of a row together; -1 where a mask leaves one out. Draws are taken at once where the program allows
    it, else one by one.
    """
    take = _prior if prior else enumerated_draw if pair.structure.enumerated else _posterior
    if pair.vectorized:
        return take(pair, num_draws, (shared or [{}])[0])
    return stack([take(pair, None, values) for values in shared or [{}] * num_draws])


def _posterior(pair: Pair, num_draws: int | None, given: dict[str, Tensor]) -> Draws:
    return read_draws(pair, *pair.draw(num_draws, given), num_draws)


def read_draws(pair: Pair, model: Trace, guide: Trace, num_draws: int | None) -> Draws:
    """The draws that a pair of traces shows."""
    shared, beside = pair.held(guide), pair.structure.beside_data
    plate = pair.structure.data_plate
    densities = log_densities(model, guide, skip={*shared, *beside}, keep=[plate.name] if plate else [])
    zeros = torch.zeros_like(densities.log_prior[:, 0])
    return Draws(
        values={s["name"]: tidy(pair.structure, s, s["value"]) for s in _latents(pair, guide)},
        **_anew(pair, model, num_draws),
        pointwise={s["name"]: tidy(pair.structure, s, _unscaled(s), 0) for s in _data(pair, model)},
        log_prior=densities.log_prior,
        log_likelihood=densities.log_likelihood,
        log_guide=densities.log_guide,
        global_log_prior=total_of(model, {*shared, *beside}, zeros),
        global_log_guide=total_of(guide, shared, zeros),
        shared=[shared],
    )


def _prior(pair: Pair, num_draws: int | None, given: dict[str, Tensor]) -> Draws:
    model = pair.model(num_draws, given=given)
    shared = pair.held(model)
    return Draws(
        values={s["name"]: tidy(pair.structure, s, s["value"]) for s in _latents(pair, model)},
        **_anew(pair, model, num_draws),
        log_likelihood=log_densities(
            model, Trace(), skip={*shared, *pair.structure.beside_data}
        ).log_likelihood,
        shared=[shared],
    )


def _anew(pair: Pair, model: Trace, num_draws: int | None) -> dict[str, Any]:
    """Data drawn anew at the latents of a trace, or why they cannot be: these have draws all the same."""
    try:
        return {"predictive": _made(pair, model, num_draws)}
    except NoSampleError as error:
        return {"predictive": {}, "undrawn": str(error)}


def _made(pair: Pair, model: Trace, num_draws: int | None) -> dict[str, Tensor]:
    """Several sites together, since one may depend on another."""

    def made(trace: Trace) -> dict[str, Tensor]:
        return {s["name"]: tidy(pair.structure, s, s["value"]) for s in _data(pair, trace)}

    try:
        if len(pair.structure.observed) < 2:
            return {s["name"]: tidy(pair.structure, s, drawn(s)) for s in _data(pair, model)}
        latents = {s["name"]: s["value"] for s in sample_sites(model) if not s["is_observed"]}
        return made(pair.simulate(num_draws, given=latents))
    except Exception:  # a program, or a distribution, that takes draws at once of its latents alone
        if num_draws is None:
            raise
    parts = [made(pair.simulate(given=slice_of(model, Trace(), i))) for i in range(num_draws)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _unscaled(site: Any) -> Tensor:
    """The log-density of a site without scales; entries that are masked out count nothing."""
    return scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])


def _latents(pair: Pair, trace: Trace) -> list[Any]:
    names = {s.name for s in pair.structure.latents}
    return [s for s in sample_sites(trace) if s["name"] in names and not s["is_observed"]]


def _data(pair: Pair, trace: Trace) -> list[Any]:
    names = {s.name for s in pair.structure.observed}
    return [s for s in sample_sites(trace) if s["name"] in names]


def enumerated_draw(pair: Pair, num_draws: int | None, given: dict[str, Tensor]) -> Draws:
    """As `_posterior`, with densities that are sums over the states of the latents that are summed out."""
    summed, model, guide = draw_summed(pair, num_draws, given)
    draws, nodes = read_draws(pair, model, guide, num_draws), dict[str, Any](model.nodes)
    for name, value in summed.values.items():
        site = nodes[name]
        seen = where_seen(site, value, -1, len(site["fn"].event_shape))
        draws.values[name] = tidy(pair.structure, site, seen)
    return _with_sums(pair, model, draws, summed)


def _with_sums(pair: Pair, model: Trace, draws: Draws, summed: Summed) -> Draws:
    """The draws with densities that are sums over all states in place of those at the states that were drawn.

    Where a state is shared by all rows there are no such sums for a row: the guide's density is then left out.
    """
    if summed.log_joint is None or summed.log_prior is None:
        return replace(draws, log_guide=None, global_log_guide=None)
    log_likelihood = summed.log_joint - summed.log_prior
    pointwise = {k: v for k, v in draws.pointwise.items() if k not in summed.observed}
    if summed.observed:
        name = summed.observed[0] if len(summed.observed) == 1 else TOGETHER
        beside = pair.log_prob(model, lambda s: s["is_observed"] and s["name"] not in summed.observed)
        pointwise[name] = log_likelihood - beside.to(log_likelihood)
    return replace(draws, pointwise=pointwise, log_prior=summed.log_prior, log_likelihood=log_likelihood)


def tidy(structure: Structure, site: Any, value: Tensor, event_dims: int | None = None) -> Tensor:
    """A site's value as [S, plates..., event...], without singleton dimensions of plates the site is not in.

    The data plate is the first of them; the others stand as in the program. S is 1 where a trace has no dimension of
    draws. `event_dims`: of `value`, if they are not those of the site's own values.
    """
    event_dims = len(site["fn"].event_shape) if event_dims is None else event_dims
    nesting, plate = structure.max_plate_nesting, structure.data_plate
    frames = {f.dim: f for f in site["cond_indep_stack"] if f.vectorized}
    sizes = [frames[d].size if d in frames else 1 for d in range(-nesting - 1, 0)]
    tail = tuple(value.shape[value.dim() - event_dims :])
    value = value.expand(torch.broadcast_shapes(value.shape, (*sizes, *tail)))
    keep = [d for d in range(-nesting, 0) if d in frames]
    value = value.reshape(len(value), *(sizes[d] for d in keep), *tail)
    rows = rows_dim(site, plate)
    return value if rows is None else value.movedim(1 + keep.index(rows), 1)


def stack(draws: list[Draws]) -> Draws:
    """Draws taken one at a time, as if taken together."""
    together = concatenate(draws, dim=0, local=None)
    together.shared = [d.shared[0] for d in draws if d.shared]
    return together


def concatenate(parts: list[Draws], *, dim: int, local: set[str] | None) -> Draws:
    """Join along draws (dim 0) or rows (dim 1); of rows, only what has them (`local`) is joined."""

    def join(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        whole = {k for k in dicts[0] if dim == 1 and local is not None and k not in local}
        return {k: dicts[0][k] if k in whole else torch.cat([d[k] for d in dicts], dim) for k in dicts[0]}

    def cat(tensors: list[Tensor | None], dim: int = dim) -> Tensor | None:
        present = [t for t in tensors if t is not None]
        return torch.cat(present, dim) if present else None

    draws = parts[:1] if dim == 1 else parts  # of rows, all have the same
    undrawn = next((p.undrawn for p in parts if p.undrawn), "")
    return Draws(
        join([p.values for p in parts]),
        {} if undrawn else join([p.predictive for p in parts]),
        join([p.pointwise for p in parts]),
        cat([p.log_prior for p in parts]),
        cat([p.log_likelihood for p in parts]),
        cat([p.log_guide for p in parts]),
        cat([p.global_log_prior for p in draws], 0),
        cat([p.global_log_guide for p in draws], 0),
        parts[0].shared,
        undrawn,
    )


def refuse_enumeration(structure: Structure, what: str) -> None:
    """Raise `ProgramError` if latents are summed out rather than sampled, so that no draw has them."""
    names = [s.name for s in structure.enumerated]
    if names:
        raise ProgramError(
            f"{what} needs draws of every latent, but '{names[0]}' is enumerated: use method='exact', or "
            "give the guide a site for it"
        )
