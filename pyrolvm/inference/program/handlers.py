"""Handlers that settle the latents of a program: at given values, at means, or drawn anew."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyrolvm.errors import ProgramError


class Fixed(Messenger):
    """Give sites these values, in model or guide."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class Means(Messenger):
    """Give every latent site the mean of its distribution instead of a draw; its most probable value if discrete."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not isinstance(msg["fn"], _Subsample) and msg["value"] is None:
            fn = msg["fn"]
            msg["value"], msg["done"] = most_probable(fn) if _lists_values(fn) else location(fn), True


class NoSampleError(ProgramError):
    """A distribution is a density alone, or its `sample()` fails."""


def kind_of(fn: Any) -> str:
    """The name of a distribution's class below masks, plates and `to_event`."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__


def drawn(site: Any) -> Any:
    """A value of a site's distribution. Raises `NoSampleError` if that cannot draw."""
    fn: Any = site["fn"]
    kind = f"the distribution of '{site['name']}' ({kind_of(fn)})"
    try:
        value = fn(*site["args"], **site["kwargs"])
    except NotImplementedError:
        value = None
    except Exception as error:  # of somebody else's class, for parameters of several rows or draws, say
        raise NoSampleError(
            f"{kind} cannot draw new data: its sample() fails for parameters of batch shape {[*fn.batch_shape]}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if value is None:
        raise NoSampleError(
            f"{kind} has no sample(), so that its values cannot be drawn: write one in its class"
        )
    if isinstance(value, Tensor) and not _is_like(value, site["value"], fn):
        raise NoSampleError(
            f"{kind} cannot draw new data: its sample() gives {[*value.shape]} for parameters of batch shape "
            f"{[*fn.batch_shape]}, and the data are {[*getattr(site['value'], 'shape', ())]}"
        )
    return value


def _is_like(value: Tensor, seen: Any, fn: Any) -> bool:
    """Whether a value is one for all parameters, and its events as large as those that were observed."""
    events = [
        t.shape[max(0, t.dim() - len(fn.event_shape)) :] for t in (value, seen) if isinstance(t, Tensor)
    ]
    try:
        wide = torch.broadcast_shapes(*events)
    except RuntimeError:
        return False
    return value.shape[: len(fn.batch_shape)] == fn.batch_shape and wide == events[0]


class Undone(Messenger):
    """Draw these observed sites anew; other observed sites (conditioned constants, factors) keep their values."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and msg["name"] in self.names:
            msg["is_observed"], msg["value"], msg["done"] = False, drawn(msg), True


def location(fn: Any) -> Tensor:
    """The mean of a distribution, whatever wraps it: a scalar Bernoulli and an image of them alike.

    A categorical variable has no mean: its most probable value. Where a mean does not exist (a Cauchy), the median of
    draws; where no closed form is known (a flow), their average.
    """
    try:
        mean = fn.mean
    except (NotImplementedError, AttributeError):
        return most_probable(fn) if _lists_values(fn) else fn.sample((256,)).mean(0)
    unknown = ~torch.isfinite(mean)
    if not bool(unknown.any()):
        return mean
    if _lists_values(fn):
        return most_probable(fn)
    return torch.where(unknown, fn.sample((256,)).median(0).values.to(mean.dtype), mean)


def _lists_values(fn: Any) -> bool:
    return bool(getattr(fn, "has_enumerate_support", False))


def most_probable(fn: Any) -> Tensor:
    """The value of highest probability of a distribution that lists its values, entry by entry."""
    support = fn.enumerate_support()
    best = fn.log_prob(support).argmax(0)
    index = best.reshape(1, *best.shape, *(1,) * len(fn.event_shape)).expand(
        1, *fn.batch_shape, *fn.event_shape
    )
    return support.gather(0, index)[0]
