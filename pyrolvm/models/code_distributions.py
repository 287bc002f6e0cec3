"""Distributions of the codes of a datum: autoregressive ones, and those of one-hot vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import one_hot


class Autoregressive(dist.TorchDistribution):
    """prod_m p(z_m | z_1, ..., z_{m-1}), event [places].

    Parameters
    ----------
    logits : callable
        From codes [rows, places] to logits [rows, places, K]; those of place m do not depend on codes m, m + 1, ...
    places, codebook_size : int
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own name and form)

    def __init__(
        self, logits: Any, places: int, codebook_size: int, like: Tensor, batch_shape: Any = ()
    ) -> None:
        self.logits, self.places, self.codebook_size, self.like = logits, places, codebook_size, like
        super().__init__(torch.Size(batch_shape), torch.Size((places,)), validate_args=False)

    @property
    def support(self) -> Any:
        """Whole numbers from 0 to K - 1."""
        return constraints.independent(constraints.integer_interval(0, self.codebook_size - 1), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Autoregressive:
        """The same for more rows."""
        return Autoregressive(self.logits, self.places, self.codebook_size, self.like, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """[...], nats, for codes [..., places], in one pass."""
        codes = value.reshape(-1, self.places).long()
        found = self.logits(codes).log_softmax(-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)
        total = found.sum(-1).reshape(value.shape[:-1])
        return total.expand(torch.broadcast_shapes(total.shape, self.batch_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        """Codes [*sample_shape, *batch_shape, places], place by place."""
        shape = self._extended_shape(torch.Size(sample_shape))
        codes = self._fill(shape[:-1].numel(), lambda logits: dist.Categorical(logits=logits).sample())
        return codes.reshape(shape)

    @property
    def mean(self) -> Tensor:
        """Codes [*batch_shape, places], each the most probable one after those before it: an average means nothing."""
        return self._fill(1, lambda logits: logits.argmax(-1))[0].expand(self._extended_shape())

    @torch.no_grad()
    def _fill(self, rows: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """Codes [rows, places], place by place, `choose` being of logits [rows, K]."""
        codes = torch.zeros(rows, self.places, dtype=torch.int64, device=self.like.device)
        for place in range(self.places):
            codes[:, place] = choose(self.logits(codes)[:, place])
        return codes


class OneHot(dist.TorchDistribution):
    """A prior over codes [places] as one over one-hot vectors [places, K].

    Parameters
    ----------
    codes : distribution
        With event [places].
    codebook_size : int
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own name and form)
    support = constraints.independent(constraints.one_hot, 1)

    def __init__(self, codes: dist.TorchDistribution, codebook_size: int, like: Tensor) -> None:
        self.codes, self.codebook_size, self.like = codes, codebook_size, like
        event = torch.Size((*codes.event_shape, codebook_size))
        super().__init__(codes.batch_shape, event, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> OneHot:
        """The same for more rows."""
        return OneHot(self.codes.expand(torch.Size(batch_shape)), self.codebook_size, self.like)

    def log_prob(self, value: Tensor) -> Tensor:
        """[...], nats, for one-hot codes [..., places, K]."""
        return self.codes.log_prob(value.argmax(-1))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        """One-hot codes [*sample_shape, *batch_shape, places, K]."""
        return self._vectors(self.codes.sample(torch.Size(sample_shape)))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """[K^places, *batch or ones, places, K]."""
        return all_settings(self, self.like, expand)

    @property
    def mean(self) -> Tensor:
        """One-hot codes: an average means nothing."""
        return self._vectors(self.codes.mean)

    def _vectors(self, codes: Tensor) -> Tensor:
        return one_hot(codes.long(), self.codebook_size).to(self.like)


def all_settings(codes: dist.TorchDistribution, like: Tensor, expand: bool) -> Tensor:
    """All one-hot codes of a distribution with event [places, K]: [K^places, *batch or ones, places, K]."""
    places, size = codes.event_shape
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    every = torch.cartesian_prod(*[torch.arange(size, device=eye.device)] * places).reshape(-1, places)
    states = eye[every].reshape(-1, *(1,) * len(codes.batch_shape), places, size)
    return states.expand(-1, *codes.batch_shape, -1, -1) if expand else states
