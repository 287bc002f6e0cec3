"""Hamiltonian Monte Carlo on many independent targets at once: chains x data.

    H(u, v) = -log f(u) + |v|^2 / 2,     f_beta(u) = start(u) (joint(u) / start(u))^beta

One move draws v ~ Normal(0, I), follows H for L leapfrog steps and accepts with probability
min(1, exp(H - H')), which leaves f_beta invariant whatever the step size (Neal 2011, section 5.3.2.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LogDensities = Callable[[Tensor], tuple[Tensor, Tensor]]
"""u [chains, rows, dim] -> (log start, log ratio = log joint - log start), each [chains, rows]."""

Slope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(u, beta []) -> the gradient of log f_beta [chains, rows, dim], and what `LogDensities` returns."""

TARGET_ACCEPTANCE = 0.65
JITTER = 0.2


@dataclass(frozen=True)
class State:
    """Positions of the chains, u [chains, rows, dim], with their log-densities [chains, rows]."""

    u: Tensor
    log_start: Tensor
    log_ratio: Tensor

    @classmethod
    def at(cls, densities: LogDensities, u: Tensor) -> State:
        """The state at u."""
        with torch.no_grad():
            return cls(u, *densities(u))

    def log_density(self, beta: float) -> Tensor:
        """log f_beta, [chains, rows]."""
        return self.log_start + beta * self.log_ratio


def slope_of(densities: LogDensities) -> Slope:
    """The gradient of log f_beta by automatic differentiation."""

    def slope(u: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_start, log_ratio = densities(u)
            (gradient,) = torch.autograd.grad((log_start + beta * log_ratio).sum(), u)
        return gradient, log_start.detach(), log_ratio.detach()

    return slope


def hmc_move(
    slope: Slope, state: State, beta: float, step_size: Tensor, num_leapfrog: int
) -> tuple[State, Tensor]:
    """One move of every chain at inverse temperature beta.

    Trajectories that reach a density that is not finite are rejected.

    Parameters
    ----------
    step_size : tensor [rows]
        Jittered by up to 20 % per trajectory to avoid periodic orbits.
    num_leapfrog : int
        L.

    Returns
    -------
    state : State
        After the move.
    acceptance : tensor [chains, rows]
        Acceptance probabilities.
    """
    chains, rows, _ = state.u.shape
    jitter = 1 + JITTER * (2 * torch.rand(chains, rows, device=state.u.device) - 1)
    step = (step_size * jitter).to(state.u.dtype).unsqueeze(-1)  # [chains, rows, 1]
    v = torch.randn_like(state.u)
    before = -state.log_density(beta) + 0.5 * v.square().sum(-1)
    end, v = _leapfrog(slope, state, v, state.u.new_tensor(beta), step, num_leapfrog)
    after = -end.log_density(beta) + 0.5 * v.square().sum(-1)
    acceptance = (before - after).nan_to_num(nan=-torch.inf).exp().clamp(max=1.0)
    accepted = torch.rand_like(acceptance) < acceptance
    return _where(accepted, end, state), acceptance


def _leapfrog(
    slope: Slope, state: State, v: Tensor, beta: Tensor, step: Tensor, num_leapfrog: int
) -> tuple[State, Tensor]:
    """v += e/2 g(u);  L times: u += e v, v += e g(u);  v -= e/2 g(u)."""
    gradient, *_ = slope(state.u, beta)
    v, u = v + 0.5 * step * gradient, state.u
    for _ in range(num_leapfrog):
        u = u + step * v
        gradient, *densities = slope(u, beta)
        v = v + step * gradient
    return State(u, *densities), v - 0.5 * step * gradient


def _where(accepted: Tensor, new: State, old: State) -> State:
    return State(
        torch.where(accepted.unsqueeze(-1), new.u, old.u),
        torch.where(accepted, new.log_start, old.log_start),
        torch.where(accepted, new.log_ratio, old.log_ratio),
    )


def adapted(step_size: Tensor, acceptance: Tensor, rate: float = 0.5) -> Tensor:
    """Step sizes [rows], larger where the acceptance [chains, rows] exceeds its target, smaller where it is below."""
    return step_size * (rate * (acceptance.mean(0) - TARGET_ACCEPTANCE)).exp()
