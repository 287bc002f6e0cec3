"""A pair run on some rows, many draws at once, for what estimators of the evidence need of it.

What the guide draws outside the data plate (global latents) is *held*: it enters no density, so that the
value of a datum is its log posterior predictive density, log E_q(theta) p(x_n | theta).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Bernoulli
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.nn.functional import softplus

from pyrolvm.data.arrays import Batch
from pyrolvm.errors import ProgramError
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import Site, Structure, sample_sites
from pyrolvm.inference.program.weights import PARTICLES, LogDensities, log_densities
from pyrolvm.plates import arange_rows
from pyrolvm.seeds import Purpose, derived_seed

if TYPE_CHECKING:
    from pyrolvm.inference.posterior.fitted import FittedModel

BUDGET = 2**20
"""Numbers that one evaluation of (draw x datum x feature) may hold: few MB, near the processor's cache."""

ACCELERATED = 64
"""How many times that on a GPU, where launches cost more than numbers."""


@dataclass(frozen=True)
class Run:
    """A pair on the rows of `batch`, out of `total`."""

    program: Program
    structure: Structure
    batch: Batch
    total: int

    @property
    def num_rows(self) -> int:
        """Data whose evidence is asked for; 1 if the program has no data plate, the data then being one."""
        return self.batch.num_rows if self.structure.data_plate else 1

    @property
    def rows(self) -> tuple[int, Tensor]:
        """(N, indices) as the data plate asks for them; a plate of the batch's own size counts the batch."""
        plate, size = self.structure.data_plate, self.batch.num_rows
        whole = plate is None or plate.full_size == plate.size
        return (size if whole else max(self.total, size)), arange_rows(size, self.program.device)

    def trace(self, function: Callable, num_samples: int | None, *handlers: Any) -> Trace:
        """`function` on the batch inside `handlers`, under a plate of `num_samples` draws if given."""
        if num_samples is not None:
            dim = -1 - self.structure.max_plate_nesting
            function = pyro.plate(PARTICLES, num_samples, dim=dim)(function)
        for handler in handlers:
            function = handler(function)
        with self.program.scope(self.rows):
            trace = poutine.trace(function).get_trace(*self.batch.args, **self.batch.kwargs)
            for site in sample_sites(trace):
                weigh_bits(site)
            trace.compute_log_prob()
        return trace

    def guide(self, num_samples: int | None, *handlers: Any) -> Trace:
        """The guide inside `handlers`."""
        return self.trace(self.program.guide, num_samples, *handlers)

    def model(self, num_samples: int | None, *handlers: Any) -> Trace:
        """The model inside `handlers`."""
        return self.trace(self.program.model, num_samples, *handlers)

    def held(self, guide: Trace) -> dict[str, Tensor]:
        """What the guide drew outside the data plate; nothing, if there is no such plate."""
        plate = self.structure.data_plate
        return {
            site["name"]: site["value"]
            for site in sample_sites(guide)
            if plate is not None and all(f.name != plate.name for f in site["cond_indep_stack"])
        }

    def held_draw(self, num_samples: int | None) -> dict[str, Tensor]:
        """Global latents drawn from the guide; the guide is not run if there are none."""
        return self.held(self.guide(num_samples)) if self.structure.global_latents else {}

    def densities(self, model: Trace, guide: Trace, held: dict[str, Tensor]) -> LogDensities:
        """log p(z), log p(x | z) and log q(z), each [draws, rows]."""
        plate = self.structure.data_plate
        found = log_densities(model, guide, skip=held, keep=[plate.name] if plate else [])
        self.check_rows(found.log_likelihood)
        return found

    def log_guide(self, guide: Trace, held: dict[str, Tensor]) -> Tensor:
        """log q(z | x), [draws, rows]; 0 of a guide that draws nothing more than is held."""
        if any(site["name"] not in held for site in sample_sites(guide)):
            return self.densities(Trace(), guide, held).log_guide
        return torch.zeros(1, self.num_rows, device=self.program.device)

    def check_rows(self, densities: Tensor) -> None:
        """Raise `ProgramError` if densities [draws, rows] are not one per datum."""
        if densities.shape[1] != self.num_rows:
            raise ProgramError(
                f"the program has no density per datum: a latent outside the data plate "
                f"({', '.join(s.name for s in self.structure.global_latents)}) is not drawn by the guide, so that "
                "the data depend on each other; give the guide a site for it"
            )

    def repeated(self, num_samples: int) -> Run:
        """The same rows `num_samples` times over, draw by draw: draws at once for programs that know no plate."""
        rows = arange_rows(self.batch.num_rows, self.program.device).repeat(num_samples)
        return replace(self, batch=self.batch.take(rows))


def weigh_bits(site: dict[str, Any]) -> None:
    """Give a site of independent Bernoulli entries its log-density, if it is one.

        log p(x) = sum_d x_d l_d - log(1 + e^l_d),     l: logits

    in two passes over the logits instead of torch's six, which matters where every draw decodes an image.
    """
    fn, value = site["fn"], site["value"]
    bits: Any = getattr(fn, "base_dist", None)
    ours = isinstance(bits, Bernoulli) and "logits" in bits.__dict__ and value.dtype == bits.logits.dtype
    if not ours or getattr(fn, "reinterpreted_batch_ndims", 0) != 1 or site["args"] or site["kwargs"]:
        return
    log_prob = torch.linalg.vecdot(bits.logits, value) - softplus(bits.logits).sum(-1)
    site["unscaled_log_prob"] = log_prob
    site["log_prob"] = scale_and_mask(log_prob, site["scale"], site["mask"])
    site["log_prob_sum"] = site["log_prob"].sum()


def can_repeat(structure: Structure) -> bool:
    """Whether draws at once may be rows: data are independent, and nothing belongs to a certain one."""
    return structure.takes_any_rows and not structure.per_datum and not structure.global_latents


def chunks(fitted: FittedModel, x: Any, num_samples: int, seed: int) -> Iterator[tuple[Run, int]]:
    """(a run on some rows, draws at once) for all rows of `x`, each under generators of its own."""
    batch, structure = fitted.batch(x), fitted.structure
    rows, at_once = chunk_sizes(structure, batch, batch.num_rows, num_samples)
    if not fitted.vectorized and not can_repeat(structure):
        at_once = 1
    device = fitted.program.device
    for index, part in enumerate(arange_rows(batch.num_rows, device).split(rows)):
        taken = batch if rows == batch.num_rows else batch.take(part)
        run = Run(fitted.program, structure, taken, fitted.num_rows)
        with seeded(derived_seed(seed, Purpose.EVIDENCE, index), device):
            yield run, at_once


def chunk_sizes(structure: Structure, batch: Batch, num_rows: int, num_samples: int) -> tuple[int, int]:
    """(rows, draws) of one evaluation of data shaped like `batch`, within the budget.

    Few rows and many draws: the guide's network sees a row once for all its draws. Global latents are
    drawn once per draw, not per row: with them, as many rows as make up for their size. Programs that take
    no other number of rows, or have parameters for each, get all rows.
    """
    budget = BUDGET * (1 if all(t.device.type == "cpu" for _, t in batch.tensors()) else ACCELERATED)
    latents = [s for s in structure.sites if not s.observed]
    size = structure.data_plate.size if structure.data_plate else 1
    data = sum(t.numel() for _, t in batch.tensors()) // max(1, batch.num_rows)
    per_row = max(1, data + sum(_numel(s) for s in latents if s.local) // size)
    per_draw = sum(_numel(s) for s in latents if not s.local)
    rows = min(num_rows, max(1, budget // (per_row * num_samples), min(per_draw, budget) // per_row))
    if not structure.takes_any_rows or structure.per_datum:
        rows = num_rows
    return rows, max(1, min(num_samples, budget // (rows * per_row + per_draw)))


def _numel(site: Site) -> int:
    return math.prod(site.batch_shape) * math.prod(site.event_shape)
