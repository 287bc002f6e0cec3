"""The InfoVAE's objective (Zhao, Song and Ermon 2019), for any program with continuous latents of each datum.

    J = (1/N) sum_n [ E_q log p(x_n | z) - (1 - alpha) KL(q(z | x_n) || p(z)) ] - (alpha + lambda - 1) D(q(z), p(z))

in nats per datum, where q(z) = (1/N) sum_n q(z | x_n) is the aggregated posterior and D the maximum mean discrepancy
(`mmd.py`), a pure number: lambda is what one unit of it costs. Since KL = I_q(n; z) + KL(q(z) || p(z)) on average,
alpha takes back the price of information, and lambda sets that of the mismatch.

    alpha = 0, lambda = 1      the ELBO
    alpha = 1 - lambda         the beta-VAE of beta = lambda: no D
    alpha = 1                  the MMD-VAE; with a point guide the Wasserstein autoencoder (Tolstikhin et al. 2018)

D is estimated from the rows of a batch, one draw of q and one of the prior for each: unbiased for rows taken at random.
It is no sum over data, so that it counts N times in the total over the data, whatever the batch.

The bound that is reported is the ELBO of the same draws, which stays a bound on log p(x); J itself is the column `info`
and D the column `mmd`.

S. Zhao, J. Song and S. Ermon, "InfoVAE: balancing learning and inference in variational autoencoders", AAAI 2019.
I. Tolstikhin, O. Bousquet, S. Gelly and B. Schoelkopf, "Wasserstein auto-encoders", ICLR 2018.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import SettingError
from pyrolvm.inference.objectives.base import Estimate, Objective, check_reparameterised, kl_term, site_terms
from pyrolvm.inference.objectives.mmd import Bandwidth, check_mmd, mmd
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import Structure, sample_sites
from pyrolvm.inference.program.weights import PARTICLES
from pyrolvm.processes import sharing

LARGEST = 1024
"""Rows that are compared at once: a larger batch falls into parts, and D is the mean over them."""


class InfoELBO(Objective):
    """The objective of the InfoVAE.

    Parameters
    ----------
    alpha : float
        At most 1.
    lambda_ : float
        Above 0 and at least 1 - alpha: below that, a mismatch of q(z) and p(z) would be rewarded.
    kernel : {"rbf", "imq"}
    bandwidth : float, sequence of float, or {"dimension", "authors", "median"}
        Of the kernel, see `pyrolvm.inference.objectives.mmd.mmd`.
    statistic : {"unbiased", "v"}
    num_particles : int
        Draws of z for each datum, over which everything is averaged.
    vectorize_particles : bool
        Whether they are taken at once.

    Raises
    ------
    SettingError
        For settings outside these ranges; in `fit`, for a program without continuous latents of each datum or with
        draws that are not reparameterised.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        lambda_: float = 100.0,
        kernel: str = "rbf",
        bandwidth: Bandwidth = "dimension",
        statistic: str = "unbiased",
        num_particles: int = 1,
        vectorize_particles: bool = False,
    ) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        check_mmd(kernel, bandwidth, statistic)
        if not -math.inf < alpha <= 1:
            raise SettingError(
                f"alpha={alpha} must be a number of at most 1: above it, the KL would be rewarded"
            )
        if not max(0.0, 1 - alpha) <= lambda_ < math.inf or lambda_ == 0:
            raise SettingError(
                f"lambda_={lambda_} must be positive and at least 1 - alpha = {1 - alpha:g}: below, the weight "
                "alpha + lambda - 1 of the divergence is negative, and rewards a mismatch of q(z) and p(z)"
            )
        self.alpha, self.lambda_ = alpha, lambda_
        self.kernel, self.bandwidth, self.statistic = kernel, bandwidth, statistic

    @property
    def weight(self) -> float:
        """alpha + lambda - 1, nats per unit of D."""
        return self.alpha + self.lambda_ - 1

    def settings(self) -> dict[str, Any]:
        """The bandwidth as text where there are several."""
        plain = self.bandwidth if isinstance(self.bandwidth, str | float | int) else str(list(self.bandwidth))
        return {"name": "InfoELBO", **super().settings(), "bandwidth": plain}

    def estimate(self, pair: Pair, controls: Mapping[str, Any]) -> Estimate:
        """The ELBO as the bound, J as the surrogate."""
        sites = compared_sites(pair.structure)
        at_once = self.num_particles if self.vectorize_particles and self.num_particles > 1 else None
        runs = [pair.draw(at_once) for _ in range(1 if at_once else self.num_particles)]
        for _, guide in runs:
            check_reparameterised(guide, "InfoELBO differentiates the divergence")
        bound, kl, local_kl = (
            sum(part) / self.num_particles for part in zip(*map(_parts(pair), runs), strict=True)
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weight != 0):
            distance = sum(self._distance(pair, sites, *run) for run in runs) / len(runs)
        total = pair.structure.num_data * distance
        info = bound + self.alpha * local_kl - (self.weight * total if self.weight else 0.0)
        terms = {
            "log_likelihood": bound + kl,
            "kl": kl,
            **site_terms(pair, runs, self.num_particles),
            "mmd": total,
            "info": info,
        }
        return Estimate(bound.detach(), -info, {name: term.detach() for name, term in terms.items()})

    def _distance(self, pair: Pair, sites: list[str], model: Trace, guide: Trace) -> Tensor:
        """D of one draw of each datum, averaged over draws: []."""
        drawn = torch.cat([pair.values(guide, name) for name in sites], -1)  # [draws, rows, dim]
        whole = round(drawn.shape[1] / sharing().part)  # rows of the batch, of all processes
        if drawn.shape[1] == 1 and (self.statistic == "unbiased" or whole > 1):
            if torch.is_grad_enabled():
                raise SettingError(
                    "the MMD compares rows of a batch, and a process has a single row here: give a batch_size of at "
                    "least 2 for each process"
                    if whole > 1
                    else "the unbiased MMD compares rows of a batch, and this one has a single row: give a batch_size "
                    "of at least 2, or statistic='v'"
                )
            return drawn.new_tensor(math.nan)
        prior = torch.cat(_prior_draws(pair, sites, model, guide), -1)
        compared = whole // math.ceil(whole / LARGEST)
        parts = _in_parts(drawn), _in_parts(prior)
        return mmd(*parts, self.kernel, self.bandwidth, self.statistic, compared).mean()


def compared_sites(structure: Structure) -> list[str]:
    """The continuous latents of each datum, which D compares together. Raises `SettingError` if there are none."""
    sites = [s.name for s in structure.local_latents if not s.discrete and s.in_guide]
    if structure.joint_guide:
        raise SettingError(
            f"the guide draws the latents of all data at once ('{structure.joint_guide}'), so the KL of a datum is not "
            "known: use a guide that is independent over data such as AutoNormal"
        )
    if not sites:
        raise SettingError(
            "InfoELBO compares the continuous latents of all data with their prior, and this program has none inside "
            "its data plate: use Trace_ELBO()"
        )
    return sites


def _parts(pair: Pair) -> Any:
    """(bound, KL, KL of the latents of each datum), summed over draws, of a pair of traces."""

    def parts(run: tuple[Trace, Trace]) -> tuple[Any, Any, Any]:
        model, guide = run
        nodes: Any = model.nodes
        local = [s for s in sample_sites(guide) if pair.is_local(s)]
        local_kl = sum(s["log_prob_sum"] for s in local) - sum(
            nodes[s["name"]]["log_prob_sum"] for s in local if s["name"] in nodes
        )
        return model.log_prob_sum() - guide.log_prob_sum(), kl_term(model, guide), local_kl

    return parts


def _prior_draws(pair: Pair, sites: list[str], model: Trace, guide: Trace) -> list[Tensor]:
    """The compared latents from the model alone, what all data share at the guide's draw: each [draws, rows, rest]."""
    nodes: Any = model.nodes
    if len(pair.structure.local_latents) == 1:  # its prior depends on no other latent of its datum
        node = nodes[sites[0]]
        return [pair.spread(node, node["fn"](), len(node["fn"].event_shape))]
    draws = next((f.size for f in nodes[sites[0]]["cond_indep_stack"] if f.name == PARTICLES), None)
    alone = pair.model(draws, given=pair.held(guide))
    return [pair.values(alone, name) for name in sites]


def _in_parts(values: Tensor) -> Tensor:
    """[draws, rows, dim] as [draws * parts, rows of a part, dim], rows spread evenly over the parts."""
    draws, rows, dim = values.shape
    parts = math.ceil(rows / LARGEST)
    each = rows // parts
    return values[:, : each * parts].reshape(draws, each, parts, dim).transpose(1, 2).reshape(-1, each, dim)
