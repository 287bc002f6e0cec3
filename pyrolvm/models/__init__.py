"""The systems, one file each. An import below registers a model: there is no other list of them."""

from __future__ import annotations

from pyrolvm.models.base import LatentVariableModel as LatentVariableModel

# isort: off
from pyrolvm.models.ppca import PPCA as PPCA
from pyrolvm.models.gmm import GaussianMixture as GaussianMixture
from pyrolvm.models.bayesian_mixture import BayesianGaussianMixture as BayesianGaussianMixture
from pyrolvm.models.factor_analysis import BayesianFactorAnalysis as BayesianFactorAnalysis
from pyrolvm.models.vae import VAE as VAE
from pyrolvm.models.power_vae import PowerVAE as PowerVAE
from pyrolvm.models.conditional_vae import ConditionalVAE as ConditionalVAE
from pyrolvm.models.autoencoder import Autoencoder as Autoencoder
from pyrolvm.models.bernoulli_vae import BernoulliVAE as BernoulliVAE
from pyrolvm.models.concrete_vae import ConcreteVAE as ConcreteVAE
from pyrolvm.models.structured_prediction import StructuredPrediction as StructuredPrediction
from pyrolvm.models.diffusion import DiffusionVAE as DiffusionVAE
from pyrolvm.models.info_vae import InfoVAE as InfoVAE
from pyrolvm.models.hierarchical_vae import HierarchicalVAE as HierarchicalVAE
from pyrolvm.models.nonlinear_lvm import NonlinearLVM as NonlinearLVM
from pyrolvm.models.vq_vae import VQVAE as VQVAE
from pyrolvm.models.probabilistic_vq_vae import ProbabilisticVQVAE as ProbabilisticVQVAE
# isort: on

REGISTRY: dict[str, type[LatentVariableModel]] = {
    name: value
    for name, value in globals().items()
    if isinstance(value, type) and issubclass(value, LatentVariableModel) and value is not LatentVariableModel
}
"""Class name -> model: what the shell can fit and a run folder can build again."""

# wraps any program, so that it has no name in the shell
from pyrolvm.models.generalised import GeneralisedBayes as GeneralisedBayes  # noqa: E402
from pyrolvm.models.generalised import loss as loss  # noqa: E402

__all__ = ["REGISTRY", "GeneralisedBayes", "LatentVariableModel", *REGISTRY]
