"""Pyro's own `SVI.step`, and the same with its Jit objectives."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor

from benchmarks.contenders.base import Runner, available
from benchmarks.rows import Case
from pyrolvm.plates import data_rows


def _empty_store() -> Any:
    return {"params": {}, "constraints": {}}


class PyroSVI(Runner):
    """`SVI.step` in a Python loop, with `pyro.optim.Adam`; all validation switched off."""

    title = "Pyro SVI.step"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._store = _empty_store()  # private: contenders share a process
        optimizer = Adam({"lr": case.row.learning_rate})
        with pyro.get_param_store().scope(self._store):
            self._svi = SVI(*case.row.pyro(case.start()), optimizer, self._elbo(case))
        torch.manual_seed(case.seed)

    def _elbo(self, case: Case) -> Any:
        return (case.row.pyro_elbo or case.row.elbo)()

    def run(self, first: int, num_steps: int) -> Tensor:
        """As `Runner.run`; `SVI.step` returns a Python float, as it does to every user."""
        rows = self.case.rows(first, num_steps)
        with pyro.get_param_store().scope(self._store), ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stack.enter_context(pyro.validation_enabled(False))
            if self.case.device.type != "cpu":
                stack.enter_context(self.case.device)
            losses = [self._step(step) for step in rows]
        return torch.tensor(losses) / -self.case.divisor

    def _step(self, rows: Tensor) -> Any:
        batch = self.case.batch(rows)
        if not self.case.row.has_globals:
            return self._svi.step(*batch)
        with data_rows(self.case.num_rows, rows):  # the plate's size and subsample
            return self._svi.step(*batch)


class PyroJit(PyroSVI):
    """`SVI.step` with the Jit form of the objective (torch.jit.trace)."""

    title = "Pyro Jit"

    def _elbo(self, case: Case) -> Any:
        return available(case.row.jit)()
