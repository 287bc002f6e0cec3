"""Importance-weighted training: the Renyi bounds of every alpha, and three gradients of them.

With a = 1 - alpha, weights w_k = p(x, z_k) / q(z_k | x) of K draws z_k = T(e_k; phi) ~ q, and
v_k = w_k^a / (w_1^a + ... + w_K^a),

    L_{K,alpha}(x) = 1/a log (1/K) sum_k w_k^a,        dL = sum_k v_k d log w_k

alpha = 0 is the importance-weighted bound (Burda, Grosse & Salakhutdinov 2016, eq. 8), 1 the ELBO, -inf the largest
log w_k (Li & Turner 2016, section 4.3), inf the smallest. The model's parameters have that gradient always; what
the draws pass on to the guide's parameters phi is one of

    "standard"  sum_k v_k (path_k - score_k),          unbiased
    "stl"       sum_k v_k path_k,                      unbiased for the ELBO (K = 1 or alpha = 1), else biased
    "dreg"      sum_k (alpha v_k + a v_k^2) path_k,    unbiased

    path_k  = d log w_k / dz_k  dz_k / dphi            with phi in the density q held
    score_k = d log q(z_k | x; phi) / dphi             with z_k held: of mean zero

"stl", sticking the landing, is Roeder, Wu & Duvenaud (2017); "dreg", doubly reparameterised, Tucker, Lawson, Gu &
Maddison (2019, eq. 8) for alpha = 0 and Daudel, Benton, Shi & Doucet (2023, "Alpha-divergence variational inference
meets importance weighted auto-encoders", theorem 1) for other alpha. Both are zero at the exact posterior, draw by
draw. The latents may be any number of reparameterised sites, each depending on the earlier ones.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import ProgramError, SettingError, count, one_of
from pyrolvm.inference.objectives.base import Estimate, Objective
from pyrolvm.inference.objectives.renyi import renyi_bound, score_term
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import base, sample_sites
from pyrolvm.inference.program.weights import LogDensities, log_densities

GRADIENTS = ("standard", "stl", "dreg")


class ImportanceWeighted(Objective):
    """L_{K,alpha} of each datum, the plate's scale outside, by the gradient of your choice.

    Data passed whole may have latents outside the data plate; all data then have one weight together, which is a bound
    on log p(x_1, ..., x_N), loose where N is large. In minibatches such latents are refused.

    Parameters
    ----------
    num_particles : int
        K, the draws of each datum.
    alpha : float
        Of the Renyi divergence; 0 is the importance-weighted bound, 1 the ELBO. Above 0 a bound on log p(x) from below;
        below 0 it rises above log p(x) for large K. `-math.inf` and `math.inf` are the largest and the smallest weight.
    gradient : {"standard", "stl", "dreg"}
        See above. "stl" and "dreg" need reparameterised sites in the guide.

    Raises
    ------
    SettingError
        A setting is unknown, or "dreg" with an infinite alpha, where it has no limit.
    """

    def __init__(self, num_particles: int = 10, alpha: float = 0.0, gradient: str = "standard") -> None:
        self.num_particles: int = count("num_particles", num_particles)
        if not isinstance(alpha, numbers.Real) or math.isnan(alpha):
            raise SettingError(f"alpha must be a number, not {alpha!r}")
        self.alpha: float = float(alpha)
        self.gradient: str = one_of("gradient", gradient, GRADIENTS)
        if gradient == "dreg" and math.isinf(alpha):
            raise SettingError(f'gradient="dreg" has no limit at alpha={alpha}: take gradient="standard"')
        self._together: dict[Any, bool] = {}

    def settings(self) -> dict[str, Any]:
        """With an infinite alpha as a word, since JSON has no such number."""
        return super().settings() | ({"alpha": str(self.alpha)} if math.isinf(self.alpha) else {})

    def estimate(self, pair: Pair, controls: Mapping[str, Any]) -> Estimate:
        """L_{K,alpha}, summed over the data."""
        together = self._at_once(pair)
        runs = [self.num_particles] if together else [None] * self.num_particles
        if self.gradient == "standard":
            found = [log_densities(*pair.draw(draws)) for draws in runs]
            log_weight = torch.cat([d.log_weight for d in found])  # [K, cells]
            bounds = renyi_bound(log_weight, self.alpha)  # [cells]
            surrogate = bounds + score_term(found, bounds)
        else:
            paths = [Path(pair, draws, self.gradient) for draws in runs]
            found = [p.densities for p in paths]
            log_weight = torch.cat([d.log_weight for d in found]).detach()
            bounds = renyi_bound(log_weight, self.alpha)
            share = renyi_shares(log_weight, self.alpha).split([len(d.log_guide) for d in found])
            surrogate = sum(p.surrogate(v, self._passed_on(v)) for p, v in zip(paths, share, strict=True))
        return _estimate(found, bounds, surrogate)

    def _passed_on(self, share: Tensor) -> Tensor:
        """What the draws' path is multiplied by, relative to v_k: [particles, cells]."""
        if self.gradient == "stl":
            return torch.ones_like(share)
        return self.alpha + (1 - self.alpha) * share

    def _at_once(self, pair: Pair) -> bool:
        """Whether the K draws may stand under a plate of their own; tried out once for a program."""
        if self.num_particles == 1:
            return False
        key = (pair.program.model, pair.program.guide)
        if key not in self._together:
            trial = Pair(
                pair.program, pair.structure, pair.batch, "predict"
            )  # dropout would tell draws apart
            self._together[key] = trial.vectorized
        return self._together[key]


def _estimate(found: list[LogDensities], bounds: Tensor, surrogate: Any) -> Estimate:
    """Summed over the data, with the scale outside."""
    scale = found[0].scale
    log_likelihood = torch.cat([d.log_likelihood for d in found]).mean(0)
    kl = torch.cat([d.log_guide - d.log_prior for d in found]).mean(0)
    total = [(scale * term).sum() for term in (bounds, -surrogate, log_likelihood, kl)]
    terms = {"log_likelihood": total[2].detach(), "kl": total[3].detach()}
    return Estimate(total[0].detach(), total[1], terms)


def renyi_shares(log_weight: Tensor, alpha: float) -> Tensor:
    """v_k = w_k^(1 - alpha) / sum_j w_j^(1 - alpha) over the leading axis: [K, ...]."""
    if math.isinf(alpha):
        chosen = log_weight.argmax(0, keepdim=True) if alpha < 0 else log_weight.argmin(0, keepdim=True)
        return torch.zeros_like(log_weight).scatter(0, chosen, 1.0)
    return ((1 - alpha) * log_weight).softmax(0)


class Path:
    """Draws whose gradient in the guide's parameters is that of their path alone.

    The model sees every draw through a node that multiplies the gradient which passes it (`factor`, known only after
    the densities), so that model and guide are run once, whatever the gradient. The score is taken off log q. A point
    of the guide (a Delta at a parameter) has no density: it is a parameter like those of the model.

    Parameters
    ----------
    draws : int or None
        Draws at once, or one without a plate.
    gradient : str
        Its name, for refusals.

    Attributes
    ----------
    densities : LogDensities
        Of the draws.
    held : tensor [particles, cells]
        log q of the same draws, held: its gradient is the score.
    """

    def __init__(self, pair: Pair, draws: int | None, gradient: str) -> None:
        self.factor = torch.ones(())
        guide = pair.guide(draws)
        roles = _roles(guide, gradient)
        seen = {name: self._passed(guide.nodes[name]) for name, role in roles.items() if role != "point"}
        model = pair.model(draws, lambda f: poutine.replay(f, trace=guide), given=seen)
        self.densities = log_densities(model, guide)
        self.held = log_densities(model, _held(pair, draws, guide, roles)).log_guide

    def _passed(self, site: Any) -> Tensor:
        """The value of a site, through a node that multiplies its gradient."""
        value = site["value"]
        if not value.requires_grad:
            return value
        event_dims = len(site["fn"].event_shape)
        value = value.clone()
        value.register_hook(lambda gradient: gradient * self.densities.in_place(self.factor, event_dims))
        return value

    def surrogate(self, share: Tensor, factor: Tensor) -> Tensor:
        """sum_k v_k log p(x, z_k) - v_k factor_k (log q(z_k) - its score): [cells]; both [particles, cells]."""
        self.factor = factor
        found = self.densities
        path = found.log_guide - self.held
        return (share * (found.log_likelihood + found.log_prior) - share * factor * path).sum(0)


def _roles(guide: Trace, gradient: str) -> dict[str, str]:
    """Guide site -> "drawn", "computed" from draws alone, or "point"; raises `SettingError` for anything else."""
    sites = list(sample_sites(guide))
    for site in sites:
        if not site["fn"].has_rsample:
            raise SettingError(
                f"gradient='{gradient}' follows the draws of the guide, but '{site['name']}' "
                f"({type(base(site['fn'])).__name__}) is not reparameterised: take gradient='standard'"
            )
    roles = {s["name"]: "drawn" for s in sites if not isinstance(base(s["fn"]), Delta)}
    draws = {s["value"].grad_fn for s in sites if s["name"] in roles}
    for site in (s for s in sites if s["name"] not in roles):
        from_draws, from_parameters = _reaches(site["value"], draws)
        with_parameters = _reaches(base(site["fn"]).log_density, draws)[1]
        if (from_draws and from_parameters) or with_parameters:
            raise SettingError(
                f"gradient='{gradient}' needs densities of draws, but '{site['name']}' (Delta) is computed from a draw "
                "by a map with parameters: make it a dist.TransformedDistribution, or take gradient='standard'"
            )
        roles[site["name"]] = "point" if from_parameters else "computed"
    return roles


def _held(pair: Pair, draws: int | None, guide: Trace, roles: Mapping[str, str]) -> Trace:
    """The guide's densities at its own draws, held: what depends on a parameter now does so by the density alone.

    Where a site's density depends on parameters and on earlier draws as well, the guide is run again at the draws.
    """
    sites = [s for s in sample_sites(guide) if roles[s["name"]] == "drawn"]
    values = {s["name"]: s["value"].detach() for s in sites}
    drawn = {s["value"].grad_fn for s in sample_sites(guide) if roles[s["name"]] != "point"}
    held = guide.copy()
    for site in sample_sites(guide):
        now = site["unscaled_log_prob"].detach()  # of what is computed: from draws alone
        if site["name"] in values:
            now = site["fn"].log_prob(values[site["name"]], *site["args"], **site["kwargs"])
            if all(_reaches(now, drawn)):
                return _run_again(pair, draws, guide, values)
        held.nodes[site["name"]] = dict(site, unscaled_log_prob=now)  # type: ignore[assignment]
    return held


def _run_again(pair: Pair, draws: int | None, guide: Trace, values: Mapping[str, Tensor]) -> Trace:
    held = pair.guide(draws, given=values)
    if is_validation_enabled():
        for site in sample_sites(guide):
            again: Any = held.nodes[site["name"]]
            if not torch.allclose(site["log_prob"], again["log_prob"], rtol=1e-3, atol=1e-3):
                raise ProgramError(
                    f"the guide's density of '{site['name']}' at the same draws differs from run to run (dropout?), so "
                    "that its score cannot be taken off: take gradient='standard'"
                )
    return held


def _reaches(root: Any, stop: set[Any]) -> tuple[bool, bool]:
    """Whether `root` was computed from the nodes in `stop`, and whether from a parameter not through them."""
    if not isinstance(root, Tensor) or not root.requires_grad:
        return False, False
    if root.is_leaf:
        return False, True
    stack: list[Any] = [root.grad_fn]
    seen: set[Any] = {None}
    found = leaf = False
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in stop:
            found = True
            continue
        leaf = leaf or hasattr(node, "variable")
        stack.extend(parent for parent, _ in node.next_functions)
    return found, leaf
