"""Multi-path Pathfinder as a method of its own: a posterior in a second, without a guide.

Zhang, Carpenter, Gelman and Vehtari (2022), "Pathfinder: parallel quasi-Newton variational inference", JMLR 23(306).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyrolvm.errors import DivergenceError, SettingError, count
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.pathfinder import PATHS, find_paths, mixture_log_prob
from pyrolvm.inference.log_joint.psis import khat_threshold
from pyrolvm.inference.log_joint.resampling import smoothed
from pyrolvm.inference.log_joint.walks import WALKERS, drift
from pyrolvm.inference.posterior.suiting import suited
from pyrolvm.inference.program.checks import inspect_program
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import Program
from pyrolvm.seeds import Purpose, derived_seed

LEAST_WEIGHED = 4000
DRIFT = 0.2
"""Of sds or log-sds: what walks of 2,000 draws may move by chance is about half of it, in a hundred entries."""


@dataclass(frozen=True, repr=False)
class Paths:
    """Draws of multi-path Pathfinder.

    Attributes
    ----------
    draws : dict
        Latent site -> [num_samples, ...], float64, resampled by importance weights.
    khat : float
        Of the weights: above 0.7 the draws are not to be relied on.
    drift : float
        How far short Hamiltonian walks from the draws move a mean, in sds, or a log-sd: draws of the posterior stay.
    elbos : list of float
        The bound of each path in nats, best first.
    """

    draws: dict[str, Tensor]
    khat: float
    elbos: list[float]
    num_weighed: int
    drift: float = 0.0
    drifting: str = ""

    @property
    def reliable(self) -> bool:
        """Whether k-hat is below what so many weights allow, and walks leave the draws where they are."""
        return self.khat <= khat_threshold(self.num_weighed) and self.drift < DRIFT

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        word = "reliable" if self.reliable else "not to be relied on"
        told = f"{len(self.elbos)} paths, best bound {self.elbos[0]:.3f} nats; k-hat {self.khat:.2f}"
        if self.drift >= DRIFT:
            told += f", and '{self.drifting}' moves by {self.drift:.2g} sd when the draws walk on"
        return f"{told}: {word}"

    def __repr__(self) -> str:
        sites = ", ".join(f"{n} {list(v.shape)}" for n, v in self.draws.items())
        return f"Pathfinder: {self.sentence}\n  {sites}"


@torch.inference_mode(False)
def pathfinder(
    model: Any, data: Any = (), num_samples: int = 1000, *, num_paths: int = PATHS, seed: int = 0
) -> Paths:
    """Draws of a program's posterior from normal approximations along quasi-Newton paths.

    Parameters
    ----------
    model : callable
        A Pyro program whose latents are continuous, or summed out (`infer={"enumerate": "parallel"}`).
    data : as `fit` takes it
        () for a program of no arguments.
    num_samples : int
    num_paths : int
        Runs of L-BFGS from starts in [-2, 2] of unconstrained space.

    Raises
    ------
    ProgramError
        The program has no log joint with derivatives.
    DivergenceError
        No path found a normal with a finite bound.
    """
    count("num_samples", num_samples)
    count("num_paths", num_paths)
    log_joint = LogJoint(_whole(model, data, seed))
    paths = find_paths(log_joint, derived_seed(seed, Purpose.START, 4) % 2**31, num_paths)
    if not paths:
        raise DivergenceError("no path found a finite bound: standardise the data, or narrow the priors")
    each = max(LEAST_WEIGHED, 2 * num_samples) // len(paths)
    generator = torch.Generator().manual_seed(derived_seed(seed, Purpose.GUIDE))
    z = torch.randn(len(paths), each, log_joint.dim, generator=generator, dtype=torch.float64)
    u = torch.cat([path.at(noise) for path, noise in zip(paths, z, strict=True)])
    with torch.no_grad():
        weights = smoothed(log_joint(u) - mixture_log_prob(paths, u))
    chosen = u[weights.resample(num_samples, generator)]
    walkers = u[weights.resample(WALKERS, generator)]
    moved, where = drift(log_joint, walkers, derived_seed(seed, Purpose.GUIDE, 3))
    return Paths(log_joint.values(chosen), weights.khat, [p.elbo for p in paths], len(u), moved, where)


def _whole(model: Any, data: Any, seed: int) -> Pair:
    """The program on all data; the guide is there for its structure alone."""
    if isinstance(model, torch.nn.Module) and callable(getattr(model, "guide", None)):
        raise SettingError(
            "pathfinder draws the latents of a program whose parameters are known: pass a Pyro function"
        )

    def summed(site: Any) -> bool:
        return site["infer"].get("enumerate") == "parallel"

    program = Program(model, AutoNormal(poutine.block(model, hide_fn=summed)), dtype=torch.float64)
    batch = suited(program, data)
    program.initialise(batch, seed)
    return Pair(program, inspect_program(program, batch), batch)
