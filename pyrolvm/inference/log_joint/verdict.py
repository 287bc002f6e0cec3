"""The verdict: whether what a fitted guide answers would stay if its draws were weighed by p(x, z) / q(z).

4,000 draws of the guide get Pareto-smoothed weights. The guide is flagged if the weights move the mean of any entry
of any latent by a tenth of its sd, or its log-sd by a tenth; if they are worth fewer than 5% of the draws; if k-hat
exceeds 0.7 at fewer than 10%, or 1 at fewer than 95%: such weights have no mean, and what they would move is not known
(worth more they are all but equal, and the shape of the little that is left says nothing); if the optimum's gradient is
not flat, or other fixed draws would move it; and if the log joint has no mode, or more than one. Weights cannot see
what no draw has visited: of that, only the number of modes speaks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolvm.inference.log_joint.families import DIAGONAL, FULL, KINDS, LOW_RANK, POINT, Family, guide_of
from pyrolvm.inference.log_joint.function import LogJoint
from pyrolvm.inference.log_joint.resampling import Weights, smoothed
from pyrolvm.inference.log_joint.solving import Solution
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import Structure
from pyrolvm.seeds import Purpose, derived_seed

DRAWS = 4000
SHIFT = 0.1
"""Of an sd, or of a log-sd: what importance weights may move without a word."""
FEWEST, FEW, ALIKE = 0.05, 0.1, 0.95
KHAT, NO_MEAN = 0.7, 1.0
MOVES, ERROR, FLAT = 0.2, 0.1, 1e-2
NAMES = {POINT: "point", DIAGONAL: "mean-field normal", FULL: "full-rank normal", LOW_RANK: "low-rank normal"}


@dataclass(frozen=True)
class Verdict:
    """What is said of a fit.

    Attributes
    ----------
    converged : bool or None
        True: the optimum is found and the weights leave it where it is; False: no optimum; None: an optimum that is
        not the posterior, or not of the only mode.
    sentence : str
    numbers : dict
        Of the solution, and `khat`, `effective_share`, `mean_shift` and `sd_shift` (the largest, in sds and log-sds).
    flags : tuple of str
        The rules that were broken: "gradient", "moves", "shift", "few", "tail", "no mode", "modes".
    """

    converged: bool | None
    sentence: str
    numbers: dict[str, float]
    flags: tuple[str, ...] = ()


@torch.no_grad()
def judge(pair: Pair, solution: Solution | None = None, seed: int = 0) -> Verdict:
    """The verdict on a Gaussian AutoGuide as it stands in the pair, after `solve` or after stochastic steps."""
    log_joint = solution.start.log_joint if solution is not None else LogJoint(pair)
    numbers = dict(solution.numbers) if solution is not None else {}
    flags = _flags_of(solution) if solution is not None else ()
    kind = KINDS[type(guide_of(pair.program))]
    worst = ""
    if kind != POINT:
        weighed = weigh(pair, log_joint, seed)
        found, worst = weighed.numbers, weighed.worst
        numbers |= found
        flags += _flags_of_weights(found)
    return _said(flags, numbers, None if kind == POINT else kind, worst, solution)


def judge_guide(optimum: Mapping[str, float], drawn: Drawn | None) -> Verdict:
    """The verdict on any guide at the optimum of its bound on fixed draws, `optimum` being that one's numbers.

    `drawn` are draws of it, None where whole draws have no weight.
    """
    numbers, flags, worst = dict(optimum), _flags_of_optimum(optimum), ""
    if drawn is not None:
        found, worst = _shifts(smoothed(drawn.log_weight), drawn.values, drawn.names)
        numbers |= found
        flags += _flags_of_weights(found)
    return _said(flags, numbers, None if drawn is None else "guide", worst, None)


@dataclass(frozen=True)
class Drawn:
    """Whole draws of a guide.

    Attributes
    ----------
    log_weight : tensor [draws]
        log p(x, z) - log q(z), nats.
    values : tensor [draws, entries]
        Every entry of every latent.
    names : list of str
        Of the entries.
    """

    log_weight: Tensor
    values: Tensor
    names: list[str]


def can_be_weighed(structure: Structure) -> bool:
    """Whether whole draws of a guide have one weight: latents are shared by all data, and each has a density."""
    hidden = structure.mixed or structure.enumerated or any(s.point or s.bound for s in structure.latents)
    return bool(structure.latents) and not structure.local_latents and not hidden


def _said(
    flags: tuple[str, ...],
    numbers: dict[str, float],
    kind: str | None,
    worst: str,
    solution: Solution | None,
) -> Verdict:
    return Verdict(_converged(flags), _sentence(flags, numbers, kind, worst, solution), numbers, flags)


@dataclass(frozen=True)
class Weighed:
    """Draws of a guide with their weights.

    Attributes
    ----------
    u : tensor [draws, dim]
    weights : Weights
    numbers : dict
        As of `Verdict`.
    worst : str
        The entry that the weights move most.
    """

    u: Tensor
    weights: Weights
    numbers: dict[str, float]
    worst: str


def weigh(pair: Pair, log_joint: LogJoint, seed: int = 0, num_draws: int = DRAWS) -> Weighed:
    """Draws of the pair's Gaussian guide, and what their weights would move."""
    q = Family(pair.program, log_joint).read()
    generator = torch.Generator().manual_seed(derived_seed(seed, Purpose.DIAGNOSE, 1))
    u = q.at(torch.randn(num_draws, q.dim, generator=generator, dtype=torch.float64))
    with torch.no_grad():
        weights = smoothed(log_joint(u) - q.log_prob(u))
        values, names = log_joint.scalars(u)
    return Weighed(u, weights, *_shifts(weights, values, names))


def _shifts(weights: Weights, values: Tensor, names: list[str]) -> tuple[dict[str, float], str]:
    """What weights would move of entries [draws, entries], as of `Verdict.numbers`, and the name of the worst."""
    mean, sd = values.mean(0), values.std(0).clamp_min(1e-300)
    moved = (weights.mean(values) - mean).abs() / sd
    stretched = (weights.sd(values) / sd).clamp_min(1e-12).log().abs()
    varying = sd > 1e-12 * mean.abs().clamp_min(1e-12)  # not the corner of a Cholesky factor
    moved, stretched = moved * varying, stretched * varying
    worst = names[int(torch.maximum(moved, stretched).argmax())]
    numbers = {
        "khat": weights.khat,
        "effective_share": weights.effective_share,
        "mean_shift": float(moved.max()),
        "sd_shift": float(stretched.max()),
    }
    return numbers, worst


def _flags_of(solution: Solution) -> tuple[str, ...]:
    broken = {"no mode": solution.start.modes == 0, "modes": solution.start.modes > 1}
    return _flags_of_optimum(solution.numbers) + tuple(name for name, wrong in broken.items() if wrong)


def _flags_of_optimum(numbers: Mapping[str, float]) -> tuple[str, ...]:
    broken = {
        "gradient": not numbers["gradient_norm"] <= FLAT,
        "moves": not (numbers["moved"] <= MOVES and numbers["monte_carlo_error"] <= ERROR),
    }
    return tuple(name for name, wrong in broken.items() if wrong)


def _flags_of_weights(numbers: dict[str, float]) -> tuple[str, ...]:
    share = numbers["effective_share"]
    broken = {
        "shift": not max(numbers["mean_shift"], numbers["sd_shift"]) < SHIFT,
        "few": not share >= FEWEST,
        "tail": share < ALIKE and numbers["khat"] > (KHAT if share < FEW else NO_MEAN),
    }
    return tuple(name for name, wrong in broken.items() if wrong)


def _sentence(
    flags: tuple[str, ...], numbers: dict[str, float], kind: str | None, worst: str, solution: Solution | None
) -> str:
    parts = []
    if "gradient_norm" in numbers:
        parts.append(_optimum_sentence(flags, numbers))
    if kind is not None:
        parts.append(_weights_sentence(flags, numbers, kind, worst))
    if "no mode" in flags:
        parts.append(
            "the log joint has no mode, as of a scale that its own effects depend on: write them non-centred"
        )
    if "modes" in flags and solution is not None:
        parts.append(f"{solution.start.sentence}, and the guide is at one of them")
    word = {True: "converged", False: "not yet", None: "flagged"}[_converged(flags)]
    return f"{word}: {'; '.join(parts)}"


def _converged(flags: tuple[str, ...]) -> bool | None:
    return False if {"gradient", "moves"} & set(flags) else None if flags else True


def _optimum_sentence(flags: tuple[str, ...], numbers: dict[str, float]) -> str:
    gradient, draws = numbers["gradient_norm"], numbers["num_draws"]
    if "gradient" in flags:
        return f"the gradient is {gradient:.2g} where the optimiser stopped"
    if "moves" in flags:
        error = max(numbers["moved"], numbers["monte_carlo_error"])
        return f"other draws than these {draws:.0f} would move the optimum by {error:.2g} sd"
    if draws <= 1:
        return f"at the optimum, gradient {gradient:.1g}"
    error = numbers["monte_carlo_error"]
    return f"at the optimum, gradient {gradient:.1g}, Monte Carlo error {error:.2g} sd with {draws:.0f} draws"


def _weights_sentence(flags: tuple[str, ...], numbers: dict[str, float], kind: str, worst: str) -> str:
    shift, khat = max(numbers["mean_shift"], numbers["sd_shift"]), numbers["khat"]
    told = (
        f"k-hat {khat:.2f}, {numbers['effective_share']:.0%} of the draws effective"
        if math.isfinite(khat)
        else "all weights equal"
    )
    if not {"shift", "few", "tail"} & set(flags):
        return f"importance weights leave the answers where they are (by {shift:.2g} sd at most; {told})"
    cure = ", or put right: fitted.posterior(x, corrected=True)" if khat <= KHAT else ""
    richer = {DIAGONAL: "AutoMultivariateNormal", LOW_RANK: "AutoMultivariateNormal"}.get(
        kind, "a richer guide"
    )
    moved = f"importance weights would move '{worst}' by {shift:.2g} sd ({told})"
    if "shift" not in flags:
        moved = f"it misses tails ({told})"
    return f"the {NAMES.get(kind, kind)} is not the posterior: {moved}; take {richer}{cure}"
