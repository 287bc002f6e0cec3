"""Handlers that settle the latents of a program: at given values, or at the means of their distributions."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor


class Fixed(Messenger):
    """Give sites these values, in model or guide."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class Means(Messenger):
    """Give every latent site the mean of its distribution instead of a draw."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not isinstance(msg["fn"], _Subsample) and msg["value"] is None:
            msg["value"], msg["done"] = location(msg["fn"]), True


def location(fn: Any) -> Tensor:
    """The mean of a distribution; its mode if it is discrete, an average of draws if it knows neither."""
    if getattr(fn, "has_enumerate_support", False):
        return fn.mode if _has(fn, "mode") else fn.enumerate_support()[0]
    if _has(fn, "mean"):
        return fn.mean
    return fn.sample((256,)).mean(0)


def _has(fn: Any, name: str) -> bool:
    try:
        value = getattr(fn, name)
    except (NotImplementedError, AttributeError):
        return False
    return bool(torch.isfinite(value).all()) if value.is_floating_point() else True
