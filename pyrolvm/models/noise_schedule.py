"""The fixed forward chain of a diffusion, and every number that follows from its schedule.

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I),              t = 1, ..., T
    q(x_t | x_0)     = N(signal_t x_0, noise_t^2 I),                        signal_t^2 + noise_t^2 = 1
    q(x_{t-1} | x_t, x_0) = N(clean_t x_0 + noised_t x_t, bridge_t^2 I)

Schedules: "linear", from 1e-4 to 0.02 at T = 1000 and scaled by 1000 / T otherwise (Ho, Jain and Abbeel 2020,
section 4); "cosine" (Nichol and Dhariwal 2021, equation 17); or a list of beta_1, ..., beta_T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrolvm.errors import SettingError, count, one_of

SCHEDULES = ("linear", "cosine")
VARIANCES = ("beta", "posterior")
LARGEST_BETA = 0.999  # of a chain so short that its formula asks for more, as Nichol and Dhariwal have it


def betas_of(schedule: str | Sequence[float], chain_length: int) -> Tensor:
    """The variances beta_1, ..., beta_T: [chain_length], float64.

    Raises
    ------
    SettingError
        For an unknown schedule, another number of betas than `chain_length`, or one not between 0 and 1.
    """
    T = count("chain_length", chain_length)
    if isinstance(schedule, str):
        one_of("schedule", schedule, SCHEDULES)
        return (_linear(T) if schedule == "linear" else _cosine(T)).clamp(max=LARGEST_BETA)
    betas = torch.as_tensor([float(beta) for beta in schedule], dtype=torch.float64)
    if len(betas) != T:
        raise SettingError(
            f"schedule has {len(betas)} betas for a chain of {T} steps: say chain_length={len(betas)}"
        )
    wrong = ~((betas > 0) & (betas < 1))
    if bool(wrong.any()):
        step = int(wrong.nonzero()[0])
        raise SettingError(
            f"schedule has beta_{step + 1} = {betas[step].item():g}: each must lie between 0 and 1, for it is the "
            "share of variance that a step replaces by noise"
        )
    return betas


def _linear(T: int) -> Tensor:
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)


def _cosine(T: int) -> Tensor:
    time = torch.arange(T + 1, dtype=torch.float64) / T
    alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


class Tables(nn.Module):
    """Numbers in float64, held as buffers of the module's dtype: rounded once, whatever it was moved through."""

    def tables(self) -> dict[str, Tensor]:
        """The buffers by name, float64."""
        raise NotImplementedError(f"{type(self).__name__} must define tables(self)")

    def hold(self) -> None:
        """Make the buffers; the end of `__init__`."""
        for name, table in self.tables().items():
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name, table in self.tables().items():
            self._buffers[name] = table.to(self._buffers[name])
        return self


class NoiseSchedule(Tables):
    """The chain's numbers as tables over t = 0, ..., T, of which t = 0 is the data.

    Parameters
    ----------
    betas : Tensor [T]
        float64.
    variance : {"beta", "posterior"}
        sigma_t^2 of p(x_{t-1} | x_t): beta_t, best for data of variance 1 in every direction, or that of
        q(x_{t-1} | x_t, x_0), best for a single datum (Ho, Jain and Abbeel 2020, section 3.2).

    Attributes
    ----------
    signal, noise : Tensor [T + 1]
        x_t = signal_t x_0 + noise_t epsilon.
    clean, noised, bridge : Tensor [T + 1]
        The mean's two weights and the standard deviation of q(x_{t-1} | x_t, x_0).
    scale : Tensor [T + 1]
        sigma_t of p(x_{t-1} | x_t); sigma_1 is that of p(x_0 | x_1), the decoder's.
    weight, constant : Tensor [T + 1]
        The KL divergence of step t > 1, in nats, of an x_0 of D numbers that is predicted with a squared error of E, is
        weight_t E + constant_t D. weight_1 = 1 / (2 sigma_1^2) is that of the error in log p(x_0 | x_1).
    simple : Tensor [T + 1]
        (1 / T) |epsilon - prediction|^2 = simple_t weight_t E: the weight of L_simple relative to the bound's.
    """

    signal: Tensor
    noise: Tensor
    clean: Tensor
    noised: Tensor
    bridge: Tensor
    scale: Tensor
    weight: Tensor
    constant: Tensor
    simple: Tensor

    def __init__(self, betas: Tensor, variance: str = "beta") -> None:
        super().__init__()
        self.betas = tuple(betas.tolist())
        self.variance = one_of("variance", variance, VARIANCES)
        self.hold()

    @property
    def chain_length(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def decoder_scale(self) -> float:
        """sigma_1."""
        return float(self.tables()["scale"][1])

    def tables(self) -> dict[str, Tensor]:
        """By name, over t = 0, ..., T."""
        beta = torch.tensor((0.0, *self.betas), dtype=torch.float64)
        alpha_bar = (1 - beta).cumprod(0)
        before = torch.cat([alpha_bar[:1], alpha_bar[:-1]])
        left = torch.cat([torch.ones(1, dtype=torch.float64), 1 - alpha_bar[1:]])  # t = 0 is never divided by
        bridge = beta * (1 - before) / left
        variance = beta if self.variance == "beta" else bridge.clone()
        if self.variance == "posterior":  # q(x_0 | x_1, x_0) has none, and a density of x_0 needs one
            variance[1] = bridge[2] if self.chain_length > 1 else beta[1]
        variance[0] = 1.0
        clean = before.sqrt() * beta / left
        ratio = torch.where(bridge > 0, bridge / variance, torch.ones(1, dtype=torch.float64))
        weight = clean.square() / (2 * variance)
        weight[0] = 1.0
        return {
            "signal": alpha_bar.sqrt(),
            "noise": (1 - alpha_bar).sqrt(),
            "clean": clean,
            "noised": (1 - beta).sqrt() * (1 - before) / left,
            "bridge": bridge.sqrt(),
            "scale": variance.sqrt(),
            "weight": weight,
            "constant": 0.5 * (ratio - 1 - ratio.log()),
            "simple": alpha_bar / left / weight / self.chain_length,
        }

    def at(self, table: Tensor, t: Tensor) -> Tensor:
        """The entries of a table for steps t [...]: [..., 1], to multiply rows of numbers."""
        return table[t].unsqueeze(-1)

    def noisy(self, x0: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """x_t [..., D] of x_0 and epsilon, each [..., D], at steps t [...]."""
        return self.at(self.signal, t) * x0 + self.at(self.noise, t) * epsilon

    def prior_kl(self, x0: Tensor) -> Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, I)), [...] in nats, for x_0 [..., D]."""
        signal, noise = self.signal[-1], self.noise[-1]
        return 0.5 * ((signal * x0).square() + noise.square() - 1 - 2 * noise.log()).sum(-1)

    def jump(self, before: int, after: int) -> tuple[float, float]:
        """Variances of one step of a shortened chain, from t = `before` to t = `after`, 0 < `after` < `before`.

        Returns
        -------
        variance, bridge : float
            sigma^2 of the step by this schedule's choice, and the variance of q(x_after | x_before, x_0).
        """
        kept = math.exp(sum(math.log1p(-beta) for beta in self.betas[after:before]))
        left = [-math.expm1(sum(math.log1p(-b) for b in self.betas[:t])) for t in (before, after)]
        bridge = (1 - kept) * left[1] / left[0]
        return (1 - kept if self.variance == "beta" else bridge), bridge


def spread_steps(chain_length: int, num_steps: int) -> list[int]:
    """Steps T = t_1 > ... > 1 of a shortened chain, `num_steps` of them, evenly spread; all if there are no more."""
    T, S = chain_length, min(num_steps, chain_length)
    return [T - round((T - 1) * i / max(S - 1, 1)) for i in range(S)]
