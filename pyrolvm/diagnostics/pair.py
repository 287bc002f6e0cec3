"""A fitted pair on one batch: run under many draws, at given latents, and read row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.data.arrays import Batch
from pyrolvm.errors import ProgramError
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.draws import BUDGET
from pyrolvm.inference.program.handlers import Fixed, Means
from pyrolvm.inference.program.structure import Site, sample_sites
from pyrolvm.inference.program.weights import PARTICLES
from pyrolvm.plates import arange_rows

Values = dict[str, Tensor]


class Pair:
    """The program of `fitted` on the rows of `batch`.

    Draws stand under a plate left of the program's own, so that a site's value is [draws, plates..., event...].
    `spread` reads any such value as [draws, rows, rest].
    """

    def __init__(self, fitted: FittedModel, batch: Batch) -> None:
        self.fitted, self.program, self.structure, self.batch = (
            fitted,
            fitted.program,
            fitted.structure,
            batch,
        )
        self.nesting = self.structure.max_plate_nesting
        plate, rows = self.structure.data_plate, arange_rows(batch.num_rows, self.program.device)
        whole = plate is None or plate.full_size == plate.size
        self.rows = (len(rows) if whole else max(fitted.num_rows, len(rows)), rows)

    def draws(self, num_samples: int, values: Values | None = None) -> Iterator[tuple[Trace, Trace]]:
        """(model trace, guide trace) of z ~ q(z | x), in parts that add up to `num_samples` draws."""
        width = max(1, sum(t.numel() for _, t in self.batch.tensors()))
        size = min(num_samples, max(1, BUDGET // width)) if self.fitted.vectorized else 1
        for first in range(0, num_samples, size):
            yield self.run(min(size, num_samples - first), values)

    def run(self, num_samples: int, values: Values | None = None) -> tuple[Trace, Trace]:
        """(model trace, guide trace) of `num_samples` draws with log-densities; `values` are given, not drawn."""
        guide = self.guide_at(values or {}, num_samples)
        model = self._trace(pyro.poutine.replay(self._under(self.program.model, num_samples), trace=guide))
        return model, guide

    def model_at(self, values: Values, num_samples: int) -> Trace:
        """The model with its latents given, each [num_samples, plates..., event...]."""
        return self._trace(Fixed(values)(self._under(self.program.model, num_samples)))

    def guide_at(self, values: Values, num_samples: int) -> Trace:
        """The guide with some of its sites given."""
        return self._trace(Fixed(values)(self._under(self.program.guide, num_samples)))

    def global_means(self) -> Values:
        """What the guide has outside the data plate, each at its mean; {} if it has nothing there."""
        with self.program.scope(self.rows), Means():
            guide = pyro.poutine.trace(self.program.guide).get_trace(*self.batch.args, **self.batch.kwargs)
        return {s["name"]: s["value"] for s in sample_sites(guide) if not self.is_local(s)}

    def simulate(self, values: Values | None = None) -> Trace:
        """(z, x) ~ p(z, x), the observed sites drawn anew; `values` are given, not drawn."""
        model = Fixed(values or {})(pyro.poutine.uncondition(self.program.model))
        return self._trace(model)

    def is_local(self, site: dict[str, Any]) -> bool:
        """Whether a site of a trace stands in the data plate."""
        plate = self.structure.data_plate
        return plate is not None and any(f.name == plate.name for f in site["cond_indep_stack"])

    def spread(self, site: dict[str, Any], value: Tensor, event_dims: int = 0) -> Tensor:
        """`value` [batch of the site, event...] as [draws, rows, rest]; one row outside the data plate."""
        frames = {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized}
        sizes = [frames.get(d, 1) for d in range(-self.nesting - 1, 0)]
        tail = tuple(value.shape[value.dim() - event_dims :])
        value = value.expand(torch.broadcast_shapes(value.shape, (*sizes, *tail)))
        plate = self.structure.data_plate
        if plate is None:
            return value.reshape(value.shape[0], 1, -1)
        value = value.movedim(self.nesting + 1 + plate.dim, 1)
        return value.reshape(value.shape[0], value.shape[1], -1)

    def values(self, trace: Trace, site: str) -> Tensor:
        """The drawn value of `site`: [draws, rows, rest]."""
        node: Any = trace.nodes[site]
        return self.spread(node, node["value"], len(node["fn"].event_shape))

    def log_prob(self, trace: Trace, keep: Callable[[dict[str, Any]], bool]) -> Tensor:
        """Log-density of the kept sites: [draws, rows], nats, without the plates' scale N/B.

        A scale of the program's own (a power of the likelihood) and masks stay in.
        """
        terms = [self._log_prob(s) for s in sample_sites(trace) if keep(s)]
        nothing = torch.zeros(1, 1, dtype=torch.float64, device=self.program.device)
        return sum(terms[1:], terms[0]) if terms else nothing

    def _log_prob(self, site: dict[str, Any]) -> Tensor:
        plates = math.prod(f.full_size / f.size for f in site["cond_indep_stack"] if f.vectorized)
        log_prob = scale_and_mask(site["unscaled_log_prob"], site["scale"] / plates, site["mask"])
        return self.spread(site, log_prob).double().sum(-1)

    def _under(self, function: Callable, num_samples: int) -> Callable:
        if num_samples == 1:  # no further dimension, for networks that know none
            return function
        return pyro.plate(PARTICLES, num_samples, dim=-1 - self.nesting)(function)

    def _trace(self, function: Callable) -> Trace:
        with self.program.scope(self.rows):
            trace = pyro.poutine.trace(function).get_trace(*self.batch.args, **self.batch.kwargs)
            trace.compute_log_prob()
        return trace


def local_sites(fitted: FittedModel, what: str) -> list[Site]:
    """The local latents that the guide draws. Raises `ProgramError` if there are none, or one is summed out."""
    sites = list(fitted.structure.local_latents)
    summed = [s.name for s in fitted.structure.sites if s.enumerated]
    if summed:
        raise ProgramError(
            f"{what} needs draws of every latent, but '{summed[0]}' is enumerated: give the guide a site for it"
        )
    if fitted.structure.joint_guide:
        raise ProgramError(
            f"the guide draws the latents of all data at once ('{fitted.structure.joint_guide}'), so {what} per "
            "datum has no meaning: use a guide that is independent over data, such as AutoNormal"
        )
    if not sites:
        raise ProgramError(
            f"{what} is about latents of each datum and this program has none in its data plate"
        )
    return sites


def row_chunks(batch: Batch, per_row: int, device: torch.device, whole: bool = False) -> Iterator[Batch]:
    """The rows of `batch` in parts of about BUDGET numbers, `per_row` being the draws of each row."""
    if whole:
        yield batch
        return
    width = max(1, sum(t.numel() for _, t in batch.tensors()) // max(batch.num_rows, 1))
    size = max(1, BUDGET // (width * per_row))
    for rows in arange_rows(batch.num_rows, device).split(size):
        yield batch.take(rows)
