"""The reverse chain of a diffusion as one distribution, and the law of the steps at which its bound is estimated."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyrolvm.errors import count, one_of
from pyrolvm.models.noise_schedule import NoiseSchedule, Tables

UNIFORM_SHARE = 0.1


class ReverseChain(dist.TorchDistribution):
    """p(x_1), what the chain from x_T to x_1 makes of noise, event [latent_dim].

    Its density is not known. `log_prob(x_1)` is log q(x_1 | x_0) less an unbiased estimate of L_1 + ... + L_T, so that

        E_q [log_prob(x_1) - log q(x_1 | x_0)] = -(L_1 + ... + L_T)

    is what the chain adds to the bound, at another draw of t and of the noise in each call.

    Parameters
    ----------
    vae : DiffusionVAE
    x0 : Tensor [..., latent_dim] or None
        The data in the chain's coordinates; without them `log_prob` is nan.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own name and form)
    support = constraints.real_vector
    bound = True  # log_prob is no log-density: whoever would weigh by it must know

    def __init__(self, vae: Any, x0: Tensor | None, batch_shape: torch.Size | None = None) -> None:
        self.vae, self.x0 = vae, x0
        rows = torch.Size() if x0 is None else x0.shape[:-1]
        event = torch.Size((vae.latent_dim,))
        super().__init__(rows if batch_shape is None else batch_shape, event, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ReverseChain:
        """The same for more rows, each with draws of its own."""
        return ReverseChain(self.vae, self.x0, torch.Size(batch_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        """x_1 from noise, by the steps that the model generates with: [*sample_shape, *batch_shape, latent_dim]."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = self.vae.coordinates.loc.new_empty(shape).normal_()
        return self.vae.back_to_one(noise, self.vae.sampling_steps)

    def log_prob(self, value: Tensor) -> Tensor:
        """[...], nats: see above."""
        if self.x0 is None:
            return value.new_full(value.shape[:-1], float("nan"))
        x0 = self.x0.expand(*self.batch_shape, self.vae.latent_dim)
        return self.vae.forward_dist(x0, 1).log_prob(value) - self.vae.chain_kl(x0)


class TimeLaw(Tables):
    """The steps t = 2, ..., T at which a row's KL terms are estimated, with weights that make the sum unbiased.

    "uniform" takes every t alike. "importance" takes a tenth of the draws so, and the others in proportion to what the
    terms are for standard normal data under their best prediction, weight_t noise_t^2: near there the estimate varies
    little, and nowhere more than ten times as much as that of "uniform".
    The t of different rows are spread evenly over the law, which each of them follows.

    Parameters
    ----------
    chain : NoiseSchedule
    times : {"importance", "uniform"}
    num_times : int
        Values of t for each row.
    """

    cumulative: Tensor
    weight: Tensor

    def __init__(self, chain: NoiseSchedule, times: str, num_times: int) -> None:
        super().__init__()
        self.num_times = count("num_times", num_times)
        one_of("times", times, ("importance", "uniform"))
        self.times, self._of_chain = times, chain.tables()
        self.hold()

    def tables(self) -> dict[str, Tensor]:
        """The distribution function of t (without its last value, 1) and the weights, over t = 2, ..., T."""
        size, noise = self._of_chain["weight"][2:], self._of_chain["noise"][2:]
        probability = torch.full_like(size, 1 / max(len(size), 1))
        if self.times == "importance" and len(size):
            usual = size * noise.square()
            probability = UNIFORM_SHARE * probability + (1 - UNIFORM_SHARE) * usual / usual.sum()
        return {"cumulative": probability.cumsum(0)[:-1], "weight": size / probability}

    def forward(self, batch_shape: torch.Size) -> tuple[Tensor, Tensor]:
        """(t, weight_t / probability of t), each [num_times, *batch_shape]."""
        shape = torch.Size((self.num_times, *batch_shape))
        offsets = (
            torch.arange(shape.numel(), device=self.weight.device, dtype=self.weight.dtype) / shape.numel()
        )
        place = (torch.rand((), device=self.weight.device, dtype=self.weight.dtype) + offsets) % 1
        index = torch.searchsorted(self.cumulative, place, right=True).reshape(shape)
        return index + 2, self.weight[index]
