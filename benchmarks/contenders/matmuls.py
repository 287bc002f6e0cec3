"""The floor of a VAE's step: its matrix products alone, forward and backward, into buffers that exist."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.contenders.base import Runner, UnavailableError
from benchmarks.rows import Case


class MatrixProducts(Runner):
    """y = x W', dW = dy' x and dx = dy W of every linear layer (no dx for the data themselves)."""

    title = "matrix products alone"
    has_bounds = False

    def __init__(self, case: Case) -> None:
        if not case.row.products:
            raise UnavailableError("counted for dense VAEs only")
        super().__init__(case)
        self._calls: list[tuple[Tensor, Tensor, Tensor]] = []
        encoder_input = case.row.products[0]
        for shape in case.row.products:
            self._add(*shape, first=shape is encoder_input)

    def _add(self, batch: int, inside: int, outside: int, first: bool) -> None:
        device = self.case.device
        x, dy = torch.randn(batch, inside, device=device), torch.randn(batch, outside, device=device)
        W = torch.randn(outside, inside, device=device)
        self._calls += [(x, W.T, torch.empty_like(dy)), (dy.T, x, torch.empty_like(W))]
        if not first:
            self._calls.append((dy, W, torch.empty_like(x)))

    @torch.no_grad()
    def run(self, first: int, num_steps: int) -> None:
        """As `Runner.run`, without bounds."""
        for _ in range(num_steps):
            for left, right, out in self._calls:
                torch.mm(left, right, out=out)
