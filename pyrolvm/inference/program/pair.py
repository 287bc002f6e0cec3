"""A program on a batch, run in every way that anybody needs: the one place where a pair is run.

What a draw is (a value under a plate left of the program's own), what a chunk is (some rows, with their numbers kept),
which sites are local, and what a density per datum is, is written here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Bernoulli
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.nn.functional import softplus

from pyrolvm.data.batch import Batch
from pyrolvm.errors import ProgramError
from pyrolvm.inference.program.handlers import Fixed, Means, Undone
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.running import every_row
from pyrolvm.inference.program.structure import (
    Structure,
    in_plate,
    is_factor,
    rows_dim,
    sample_sites,
    with_sizes,
)
from pyrolvm.inference.program.weights import PARTICLES, LogDensities, log_densities

Values = Mapping[str, Tensor]

BUDGET = 2**22
"""Numbers that one chunk of (draw x datum x feature) may hold."""


class Pair:
    """A model and its guide on the rows of one batch.

    Parameters
    ----------
    program : Program
    structure : Structure
    batch : Batch
        The arguments, with the numbers of the rows that they hold.
    mode : {"predict", "train"}
        See `Program.scope`.

    Notes
    -----
    Draws stand under a plate left of the program's own: a site's value is [draws, plates..., event...]. `spread` reads
    any such value as [draws, rows, rest]. Nothing here sets seeds: whoever asks does, chunk by chunk.
    """

    def __init__(self, program: Program, structure: Structure, batch: Batch, mode: str = "predict") -> None:
        self.program, self.structure, self.batch, self.mode = program, structure, batch, mode

    @property
    def num_rows(self) -> int:
        """Data whose densities are asked for; 1 if the program has no data plate, the data then being one."""
        return len(self.batch.indices) if self.structure.data_plate else 1

    @property
    def device(self) -> torch.device:
        """Where the program's tensors lie."""
        return self.program.device

    # ------------------------------------------------------------------ running

    def guide(self, num_draws: int | None = None, *handlers: Any, given: Values | None = None) -> Trace:
        """The guide inside `handlers`, some of its sites given; log-densities are computed.

        In predict mode without its factors: a loss that is trained beside the bound is no part of q's density.
        """
        trace = self._run(self.program.guide, num_draws, handlers, given)
        if self.mode == "predict":
            for name in [s["name"] for s in sample_sites(trace) if is_factor(s)]:
                trace.remove_node(name)
        return trace

    def model(self, num_draws: int | None = None, *handlers: Any, given: Values | None = None) -> Trace:
        """The model inside `handlers`, some of its latents given; log-densities are computed."""
        return self._run(self.program.model, num_draws, handlers, given)

    def draw(self, num_draws: int | None = None, given: Values | None = None) -> tuple[Trace, Trace]:
        """(model trace, guide trace) of z ~ q(z | x), the model replayed at the guide's draws."""
        guide = self.guide(num_draws, given=given)
        model = self.model(num_draws, lambda f: poutine.replay(f, trace=guide), given=given)
        return model, guide

    def simulate(self, num_draws: int | None = None, given: Values | None = None) -> Trace:
        """(z, x) ~ p(z, x): what is data is drawn anew; conditioned constants stay."""
        return self.model(num_draws, Undone({s.name for s in self.structure.observed}), given=given)

    def means(self) -> dict[str, Tensor]:
        """The guide's sites at their means, propagated: a site that depends on others gets them at their means."""
        guide = self.guide(None, Means())
        return {s["name"]: s["value"] for s in sample_sites(guide)}

    def _run(
        self, function: Callable, num_draws: int | None, handlers: tuple[Any, ...], given: Values | None
    ) -> Trace:
        predicting = self.mode == "predict"
        scope = self.program.scope(self.batch, self.mode) if predicting else nullcontext()
        with scope, every_row(self.batch) if predicting and self.structure.whole else nullcontext():
            if num_draws is not None:  # a plate is a site of its own: the caller's handlers must not see it
                dim = -1 - self.structure.max_plate_nesting
                function = pyro.plate(PARTICLES, num_draws, dim=dim)(function)
            for handler in (*handlers, *([Fixed(given)] if given else [])):
                function = handler(function)
            trace = with_sizes(poutine.trace(function).get_trace(*self.batch.args, **self.batch.kwargs))
            if predicting:
                for site in sample_sites(trace):
                    _weigh_bits(site)
            with _densities_exist(handlers, given):
                trace.compute_log_prob()
        return trace

    # ------------------------------------------------------------------ reading

    def is_local(self, site: Any) -> bool:
        """Whether a site of a trace stands in the data plate."""
        return in_plate(site, self.structure.data_plate)

    def held(self, guide: Trace) -> dict[str, Tensor]:
        """What the guide drew outside the data plate; nothing, if there is no such plate."""
        if self.structure.data_plate is None:
            return {}
        return {s["name"]: s["value"] for s in sample_sites(guide) if not self.is_local(s)}

    def held_draw(self, num_draws: int | None = None) -> dict[str, Tensor]:
        """Global latents drawn from the guide; the guide is not run if there are none."""
        return self.held(self.guide(num_draws)) if self.structure.global_latents else {}

    def held_means(self) -> dict[str, Tensor]:
        """Global latents at their means; the guide is not run if there are none."""
        return self.held(self.guide(None, Means())) if self.structure.global_latents else {}

    def spread(self, site: Any, value: Tensor, event_dims: int = 0) -> Tensor:
        """`value` [batch of the site, event...] as [draws, rows, rest]; outside the data plate [draws, 1, rest]."""
        nesting, plate = self.structure.max_plate_nesting, self.structure.data_plate
        frames = {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized}
        sizes = [frames.get(d, 1) for d in range(-nesting - 1, 0)]
        tail = tuple(value.shape[value.dim() - event_dims :])
        value = value.expand(torch.broadcast_shapes(value.shape, (*sizes, *tail)))
        rows = rows_dim(site, plate)
        if rows is None:
            return value.reshape(value.shape[0], 1, -1)
        value = value.movedim(nesting + 1 + rows, 1)
        return value.reshape(value.shape[0], value.shape[1], -1)

    def values(self, trace: Trace, site: str) -> Tensor:
        """The drawn value of `site`: [draws, rows, rest]."""
        node: Any = trace.nodes[site]
        return self.spread(node, node["value"], len(node["fn"].event_shape))

    def log_prob(self, trace: Trace, keep: Callable[[Any], bool]) -> Tensor:
        """Log-density of the kept sites: [draws, rows] float64, nats, without the plates' scale N/B.

        A scale of some sites (a power of the likelihood) and masks stay in, one of the whole program does not.
        """
        terms = [self._log_prob(s) for s in sample_sites(trace) if keep(s)]
        nothing = torch.zeros(1, 1, dtype=torch.float64, device=self.device)
        return sum(terms[1:], terms[0]) if terms else nothing

    def _log_prob(self, site: Any) -> Tensor:
        plates = math.prod(f.full_size / f.size for f in site["cond_indep_stack"] if f.vectorized)
        scale = 1.0 if self.structure.weighted else site["scale"] / plates
        log_prob = scale_and_mask(site["unscaled_log_prob"], scale, site["mask"])
        return self.spread(site, log_prob).double().sum(-1)

    def densities(self, model: Trace, guide: Trace, held: Values | None = None) -> LogDensities:
        """log p(z), log p(x | z) and log q(z), each [draws, rows]; `held` sites enter none of them."""
        plate = self.structure.data_plate
        skip = {*(held or ()), *self.structure.beside_data}
        found = log_densities(model, guide, skip=skip, keep=[plate.name] if plate else [])
        if found.log_likelihood.shape[1] != self.num_rows:
            outside = [s.name for s in self.structure.observed if not s.local]
            if outside and plate is not None:
                raise ProgramError(
                    f"the program has no density per datum: the data '{outside[0]}' belong to no row of the plate "
                    f"'{plate.name}', which they stand outside of"
                )
            names = ", ".join(s.name for s in self.structure.global_latents)
            raise ProgramError(
                f"the program has no density per datum: a latent outside the data plate ({names}) is not drawn by "
                "the guide, so that the data depend on each other; give the guide a site for it"
            )
        return found

    def log_guide(self, guide: Trace, held: Values) -> Tensor:
        """log q(z | x), [draws, rows]; 0 of a guide that draws nothing more than is held."""
        if any(site["name"] not in held for site in sample_sites(guide)):
            return self.densities(Trace(), guide, held).log_guide
        return torch.zeros(1, self.num_rows, device=self.device)

    # ------------------------------------------------------------------ parts

    def on(self, batch: Batch) -> Pair:
        """The same program on other data."""
        return Pair(self.program, self.structure, batch, self.mode)

    def take(self, rows: Tensor) -> Pair:
        """The same program on some of the rows, which keep their numbers."""
        return self.on(self.batch.take(rows))

    def split(self, size: int) -> Iterator[Pair]:
        """The rows in parts of at most `size`; itself if rows cannot be taken apart or all fit."""
        count = len(self.batch.indices)
        if not self.structure.chunkable or size >= count:
            yield self
            return
        for rows in torch.arange(count, device=self.batch.indices.device).split(size):
            yield self.take(rows)

    def chunks(self, per_row: int = 1, budget: int | None = None) -> Iterator[Pair]:
        """The rows in parts of about `budget` numbers, `per_row` being the draws of each row."""
        return self.split(max(1, (budget or BUDGET) // (self.width * per_row)))

    @property
    def width(self) -> int:
        """Numbers that one row of the data holds."""
        return max(1, sum(t.numel() for _, t in self.batch.tensors()) // max(self.batch.num_rows, 1))

    def at_once(self, num_draws: int, budget: int | None = None) -> int:
        """Draws of one evaluation: as many as the budget holds, 1 where they are taken one by one."""
        if not self.vectorized:
            return 1
        return min(num_draws, max(1, (budget or BUDGET) // (self.width * len(self.batch.indices))))

    @property
    def can_repeat(self) -> bool:
        """Whether draws at once may be rows: data are independent, and nothing belongs to a certain one."""
        structure = self.structure
        return structure.chunkable and not structure.per_datum and not structure.global_latents

    def repeated(self, num_draws: int) -> Pair:
        """The same rows `num_draws` times over, draw by draw: draws at once for programs that know no plate."""
        rows = torch.arange(len(self.batch.indices), device=self.batch.indices.device)
        return self.take(rows.repeat(num_draws))

    @property
    def vectorized(self) -> bool:
        """Whether draws under a further plate have the log-densities of the same draws taken one by one.

        Tried out, once for a program.
        """
        if self.program.vectorized is None:
            few = self
            if self.structure.chunkable and len(self.batch.indices) > 3:
                few = self.take(torch.arange(3, device=self.batch.indices.device))
            with torch.no_grad(), seeded(0, self.device):
                self.program.vectorized = few._try_vectorized()
        return self.program.vectorized

    def _try_vectorized(self) -> bool:
        try:
            model, guide = self.draw(2)
            together = self._densities(model, guide)
            given = [slice_of(model, guide, s) for s in range(2)]
            alone = [self._densities(self.model(given=v), self._guide_again(v)) for v in given]
        except Exception:  # whatever a user's program raises under dimensions it did not expect
            return False
        pairs = [(t[s], a[0]) for s, found in enumerate(alone) for t, a in zip(together, found, strict=True)]
        return all(t.shape == a.shape and torch.allclose(t, a, rtol=1e-3, atol=1e-3) for t, a in pairs)

    def _guide_again(self, given: Values) -> Trace:
        """The guide with the noise that it began with when all draws were taken: what it makes of it is the same."""
        with seeded(0, self.device):
            return self.guide(given=given)

    def _densities(self, model: Trace, guide: Trace) -> list[Tensor]:
        """Log-weights [draws, cells], and log p and log q of what all rows share [draws]."""
        shared = self.held(guide)
        log_weight = log_densities(model, guide, skip=shared).log_weight
        zeros = torch.zeros_like(log_weight[:, 0])
        estimates = [s.name for s in self.structure.sites if s.bound]  # another value at every call
        if estimates:
            rest = log_densities(model, guide, skip={*shared, *estimates}).log_weight
            log_weight = rest.expand_as(log_weight)
        return [log_weight, *(total_of(t, shared, zeros) for t in (model, guide))]


NO_INVERSE = (KeyError, NotImplementedError)
"""What a transform without an inverse raises."""


def _densities_exist(handlers: tuple[Any, ...], given: Values | None) -> AbstractContextManager[None]:
    """Nobody asks for the density at a mean; given values are not the program's own draws."""
    if any(isinstance(handler, Means) for handler in handlers):
        return suppress(*NO_INVERSE)
    return inverse_needed(next(iter(given))) if given else nullcontext()


@contextmanager
def inverse_needed(site: str) -> Iterator[None]:
    """Raise `ProgramError` where the density at values that a program did not draw itself does not exist."""
    try:
        yield
    except NO_INVERSE as error:
        raise ProgramError(
            f"the density of '{site}' can be computed at the program's own draws only, because a flow in it has no "
            "inverse: take one that has, such as those of pyrolvm.models.guides"
        ) from error


def total_of(trace: Trace, names: Collection[str], zeros: Tensor) -> Tensor:
    """The log-densities of the named sites of a trace, summed onto `zeros` [draws]: nats, unscaled."""
    sites = [s for s in sample_sites(trace) if s["name"] in names]
    terms = [scale_and_mask(s["unscaled_log_prob"], mask=s["mask"]) for s in sites]
    return sum((t.reshape(len(zeros), -1).sum(-1) for t in terms), zeros)


def slice_of(model: Trace, guide: Trace, index: int) -> dict[str, Tensor]:
    """The latents of one of several draws, shaped as without the plate of draws."""
    sites = {s["name"]: s for trace in (model, guide) for s in sample_sites(trace) if not s["is_observed"]}
    values = {}
    for name, site in sites.items():
        own = len(site["fn"].event_shape)
        batch_dims = [f.dim for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
        depth = -min(batch_dims, default=0)
        values[name] = site["value"][index].reshape(site["value"].shape[site["value"].dim() - own - depth :])
    return values


def _weigh_bits(site: Any) -> None:
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
