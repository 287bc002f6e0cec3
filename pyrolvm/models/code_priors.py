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

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad

from pyrolvm.errors import SettingError, count
from pyrolvm.models.code_distributions import Autoregressive
from pyrolvm.models.pieces import Piece, make_piece


class CodePrior(Piece):
    """p(z) of the codes of a datum. A new one defines `logits`, or `forward()`.

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
        if isinstance(self.logits, Tensor):  # places that are independent of each other
            return dist.Categorical(logits=self.logits).to_event(1)
        return Autoregressive(self.logits, self.places, self.codebook_size, next(self.parameters()))


class Uniform(CodePrior):
    """Every code alike, everywhere."""

    logits: Tensor

    def __init__(self, codebook_size: int, height: int, width: int) -> None:
        super().__init__(codebook_size, height, width)
        self.register_buffer("logits", torch.zeros(self.places, codebook_size), persistent=False)


class Learned(CodePrior):
    """Learned logits [places, K], the places independent."""

    def __init__(self, codebook_size: int, height: int, width: int) -> None:
        super().__init__(codebook_size, height, width)
        self.logits = nn.Parameter(torch.zeros(self.places, codebook_size))


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
