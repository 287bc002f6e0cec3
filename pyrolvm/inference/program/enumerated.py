"""Draws for programs whose discrete latents are summed out: the exact p(k | x, z) stands for their guide.

With k enumerated, a program's joint density has one value per state of k. Under q(z | x) for the rest,

    k ~ p(k | x, z)  proportional to  p(x, z, k),       log p(x | z) = log sum_k p(x, z, k) - log sum_k p(z, k),

so that predictions go on from a k that the datum speaks for, and likelihoods have no noise of k in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.data.arrays import Batch
from pyrolvm.errors import ProgramError
from pyrolvm.inference.program.draws import Draws, _Pair, _with_log_prob, stack, tidy
from pyrolvm.inference.program.handlers import Fixed
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import Structure, sample_sites

TOGETHER = "observed"
"""The name of the likelihood of several observed sites that share a summed-out latent."""


def enumerated_sites(structure: Structure) -> list[str]:
    """The latents that are summed out. Raises `ProgramError` if one is not in the data plate and no other."""
    sites = [s for s in structure.sites if s.enumerated]
    for site in sites:
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


def enumerated_draws(
    program: Program,
    structure: Structure,
    batch: Batch,
    num_samples: int,
    *,
    vectorized: bool,
    total: int,
    shared: list[dict[str, Tensor]] | None = None,
) -> Draws:
    """As `posterior_draws`, with the summed-out latents drawn from their exact posterior."""
    pair = _Enumerated(program, structure, batch, total)
    if vectorized:
        return pair.enumerated_draws(num_samples, (shared or [{}])[0])
    return stack([pair.enumerated_draws(None, values) for values in shared or [{}] * num_samples])


class _Enumerated(_Pair):
    """One program on one batch, its enumerated sites summed out and drawn."""

    together = True
    """Whether draws have a dimension of their own, left of the plates'."""

    def enumerated_draws(self, num_samples: int | None, shared: dict[str, Tensor]) -> Draws:
        self.together = num_samples is not None
        with self.program.scope(self.rows), Fixed(shared):
            guide = self._trace(self._wrapped(self.program.guide, num_samples))
            replayed = pyro.poutine.replay(self._wrapped(self.program.model, num_samples), trace=guide)
            states = self._trace(self._parallel(replayed))
            states.compute_log_prob()
            joint, prior = self._by_state(states, observed=True), self._by_state(states, observed=False)
            chosen = dist.Categorical(logits=joint.movedim(0, -1)).sample()  # [S, rows]
            drawn = self._values(states, chosen)
            with Fixed(drawn):
                model, guide = _with_log_prob(self._trace(replayed), guide)
        draws = self._summed(self.draws(model, guide), states, joint, prior, chosen)
        values = {k: tidy(self.structure, model.nodes[k], v) for k, v in drawn.items()}
        return replace(draws, values=draws.values | values)

    @property
    def _depth(self) -> int:
        """The dimensions right of those of the states: draws and plates."""
        return self.together + self.structure.max_plate_nesting

    def _parallel(self, model: Callable) -> Callable:
        names = {s.name for s in self.structure.sites if s.enumerated}
        marked = pyro.poutine.infer_config(
            model, config_fn=lambda s: {"enumerate": "parallel"} if s["name"] in names else {}
        )
        return pyro.poutine.enum(marked, first_available_dim=-1 - self._depth)

    def _dependent(self, states: Trace) -> list[Any]:
        """The sites whose log-density differs by state."""
        return [s for s in sample_sites(states) if s["unscaled_log_prob"].dim() > self._depth]

    def _by_state(self, states: Trace, *, observed: bool) -> Tensor:
        """log p(k, ...), with or without what is observed, of what depends on k: [states, S, rows], nats."""
        sites = [s for s in self._dependent(states) if observed or not s["is_observed"]]
        terms = [scale_and_mask(s["unscaled_log_prob"], mask=s["mask"]) for s in sites]
        inner = [d for d in range(-self.structure.max_plate_nesting, 0) if d != self._row_dim]
        total = sum(t.sum(inner, keepdim=True) if inner else t for t in terms)
        assert isinstance(total, Tensor)  # an enumerated site depends on itself
        num_samples = total.shape[-self._depth] if self.together else 1
        return total.reshape(-1, num_samples, total.shape[self._row_dim])

    @property
    def _row_dim(self) -> int:
        assert self.structure.data_plate is not None  # see `enumerated_sites`
        return self.structure.data_plate.dim

    def _values(self, states: Trace, chosen: Tensor) -> dict[str, Tensor]:
        """Each enumerated site's value in the states numbered `chosen` [S, rows], in the program's shape."""
        sites = [s for s in sample_sites(states) if "_enumerate_dim" in s["infer"]]
        sites.sort(key=lambda s: s["infer"]["_enumerate_dim"])  # leftmost first, as states are numbered
        places = torch.unravel_index(chosen, [s["value"].numel() for s in sites])
        shape = [len(chosen)] * self.together + [1] * self.structure.max_plate_nesting
        shape[self._row_dim] = chosen.shape[1]
        return {s["name"]: s["value"].flatten()[i].reshape(shape) for s, i in zip(sites, places, strict=True)}

    def _summed(self, draws: Draws, states: Trace, joint: Tensor, prior: Tensor, chosen: Tensor) -> Draws:
        """The draws with densities at the chosen states replaced by their sums over all states."""
        assert draws.log_prior is not None
        assert draws.log_likelihood is not None
        joint_there, prior_there = (t.gather(0, chosen[None])[0] for t in (joint, prior))
        log_prior, log_joint = prior.logsumexp(0), joint.logsumexp(0)
        names = [s["name"] for s in self._dependent(states) if s["is_observed"]]
        pointwise = {k: v for k, v in draws.pointwise.items() if k not in names}
        if names:
            pointwise[names[0] if len(names) == 1 else TOGETHER] = log_joint - log_prior
        return replace(
            draws,
            pointwise=pointwise,
            log_prior=draws.log_prior - prior_there + log_prior,
            log_likelihood=draws.log_likelihood - (joint_there - prior_there) + log_joint - log_prior,
        )
