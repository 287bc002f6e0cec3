"""What a fit leaves behind: the trained pair, the data it was fitted to in outline, and how the run went."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from pyrolvm.data.batch import Batch
from pyrolvm.errors import ProgramError
from pyrolvm.inference.posterior.convergence import Convergence, unknown
from pyrolvm.inference.posterior.history import held_out_elbo
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import Structure


@dataclass(repr=False)
class Record:
    """The fields of a `FittedModel`, which documents them, and what follows from them alone."""

    program: Program
    structure: Structure
    history: pd.DataFrame
    settings: dict[str, Any]
    example: Batch | None
    num_rows: int
    engine: str = ""
    stopped_because: str = ""
    columns: list[str] | None = None
    arguments: dict[str, Any] | None = None
    convergence: Convergence = field(default_factory=unknown)
    call: Batch | None = None

    def __repr__(self) -> str:
        name = model_record(self.model)["name"]
        unit = "nats per datum" if self.structure.data_plate else "nats in total"
        steps = int(self.history["step"].iloc[-1]) if len(self.history) else 0
        lines = [f"FittedModel of {name}: {self.num_rows} rows, {steps} steps, {self.stopped_because}"]
        if steps:
            lines.append(f"  {self.structure.bound_name} {self.elbo:.4f} {unit}")
        if not math.isnan(self.held_out_elbo):
            lines[-1] += f", held out {self.held_out_elbo:.4f}"
        for role, sites in (("latents", self.structure.latents), ("data", self.structure.observed)):
            lines.append(f"  {role}: " + (", ".join(f"{s.name} ({s.family})" for s in sites) or "none"))
        return "\n".join([*lines, f"  {self.convergence.sentence}", f"  {self.engine}"])

    @property
    def model(self) -> Any:
        """The fitted model itself: the module or function that was passed to `fit`."""
        return self.program.source

    @property
    def num_data(self) -> int:
        """The rows that bounds are per datum of; 1 if the program has no data plate."""
        return self.structure.num_data

    @property
    def elbo(self) -> float:
        """The bound, nats per datum: at these parameters, or over the last hundred steps; of a point, log p(x, z)."""
        kept = self.convergence.numbers.get("elbo")  # of a run whose parameters are an average over its steps
        return float(self.history["elbo"].tail(100).mean()) if kept is None else kept

    @property
    def held_out_elbo(self) -> float:
        """The validation bound of these parameters, nats per datum; nan if nothing was held out.

        Where `patience` chose the parameters by it, it is a little too high: the rows that chose cannot also judge.
        """
        kept = self.convergence.numbers.get("held_out_elbo")
        return held_out_elbo(self.history, self.settings.get("kept_step")) if kept is None else kept

    @property
    def vectorized(self) -> bool:
        """Whether draws are taken at once (tried out on the first use) or one by one."""
        return Pair(self.program, self.structure, self.real_rows).vectorized

    @property
    def real_rows(self) -> Batch:
        """Rows that the program can be called with; `ProgramError` for a loaded fit that has none."""
        if self.example is None:
            raise ProgramError(
                "a run folder keeps no rows of its data, and this needs some: load it with "
                "pyrolvm.load(path, ..., example=x)"
            )
        return self.example


def model_record(model: Any) -> dict[str, Any]:
    """How to build the model again: its class and arguments if they are plain, else its name alone."""
    arguments = getattr(model, "constructor", None)
    name = (
        type(model).__name__
        if isinstance(model, torch.nn.Module)
        else getattr(model, "__name__", repr(model))
    )
    record: dict[str, Any] = {"name": name, "arguments": None}
    with contextlib.suppress(TypeError, ValueError):  # networks passed as objects: the caller builds them
        record["arguments"] = json.loads(json.dumps(arguments))
    return record
