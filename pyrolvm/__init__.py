"""Bayesian latent variable models as Pyro model/guide pairs, trained by SVI."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrolvm import errors
from pyrolvm._version import __version__ as __version__
from pyrolvm.errors import *  # noqa: F403

if TYPE_CHECKING:
    from pyrolvm import data as data
    from pyrolvm import diagnostics as diagnostics
    from pyrolvm import inference as inference
    from pyrolvm import models as models
    from pyrolvm import plots as plots
    from pyrolvm import report as report
    from pyrolvm import runs as runs
    from pyrolvm.controls import control as control
    from pyrolvm.diagnostics import diagnose as diagnose
    from pyrolvm.diagnostics import to_inference_data as to_inference_data
    from pyrolvm.inference import FittedModel as FittedModel
    from pyrolvm.inference import FreeBits as FreeBits
    from pyrolvm.inference import ImportanceWeighted as ImportanceWeighted
    from pyrolvm.inference import InfoELBO as InfoELBO
    from pyrolvm.inference import Objective as Objective
    from pyrolvm.inference import PerDatum as PerDatum
    from pyrolvm.inference import RenyiELBO as RenyiELBO
    from pyrolvm.inference import SemiAmortised as SemiAmortised
    from pyrolvm.inference import calibrate_loss as calibrate_loss
    from pyrolvm.inference import fit as fit
    from pyrolvm.inference import fit_restarts as fit_restarts
    from pyrolvm.inference import pathfinder as pathfinder
    from pyrolvm.inference import sweep as sweep
    from pyrolvm.inference import write_answers as write_answers
    from pyrolvm.inference.program.semi_implicit_guide import SemiImplicitGuide as SemiImplicitGuide
    from pyrolvm.models import *  # noqa: F403
    from pyrolvm.models import loss as loss
    from pyrolvm.plates import data_plate as data_plate
    from pyrolvm.plates import row_entries as row_entries
    from pyrolvm.semi_implicit import SemiImplicit as SemiImplicit

# Imported when first used: torch and Pyro take seconds that `pyrolvm --help` need not wait for
_ROOMS = ("data", "diagnostics", "inference", "models", "plots", "report", "runs")
_HOMES = {
    "FittedModel": "inference",
    "ImportanceWeighted": "inference",
    "FreeBits": "inference",
    "InfoELBO": "inference",
    "Objective": "inference",
    "PerDatum": "inference",
    "SemiAmortised": "inference",
    "RenyiELBO": "inference",
    "calibrate_loss": "inference",
    "SemiImplicit": "semi_implicit",
    "SemiImplicitGuide": "inference.program.semi_implicit_guide",
    "control": "controls",
    "data_plate": "plates",
    "diagnose": "diagnostics",
    "fit": "inference",
    "fit_restarts": "inference",
    "sweep": "inference",
    "loss": "models",
    "pathfinder": "inference",
    "row_entries": "plates",
    "to_inference_data": "diagnostics",
    "write_answers": "inference",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted([*errors.__all__, *_ROOMS, *_HOMES, "load", *__getattr__("models").__all__])
    if name in _ROOMS:
        return importlib.import_module(f"pyrolvm.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"pyrolvm.{_HOMES[name]}"), name)
    # What else has a capital is a model or not there; other names are tried by imports of files
    if name[0].isupper() and name in (found := __getattr__("models")).__all__:
        return getattr(found, name)
    raise AttributeError(f"module 'pyrolvm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__getattr__("__all__")])


def load(
    path: str | Path, *, model: Any = None, guide: Any = None, device: str = "cpu", example: Any = None
) -> FittedModel:
    """Read a run folder back. Nothing in it is executed.

    Parameters
    ----------
    path : str or Path
        The run folder.
    model, guide : optional
        Models of the package are rebuilt from their recorded arguments. Pass `model` (and `guide`) for your own
        programs, and for models that were given networks as objects, constructed as they were when the run was saved.
    device : str
        The device of the parameters.
    example : tensor, array, DataFrame or Dataset, or a tuple or dict of them, optional
        Rows like those the program was fitted to, for programs that cannot run without them: a run folder keeps
        no rows.

    Returns
    -------
    FittedModel
        The fit with its parameters, history and settings.

    Raises
    ------
    RunFolderError
        The folder is missing, damaged, or of another program or version.
    """
    from pyrolvm.inference.posterior.loading import load_run
    from pyrolvm.models import REGISTRY

    return load_run(Path(path), REGISTRY, model, guide, device, example)
