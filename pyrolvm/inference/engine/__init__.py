"""Engines run training steps: `run(state, rows) -> (state, terms)`, whatever runs them."""

from pyrolvm.inference.engine.choose import Engine, choose_engine
from pyrolvm.inference.engine.state import TrainingState
from pyrolvm.inference.engine.step import TERMS, Step

__all__ = ["TERMS", "Engine", "Step", "TrainingState", "choose_engine"]
