"""Engines run training steps: `run(state, rows) -> (state, terms)`."""

from pyrolvm.inference.engine.choose import Engine, choose_engine
from pyrolvm.inference.engine.problem import Problem
from pyrolvm.inference.engine.state import TrainingState

__all__ = ["Engine", "Problem", "TrainingState", "choose_engine"]
