"""Whether draws are of the posterior, asked of walks that leave the posterior as it is.

Each draw takes a few Hamiltonian trajectories with a Metropolis step, in coordinates in which the draws have unit
covariance. Draws of the posterior keep their means and standard deviations; draws that stop short of mass beside them
spread into it. Importance weights cannot see that mass, since no draw is there; these walks cannot see a mode that is
far from all draws.

Neal (2011), "MCMC using Hamiltonian dynamics"; Gorham and Mackey (2015) compare samples by such operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrolvm.inference.log_joint.function import LogJoint

WALKERS, TRAJECTORIES, LEAPS = 2000, 10, 8
STEP = 0.4
"""Of the first trajectory, in sds of a coordinate; then by how many walkers arrive."""
WANTED = 0.8


def walked(log_joint: LogJoint, u: Tensor, seed: int) -> Tensor:
    """Where draws u [draws, dim] are after their walks."""
    generator = torch.Generator().manual_seed(seed)
    mean = u.mean(0)
    covariance = (u - mean).T @ (u - mean) / len(u)
    jitter = 1e-9 * covariance.diagonal().clamp_min(1e-300).diag()
    root, failed = torch.linalg.cholesky_ex(covariance + jitter)
    if failed:
        root = covariance.diagonal().clamp_min(1e-300).sqrt().diag()
    step = STEP
    value, slope = log_joint.slope(u)
    for _ in range(TRAJECTORIES):
        p = torch.randn(u.shape, generator=generator, dtype=u.dtype)
        at, momentum, end_slope = u, p + step / 2 * (slope @ root), slope
        for leap in range(LEAPS):
            at = at + step * (momentum @ root.T)
            end_value, end_slope = log_joint.slope(at)
            momentum = momentum + step * (0.5 if leap == LEAPS - 1 else 1.0) * (end_slope @ root)
        gained = end_value - value - 0.5 * (momentum.square().sum(1) - p.square().sum(1))
        chance = torch.rand(len(u), generator=generator, dtype=u.dtype).log()
        arrived = chance < gained.nan_to_num(-torch.inf)
        u = torch.where(arrived[:, None], at, u)
        slope = torch.where(arrived[:, None], end_slope, slope)
        value = torch.where(arrived, end_value, value)
        step *= 1.2 if float(arrived.double().mean()) > WANTED else 0.6
    return u


def drift(log_joint: LogJoint, u: Tensor, seed: int) -> tuple[float, str]:
    """How far walks move a mean, in sds, or a log-sd, of any entry of any latent, and which."""
    before, names = log_joint.scalars(u)
    after = log_joint.scalars(walked(log_joint, u, seed))[0]
    sd, new_sd = before.std(0), after.std(0)
    varying = torch.minimum(sd, new_sd) > 1e-12 * before.mean(0).abs().clamp_min(1e-12)
    moved = (after.mean(0) - before.mean(0)).abs() / torch.maximum(sd, new_sd)
    stretched = (new_sd / sd).log().abs()
    shift = torch.maximum(moved, stretched).where(varying, 0.0)
    return float(shift.max()), names[int(shift.argmax())]
