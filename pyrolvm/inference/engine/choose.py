"""Which engine runs, and why."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pyrolvm.errors import SettingError
from pyrolvm.inference.engine.eager import EagerEngine
from pyrolvm.inference.engine.state import TrainingState
from pyrolvm.inference.engine.step import Step

ENGINES = ("auto", "compiled", "eager")


class Engine(Protocol):
    """What `fit` asks of an engine; nothing in it knows which one runs."""

    name: str

    def initial_state(self, random: dict[str, Tensor]) -> TrainingState:
        """The state before the first step."""

    def run(self, state: TrainingState, rows: Tensor) -> tuple[TrainingState, Tensor]:
        """Steps over `rows` [num_steps, batch] -> the new state, terms [num_steps, 3] in nats per datum."""


def choose_engine(name: str, step: Step, num_steps: int) -> tuple[Engine, str]:
    """The engine for `name`, and one sentence that says which runs and why."""
    if name not in ENGINES:
        raise SettingError(f"engine='{name}' is not known: choose from {', '.join(ENGINES)}")
    return EagerEngine(step), "eager engine"
