"""Discrete latents of a pair: which there are, a draw of them with its noise, what each datum costs.

For a datum with discrete latents b in layers b_1, b_2, ..., drawn in this order by the guide from logits a_1,
a_2(b_1), ...,

    f(b) = log p(x, b) - log q(b | x),        bound = E_q[f(b)],        d bound = E_q[d log p(x, b)] + sum_l E_q[h_l]
    da_l

An estimator says what h_l is: an estimate, of the shape of a_l, of the derivative of E_q[f] in the logits. Its
surrogate is log p(x, b) + sum_l <h_l, a_l> with h_l held, which also has the gradient of the model. The gradient of
log q(b | x) at the draw has mean zero and is left out. All is per datum: the scale N/B of a minibatch stands outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, ExpandedDistribution, Independent, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Bernoulli
from torch.nn.functional import softplus

from pyrolvm.errors import SettingError
from pyrolvm.inference.objectives.base import Estimate, Objective, site_terms
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import base, sample_sites
from pyrolvm.inference.program.weights import LogDensities, log_densities

Chosen = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Bits:
    """A site of bits as the guide drew it: b = 1 where u > 1 - theta, theta = sigmoid(a).

    Attributes
    ----------
    logits, value, noise : tensor [batch..., event...]
        a, b and the uniform u; of a site that was given, u means nothing.
    event_dims : int
    mask : tensor [batch...], bool or None
        The site's mask: no gradient where it is False.
    """

    name: str
    logits: Tensor
    value: Tensor
    noise: Tensor
    event_dims: int
    mask: Any

    @property
    def probs(self) -> Tensor:
        """theta, held."""
        return self.logits.detach().sigmoid()

    def kept(self, h: Tensor) -> Tensor:
        """`h` where the mask is True, 0 elsewhere."""
        if self.mask is None or self.mask is True:
            return h
        mask = torch.as_tensor(self.mask, device=h.device)
        return torch.where(mask.reshape(*mask.shape, *(1,) * self.event_dims), h, torch.zeros_like(h))


@dataclass(frozen=True)
class Run:
    """One draw of a pair, with its densities and, if they were asked for, its bits from the data up."""

    model: Trace
    guide: Trace
    densities: LogDensities
    bits: list[Bits] = field(default_factory=list)

    @property
    def cost(self) -> Tensor:
        """f(b) of each cell, held: [draws, cells]."""
        return self.densities.log_weight.detach()

    @property
    def log_joint(self) -> Tensor:
        """log p(x, b): [draws, cells]."""
        return self.densities.log_likelihood + self.densities.log_prior

    def beside(self, per_cell: Tensor, bits: Bits) -> Tensor:
        """A number per cell, to be multiplied by what has the shape of the bits."""
        return self.densities.in_place(per_cell, bits.event_dims)

    def summed(self, value: Tensor, event_dims: int) -> Tensor:
        """`value` [batch..., event...] summed within each cell: [draws, cells]."""
        return in_cells(value, self.densities, event_dims).sum(-1).reshape(self.cost.shape)

    def passed_on(self, estimates: Sequence[Tensor]) -> Tensor:
        """sum_l <h_l, a_l> with h held, whose gradient is that of the guide: [draws, cells]."""
        pairs = zip(self.bits, estimates, strict=True)
        inner = [self.summed(b.kept(h.detach()) * b.logits, b.event_dims) for b, h in pairs]
        return sum(inner, torch.zeros_like(self.cost))

    def squares(self, estimates: Sequence[Tensor]) -> Tensor:
        """sum_l |h_l|^2: what a control variate makes small, since the mean of h does not depend on it."""
        pairs = zip(self.bits, estimates, strict=True)
        return sum(
            (self.summed(b.kept(h).square(), b.event_dims) for b, h in pairs), torch.zeros_like(self.cost)
        )


class Settled(Messenger):
    """Give latents of model or guide the value, and the log-density if it is not None, that `choose(site)` returns.

    A site for which it returns None itself is left as it is.
    """

    def __init__(self, choose: Callable[[Any], Chosen | None]) -> None:
        super().__init__()
        self.choose = choose

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or isinstance(msg["fn"], _Subsample) or msg["done"]:
            return
        chosen = self.choose(msg)
        if chosen is None:
            return
        value, log_density = chosen
        if log_density is not None:
            event_dims = len(msg["fn"].event_shape)
            log_density = log_density.sum(tuple(range(-event_dims, 0))) if event_dims else log_density
            msg["fn"] = Delta(value, log_density, event_dims)
        msg["value"], msg["done"] = value, True


class DiscreteObjective(Objective):
    """An estimator of the gradient of the ELBO of a program with discrete latents.

    A subclass defines `estimated`. Where no gradient is asked for (a held-out bound), the ELBO of one draw is the
    answer.
    """

    def __init__(self) -> None:  # of one draw: no number of particles
        super().__init__()

    def estimate(self, pair: Pair, controls: Any) -> Estimate:
        """The ELBO of a draw and its surrogate."""
        if torch.is_grad_enabled():
            return self.estimated(pair, controls)
        run = drawn(pair)
        return assembled(pair, [run], run.densities.log_weight)

    def estimated(self, pair: Pair, controls: Any) -> Estimate:
        """The same, with a surrogate."""
        raise NotImplementedError(f"{type(self).__name__} must define estimated(self, pair, controls)")


@contextmanager
def plainly() -> Iterator[None]:
    """A refusal from within a program as it was worded, without the table of shapes that Pyro's trace adds."""
    try:
        yield
    except SettingError as error:
        cause = error.__cause__
        raise (cause if isinstance(cause, SettingError) else error) from None


# ---------------------------------------------------------------------- draws


def drawn(pair: Pair, num_draws: int | None = None) -> Run:
    """A draw of any program."""
    model, guide = pair.draw(num_draws)
    return Run(model, guide, log_densities(model, guide))


def score(run: Run, what: str) -> Tensor:
    """log q of the sites without a path, unscaled: [draws, cells]; its gradient is the score.

    Raises `SettingError` if there is no such site.
    """
    sites = [
        s
        for s in sample_sites(run.guide)
        if not s["is_observed"] and not getattr(s["fn"], "has_rsample", False)
    ]
    if not sites:
        raise SettingError(
            f"{what} estimates the gradient of discrete latents, and the guide draws none: use Trace_ELBO()"
        )
    parts = [run.summed(scale_and_mask(s["unscaled_log_prob"], mask=s["mask"]), 0) for s in sites]
    return sum(parts[1:], parts[0])


def drawn_bits(pair: Pair, what: str, given: dict[str, Tensor] | None = None) -> Run:
    """A draw of a program whose latents are all bits, some of them given. Raises `SettingError` for other programs.

    Points of the guide (a Delta) are left as they are: their gradient is that of log p(x, b).
    """
    found: list[Bits] = []
    points: list[str] = []

    def choose(site: Any) -> Chosen | None:
        if is_point(site):
            points.append(site["name"])
            return None
        logits = bit_logits(site, what)
        value = (given or {}).get(site["name"])
        noise = (
            uniform(logits) if value is None else value
        )  # a draw that nobody uses is none in a compiled step
        value = (noise > (-logits.detach()).sigmoid()).to(logits.dtype) if value is None else value
        found.append(Bits(site["name"], logits, value, noise, len(site["fn"].event_shape), site["mask"]))
        return value, None

    with plainly():
        guide = pair.guide(None, Settled(choose))
    if not found and not points:
        raise SettingError(
            f"{what} estimates the gradient of latent bits, and the guide draws none: use Trace_ELBO()"
        )
    model = pair.model(None, lambda f: poutine.replay(f, trace=guide))
    return Run(model, guide, log_densities(model, guide), found)


def is_point(site: Any) -> bool:
    """Whether the guide, or the model after it, holds the site at a point."""
    return isinstance(unwrapped(site["fn"]), Delta)


def uniform(like: Tensor) -> Tensor:
    """Uniform numbers inside (0, 1), of the shape of `like`."""
    tiny = torch.finfo(like.dtype).eps
    return torch.rand_like(like.detach()).clamp(tiny, 1 - tiny)


def bit_logits(site: Any, what: str) -> Tensor:
    """Logits [batch..., event...] of a site of bits. Raises `SettingError` for any other site."""
    fn = unwrapped(site["fn"])
    if isinstance(fn, Bernoulli):
        return fn.logits.expand(site["fn"].batch_shape + site["fn"].event_shape)
    discrete = not getattr(site["fn"], "has_rsample", False)
    kind = "a discrete latent of other values" if discrete else "continuous"
    other = "NVIL() or VIMCO()" if discrete else "TraceGraph_ELBO() or NVIL()"
    raise SettingError(
        f"{what} takes programs whose latents are all Bernoulli, and '{site['name']}' "
        f"({type(base(site['fn'])).__name__}) is "
        f"{kind}: use {other}"
    )


def unwrapped(fn: Any) -> Any:
    """A distribution without what leaves its values as they are: event dimensions, masks, expansion."""
    while isinstance(
        fn, (torch.distributions.Independent, Independent, MaskedDistribution, ExpandedDistribution)
    ):
        fn = fn.base_dist
    return fn


def bit_density(logits: Tensor, value: Tensor) -> Tensor:
    """b a - log(1 + e^a): the log-probability of bits, and between them the straight line."""
    return value * logits - softplus(logits)


Read = Callable[[Any], tuple[Tensor, Callable[[Tensor, Tensor], Tensor]] | None]
"""Of a site, (logits, function of logits and value that is its log-density); None for a site that is left as it is."""


def reading_bits(what: str) -> Read:
    """Bits, and the straight line between their log-probabilities."""
    return lambda site: None if is_point(site) else (bit_logits(site, what), bit_density)


def cost_at(pair: Pair, read: Read, choose: Callable[[Any, Tensor], Tensor]) -> LogDensities:
    """f at values between the discrete ones: the guide's sites at `choose(site, logits)`, the model's at the same.

    f is continued by the densities of `read`, and by the program itself in all else.
    """
    values: dict[str, Tensor] = {}

    def in_guide(site: Any) -> Chosen | None:
        found = read(site)
        if found is None:
            return None
        logits, density = found
        value = values[site["name"]] = choose(site, logits)
        return value, density(logits, value)

    def in_model(site: Any) -> Chosen | None:
        value = values.get(site["name"])
        found = None if value is None else read(site)
        return None if value is None or found is None else (value, found[1](found[0], value))

    with plainly():
        guide = pair.guide(None, Settled(in_guide))
        model = pair.model(None, Settled(in_model), lambda f: poutine.replay(f, trace=guide))
    return log_densities(model, guide)


# ---------------------------------------------------------------------- cells


def in_cells(value: Tensor, densities: LogDensities, event_dims: int = 0) -> Tensor:
    """`value` [batch..., event...] as [draws * cells, rest]: what `LogDensities.in_place` takes back."""
    sizes = densities.sizes
    depth = max(value.dim() - event_dims, -min(sizes, default=0))
    missing = depth - (value.dim() - event_dims)
    value = value.reshape((1,) * missing + tuple(value.shape))
    wide = [max(sizes.get(i - depth, 1), size) for i, size in enumerate(value.shape[:depth])]
    value = value.expand(*wide, *value.shape[depth:])
    kept = sorted(depth + dim for dim in sizes)
    value = value.movedim(kept, tuple(range(len(kept))))
    return value.reshape(torch.Size(value.shape[: len(kept)]).numel(), -1)


def assembled(
    pair: Pair, runs: Sequence[Run], gain: Tensor, own_loss: Tensor | None = None, **terms: Tensor
) -> Estimate:
    """The ELBO averaged over draws, the surrogate -`gain` [..., cells], and the modules' own loss [..., cells]."""
    scale = runs[0].densities.scale
    log_likelihood = sum((scale * r.densities.log_likelihood).sum() for r in runs) / len(runs)
    kl = sum((scale * (r.densities.log_guide - r.densities.log_prior)).sum() for r in runs) / len(runs)
    named = {"log_likelihood": log_likelihood, "kl": kl}
    named |= site_terms(pair, [(r.model, r.guide) for r in runs], len(runs)) | terms
    held = {name: term.detach() for name, term in named.items()}
    own = None if own_loss is None else (scale * own_loss).sum()
    return Estimate((log_likelihood - kl).detach(), -(scale * gain).sum(), held, own)
