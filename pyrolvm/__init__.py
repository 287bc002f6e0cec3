"""Bayesian latent variable models as Pyro model/guide pairs, trained by SVI."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrolvm._version import __version__ as __version__

if TYPE_CHECKING:
    from pyrolvm import data, diagnostics, inference, models, plots
    from pyrolvm.diagnostics import diagnose, to_inference_data
    from pyrolvm.errors import (
        DataError,
        DivergenceError,
        ProgramError,
        PyrolvmError,
        RunFolderError,
        SettingError,
    )
    from pyrolvm.inference import FittedModel, RenyiELBO, fit_restarts
    from pyrolvm.inference.training.fit import fit
    from pyrolvm.models import (
        PPCA,
        REGISTRY,
        VAE,
        BayesianFactorAnalysis,
        GaussianMixture,
        LatentVariableModel,
        PowerVAE,
    )
    from pyrolvm.plates import data_plate


_HOMES = {
    "pyrolvm.diagnostics": ("diagnose", "to_inference_data"),
    "pyrolvm.errors": (
        "DataError",
        "DivergenceError",
        "ProgramError",
        "PyrolvmError",
        "RunFolderError",
        "SettingError",
    ),
    "pyrolvm.inference": ("FittedModel", "RenyiELBO", "fit", "fit_restarts"),
    "pyrolvm.models": (
        "PPCA",
        "REGISTRY",
        "VAE",
        "BayesianFactorAnalysis",
        "GaussianMixture",
        "LatentVariableModel",
        "PowerVAE",
    ),
    "pyrolvm.plates": ("data_plate",),
}
_MODULES = ("data", "diagnostics", "inference", "models", "plots")


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch and Pyro take seconds that `pyrolvm --help` need not wait for."""
    if name in _MODULES:
        return importlib.import_module(f"pyrolvm.{name}")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'pyrolvm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def load(
    path: str | Path, *, model: Any = None, guide: Any = None, device: str = "cpu", example: Any = None
) -> FittedModel:
    """Read a run folder back. Nothing in it is executed.

    The suite's models are built from their recorded arguments; pass `model` (and `guide`) for your own, or
    for a model that was given networks as objects: built as they were when the run was saved.
    Raises `RunFolderError` if the folder is missing, damaged, or of another program or version.
    """
    from pyrolvm.inference.posterior.loading import load_run
    from pyrolvm.models import REGISTRY

    return load_run(Path(path), REGISTRY, model, guide, device, example)


__all__ = [
    "PPCA",
    "REGISTRY",
    "VAE",
    "BayesianFactorAnalysis",
    "DataError",
    "DivergenceError",
    "FittedModel",
    "GaussianMixture",
    "LatentVariableModel",
    "PowerVAE",
    "ProgramError",
    "PyrolvmError",
    "RenyiELBO",
    "RunFolderError",
    "SettingError",
    "data",
    "data_plate",
    "diagnose",
    "diagnostics",
    "fit",
    "fit_restarts",
    "inference",
    "load",
    "models",
    "plots",
    "to_inference_data",
]
