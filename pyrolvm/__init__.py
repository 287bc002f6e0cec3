"""Bayesian latent variable models as Pyro model/guide pairs, trained by SVI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyrolvm import models
from pyrolvm.diagnostics import diagnose, to_inference_data
from pyrolvm.errors import (
    DataError,
    DivergenceError,
    ProgramError,
    PyrolvmError,
    RunFolderError,
    SettingError,
)
from pyrolvm.inference import FittedModel, RenyiELBO, fit
from pyrolvm.models import *  # noqa: F403
from pyrolvm.models import REGISTRY, LatentVariableModel
from pyrolvm.plates import data_plate

__version__ = "0.1.0"


def load(path: str | Path, *, model: Any = None, guide: Any = None, device: str = "cpu") -> FittedModel:
    """Read a run folder back. Nothing in it is executed.

    The suite's models are built from their recorded arguments; pass `model` (and `guide`) for your own, or
    for a model that was given networks as objects: built as they were when the run was saved.
    Raises `RunFolderError` if the folder is missing, damaged, or of another program or version.
    """
    from pyrolvm.inference.folder import load_run

    return load_run(Path(path), REGISTRY, model, guide, device)


__all__ = [
    "DataError",
    "DivergenceError",
    "FittedModel",
    "LatentVariableModel",
    "ProgramError",
    "PyrolvmError",
    "RenyiELBO",
    "RunFolderError",
    "SettingError",
    "data_plate",
    "diagnose",
    "fit",
    "load",
    "to_inference_data",
    *models.__all__,
]
