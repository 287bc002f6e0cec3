"""The bound of a diffusion model term by term: a draw of each, all of them, or a few with their standard error."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrolvm.errors import count
from pyrolvm.models.base import LatentVariableModel
from pyrolvm.models.coordinates import Coordinates
from pyrolvm.models.noise_schedule import NoiseSchedule


class ChainTerms(LatentVariableModel):
    """What a model with a chain of T latents x_1, ..., x_T knows of the terms L_0, ..., L_T of its bound."""

    data_dim: int
    latent_dim: int
    chain: NoiseSchedule
    coordinates: Coordinates

    @property
    def chain_length(self) -> int:
        """T, steps of the chain."""
        return self.chain.chain_length

    def likelihood_dist(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | x_1 = z) for z [..., latent_dim], event [data_dim]."""
        raise NotImplementedError

    def squared_error(self, x0: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """|x_0 - xhat(x_t, t)|^2, [...], for x_0 and epsilon [..., latent_dim] and steps t [...]."""
        raise NotImplementedError

    def chain_kl(self, x0: Tensor) -> Tensor:
        """L_1 + ... + L_T of x_0 [..., latent_dim], estimated at few t: [...], nats, unbiased."""
        raise NotImplementedError

    @torch.no_grad()
    def term(self, x: Tensor, t: int, epsilon: Tensor | None = None) -> Tensor:
        """The term L_t of the bound at one draw of the chain.

        Parameters
        ----------
        x : Tensor [rows, data_dim]
            In the units of the data.
        t : int
            0 for -log p(x | x_1), 1, ..., T - 1 for the KL divergence of p(x_t | x_{t+1}), T for that of p(x_T).
        epsilon : Tensor [rows, latent_dim], optional
            The noise of the chain; drawn by default.

        Returns
        -------
        Tensor [rows]
            In nats; -log p(x) is at most the expected sum over t = 0, ..., T.
        """
        x0 = self.coordinates(x)
        if t == self.chain_length:
            return self.chain.prior_kl(x0)
        epsilon = torch.randn_like(x0) if epsilon is None else epsilon
        steps = torch.full(x0.shape[:-1], t + 1, dtype=torch.int64, device=x0.device)
        if t == 0:
            return -self.likelihood_dist(self.chain.noisy(x0, steps, epsilon)).log_prob(x)
        error = self.squared_error(x0, steps, epsilon)
        return self.chain.weight[t + 1] * error + self.latent_dim * self.chain.constant[t + 1]

    def terms(self, x: Tensor, num_draws: int = 1, seed: int = 0) -> Tensor:
        """L_0, ..., L_T of each row, each averaged over `num_draws` draws of its own: [T + 1, rows], nats."""
        x = self._as_data(x)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            parts = [
                torch.stack([self.term(x, t) for _ in range(num_draws)]) for t in range(self.chain_length + 1)
            ]
        return torch.stack([part.mean(0) for part in parts])

    def log_bound(self, x: Tensor, num_draws: int = 1, seed: int = 0) -> Tensor:
        """The bound on log p(x) of each row by all its terms: [rows], nats. Arguments as of `terms`."""
        return -self.terms(x, num_draws, seed).sum(0)

    @torch.no_grad()
    def sampled_bound(self, x: Tensor, num_draws: int = 10, seed: int = 0) -> pd.DataFrame:
        """The bound as it is trained on, from few t per row.

        Parameters
        ----------
        x : Tensor [rows, data_dim]
        num_draws : int
            Estimates of each row, of `num_times` values of t each; 2 at least.
        seed : int
            Of the draws.

        Returns
        -------
        DataFrame
            One row per datum: `bound`, in nats, unbiased for what `log_bound` estimates, and its `standard_error`.
        """
        x, num_draws = self._as_data(x), count("num_draws", num_draws, 2)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            x0 = self.coordinates(x)
            found = torch.stack([-self.term(x, 0) - self.chain_kl(x0) for _ in range(num_draws)])
        columns = {"bound": found.mean(0), "standard_error": found.std(0) / math.sqrt(num_draws)}
        index = pd.RangeIndex(len(x), name="row")
        return pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()}, index)

    def bound_table(self, x: Tensor, num_draws: int = 1, seed: int = 0) -> pd.DataFrame:
        """The terms of the bound, averaged over the rows of x. Arguments as of `terms`.

        Returns
        -------
        DataFrame
            One row per t = 0, ..., T: `nats` of L_t; its `standard_error`, of data and draws; and `bits_per_dim`. The
            sums of `nats` and `bits_per_dim` are those of minus the bound.
        """
        terms = self.terms(x, num_draws, seed)
        columns = {"nats": terms.mean(1), "standard_error": terms.std(1) / math.sqrt(terms.shape[1])}
        columns["bits_per_dim"] = self.bits_per_dim(-columns["nats"])
        index = pd.RangeIndex(len(terms), name="t")
        return pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()}, index)

    def bits_per_dim(self, bound: Any) -> Any:
        """-bound / (data_dim log 2): bits for each column, of a bound in nats per datum. Lower is better."""
        return -bound / (self.data_dim * math.log(2))

    def _as_data(self, x: Tensor) -> Tensor:
        loc = self.coordinates.loc
        x = torch.as_tensor(x, device=loc.device)
        self.check_data(x)
        return x.to(loc.dtype)
