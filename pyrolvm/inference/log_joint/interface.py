"""What `fit` needs of this room; signatures first, the bodies follow."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import Program


@dataclass(frozen=True)
class Start:
    """Where to begin, in the unconstrained space of all latents together.

    Attributes
    ----------
    location : tensor [dim], float64
    scale_tril : tensor [dim, dim], float64
        chol(H^-1) at the mode, or a diagonal where the Hessian is too large.
    modes : int
        Distinct modes that four starts found; 0 if none has an interior one.
    method : {"mode", "pathfinder"}
    sentence : str
    """

    location: Tensor
    scale_tril: Tensor
    modes: int
    method: str
    sentence: str

    def place(self, program: Program) -> bool:
        """Set the guide's location and scale (parameters in place); False if the guide's family has none to set."""
        raise NotImplementedError


@dataclass(frozen=True)
class Solution:
    """An optimum of the bound on fixed draws; it stands in the program's parameters.

    Attributes
    ----------
    history : list of dict
        One row per iteration of the optimiser: `elbo` in nats in total, `gradient_norm`, `num_draws`, `seconds`.
    converged : bool
        Whether the gradient is below its tolerance, and doubling the draws moves nothing by more than 0.1 sd.
    numbers : dict
        gradient_norm, moved, num_draws, monte_carlo_error, elbo, modes.
    """

    history: list[dict[str, float]]
    converged: bool
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The fields of `Convergence`, with the flags apart.

    Attributes
    ----------
    converged : bool or None
        True: the optimum is found and weights leave it where it is; False: no optimum; None: an optimum, which is not
        the posterior, or not the only mode.
    flags : tuple of str
        Names of the rules that were broken: "shift", "tail", "few", "gradient", "moves", "no mode", "modes".
    """

    converged: bool | None
    sentence: str
    numbers: dict[str, float]
    flags: tuple[str, ...] = ()


def declined(pair: Pair) -> str | None:
    """Why the pair cannot be fitted by fixed draws, in one sentence; None if it can."""
    raise NotImplementedError


def find_start(pair: Pair, seed: int = 0) -> Start:
    """Modes of the log joint from four starts; the best of eight Pathfinder paths where there is none."""
    raise NotImplementedError


def solve(pair: Pair, start: Start | None = None, seed: int = 0) -> Solution:
    """Maximise the bound on fixed draws, doubled until it stays; fits every mode and keeps the best."""
    raise NotImplementedError


def judge(pair: Pair, solution: Solution | None = None, seed: int = 0) -> Verdict:
    """Whether importance weights of the fitted guide's draws leave its answers where they are."""
    raise NotImplementedError
