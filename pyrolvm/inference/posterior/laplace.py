"""The normal distribution around the point of an AutoLaplaceApproximation, by the curvature of the log joint there.

    q(u) = N(u*, H^-1),     H = - d^2/du^2 [ log p(x, T(u)) + log |T'(u)| ] at the point u* of the guide

u: all latents in unconstrained space, T: to their own. Discrete latents are summed out, and H is in float64, where
Pyro's method of the same name draws the one and rounds the other.
"""

from __future__ import annotations

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal

from pyrolvm.errors import ProgramError, SettingError
from pyrolvm.inference.log_joint.draws import fixed_normals
from pyrolvm.inference.log_joint.families import FULL, Family, Gaussian
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.posterior.convergence import Convergence
from pyrolvm.inference.program.checks import inspect_program
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import Structure
from pyrolvm.seeds import Purpose, derived_seed

DRAWS = 1024
"""Of the estimate of the bound."""
AT_MODE = 0.05
"""Standard deviations that a point may be away from the mode it stands for."""


def laplace_approximation(pair: Pair, seed: int) -> tuple[Program, Structure, Convergence]:
    """The program with an AutoMultivariateNormal in place of its point, and whether that point is the mode."""
    guide = pair.program.auto_guide
    if not isinstance(guide, AutoLaplaceApproximation):
        raise SettingError(
            "laplace_approximation() is of the point that guide='AutoLaplaceApproximation' finds, and this guide is "
            f"{type(guide).__name__ if guide is not None else 'of your own'}: fit with that one"
        )
    log_joint = LogJoint(pair)
    location = Family(pair.program, log_joint).read().location
    tril, away = _curvature(log_joint, location)
    program = pair.program.with_auto_guide(AutoMultivariateNormal(guide.model))
    program.initialise(pair.batch, derived_seed(seed, Purpose.START), validate=False)
    q = Gaussian(FULL, location, scale_tril=tril)
    Family(program, log_joint).write(q)
    with seeded(derived_seed(seed, Purpose.CHECK), program.device):
        structure = inspect_program(program, pair.batch)
    program.settle()
    u = q.at(fixed_normals(DRAWS, q.dim, derived_seed(seed, Purpose.DIAGNOSE, 3)))
    elbo = float((log_joint(u) - q.log_prob(u)).mean()) / structure.num_data
    sentence = (
        f"{'' if away <= AT_MODE else 'not '}the mode: a Newton step from the point is {away:.1g} sd long"
    )
    return program, structure, Convergence(away <= AT_MODE, sentence, {"elbo": elbo, "away": away})


def _curvature(log_joint: LogJoint, u: torch.Tensor) -> tuple[torch.Tensor, float]:
    """chol(H^-1) at u [dim], and how many sd a Newton step from there is."""
    root, failed = torch.linalg.cholesky_ex(-log_joint.hessian(u))
    if bool(failed) or not bool(root.isfinite().all()):
        raise ProgramError(
            "the log joint does not curve downwards in every direction at the point of the guide, which is no maximum: "
            "fit for more steps"
        )
    whitened = torch.linalg.solve_triangular(root, log_joint.slope(u)[1].unsqueeze(-1), upper=False)
    return torch.linalg.cholesky(torch.cholesky_inverse(root)), float(whitened.norm())
