"""New data from a fitted pair: local latents from the prior, global ones from the guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
from torch import Tensor

from pyrolvm.data.arrays import Batch
from pyrolvm.inference.program.handlers import Fixed, location
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import Structure, sample_sites
from pyrolvm.plates import arange_rows, data_rows


@dataclass
class Generator:
    """Runs a model without its data. `example`: rows it can be called with; `total`: rows it was fitted to."""

    program: Program
    structure: Structure
    example: Batch
    total: int

    @property
    def makes_rows(self) -> bool:
        """Whether any number of rows can be made (else the model is run on its data, unconditioned)."""
        return self.structure.takes_any_rows and len(self.example.args) == 1 and not self.example.kwargs

    def __call__(self, num_rows: int, *, mean: bool) -> dict[str, Tensor]:
        """Observed site -> a draw, or the mean of its distribution, at one draw of the global latents."""
        model, arguments = self._generator(num_rows)
        rows = arange_rows(num_rows if self.makes_rows else self.example.num_rows, self.program.device)
        with self.program.scope((len(rows), rows)), Fixed(self._global_values()):
            trace = pyro.poutine.trace(model).get_trace(*arguments.args, **arguments.kwargs)
        wanted = {s.name for s in self.structure.observed}
        sites = [s for s in sample_sites(trace) if s["name"] in wanted]
        return {s["name"]: location(s["fn"]) if mean else s["value"] for s in sites}

    def _generator(self, num_rows: int) -> tuple[Callable, Batch]:
        # a model of the suite's contract generates when it is given None
        if self.makes_rows and hasattr(getattr(self.program.model, "__self__", None), "data_plate"):
            return self.program.model, Batch((None,), {})
        example = self.example
        if self.makes_rows:
            example = example.take(arange_rows(num_rows, self.program.device) % example.num_rows)
        return pyro.poutine.uncondition(self.program.model), example

    def _global_values(self) -> dict[str, Tensor]:
        names = {s.name for s in self.structure.global_latents}
        if not names:
            return {}
        rows = arange_rows(self.example.num_rows, self.program.device)
        with data_rows(self.total, rows):
            guide = pyro.poutine.trace(self.program.guide)
            trace = guide.get_trace(*self.example.args, **self.example.kwargs)
        return {s["name"]: s["value"] for s in sample_sites(trace) if s["name"] in names}
