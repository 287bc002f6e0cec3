"""Inference: objectives, engines, `fit`, and what a fitted pair can tell. Knows no model of the suite."""

from pyrolvm.inference.callbacks import JSONLines, TensorBoard
from pyrolvm.inference.fit import fit
from pyrolvm.inference.fitted import FittedModel
from pyrolvm.inference.objectives import RenyiELBO
from pyrolvm.inference.restarts import fit_restarts
from pyrolvm.inference.training import Callback, Report

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
