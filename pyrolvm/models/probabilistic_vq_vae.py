"""A probabilistic VQ-VAE: codes drawn by their distances, a learned prior over them, and an ELBO.

Generative story, for each of N rows, with a codebook of K vectors e_k:

    z ~ p(z)                                       num_codes one-hot vectors z_m [K], on a grid
    x | z ~ N(decoder(z e), noise_scale^2 I)       likelihood="gaussian", or another

    q(z_m = k | x) = softmax_k(-precision |h_m(x) - e_k|^2),          h(x) the outputs of the encoder

The prior has learned logits for each place, or is autoregressive over the grid (`code_priors.py`), fitted beside the
rest or in a second run with everything else held (`with_prior`). The networks are those of the VQ-VAE; but the guide is
a distribution, whose precision is learned, and the bound (Sonderby, Poole and Mnih 2017)

    log p(x) >= E_q [log p(x | z)] - KL(q(z | x) || p(z))

needs neither a straight-through gradient nor a commitment loss: encoder, codebook and prior climb it together. As the
precision grows q becomes the point of the VQ-VAE, and the bound log p(x, z) at it.

Its gradient is that of a discrete program: summed over all codes of a datum where they are few (objective "enum"), else
by a score function ("vimco", "nvil", "reinforce") or of relaxed codes ("concrete"). The reconstruction decodes the mean
of z, in which each vector has the weight of its probability.

C. K. Sonderby, B. Poole and A. Mnih, "Continuous relaxation training of discrete latent variable image models",
Bayesian deep learning workshop, NIPS 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.errors import DataError
from pyrolvm.models.code_distributions import OneHot, all_settings
from pyrolvm.models.code_model import CodeModel
from pyrolvm.models.code_priors import CodePrior
from pyrolvm.models.codebook import Codebook
from pyrolvm.models.likelihoods import Likelihood

MOST_SUMMED = 256
"""The most settings of a datum's codes that training sums over by default."""


class OneHotCodes(dist.Independent):
    """num_codes one-hot vectors, event [num_codes, K], independent of each other.

    `enumerate_support` lists all settings of them together, K^num_codes.

    Parameters
    ----------
    logits : Tensor [..., num_codes, K]
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__(dist.OneHotCategorical(logits=logits), 1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """[K^num_codes, *batch or ones, num_codes, K]."""
        return all_settings(self, self.base_dist.logits, expand)

    def expand(self, batch_shape: Any, _instance: Any = None) -> OneHotCodes:
        """The same for more rows."""
        return OneHotCodes(self.base_dist.logits.expand(*batch_shape, *self.event_shape))


class ProbabilisticVQVAE(CodeModel):
    """VQ-VAE with a distribution over codes.

    Parameters
    ----------
    data_dim, num_codes, codebook_size, code_dim, likelihood, encoder, decoder
        As in `VQVAE`.
    noise_scale, hidden, activation, image_shape, channels
        As in `VQVAE`.
    prior : str or CodePrior
        p(z), of `pyrolvm.models.code_priors.CODE_PRIORS`, with its settings: a learned distribution at each place by
        default, every code alike ("uniform"), or autoregressive over the grid ("pixelcnn:6,channels=64").
    hold : bool
        Train the prior alone; `with_prior` makes such a model.

    Raises
    ------
    SettingError
        For an unknown option or a size that it cannot have.
    ProgramError
        For a module whose output does not have the shapes of `VQVAE`.
    """

    def __init__(
        self,
        data_dim: int,
        num_codes: int | None = None,
        codebook_size: int = 64,
        code_dim: int = 16,
        likelihood: str | Likelihood = "gaussian",
        encoder: str | nn.Module = "mlp",
        decoder: str | nn.Module = "mlp",
        noise_scale: float | str | None = None,
        hidden: Sequence[int] = (400,),
        activation: str = "relu",
        image_shape: Sequence[int] | None = None,
        channels: Sequence[int] = (32, 64),
        prior: str | CodePrior = "learned",
        hold: bool = False,
    ) -> None:
        codebook = Codebook(codebook_size, code_dim, "gradient", revive_below=0)
        nets = (encoder, decoder, noise_scale, hidden, activation, image_shape, channels)
        super().__init__(data_dim, num_codes, codebook, likelihood, *nets, prior)
        self.log_precision = nn.Parameter(torch.zeros(()))
        if hold:
            self._hold()

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(x, z); `x`: [batch, data_dim] or None to generate. Returns x."""
        with self.data_plate(x):
            z = pyro.sample("z", self.prior_dist())  # [batch, num_codes, K]
            return pyro.sample("x", self.likelihood_dist(self.vectors_of(z)), obs=x)  # [batch, data_dim]

    def guide(self, x: Tensor | None = None) -> Tensor:
        """q(z | x); `x`: [batch, data_dim]. Returns z [batch, num_codes, K]."""
        if x is None:
            raise DataError(f"q(z | x) needs data: call guide(x) with x of shape [batch, {self.data_dim}]")
        with self.data_plate(x):
            infer: Any = {"enumerate": "parallel"} if self.summed else {}
            return pyro.sample("z", self.posterior_dist(x), infer=infer)

    def prior_dist(self) -> dist.TorchDistribution:
        """p(z), event [num_codes, K]."""
        prior = self.code_prior
        if isinstance(prior.logits, Tensor):  # places that are independent of each other
            return OneHotCodes(prior.logits)
        return OneHot(prior(), self.codebook_size, self.codebook.vectors)

    def posterior_dist(self, x: Tensor) -> OneHotCodes:
        """q(z | x) for x [..., data_dim], event [num_codes, K]."""
        return OneHotCodes(-self.log_precision.exp() * self.codebook.distances(self.outputs(x)))

    def vectors_of(self, z: Tensor) -> Tensor:
        """The vectors [..., num_codes, code_dim] of one-hot codes, or their weighted means, z [..., num_codes, K]."""
        return z @ self.codebook.vectors

    @property
    def summed(self) -> bool:
        """Whether a datum's codes are few enough that training sums over them."""
        return self.codebook_size**self.num_codes <= MOST_SUMMED

    def objective(self) -> str:
        """The sum over all codes where they are few, else the score function of several draws.

        Where the prior alone is trained no gradient goes through a draw, and one of the plain ELBO will do.
        """
        return "enum" if self.summed else "trace" if self.hold else "vimco"

    @torch.no_grad()
    def initialise_from(self, x: Tensor, seed: int = 0) -> None:
        """As of `VQVAE`, and the precision as of a Gaussian around the nearest vectors: q(z | x) is sharp enough.

        Where it is nearly uniform, the decoder learns to do without z before z says anything.
        """
        super().initialise_from(x, seed)
        nearest = self.codebook.distances(self.outputs(self.check_data(x))).amin(-1).clamp(min=0).mean()
        if nearest > 0:
            self.log_precision.copy_((0.5 * self.codebook.code_dim / nearest).log())

    def decode(self, z: Tensor) -> Tensor:
        """The mean [..., data_dim] of p(x | z) for one-hot codes, or their probabilities, z [..., num_codes, K]."""
        return self.likelihood_dist(self.vectors_of(z)).mean

    def _count(self, x: Tensor) -> Tensor:
        """Expected uses of each code."""
        probs = self.posterior_dist(x).base_dist.probs
        return probs.reshape(-1, self.codebook_size).sum(0)
