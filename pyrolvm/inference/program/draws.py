"""Draws from a fitted pair: latents, predictions and log-densities per draw and datum, in chunks.

Draws are vectorised over a plate left of the program's own where the program allows it. Whether it
does is tried out, not assumed: two vectorised draws must have the log-densities that the same two
have one at a time. Otherwise (convolutions that know no extra dimension, say) draws are looped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.data.arrays import Batch
from pyrolvm.errors import ProgramError
from pyrolvm.inference.program.handlers import Fixed
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import Structure, sample_sites
from pyrolvm.inference.program.weights import PARTICLES, log_densities

BUDGET = 2**22
"""Numbers that one chunk of (draw x datum x feature) may hold."""


@dataclass
class Draws:
    """S draws for a batch of B rows.

    values: latent site -> [S, B, ...] (local) or [S, ...] (global).
    predictive: observed site -> [S, B, ...], drawn anew from p(x | z).
    pointwise: observed site -> log p(x | z), [S, B, ...], nats.
    log_prior, log_likelihood, log_guide: [S, cells], nats per datum, unscaled; None for prior draws.
    global_log_prior, global_log_guide: the rest, log p and log q outside the data plate, [S] nats (not per
        datum); None for prior draws.
    shared: the values outside the data plate as the guide made them, to be used again for other rows.
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

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) - log q(z | x): [S, cells]."""
        if self.log_prior is None or self.log_likelihood is None or self.log_guide is None:
            raise ProgramError("draws from the prior have no importance weights: draw from the posterior")
        return self.log_likelihood + self.log_prior - self.log_guide


def posterior_draws(
    program: Program,
    structure: Structure,
    batch: Batch,
    num_samples: int,
    *,
    vectorized: bool,
    total: int,
    shared: list[dict[str, Tensor]] | None = None,
) -> Draws:
    """z ~ q(z | x) with p(x, z) at the draws; `shared` are global values of draws for other rows."""
    run = _Pair(program, structure, batch, total)
    if vectorized:
        return run.draws(*run.traces(num_samples, (shared or [{}])[0]))
    fixed = shared or [{}] * num_samples
    return stack([run.draws(*run.traces(None, values)) for values in fixed])


def prior_draws(
    program: Program,
    structure: Structure,
    batch: Batch,
    num_samples: int,
    *,
    vectorized: bool,
    total: int,
    shared: list[dict[str, Tensor]] | None = None,
) -> Draws:
    """(x, z) ~ p(x, z) for as many rows as `batch` has. `log_likelihood` is that of the batch's x."""
    run = _Pair(program, structure, batch, total)
    if vectorized:
        return run.prior(num_samples, (shared or [{}])[0])
    return stack([run.prior(None, values) for values in shared or [{}] * num_samples])


def can_vectorize(program: Program, structure: Structure, batch: Batch, total: int) -> bool:
    """Whether draws under a further plate have the log-densities of the same draws taken one by one."""
    if structure.takes_any_rows and not structure.per_datum and batch.num_rows > 3:
        batch = batch.take(torch.arange(3))
    run = _Pair(program, structure, batch, total)
    try:
        together = _densities(run, *run.traces(2))
        alone = [_densities(run, *run.fixed(_slice(run, s))) for s in range(2)]
    except Exception:  # whatever a user's program raises under dimensions it did not expect
        return False
    pairs = [(t[s], a[0]) for s, found in enumerate(alone) for t, a in zip(together, found, strict=True)]
    return all(t.shape == a.shape and torch.allclose(t, a, rtol=1e-3, atol=1e-3) for t, a in pairs)


def _densities(run: _Pair, model: Trace, guide: Trace) -> list[Tensor]:
    """Log-weights [draws, cells], and log p and log q of what all rows share [draws]."""
    shared = run._shared_values(guide)
    log_weight = log_densities(model, guide, skip=shared).log_weight
    return [log_weight, *(_total(t, shared, torch.zeros_like(log_weight[:, 0])) for t in (model, guide))]


def _slice(run: _Pair, index: int) -> dict[str, Tensor]:
    """The latents of one of the last vectorised draws, shaped as without the extra plate."""
    sites = {s["name"]: s for trace in run.last for s in sample_sites(trace) if not s["is_observed"]}
    values = {}
    for name, site in sites.items():
        own = len(site["fn"].event_shape)
        batch_dims = [f.dim for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
        depth = -min(batch_dims, default=0)
        values[name] = site["value"][index].reshape(site["value"].shape[site["value"].dim() - own - depth :])
    return values


class _Pair:
    """One program on one batch, run in the ways that draws need."""

    def __init__(self, program: Program, structure: Structure, batch: Batch, total: int) -> None:
        self.program, self.structure, self.batch = program, structure, batch
        rows = torch.arange(batch.num_rows, device=program.device)
        self.rows = (max(total, len(rows)) if structure.data_plate else len(rows), rows)
        if structure.data_plate is not None and structure.data_plate.full_size == structure.data_plate.size:
            self.rows = (len(rows), rows)
        self.last: tuple[Trace, Trace] = (Trace(), Trace())

    def _wrapped(self, function: Callable, num_samples: int | None) -> Callable:
        if num_samples is None:
            return function
        return pyro.plate(PARTICLES, num_samples, dim=-1 - self.structure.max_plate_nesting)(function)

    def _trace(self, function: Callable) -> Trace:
        return pyro.poutine.trace(function).get_trace(*self.batch.args, **self.batch.kwargs)

    def traces(self, num_samples: int | None, fixed: dict[str, Tensor] | None = None) -> tuple[Trace, Trace]:
        """(model trace, guide trace) with log-densities; under a plate of `num_samples` if given."""
        with self.program.scope(self.rows), Fixed(fixed or {}):
            guide = self._trace(self._wrapped(self.program.guide, num_samples))
            model = self._trace(
                pyro.poutine.replay(self._wrapped(self.program.model, num_samples), trace=guide)
            )
            self.last = model, guide
            return _with_log_prob(model, guide)

    def fixed(self, values: dict[str, Tensor]) -> tuple[Trace, Trace]:
        """(model trace, guide trace) at given latents."""
        with self.program.scope(self.rows):
            return _with_log_prob(
                *(self._trace(Fixed(values)(f)) for f in (self.program.model, self.program.guide))
            )

    def draws(self, model: Trace, guide: Trace) -> Draws:
        shared = self._shared_values(guide)
        densities = log_densities(model, guide, skip=shared)
        zeros = torch.zeros_like(densities.log_prior[:, 0])
        return Draws(
            values={s["name"]: tidy(self.structure, s, s["value"]) for s in self._latents(guide)},
            predictive={s["name"]: tidy(self.structure, s, s["fn"].sample()) for s in _observed(model)},
            pointwise={
                s["name"]: tidy(self.structure, s, s["unscaled_log_prob"], event=False)
                for s in _observed(model)
            },
            log_prior=densities.log_prior,
            log_likelihood=densities.log_likelihood,
            log_guide=densities.log_guide,
            global_log_prior=_total(model, shared, zeros),
            global_log_guide=_total(guide, shared, zeros),
            shared=[shared],
        )

    def _shared_values(self, trace: Trace) -> dict[str, Tensor]:
        """What is drawn outside the data plate; nothing, if there is no such plate."""
        plate = self.structure.data_plate
        if plate is None:
            return {}
        sites = [s for s in sample_sites(trace) if not s["is_observed"]]
        return {
            s["name"]: s["value"] for s in sites if all(f.name != plate.name for f in s["cond_indep_stack"])
        }

    def prior(self, num_samples: int | None, fixed: dict[str, Tensor]) -> Draws:
        with self.program.scope(self.rows), Fixed(fixed):
            model = self._trace(self._wrapped(self.program.model, num_samples))
            model.compute_log_prob()
        densities = log_densities(model, Trace())
        return Draws(
            values={s["name"]: tidy(self.structure, s, s["value"]) for s in self._latents(model)},
            predictive={s["name"]: tidy(self.structure, s, s["fn"].sample()) for s in _observed(model)},
            log_likelihood=densities.log_likelihood,
            shared=[self._shared_values(model)],
        )

    def _latents(self, trace: Trace) -> Iterator[dict[str, Any]]:
        names = {s.name for s in self.structure.sites if not s.observed}
        return (s for s in sample_sites(trace) if s["name"] in names and not s["is_observed"])


def tidy(structure: Structure, site: Any, value: Tensor, *, event: bool = True) -> Tensor:
    """A site's value as [S, plates..., event...], without singleton dimensions of plates the site is not in.

    The data plate is the first of them; the others stand as in the program. Of log-densities, `event=False`.
    """
    event_dims = len(site["fn"].event_shape) if event else 0
    nesting, plate = structure.max_plate_nesting, structure.data_plate
    frames = {f.dim: f for f in site["cond_indep_stack"] if f.vectorized}
    sizes = [frames[d].size if d in frames else 1 for d in range(-nesting - 1, 0)]
    tail = tuple(value.shape[value.dim() - event_dims :])
    value = value.expand(torch.broadcast_shapes(value.shape, (*sizes, *tail)))
    keep = [d for d in range(-nesting, 0) if d in frames]
    value = value.reshape(sizes[0], *(sizes[d] for d in keep), *tail)
    return value.movedim(1 + keep.index(plate.dim), 1) if plate and plate.dim in keep else value


def _with_log_prob(model: Trace, guide: Trace) -> tuple[Trace, Trace]:
    model.compute_log_prob()
    guide.compute_log_prob()
    return model, guide


def _total(trace: Trace, names: Iterable[str], zeros: Tensor) -> Tensor:
    """The log-densities of the named sites of a trace, summed onto `zeros` [S]: nats, unscaled."""
    sites = [s for s in sample_sites(trace) if s["name"] in names]
    terms = [scale_and_mask(s["unscaled_log_prob"], mask=s["mask"]) for s in sites]
    return sum((t.reshape(len(zeros), -1).sum(-1) for t in terms), zeros)


def _observed(trace: Trace) -> Iterable[dict[str, Any]]:
    return (s for s in sample_sites(trace) if s["is_observed"])


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
    return Draws(
        join([p.values for p in parts]),
        join([p.predictive for p in parts]),
        join([p.pointwise for p in parts]),
        cat([p.log_prior for p in parts]),
        cat([p.log_likelihood for p in parts]),
        cat([p.log_guide for p in parts]),
        cat([p.global_log_prior for p in draws], 0),
        cat([p.global_log_guide for p in draws], 0),
        parts[0].shared,
    )


def refuse_enumeration(structure: Structure, what: str) -> None:
    """Raise `ProgramError` if latents are summed out rather than sampled, so that no draw has them."""
    names = [s.name for s in structure.sites if s.enumerated]
    if names:
        raise ProgramError(
            f"{what} needs draws of every latent, but '{names[0]}' is enumerated: use method='exact', or "
            "give the guide a site for it"
        )
