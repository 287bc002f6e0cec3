"""What models with a grid of codes and a codebook share: networks, likelihood, sums over all codes, counts."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolvm.errors import DataError, ProgramError, SettingError, count
from pyrolvm.models.base import LatentVariableModel, check_columns, check_finite
from pyrolvm.models.code_networks import make_code_networks
from pyrolvm.models.code_priors import CodePrior, make_code_prior
from pyrolvm.models.codebook import Codebook, perplexity_of
from pyrolvm.models.likelihoods import Likelihood, make_likelihood
from pyrolvm.models.make import start_decoder
from pyrolvm.models.pieces import plain

MOST_STATES = 2**14
"""The most settings of a datum's codes that `log_marginal` sums over."""


Same = TypeVar("Same", bound="CodeModel")


class CodeModel(LatentVariableModel):
    """p(z) over codes, p(x | z) by a decoder of their vectors, and an encoder that vectors are compared with.

    Attributes
    ----------
    codebook : Codebook
    code_prior : CodePrior
    grid : (int, int)
        Height and width of the codes of a datum.
    num_codes : int
        Codes of a datum, height * width.
    hold : bool
        Whether a fit trains the prior alone.
    """

    hold = False

    def __init__(
        self,
        data_dim: int,
        num_codes: int | None,
        codebook: Codebook,
        likelihood: str | Likelihood,
        encoder: str | nn.Module,
        decoder: str | nn.Module,
        noise_scale: float | str | None,
        hidden: Sequence[int],
        activation: str,
        image_shape: Sequence[int] | None,
        channels: Sequence[int],
        prior: str | CodePrior,
    ) -> None:
        super().__init__()
        self.data_dim, self.codebook = count("data_dim", data_dim), codebook
        self.likelihood = make_likelihood(likelihood, self.data_dim, noise_scale)
        nets = (hidden, activation, image_shape, channels)
        parts, size = self.likelihood.parts, codebook.code_dim
        self.encoder, self.decoder, self.grid = make_code_networks(
            encoder, decoder, self.data_dim, num_codes, size, parts, *nets
        )
        self.num_codes = math.prod(self.grid)
        self.code_prior = make_code_prior(prior, codebook.codebook_size, self.grid)

    @property
    def codebook_size(self) -> int:
        """K."""
        return self.codebook.codebook_size

    # ------------------------------------------------------------------ the second fit, of the prior

    def with_prior(self: Same, prior: str | CodePrior) -> Same:
        """A copy with another prior, the only part of it that a fit trains.

        Parameters
        ----------
        prior : str or CodePrior
            As of the constructor.

        Examples
        --------
        `second = pyrolvm.fit(first.model.with_prior("pixelcnn"), x)`
        """
        other = copy.deepcopy(self)
        other.code_prior = make_code_prior(prior, self.codebook_size, self.grid).to(self.codebook.vectors)
        other.constructor = {**self.constructor, "prior": plain(prior), "hold": True}
        other.fresh = False
        other._hold()
        return other

    def _hold(self) -> None:
        """Train the prior alone."""
        self.hold = True
        prior = {id(p) for p in self.code_prior.parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in prior)
        self.train(self.training)

    def train(self: Same, mode: bool = True) -> Same:
        """As of any module; what is held stays in evaluation mode."""
        super().train(mode)
        if self.hold:
            self.encoder.eval()
            self.decoder.eval()
        return self

    # ------------------------------------------------------------------ the parts of the program

    def outputs(self, x: Tensor) -> Tensor:
        """h, what the encoder makes of x [..., data_dim]: [..., num_codes, code_dim]."""
        h = self.encoder(x).to(x.dtype)
        return h.unflatten(-1, (self.num_codes, self.codebook.code_dim))

    def likelihood_dist(self, vectors: Tensor) -> dist.TorchDistribution:
        """p(x | z) for the vectors [..., num_codes, code_dim] of the codes z, event [data_dim]."""
        return self.likelihood(self.decoder(vectors.flatten(-2)).to(vectors.dtype))

    # ------------------------------------------------------------------ what it knows

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The nearest vectors' numbers [..., num_codes] for x [..., data_dim]."""
        return self.codebook.nearest(self.outputs(x))

    def check_codes(self, z: Tensor) -> Tensor:
        """z [..., num_codes] as whole numbers; raises `ProgramError` for what is no code."""
        if z.is_floating_point() and not torch.equal(z, z.round()):
            raise ProgramError(
                "a code is the number of a vector, and there is nothing between two numbers: decode whole numbers, or "
                "what lies between their vectors, model.likelihood_dist(model.codebook(z)).mean for codes z"
            )
        if z.shape[-1] != self.num_codes or int(z.min()) < 0 or int(z.max()) >= self.codebook_size:
            raise DataError(
                f"codes are [..., {self.num_codes}] of whole numbers from 0 to {self.codebook_size - 1}, but these are "
                f"{list(z.shape)} from {z.min().item():g} to {z.max().item():g}"
            )
        return z.long()

    def log_marginal(self, x: Tensor) -> Tensor | None:
        """log p(x) [batch] in nats for x [batch, data_dim], all codes summed out; None if there are too many."""
        states = self.states()
        if states is None:
            return None
        prior = self.code_prior().log_prob(states)  # [states]
        seen = self.likelihood_dist(self.codebook(states))
        return torch.stack([(prior + seen.log_prob(row)).logsumexp(0) for row in x])

    def states(self, most: int = MOST_STATES) -> Tensor | None:
        """All settings of a datum's codes, [K^num_codes, num_codes]; None if they are more than `most`."""
        if self.num_codes * math.log(self.codebook_size) > math.log(most) + 1e-9:
            return None
        one = torch.arange(self.codebook_size, device=self.codebook.vectors.device)
        return torch.cartesian_prod(*[one] * self.num_codes).reshape(-1, self.num_codes)

    def bits_per_dim(self, bound: Any) -> Any:
        """-bound / (data_dim log 2): bits for each column, of a bound in nats per datum. Lower is better."""
        return -bound / (self.data_dim * math.log(2))

    def perplexity(self, x: Tensor) -> float:
        """exp(entropy) of the codes of all rows of x [rows, data_dim]: the number of codes in use, from 1 to K."""
        return perplexity_of(self.usage(x)).item()

    @torch.no_grad()
    def usage(self, x: Tensor) -> Tensor:
        """How often each code stands for a place of the rows of x [rows, data_dim]: [codebook_size]."""
        counts = [self._count(part) for part in self.as_data(x).split(4096)]
        return torch.stack(counts).sum(0)

    def _count(self, x: Tensor) -> Tensor:
        return self.codes(x).flatten().bincount(minlength=self.codebook_size).to(x.dtype)

    @torch.no_grad()
    def initialise_from(self, x: Tensor, seed: int = 0) -> None:
        """Let the decoder begin at the columns' own distribution, the vectors at outputs of the encoder.

        Parameters
        ----------
        x : Tensor [rows, data_dim]
        seed : int
            Of the choice of outputs.

        Raises
        ------
        SettingError
            If all but the prior is held, since nothing is trained yet.
        """
        if self.hold:
            raise SettingError(
                "hold=True trains the prior of a model that is fitted: leave it out, or use "
                "fitted.model.with_prior('pixelcnn')"
            )
        x = self.check_data(x)
        start_decoder(self.decoder, self.likelihood, x)
        self.codebook.start(self.outputs(x).flatten(0, -2), seed)
        self.fresh = False

    def check_data(self, x: Tensor) -> Tensor:
        """`x` as floats; raises `DataError` unless [rows, data_dim], in the likelihood's support."""
        check_columns(x, self.data_dim, type(self).__name__)
        check_finite(x)
        self.likelihood.check(x)
        return self.as_floats(x)

    def as_data(self, x: Any) -> Tensor:
        """`x`, a tensor or array [rows, data_dim], as the model computes with it."""
        like = self.codebook.vectors
        return self.check_data(torch.as_tensor(x, device=like.device)).to(like.dtype)
