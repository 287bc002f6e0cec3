"""The conditional variational autoencoder (Sohn, Lee and Yan 2015).

Generative story, for each of N rows with a condition y (a label, or covariates):

    z | y ~ N(0, I), or N(m(y), diag(s(y)^2))              prior="conditional": m, s linear in y
    x | z, y ~ likelihood(decoder(z, y))

    q(z | x, y) = N(loc, diag(scale^2)),                   (loc, scale) = encoder(x, y)

and the bound of each row is on the conditional density,

    log p(x | y) >= E_q(z | x, y) [log p(x | z, y)] - KL(q(z | x, y) || p(z | y)).

With the prior that does not depend on y, z holds what y does not tell: the style of a digit apart from its class. The
density of the labels is not modelled. A label enters the networks as a vector with a one at its place, covariates enter
as they are, None (no condition) as zeros.

K. Sohn, H. Lee and X. Yan, "Learning structured output representation using deep conditional generative models",
NeurIPS 2015, equations 3 and 4.
D. P. Kingma et al., "Semi-supervised learning with deep generative models", NeurIPS 2014 (model M2).
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.errors import DataError, SettingError, count
from pyrolvm.models.base import LatentVariableModel, check_columns, check_finite, first_row_where
from pyrolvm.models.guides import GuideFamily, make_guide
from pyrolvm.models.latent_priors import LatentPrior, make_prior
from pyrolvm.models.likelihoods import Likelihood, make_likelihood
from pyrolvm.models.make import image_of, make_decoder, make_encoder
from pyrolvm.models.networks import split_loc_scale


class ConditionalVAE(LatentVariableModel):
    """Variational autoencoder of x given labels or covariates y.

    Parameters
    ----------
    data_dim : int
        Columns of the data; images are flat vectors.
    latent_dim : int
        Dimensions of z.
    num_classes : int, optional
        y are labels, integers [rows] from 0 to num_classes - 1. Exactly one of this and `condition_dim`.
    condition_dim : int, optional
        y are covariates, numbers [rows, condition_dim].
    likelihood, noise_scale, hidden, activation, image_shape, guide
        As in `VAE`.
    encoder, decoder : {"mlp", "conv", "linear"} or Module
        As in `VAE`, of x and the condition side by side, and of z and the condition side by side; "conv" takes the
        condition as constant channels of the image.
    prior : str or LatentPrior
        As in `VAE`, or "conditional", p(z | y) with mean and scale linear in the condition.

    Raises
    ------
    SettingError
        For an unknown option, or unless exactly one of `num_classes` and `condition_dim` is given.
    """

    takes_labels = True

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        num_classes: int | None = None,
        condition_dim: int | None = None,
        likelihood: str | Likelihood = "bernoulli",
        encoder: str | nn.Module = "mlp",
        decoder: str | nn.Module = "mlp",
        noise_scale: float | str | None = None,
        hidden: Sequence[int] = (400,),
        activation: str = "relu",
        image_shape: Sequence[int] | None = None,
        guide: str | GuideFamily = "diagonal",
        prior: str | LatentPrior = "normal",
    ) -> None:
        super().__init__()
        self.data_dim, self.latent_dim = count("data_dim", data_dim), count("latent_dim", latent_dim)
        self.num_classes, self.condition_dim = _condition(num_classes, condition_dim)
        self.likelihood = make_likelihood(likelihood, self.data_dim, noise_scale)
        self.guide_family = make_guide(guide, self.latent_dim)
        self.prior_net = (
            nn.Linear(self.condition_dim, 2 * self.latent_dim) if prior == "conditional" else None
        )
        fixed = "normal" if prior == "conditional" else prior
        self.latent_prior = make_prior(fixed, self.latent_dim, self.data_dim)
        self.planes = 1  # entries of the encoder's input for each entry of the condition
        encoder_dim, encoder_shape = self.data_dim + self.condition_dim, image_shape
        if encoder == "conv":
            channels, *sides = image_of(self.data_dim, image_shape)
            self.planes = self.data_dim // channels
            encoder_dim = self.data_dim + self.condition_dim * self.planes
            encoder_shape = (channels + self.condition_dim, *sides)
        features, parts = self.guide_family.num_features, self.likelihood.parts
        self.encoder = make_encoder(
            encoder, encoder_dim, self.latent_dim, hidden, activation, encoder_shape, num_features=features
        )
        decoder_dim = self.latent_dim + self.condition_dim
        self.decoder = make_decoder(
            decoder, decoder_dim, self.data_dim, hidden, activation, image_shape, parts=parts
        )

    def model(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """p(x, z | y).

        Parameters
        ----------
        x : Tensor [batch, data_dim] or None
            None generates, for the rows of `y` or as many as the trainer asks for.
        y : Tensor [batch] or [batch, condition_dim], optional
            The condition.

        Returns
        -------
        Tensor [batch, data_dim]
        """
        with self.data_plate(y if x is None else x):
            z = pyro.sample("z", self.prior(y))  # [batch, latent_dim]
            return pyro.sample("x", self.likelihood_dist(z, y), obs=x)  # [batch, data_dim]

    def guide(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """q(z | x, y); arguments as `model`. Returns z [batch, latent_dim]."""
        if x is None:
            raise DataError(
                f"q(z | x, y) needs data: call guide(x, y) with x of shape [batch, {self.data_dim}]"
            )
        with self.data_plate(x):
            return pyro.sample("z", self.posterior_dist(x, y))  # [batch, latent_dim]

    def prior(self, y: Tensor | None = None) -> dist.TorchDistribution:
        """p(z | y), event [latent_dim]; batch [] where it does not depend on y, else [batch]."""
        if self.prior_net is None:
            return self.latent_prior(self.posterior_dist)
        like = self.prior_net.weight
        condition = (
            self.condition(y, like.new_zeros(())) if y is not None else like.new_zeros(self.condition_dim)
        )
        loc, scale = split_loc_scale(self.prior_net(condition))
        return dist.Normal(loc, scale).to_event(1)

    def likelihood_dist(self, z: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """p(x | z, y) for z [..., latent_dim], event [data_dim]; its `.mean` is the reconstruction."""
        return self.likelihood(self.decoder(self._beside(z, y)).to(z.dtype))

    def posterior_dist(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """q(z | x, y) for x [..., data_dim], event [latent_dim]."""
        out = self.encoder(self._beside(x, y, self.planes))
        return self.guide_family(*(part.to(x.dtype) for part in out))

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The mean [..., data_dim] of p(x | z, y) for z [..., latent_dim]."""
        return self.likelihood_dist(z, y).mean

    def condition(self, y: Tensor, like: Tensor) -> Tensor:
        """y as the networks take it, [..., condition_dim], in the dtype of `like`."""
        if self.num_classes is None:
            return y.to(like.dtype)
        classes = torch.arange(self.num_classes, device=y.device)
        return (y.unsqueeze(-1) == classes).to(like.dtype)

    def _beside(self, value: Tensor, y: Tensor | None, planes: int = 1) -> Tensor:
        """`value` [..., size] and beside it the condition [..., condition_dim], each entry `planes` times."""
        condition = value.new_zeros(self.condition_dim) if y is None else self.condition(y, value)
        wide = condition.repeat_interleave(planes, -1) if planes > 1 else condition
        return torch.cat([value, wide.expand(*value.shape[:-1], wide.shape[-1])], -1)

    def check_data(self, x: Tensor) -> Tensor:
        """`x` as floats; raises `DataError` unless [rows, data_dim], finite and in the likelihood's support."""
        check_columns(x, self.data_dim, type(self).__name__)
        check_finite(x)
        self.likelihood.check(x)
        return self.as_floats(x)

    def check_condition(self, y: Tensor) -> Tensor:
        """Labels as integers, or covariates as floats; raises `DataError` for others than the model was built for."""
        if self.num_classes is None:
            y = y.unsqueeze(-1) if y.dim() == 1 else y
            check_columns(y, self.condition_dim, f"the condition of {type(self).__name__}")
            return self.as_floats(y)
        if y.dim() != 1:
            raise DataError(f"y has shape {list(y.shape)}: pass one label for each row, integers [rows]")
        top = self.num_classes - 1
        where = first_row_where(y, lambda part: (part != part.round()) | (part < 0) | (part > top))
        if where is not None:
            raise DataError(
                f"the label of row {where[0]} is {y[where[0]].item()}, but num_classes={self.num_classes}: labels are "
                f"whole numbers from 0 to {top}"
            )
        return y.long()


def _condition(num_classes: int | None, condition_dim: int | None) -> tuple[int | None, int]:
    """(num_classes or None, entries of the condition)."""
    if (num_classes is None) == (condition_dim is None):
        raise SettingError(
            "say exactly one of num_classes= (y are labels) and condition_dim= (y are covariates)"
        )
    if num_classes is not None:
        return count("num_classes", num_classes, 2), int(num_classes)
    return None, count("condition_dim", condition_dim)
