"""A pair of plain functions, as Pyro itself runs them: without a fit around them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrolvm.data.batch import Batch
from pyrolvm.inference.program.noise import kept_generators
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.reading import read_structure
from pyrolvm.inference.program.structure import Structure, with_sizes


class Functions:
    """What a `Pair` needs of a program, for functions whose parameters are in Pyro's own store."""

    def __init__(self, model: Callable, guide: Callable, device: torch.device) -> None:
        self.model, self.guide, self.device = model, guide, device
        self.parameters: dict[str, Tensor] = {}
        self.vectorized: bool | None = None

    def scope(self, *_: Any, **__: Any) -> Any:
        """Nothing to set up: handlers and parameters are the caller's."""
        return nullcontext()

    untouched = scope


class PlainPair(Pair):
    """A pair whose structure is read when it is first asked for."""

    def __init__(
        self, model: Callable, guide: Callable, args: tuple = (), kwargs: dict | None = None
    ) -> None:
        batch = Batch(args, kwargs or {})
        device = next((t.device for _, t in batch.tensors()), torch.device("cpu"))
        functions: Any = Functions(model, guide, device)
        self.program, self.batch, self.mode = functions, batch, "train"

    @cached_property
    def structure(self) -> Structure:  # type: ignore[override]
        """Read from one run that leaves handlers, gradients and generators out of it."""
        with pyro.poutine.block(), torch.no_grad(), kept_generators(self.device):
            arguments = self.batch.args, self.batch.kwargs
            guide = with_sizes(
                pyro.poutine.trace(self.program.guide).get_trace(*arguments[0], **arguments[1])
            )
            replayed = pyro.poutine.replay(self.program.model, trace=guide)
            model = with_sizes(pyro.poutine.trace(replayed).get_trace(*arguments[0], **arguments[1]))
            return read_structure(self.program, self.batch, model, guide)
