"""The bound on data that are not trained on, with the same noise every time it is asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrolvm.data.arrays import Batch
from pyrolvm.inference.engine.step import Step
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.structure import find_data_plate
from pyrolvm.plates import arange_rows, data_rows
from pyrolvm.seeds import Purpose, derived_seed

CHUNK_ROWS = 4096


class HeldOutBound:
    """The objective's bound per datum of held-out `data`, in nats, under common random numbers.

    Rows weigh as the training data's do, so that the value compares with the bound that is trained: with
    global latents m shared by N training rows, and held-out rows y_1..y_M,

        (1/M) sum_i E_q [log p(y_i, z_i | m) - log q(z_i)] - KL(q(m) || p(m)) / N.
    """

    def __init__(self, step: Step, data: Batch, seed: int) -> None:
        self.seed = seed
        self.step = dataclasses.replace(step, data=data, minibatch=True, warmup_steps=0)
        whole = arange_rows(data.num_rows, step.program.device)
        has_plate = step.structure.data_plate is not None
        self.chunks = list(whole.split(CHUNK_ROWS)) if has_plate else [whole]
        self.steps = {len(rows): self._step_of(rows) if has_plate else self.step for rows in self.chunks}

    @torch.no_grad()
    def __call__(self) -> float:
        """The bound, nats per datum."""
        program, total = self.step.program, 0.0
        with seeded(derived_seed(self.seed, Purpose.HELD_OUT), program.device), program.scope():
            for rows in self.chunks:
                total += self._bound(rows) * len(rows)
        return total / sum(len(rows) for rows in self.chunks)

    def _bound(self, rows: Tensor) -> float:
        """Of one chunk, nats per datum."""
        step = self.steps[len(rows)]
        plate = step.structure.data_plate
        if plate is None or plate.full_size != len(rows) or not step.structure.global_latents:
            return float(step.loss(rows)[1][0])
        with _Weighed(plate.name, step.num_rows / len(rows)):
            return float(step.loss(rows)[1][0]) * len(rows) / step.num_rows

    @torch.no_grad()
    def _step_of(self, rows: Tensor) -> Step:
        """The step whose plate counts as many rows as the program's plate does for a chunk of this size.

        A plate that carries N counts N whatever the chunk; one of the batch's own length counts the chunk.
        """
        step, program = self.step, self.step.program
        batch = step.data.take(rows)
        with seeded(self.seed, program.device), program.scope(), data_rows(step.num_rows, rows):
            trace = pyro.poutine.trace(program.model).get_trace(*batch.args, **batch.kwargs)
        plate = find_data_plate(trace, step.num_rows, len(rows))
        return dataclasses.replace(step, structure=dataclasses.replace(step.structure, data_plate=plate))


class _Weighed(Messenger):
    """Let the rows of a plate that knows only its own length stand for all N, as `data_plate` would."""

    def __init__(self, plate: str, weight: float) -> None:
        super().__init__()
        self.plate, self.weight = plate, weight

    def _pyro_sample(self, msg: Any) -> None:
        if any(frame.name == self.plate for frame in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self.weight
