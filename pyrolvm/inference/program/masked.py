"""Guides that are made from the model, masked as the model is.

Pyro's automatic guides know no masks: they draw every entry of a latent, and count its log q where the model leaves its
log p out (padding under `poutine.mask`, what is observed under `obs_mask`). Such a bound rises without limit as those
entries spread. Here they are left out of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.errors import ProgramError
from pyrolvm.inference.program.per_datum import PerDatum
from pyrolvm.inference.program.structure import mask_of, sample_sites

OF_SITE = "_unconstrained"
"""What AutoNormal calls the draw that a site is computed from."""


class Masked:
    """`guide`, an AutoGuide or a guide per datum, under the masks that the latents of `model` have."""

    def __init__(self, guide: AutoGuide | PerDatum, model: Callable[..., Any]) -> None:
        self.guide, self.model = guide, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The guide, its sites under the masks of this call of the model."""
        if not self._any_masked:
            return self.guide(*args, **kwargs)
        with poutine.block(), torch.no_grad():
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        with _UnderMasks(masks_of(trace)):
            return self.guide(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What else is asked of the guide."""
        if name in ("guide", "model") or name.startswith("__"):  # not there yet while it is copied
            raise AttributeError(name)
        return getattr(self.guide, name)

    @property
    def _any_masked(self) -> bool:
        """Whether a latent was masked when the guide looked at the model; not known before its first run."""
        if isinstance(self.guide, PerDatum):
            return any(site.masked for site in self.guide.sites)
        return self.guide.prototype_trace is not None and bool(masks_of(self.guide.prototype_trace))


class _UnderMasks(Messenger):
    """Put masks around the sites of a guide, and around the draws that they are computed from."""

    def __init__(self, masks: dict[str, Any]) -> None:
        super().__init__()
        self.masks = masks

    def _pyro_sample(self, msg: Any) -> None:
        mask = self.masks.get(msg["name"].removesuffix(OF_SITE))
        if mask is not None:
            msg["mask"] = mask if msg["mask"] is None else mask & msg["mask"]


def masks_of(model: Trace) -> dict[str, Tensor | bool]:
    """The masks of the latents that have one."""
    masks = {s["name"]: mask_of(s) for s in sample_sites(model) if not s["is_observed"]}
    return {name: mask for name, mask in masks.items() if mask is not None}


def check_apart(model: Trace, guide: Trace) -> None:
    """Raise `ProgramError` if a masked latent is computed from a draw that no mask can part."""
    together = [
        s["name"] for s in sample_sites(guide) if s["infer"].get("is_auxiliary") and s["mask"] is None
    ]
    for name, mask in masks_of(model).items():
        if (
            together
            and name in guide.nodes
            and name + OF_SITE not in guide.nodes
            and not torch.as_tensor(mask).all()
        ):
            raise ProgramError(
                f"a mask leaves entries of the latent '{name}' out of the model, and the guide draws all of them at "
                f"once with others ('{together[0]}'), so that its density cannot leave them out: pass "
                "guide='AutoNormal'"
            )
