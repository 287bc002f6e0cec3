"""The Concrete (Gumbel-softmax) relaxation of bits and of one-hot categories: an objective with a biased gradient.

With G Gumbel and u uniform noise, a the site's logits, and lambda the temperature,

    bits         x = sigma((a + log u - log(1 - u)) / lambda)
    categories   x = softmax((a + G) / lambda)

The relaxed bound has the densities of the relaxed variables in place of the probabilities,

    E[ log p(x_data | x) + log p_0(x) - log q_lambda(x | x_data) ],      p_0 with a temperature of its own,

and its gradient is that of the path. Densities are those of the log-odds and of log x, in which the numbers are
exact; the change of variables is the same in p_0 and q, so that it cancels. It is a bound of the relaxed program and
of no other: what is reported as the bound is the ELBO of a draw of the discrete program (the relaxed one is the term
`relaxed`), and held-out bounds and evidences are of the discrete program too.

With K = `num_particles` draws the bound is that of Maddison et al., E[ log (1/K) sum_k w_k ] with the weights of
relaxed draws; the one that is reported has those of K discrete draws.

`straight_through`: the program sees the discrete value, with the gradient of the relaxed one, and the discrete
probabilities in its bound (Bengio et al. 2013; Jang et al. 2017).

C. Maddison, A. Mnih and Y. W. Teh, "The Concrete distribution", ICLR 2017.
E. Jang, S. Gu and B. Poole, "Categorical reparameterization with Gumbel-softmax", ICLR 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Bernoulli, OneHotCategorical
from torch.nn.functional import one_hot, softplus

from pyrolvm.controls import Schedule, value_of
from pyrolvm.errors import SettingError, count, positive
from pyrolvm.inference.objectives.base import Estimate
from pyrolvm.inference.objectives.discrete import (
    Chosen,
    DiscreteObjective,
    Settled,
    assembled,
    bit_density,
    drawn,
    is_point,
    plainly,
    uniform,
    unwrapped,
)
from pyrolvm.inference.objectives.several import Several, multi_sample
from pyrolvm.inference.objectives.smooth import Smoothness
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import base
from pyrolvm.inference.program.weights import LogDensities, log_densities


class Concrete(DiscreteObjective):
    """The path gradient of a relaxed program, for sites that are Bernoulli or OneHotCategorical.

    Parameters
    ----------
    temperature : float or function of the share of the run
        Of the guide's sites: the control `temperature`.
    prior_temperature : float, optional
        Of the model's; None is that of the guide, at which densities cancel where the guide is the prior.
    straight_through : bool
    num_particles : int
        K, the draws of each datum.

    Raises
    ------
    SettingError
        A temperature is not positive, or a site is of another kind.
    """

    def __init__(
        self,
        temperature: Schedule = 2 / 3,
        prior_temperature: float | None = 0.5,
        straight_through: bool = False,
        num_particles: int = 1,
    ) -> None:
        super().__init__()
        for share in (1e-6, 0.5, 1.0):
            positive("temperature", value_of("temperature", temperature, share))
        self.temperature = temperature
        self.prior_temperature = (
            None if prior_temperature is None else positive("prior_temperature", prior_temperature)
        )
        self.straight_through = bool(straight_through)
        self.num_particles: int = count("num_particles", num_particles)
        self.smooth, self.several = Smoothness(), Several(self.num_particles)

    def controls(self) -> dict[str, Schedule]:
        """The temperature."""
        return {"temperature": self.temperature}

    def estimate(self, pair: Pair, controls: Any) -> Estimate:
        """The bound of discrete draws, and its surrogate where a gradient is asked for."""
        if torch.is_grad_enabled() or self.num_particles == 1:
            return super().estimate(pair, controls)
        runs = [drawn(pair, draws) for draws in self.several.runs(pair)]
        bound = self.several.bound([r.densities.log_weight for r in runs])
        return multi_sample(runs, bound, bound)

    def estimated(self, pair: Pair, controls: Any) -> Estimate:
        """The bound of discrete draws; the surrogate is of relaxed ones."""
        temperature = controls["temperature"]
        if not isinstance(temperature, Tensor):
            positive("temperature", temperature)
        self.smooth.check(pair, "Concrete", reading_kinds)
        draws = [None] if self.num_particles == 1 else self.several.runs(pair)
        with torch.no_grad():
            runs = [drawn(pair, number) for number in draws]
        relaxed = [self._relaxed(pair, temperature, number) for number in draws]
        gain = self.several.bound([found.log_weight for found in relaxed])  # [cells]
        total = (relaxed[0].scale * gain).sum()
        if self.num_particles == 1:
            return assembled(pair, runs, gain, relaxed=total)
        bound = self.several.bound([r.densities.log_weight for r in runs])
        return multi_sample(runs, bound, gain, relaxed=total)

    def _relaxed(self, pair: Pair, temperature: Any, draws: int | None) -> LogDensities:
        """Densities of relaxed draws."""
        drawn_at: dict[str, Relaxed] = {}
        points: list[str] = []

        def in_guide(site: Any) -> Chosen | None:
            kind = kind_of(site)
            if kind is None:
                points.extend([site["name"]] * is_point(site))
                return None
            one = drawn_at[site["name"]] = kind.draw(_logits(site, kind), temperature)
            return one.passed(straight_through=self.straight_through), self._density(
                one, kind, one.logits, temperature
            )

        def in_model(site: Any) -> Chosen | None:
            one = drawn_at.get(site["name"])
            if one is None:
                return None
            kind = kind_of(site)
            assert kind is not None
            prior = temperature if self.prior_temperature is None else self.prior_temperature
            density = self._density(one, kind, _logits(site, kind), prior)
            return one.passed(straight_through=self.straight_through), density

        with plainly():
            guide = pair.guide(draws, Settled(in_guide))
        if not drawn_at and not points:
            raise SettingError(
                "Concrete relaxes discrete latents, and the guide draws none: use Trace_ELBO()"
            )
        model = pair.model(draws, Settled(in_model), lambda f: poutine.replay(f, trace=guide))
        return log_densities(model, guide)

    def _density(self, one: Relaxed, kind: Kind, logits: Tensor, temperature: Any) -> Tensor:
        if self.straight_through:
            return kind.discrete_density(logits, one.passed(straight_through=True))
        return kind.density(one.raw, logits, temperature)


@dataclass(frozen=True)
class Relaxed:
    """A relaxed draw of one site: log-odds or log x in `raw`, x in `soft`, the nearest discrete value in `hard`."""

    logits: Tensor
    raw: Tensor
    soft: Tensor
    hard: Tensor

    def passed(self, *, straight_through: bool) -> Tensor:
        """What the program sees."""
        return self.hard + (self.soft - self.soft.detach()) if straight_through else self.soft


@dataclass(frozen=True)
class Kind:
    """How sites of one family are relaxed."""

    draw: Callable[[Tensor, Any], Relaxed]
    density: Callable[[Tensor, Tensor, Any], Tensor]
    discrete_density: Callable[[Tensor, Tensor], Tensor]


def _draw_bits(logits: Tensor, temperature: Any) -> Relaxed:
    raw = (logits + uniform(logits).logit()) / temperature
    return Relaxed(logits, raw, raw.sigmoid(), (raw.detach() > 0).to(raw.dtype))


def _draw_categories(logits: Tensor, temperature: Any) -> Relaxed:
    gumbel = -(-uniform(logits).log()).log()
    raw = ((logits + gumbel) / temperature).log_softmax(-1)
    hard = one_hot(raw.detach().argmax(-1), raw.shape[-1]).to(raw.dtype)
    return Relaxed(logits, raw, raw.exp(), hard)


def bits_density(raw: Tensor, logits: Tensor, temperature: Any) -> Tensor:
    """Log-density of the log-odds y of binary Concrete variables, entry by entry (Maddison et al., appendix C.3.1).

    log lambda + a - lambda y - 2 log(1 + e^(a - lambda y))
    """
    apart = logits - temperature * raw
    return _log(temperature) + apart - 2 * softplus(apart)


def categories_density(raw: Tensor, logits: Tensor, temperature: Any) -> Tensor:
    """Log-density of y = log x of a Concrete variable: [..., 1] (appendix C.3.2).

    log (n - 1)! + (n - 1) log lambda + sum_k (a_k - lambda y_k) - n log sum_k e^(a_k - lambda y_k)
    """
    n, apart = raw.shape[-1], logits - temperature * raw
    constant = math.lgamma(n) + (n - 1) * _log(temperature)
    return constant + apart.sum(-1, keepdim=True) - n * apart.logsumexp(-1, keepdim=True)


def concrete_density(x: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Log-density [...] of a Concrete variable x [..., n] on the simplex (Maddison et al., definition 1)."""
    return categories_density(x.log(), logits, temperature).squeeze(-1) - x.log().sum(-1)


def _log(temperature: Any) -> Any:
    return temperature.log() if isinstance(temperature, Tensor) else math.log(temperature)


def _categories_log_prob(logits: Tensor, value: Tensor) -> Tensor:
    return (value * logits.log_softmax(-1)).sum(-1, keepdim=True)


BITS = Kind(_draw_bits, bits_density, bit_density)
CATEGORIES = Kind(_draw_categories, categories_density, _categories_log_prob)


def kind_of(site: Any) -> Kind | None:
    """How a site is relaxed; None if it is reparameterised as it is. Raises `SettingError` for other discrete sites."""
    fn = unwrapped(site["fn"])
    if isinstance(fn, Bernoulli):
        return BITS
    if isinstance(fn, OneHotCategorical):
        return CATEGORIES
    if getattr(fn, "has_rsample", False):
        return None
    name = type(base(site["fn"])).__name__
    instead = "write it as dist.OneHotCategorical, or " if name == "Categorical" else ""
    raise SettingError(
        f"Concrete relaxes sites that are Bernoulli or OneHotCategorical, and '{site['name']}' is {name}, whose values "
        f"have "
        f"none between them: {instead}use NVIL() or VIMCO()"
    )


def reading_kinds(site: Any) -> Any:
    """Logits and discrete log-density of a site that is relaxed; None of one that is left as it is."""
    kind = kind_of(site)
    return None if kind is None else (_logits(site, kind), kind.discrete_density)


def _logits(site: Any, kind: Kind) -> Tensor:
    """Logits [batch..., event...] of a site of this kind."""
    if kind_of(site) is not kind:
        raise SettingError(
            f"'{site['name']}' is of another family in the guide than in the model: Concrete needs the same"
        )
    fn = site["fn"]
    return unwrapped(fn).logits.expand(fn.batch_shape + fn.event_shape)
