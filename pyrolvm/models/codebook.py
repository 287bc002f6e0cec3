"""A codebook: K vectors, and how they follow what is assigned to them.

An output h of the encoder is quantised to the nearest vector, k(h) = argmin_k |h - e_k|^2. Vectors follow the outputs
that they stand for in one of two ways (van den Oord et al. 2017, equation 3 and appendix A.1):

    "gradient"   the optimiser descends |h - e_k(h)|^2 in e
    "ema"        N_k <- decay N_k + (1 - decay) n_k
                 m_k <- decay m_k + (1 - decay) sum_{k(h) = k} h,            e_k = m_k / N_k

with n_k the number of outputs of the batch at k. With decay = 0 and all data in a batch the second is a step of Lloyd's
k-means. A vector that fewer than `revive_below` outputs of a whole pass over the data chose is put at an output of the
batch, drawn at random, and begins anew (Williams et al. 2020, "Hierarchical quantized autoencoders", section 3.1).
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from pyrolvm.errors import SettingError, count, one_of
from pyrolvm.plates import current_rows
from pyrolvm.processes import sharing

UPDATES = ("ema", "gradient")
LEAST_COUNT = 1e-12
"""Below it a running count is none: the vector has had no outputs since it began."""


class Codebook(nn.Module):
    """K vectors of `code_dim` numbers, with the counts of a pass over the data.

    Parameters
    ----------
    codebook_size : int
        K, at least 2.
    code_dim : int
        Numbers in a vector.
    update : {"ema", "gradient"}
    decay : float
        Of the moving averages, in [0, 1).
    revive_below : float
        Uses in a pass below which a vector is moved; 0 moves none.

    Attributes
    ----------
    vectors : Tensor [codebook_size, code_dim]
        e; a parameter under "gradient", else a buffer.
    usage : Tensor [codebook_size]
        Outputs at each vector in the last whole pass of training; zeros before its end.

    Raises
    ------
    SettingError
        For a size, decay or threshold that it cannot have.
    """

    vectors: Tensor
    mean_counts: Tensor
    mean_sums: Tensor
    usage: Tensor
    counts: Tensor
    rows_seen: Tensor

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        update: str = "ema",
        decay: float = 0.99,
        revive_below: float = 1.0,
    ) -> None:
        super().__init__()
        self.codebook_size = count("codebook_size", codebook_size, 2)
        self.code_dim = count("code_dim", code_dim)
        self.update = one_of("update", update, UPDATES)
        self.decay = _within("decay", decay, 1.0)
        self.revive_below = _within("revive_below", revive_below, math.inf)
        vectors = torch.randn(self.codebook_size, self.code_dim)
        if update == "gradient":
            self.vectors = nn.Parameter(vectors)
        else:
            self.register_buffer("vectors", vectors)
            self.register_buffer("mean_counts", torch.zeros(self.codebook_size))
            self.register_buffer("mean_sums", torch.zeros_like(vectors))
        for name in ("usage", "counts"):
            self.register_buffer(name, torch.zeros(self.codebook_size))
        self.register_buffer("rows_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, codes: Tensor) -> Tensor:
        """The vectors [..., code_dim] of whole numbers codes [...]."""
        return embedding(codes, self.vectors)

    def distances(self, h: Tensor) -> Tensor:
        """|h - e_k|^2, [..., codebook_size], for h [..., code_dim]."""
        squares = self.vectors.square().sum(-1)
        return h.square().sum(-1, keepdim=True) - 2 * h @ self.vectors.mT + squares

    @torch.no_grad()
    def nearest(self, h: Tensor) -> Tensor:
        """k(h) [...], whole numbers, for h [..., code_dim]."""
        return self.distances(h).argmin(-1)

    @torch.no_grad()
    def start(self, h: Tensor, seed: int = 0) -> None:
        """Put the vectors at outputs h [number, code_dim], drawn without repetition while there are enough."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(h), generator=generator).to(h.device)
        self.vectors.copy_(h[order.repeat(-(-self.codebook_size // len(h)))[: self.codebook_size]])

    # ------------------------------------------------------------------ training

    @torch.no_grad()
    def follow(self, h: Tensor, codes: Tensor) -> None:
        """Count, average and revive: a step of training with outputs h [rows, places, code_dim], codes [rows, places].

        Everything is tensors, so that a compiled loop can run it.
        """
        every = torch.arange(self.codebook_size, device=h.device)
        h_flat, members = h.flatten(0, -2), (codes.reshape(-1, 1) == every).to(h.dtype)
        processes = sharing()  # one unless they share the rows of a batch
        number = processes.sum(members.sum(0))  # [codebook_size]
        if self.update == "ema":
            self.mean_counts.lerp_(number, 1 - self.decay)
            self.mean_sums.lerp_(processes.sum(members.mT @ h_flat), 1 - self.decay)
            means = self.mean_sums / self.mean_counts.clamp(min=LEAST_COUNT).unsqueeze(-1)
            alive = (self.mean_counts > LEAST_COUNT).unsqueeze(-1)
            self.vectors.copy_(torch.where(alive, means, self.vectors))
        rows = current_rows()
        batch = number.sum().long() * len(h) // len(h_flat)  # of all processes
        self._close_pass(h_flat, number, batch, rows.total if rows is not None else len(h))

    def _close_pass(self, h: Tensor, number: Tensor, batch: Tensor, total: int) -> None:
        """Add a batch to the pass; at its end keep the counts, revive and begin another."""
        self.counts.add_(number)
        self.rows_seen.add_(batch)
        ended = self.rows_seen >= total
        self.usage.copy_(torch.where(ended, self.counts, self.usage))
        if self.revive_below > 0 and (
            self.update == "ema" or self.vectors.requires_grad
        ):  # frozen stays frozen
            self._revive(h, ended & (self.counts < self.revive_below))
        self.counts.mul_(~ended)
        self.rows_seen.mul_(~ended)

    def _revive(self, h: Tensor, dead: Tensor) -> None:
        """Put the vectors `dead` [codebook_size] at outputs of h [number, code_dim]; their averages begin anew."""
        chosen = (torch.rand(self.codebook_size, dtype=h.dtype, device=h.device) * len(h)).long()
        new = sharing().of_first(h[chosen.clamp(max=len(h) - 1)])
        self.vectors.copy_(torch.where(dead.unsqueeze(-1), new, self.vectors))
        if self.update == "ema":
            self.mean_counts.mul_(~dead)
            self.mean_sums.mul_(~dead.unsqueeze(-1))

    @property
    def perplexity(self) -> Tensor:
        """exp(entropy) of the codes in the last whole pass, []: between 1 and K; nan before its end."""
        return perplexity_of(self.usage)


def perplexity_of(usage: Tensor) -> Tensor:
    """exp(-sum_k p_k log p_k), [], with p proportional to usage [codebook_size]; nan where nothing was used."""
    share = usage / usage.sum()
    return torch.special.entr(share).sum().exp()


def _within(name: str, value: float, end: float) -> float:
    """`value` as a float in [0, end), else `SettingError`."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= float(value) < end:
        below = "" if end == math.inf else f" and below {end:g}"
        raise SettingError(f"{name} must be a number of at least 0{below}, not {value!r}")
    return float(value)
