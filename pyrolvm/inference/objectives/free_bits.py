"""Free bits: the KL of a latent costs nothing up to a number of nats (Kingma et al. 2016, equation 15).

    J = (1/N) sum_n E_q log p(x_n | z) - sum_j max(free_bits, (1/N) sum_n KL_j(x_n))

in nats per datum, over groups j of the latents of each datum: sites, or their dimensions. The mean over data stands
inside the maximum and is taken over the batch. A group below its free bits has no gradient of its KL, so that nothing
is gained by leaving it unused.

The bound that is reported is the ELBO of the same draws; J is the column `free_bits`. What all data share is paid in
full.

D. P. Kingma, T. Salimans, R. Jozefowicz, X. Chen, I. Sutskever and M. Welling, "Improved variational inference with
inverse autoregressive flow", NeurIPS 2016.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyrolvm.errors import SettingError, one_of
from pyrolvm.inference.objectives.base import (
    Estimate,
    Objective,
    check_reparameterised,
    kl_term,
    log_ratio,
    site_terms,
)
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import given_first, sample_sites
from pyrolvm.processes import sharing


class FreeBits(Objective):
    """The ELBO with free bits.

    Parameters
    ----------
    free_bits : float
        Nats of each group, not negative; 0 is the ELBO where no KL is negative.
    per : {"site", "dimension"}
        What a group is: a latent site, or one of its dimensions.
    num_particles : int
        Draws of z for each datum, over which everything is averaged.
    vectorize_particles : bool
        Whether they are taken at once.

    Raises
    ------
    SettingError
        For settings outside these ranges; in `fit`, for a program without latents of each datum, or with draws that are
        not reparameterised; for dimensions that are not independent in guide and model.
    """

    def __init__(
        self,
        free_bits: float = 0.5,
        per: str = "site",
        num_particles: int = 1,
        vectorize_particles: bool = False,
    ) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        if not 0 <= free_bits < math.inf:
            raise SettingError(f"free_bits={free_bits} must be a number of nats, not negative")
        self.free_bits, self.per = free_bits, one_of("per", per, ("site", "dimension"))

    def settings(self) -> dict[str, Any]:
        """Under this class's name."""
        return {"name": "FreeBits", **super().settings()}

    def estimate(self, pair: Pair, controls: Mapping[str, Any]) -> Estimate:
        """The ELBO as the bound, J as the surrogate."""
        if "kl_weight" in controls:
            raise SettingError(
                "free bits and a weight of the KL (kl_warmup) exclude each other: leave one out"
            )
        sites = _paid_sites(pair)
        at_once = self.num_particles if self.vectorize_particles and self.num_particles > 1 else None
        runs = [pair.draw(at_once) for _ in range(1 if at_once else self.num_particles)]
        for _, guide in runs:
            check_reparameterised(guide, "FreeBits differentiates the KL")
            _check_direct(guide)
        share = 1 / self.num_particles
        bound: Any = sum(model.log_prob_sum() - guide.log_prob_sum() for model, guide in runs) * share
        kl: Any = sum(kl_term(*run) for run in runs) * share
        drawn: Any = sum(log_ratio(*run, name) for run in runs for name in sites) * share
        # the threshold is on the mean over all rows, whichever processes they are with
        groups = {name: sharing().mean(sum(self._kl(*run, name) for run in runs) * share) for name in sites}
        least = self.free_bits * pair.structure.num_data
        paid: Any = sum(group.clamp(min=least).sum() for group in groups.values())
        value = bound + drawn - paid
        terms = {
            "log_likelihood": bound + kl,
            "kl": kl,
            **site_terms(pair, runs, self.num_particles),
            "free_bits": value,
        }
        return Estimate(bound.detach(), -value, {name: term.detach() for name, term in terms.items()})

    def _kl(self, model: Trace, guide: Trace, name: str) -> Tensor:
        """The KL of the groups of one site, summed over data and draws: [groups]."""
        q: Any = guide.nodes[name]
        p: Any = model.nodes[name]
        elements = _elements(q["fn"], p["fn"], q["value"], given_first(model, guide, name))
        if elements is None:
            if self.per == "dimension":
                raise SettingError(
                    f"the KL of '{name}' is no sum over dimensions, which are not independent in guide and model: say "
                    "per='site'"
                )
            return log_ratio(model, guide, name).reshape(1)
        weights = scale_and_mask(torch.ones_like(q["log_prob"]), q["scale"], q["mask"])  # of each datum
        rows = elements.expand(*weights.shape, *q["fn"].event_shape).reshape(weights.numel(), -1)
        each = (rows * weights.reshape(-1, 1)).sum(0)
        return each if self.per == "dimension" else each.sum().reshape(1)


def _paid_sites(pair: Pair) -> list[str]:
    """The latents of each datum that the guide draws."""
    structure = pair.structure
    sites = [s.name for s in structure.local_latents if s.in_guide]
    if not sites:
        raise SettingError(
            "FreeBits is about latents of each datum and this program has none in its data plate: use Trace_ELBO()"
        )
    if structure.joint_guide:
        raise SettingError(
            f"the guide draws the latents of all data at once ('{structure.joint_guide}'), so the KL of a site is not "
            "known: use a guide that is independent over data"
        )
    return sites


def _check_direct(guide: Trace) -> None:
    for site in sample_sites(guide):
        if site["infer"].get("is_auxiliary"):
            raise SettingError(
                f"the guide computes latents from the auxiliary '{site['name']}' (an AutoGuide does), so the KL of "
                "a site is not known: write a guide that draws them"
            )


def _elements(q: Any, p: Any, value: Tensor, given: bool) -> Tensor | None:
    """KL of each element, [batch..., event...]: closed where it may be, else at the draw; None if elements depend."""
    q, p = (_below(fn) for fn in (q, p))
    if q.event_shape or p.event_shape:
        return None
    if given:
        try:
            return kl_divergence(q, p)
        except NotImplementedError:
            pass
    return q.log_prob(value) - p.log_prob(value)


def _below(fn: Any) -> Any:
    """What stands below `to_event`."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn
