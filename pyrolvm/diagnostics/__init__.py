"""How good is the guide? Measures of a fitted pair, and its export to ArviZ.

`inference_data` is the only module of the package that imports arviz, and does so when it is used.
"""

from pyrolvm.diagnostics.calibration import Calibration, calibrate, calibration_of
from pyrolvm.diagnostics.collapse import CollapseReport, collapse_report
from pyrolvm.diagnostics.disentanglement import Disentanglement, disentanglement
from pyrolvm.diagnostics.gaps import Gaps, evidence_gaps
from pyrolvm.diagnostics.gradients import gradient_draws, gradient_variance
from pyrolvm.diagnostics.guide_quality import Diagnosis, diagnose
from pyrolvm.diagnostics.inference_data import approximate_loo, to_inference_data
from pyrolvm.diagnostics.predictive import PredictiveCheck, predictive_check
from pyrolvm.diagnostics.reference import ReferenceComparison, compare_with_nuts
from pyrolvm.diagnostics.restarts import RestartComparison, compare_restarts
from pyrolvm.diagnostics.tails import GlobalTail, global_khat, local_khat

__all__ = [
    "Calibration",
    "CollapseReport",
    "Diagnosis",
    "Disentanglement",
    "Gaps",
    "GlobalTail",
    "PredictiveCheck",
    "ReferenceComparison",
    "RestartComparison",
    "approximate_loo",
    "calibrate",
    "calibration_of",
    "collapse_report",
    "compare_restarts",
    "compare_with_nuts",
    "diagnose",
    "disentanglement",
    "evidence_gaps",
    "global_khat",
    "gradient_draws",
    "gradient_variance",
    "local_khat",
    "predictive_check",
    "to_inference_data",
]
