"""The systems: one file each, all registered here."""

from __future__ import annotations

from pyrolvm.models.base import LatentVariableModel
from pyrolvm.models.factor_analysis import BayesianFactorAnalysis
from pyrolvm.models.gmm import GaussianMixture
from pyrolvm.models.power_vae import PowerVAE
from pyrolvm.models.ppca import PPCA
from pyrolvm.models.vae import VAE

REGISTRY: dict[str, type[LatentVariableModel]] = {
    cls.__name__: cls for cls in (PPCA, GaussianMixture, BayesianFactorAnalysis, VAE, PowerVAE)
}
"""Class name -> model: what the shell can fit and a run folder can build again."""

__all__ = [
    "PPCA",
    "REGISTRY",
    "VAE",
    "BayesianFactorAnalysis",
    "GaussianMixture",
    "LatentVariableModel",
    "PowerVAE",
]
