"""Inference: objectives, engines, `fit`, and what a fitted pair can tell. Knows no model of the suite."""

from pyrolvm.inference.objectives import RenyiELBO
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.training.callbacks import JSONLines, TensorBoard
from pyrolvm.inference.training.fit import fit
from pyrolvm.inference.training.loop import Callback, Report
from pyrolvm.inference.training.restarts import fit_restarts

__all__ = [
    "Callback",
    "FittedModel",
    "JSONLines",
    "RenyiELBO",
    "Report",
    "TensorBoard",
    "fit",
    "fit_restarts",
]
