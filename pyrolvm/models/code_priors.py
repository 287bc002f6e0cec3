"""Priors over a grid of codes, by name: p(z) for z [places] of whole numbers 0, ..., K - 1.

    uniform       every code alike: log p(z) = -places log K
    learned       a distribution of its own at each place
    pixelcnn      prod_m p(z_m | z_1, ..., z_{m-1}) by a gated convolutional network, places in reading order
    transformer   the same by causal self-attention

The last two are autoregressive: the density takes one pass of their network, a draw one for each place. No gradient
goes through a code, so that a prior learns from the codes and does not change them.

A. van den Oord et al., "Conditional image generation with PixelCNN decoders", NeurIPS 2016 (gates, the two stacks).
A. Vaswani et al., "Attention is all you need", NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import embedding, one_hot, pad

from pyrolvm.errors import SettingError, count
from pyrolvm.models.pieces import Piece, make_piece


class CodePrior(Piece):
    """p(z) of the codes of a datum. A new one defines `forward()`.

    Parameters
    ----------
    codebook_size : int
        K.
    height, width : int
        Of the grid.
    """

    sizes = ("codebook_size", "height", "width")
    logits: Any
    """Logits [places, K], or a function of codes that finds them."""

    def __init__(self, codebook_size: int, height: int, width: int) -> None:
        super().__init__()
        self.codebook_size, self.height, self.width = codebook_size, height, width

    @property
    def places(self) -> int:
        """Codes of a datum."""
        return self.height * self.width

    def forward(self) -> dist.TorchDistribution:
        """p(z) with batch [] and event [places], whole numbers."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(self)")


class Uniform(CodePrior):
    """Every code alike, everywhere."""

    logits: Tensor

    def __init__(self, codebook_size: int, height: int, width: int) -> None:
        super().__init__(codebook_size, height, width)
        self.register_buffer("logits", torch.zeros(self.places, codebook_size), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        """Event [places]."""
        return dist.Categorical(logits=self.logits).to_event(1)


class Learned(CodePrior):
    """Learned logits [places, K], the places independent."""

    def __init__(self, codebook_size: int, height: int, width: int) -> None:
        super().__init__(codebook_size, height, width)
        self.logits = nn.Parameter(torch.zeros(self.places, codebook_size))

    def forward(self) -> dist.TorchDistribution:
        """Event [places]."""
        return dist.Categorical(logits=self.logits).to_event(1)


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


class GatedLayer(nn.Module):
    """Two stacks: `down` sees the rows above (and its own), `right` them and what stands left in the row.

    Zeros above and to the left, and shifts by one, take the place of masks on the weights. No place of `right` sees
    itself in the first layer; later ones may, since their input no longer holds it.
    """

    def __init__(self, channels: int, kernel: int, first: bool) -> None:
        super().__init__()
        self.reach, self.first = kernel // 2, first
        self.above = nn.Conv2d(channels, 2 * channels, (self.reach + 1, kernel))
        self.before = nn.Conv2d(channels, 2 * channels, (1, self.reach + 1))
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.leave = nn.Conv2d(channels, channels, 1)

    def forward(self, down: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, channels, height, width] each, of the same shapes."""
        r = self.reach
        seen = self.above(pad(down, (r, r, r, 0)))
        over = pad(seen, (0, 0, 1, 0))[:, :, :-1]  # of the rows above alone
        left = pad(right, (r + 1, 0))[..., :-1] if self.first else pad(right, (r, 0))
        out = self.leave(gated(self.before(left) + self.link(over)))
        return gated(seen), out if self.first else right + out


def gated(x: Tensor) -> Tensor:
    """tanh(a) sigmoid(b) for the halves a, b of the features: [rows, channels, ...] of [rows, 2 * channels, ...]."""
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class PixelCNN(CodePrior):
    """A gated PixelCNN over the codes.

    Parameters
    ----------
    codebook_size, height, width : int
    num_layers : int
    channels : int
        Features of each of its two stacks.
    kernel : int
        Side of what a layer sees, an odd number.
    """

    def __init__(
        self,
        codebook_size: int,
        height: int,
        width: int,
        num_layers: int = 4,
        channels: int = 32,
        kernel: int = 3,
    ) -> None:
        super().__init__(codebook_size, height, width)
        self.num_layers, self.channels = count("num_layers", num_layers), count("channels", channels)
        self.kernel = count("kernel", kernel, 3)
        if not kernel % 2:
            raise SettingError(f"kernel={kernel} must be odd: it has a middle")
        self.enter = nn.Parameter(torch.randn(codebook_size, channels) / 2)
        self.places_in = nn.Parameter(torch.zeros(channels, height, width))
        self.layers = nn.ModuleList(GatedLayer(channels, kernel, first=not n) for n in range(num_layers))
        self.leave = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, codebook_size, 1))

    def logits(self, codes: Tensor) -> Tensor:
        """[rows, places, K] for codes [rows, places]."""
        down = embedding(codes, self.enter).mT.unflatten(2, (self.height, self.width))
        right = down
        for n, layer in enumerate(self.layers):
            down, right = layer(down, right)
            right = right + self.places_in if not n else right
        return self.leave(right).flatten(2).mT.to(self.enter.dtype)

    def forward(self) -> dist.TorchDistribution:
        """Event [places]."""
        return Autoregressive(self.logits, self.places, self.codebook_size, self.enter)


class Transformer(CodePrior):
    """Causal self-attention over the codes in reading order.

    Parameters
    ----------
    codebook_size, height, width : int
    num_layers : int
    channels : int
        Features of a place, a multiple of `heads`.
    heads : int
    """

    later: Tensor

    def __init__(
        self,
        codebook_size: int,
        height: int,
        width: int,
        num_layers: int = 2,
        channels: int = 64,
        heads: int = 4,
    ) -> None:
        super().__init__(codebook_size, height, width)
        self.num_layers, self.channels = count("num_layers", num_layers), count("channels", channels)
        self.heads = count("heads", heads)
        if channels % heads:
            raise SettingError(f"channels={channels} must be a multiple of heads={heads}")
        self.enter = nn.Parameter(torch.randn(codebook_size + 1, channels) / 2)  # the last one: the beginning
        self.places_in = nn.Parameter(torch.zeros(self.places, channels))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                channels, heads, 2 * channels, 0.0, batch_first=True, norm_first=True, bias=False
            )
            for _ in range(num_layers)
        )
        self.leave = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, codebook_size))
        later = torch.ones(self.places, self.places, dtype=torch.bool).triu(1)
        self.register_buffer("later", later, persistent=False)

    def logits(self, codes: Tensor) -> Tensor:
        """[rows, places, K] for codes [rows, places]."""
        begin = torch.full_like(codes[:, :1], self.codebook_size)
        h = embedding(torch.cat([begin, codes[:, :-1]], 1), self.enter) + self.places_in
        for layer in self.layers:
            h = layer(h, src_mask=self.later)
        return self.leave(h).to(self.enter.dtype)

    def forward(self) -> dist.TorchDistribution:
        """Event [places]."""
        return Autoregressive(self.logits, self.places, self.codebook_size, self.enter)


CODE_PRIORS: dict[str, type[CodePrior]] = {
    "uniform": Uniform,
    "learned": Learned,
    "pixelcnn": PixelCNN,
    "transformer": Transformer,
}
"""By name."""
CodePrior.known = CODE_PRIORS


def make_code_prior(prior: str | CodePrior, codebook_size: int, grid: tuple[int, int]) -> CodePrior:
    """The prior of this name, with its settings ("pixelcnn:6,channels=64"), or `prior` itself.

    Raises
    ------
    SettingError
        For an unknown name or setting, or an instance of another size.
    """
    sizes = {"codebook_size": codebook_size, "height": grid[0], "width": grid[1]}
    return make_piece("prior", prior, CODE_PRIORS, **sizes)
