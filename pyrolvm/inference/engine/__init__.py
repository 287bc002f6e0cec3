"""Engines run training steps: `run(state, rows) -> (state, terms)`."""

from pyrolvm.inference.engine.choose import Engine, choose_engine
from pyrolvm.inference.engine.problem import Problem
from pyrolvm.inference.engine.state import TrainingState
from pyrolvm.inference.engine.watch import Watch

__all__ = ["Engine", "Problem", "TrainingState", "Watch", "choose_engine"]
