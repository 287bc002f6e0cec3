"""Objectives, engines, `fit` and fitted models, for any Pyro program."""

from pyrolvm.inference.objectives import FreeBits, ImportanceWeighted, InfoELBO, Objective, RenyiELBO
from pyrolvm.inference.posterior.at_scale import Answers, write_answers
from pyrolvm.inference.posterior.convergence import Convergence
from pyrolvm.inference.posterior.fitted import FittedModel, Refined
from pyrolvm.inference.posterior.pathfinder import pathfinder
from pyrolvm.inference.program.per_datum import PerDatum
from pyrolvm.inference.program.semi_amortised import SemiAmortised
from pyrolvm.inference.training.callbacks import JSONLines, TensorBoard
from pyrolvm.inference.training.fit import fit
from pyrolvm.inference.training.loop import Callback, Report
from pyrolvm.inference.training.loss_weight import LossWeight, calibrate_loss
from pyrolvm.inference.training.restarts import fit_restarts
from pyrolvm.inference.training.sweep import sweep

__all__ = [
    "Answers",
    "Callback",
    "Convergence",
    "FittedModel",
    "FreeBits",
    "ImportanceWeighted",
    "InfoELBO",
    "JSONLines",
    "LossWeight",
    "Objective",
    "PerDatum",
    "Refined",
    "RenyiELBO",
    "Report",
    "SemiAmortised",
    "TensorBoard",
    "calibrate_loss",
    "fit",
    "fit_restarts",
    "pathfinder",
    "sweep",
    "write_answers",
]
