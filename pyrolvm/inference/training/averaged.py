"""Fits on fixed draws of pairs that are no Gaussian AutoGuide alone: models that learn parameters, guides of one's own.

With the noise e_1, ..., e_M of a guide held, its bound

    L_M(theta) = (1 / M) sum_i log p_theta(x, z_i) - log q_theta(z_i),      z_i = z(e_i; theta),

is an ordinary function of all trained parameters theta, the model's and the guide's. L-BFGS takes it to a gradient of
1e-4 nats, and the draws are doubled, drawn afresh, until no latent's mean moves by more than a tenth of its sd and no
log-sd by more than that. A model without latents is maximised once.

The coordinates are the program's own, so that more iterations are needed than in `log_joint`, and the noise is the
program's, so that more draws are. Draws must move with the parameters as their gradients have it, which is seen by
differences of L_M (a straight-through draw does not); and layers would learn the draws by heart.

Giordano, Ingram and Broderick (2024), JMLR 25(18). Burroni, Domke and Sheldon (2024), UAI.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrolvm.inference.engine import Problem
from pyrolvm.inference.log_joint import DRAWS, Drawn, can_be_weighed
from pyrolvm.inference.log_joint.climbing import climb, rows_of
from pyrolvm.inference.log_joint.fixed import FROM_DOUBLING, MOVES
from pyrolvm.inference.log_joint.function import element
from pyrolvm.inference.objectives import prepare
from pyrolvm.inference.program.hints import reason_of
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.training.one_draw import OneDraw, doubled
from pyrolvm.inference.training.rules import has_networks, is_shared
from pyrolvm.seeds import Purpose, derived_seed

GRADIENT, FLAT = 1e-4, 1e-2
"""Nats per unit of a parameter: what L-BFGS stops at, and what counts as flat."""
LEAST_DRAWS, MOST_DRAWS, PER_NUMBER = 128, 4096, 8
"""Draws to begin and to end with, and per number of the latents to begin with: fewer are fitted instead."""
NUMBERS = 2**23
"""Numbers (draws x rows x columns) of one evaluation."""
ITERATIONS, EVALUATIONS = 1000, 2500
STEP, ROUGH = 1e-5, 0.02
"""Of the differences that smoothness is judged by, and how far, relatively, they may be from the gradient."""
FRESH = 999_000


@dataclass(frozen=True)
class Averaged:
    """The optimum of a pair's bound on fixed draws; it stands in the program's parameters.

    Attributes
    ----------
    numbers : dict
        As of `log_joint.Solution`, without modes.
    history : list of dict
        A row an iteration, as there.
    drawn : Drawn or None
        Draws of the guide there, where they have a weight each.
    """

    numbers: dict[str, float]
    history: list[dict[str, float]]
    drawn: Drawn | None = None
    sentence: str = "the gradient of the bound on fixed draws is flat"

    @property
    def converged(self) -> bool:
        """Whether the gradient is flat and doubling the draws moves nothing by more than a tenth of an sd."""
        return self.numbers["gradient_norm"] <= FLAT and self.numbers["moved"] <= MOVES


class FixedNoise:
    """L_M in nats, and its gradient, as a function of one float64 vector of all trained parameters.

    Call it inside `doubled`.
    """

    def __init__(self, one: OneDraw, num_draws: int, seed: int, scale: float) -> None:
        self.one, self.num_draws, self.seed, self.scale = one, num_draws, seed, scale

    def __call__(self, vector: Tensor) -> tuple[float, Tensor]:
        """(bound, gradient [size]) at `vector` [size]."""
        at = vector.detach().clone().requires_grad_()
        with torch.enable_grad():
            surrogate, bound = self.one(at, self.num_draws, self.seed)
            (slope,) = torch.autograd.grad(-surrogate.mean(), at)
        return float(bound.detach().mean()) * self.scale, slope * self.scale


def bound_of_one(problem: Problem) -> OneDraw:
    """(surrogate, bound) of one draw, per datum: KLs in closed form where they are known."""
    name = "enum" if problem.structure.enumerated else "meanfield"
    problem = replace(problem, objective=prepare(name, problem.structure))
    rows = torch.arange(problem.num_rows)

    def run() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            loss = problem.loss(rows)
        return loss.surrogate, loss.terms[0]

    return OneDraw(problem.program, run)


def draw_of_one(pair: Pair) -> OneDraw:
    """(log-weight, every entry of every latent) of one draw; the log-weight is nan where latents are summed out."""
    program, batch, names = pair.program, pair.batch, [s.name for s in pair.structure.latents]

    def run() -> tuple[Tensor, ...]:
        guide = poutine.trace(program.guide).get_trace(*batch.args, **batch.kwargs)
        nodes: dict[str, Any] = guide.nodes
        values = torch.cat([nodes[n]["value"].reshape(-1) for n in names if n in nodes])
        if pair.structure.enumerated:
            return torch.full((), torch.nan), values
        model = poutine.trace(poutine.replay(program.model, trace=guide))
        log_joint = model.get_trace(*batch.args, **batch.kwargs).log_prob_sum()
        return torch.as_tensor(log_joint - guide.log_prob_sum()), values

    return OneDraw(program, run)


def declined(pair: Pair) -> str | None:
    """Why the bound of the pair is not maximised on fixed draws, in one sentence; None if it may be tried."""
    structure, program = pair.structure, pair.program
    if not program.parameters:
        return "nothing is learned"
    if has_networks(program):
        return "layers are trained, which would learn the fixed draws by heart"
    if structure.per_datum:
        return f"each row has parameters of its own ('{structure.per_datum[0]}')"
    if structure.whole:
        return "a plate of the program draws a subsample of its rows"
    for site in structure.latents:
        if site.bound:
            return f"'{site.name}' has no density but an estimate of a bound"
        if site.discrete and not (site.enumerated and not site.in_guide):
            return f"'{site.name}' is discrete and not summed out: mark it infer={{'enumerate': 'parallel'}}"
    if program.device.type != "cpu":
        return "fixed draws are fitted on the CPU: device='cpu'"
    if not is_shared(structure):
        return f"'{structure.local_latents[0].name}' is a latent of single data"
    return None


def maximise(pair: Pair, problem: Problem, seed: int) -> Averaged | str:
    """The optimum, left in the program's parameters; why there is none in one sentence, the parameters untouched."""
    program, began = problem.program, time.perf_counter()
    with doubled(program):
        return _maximise(pair, problem, derived_seed(seed, Purpose.NOISE, 2) % 2**31, began)


def _maximise(pair: Pair, problem: Problem, seed: int, began: float) -> Averaged | str:
    vector, history = _vector(list(problem.program.parameters.values())), list[dict[str, float]]()
    M, most = _numbers_of_draws(pair)
    scale = float(problem.structure.num_data)
    try:
        one, draws = bound_of_one(problem), draw_of_one(pair) if M > 1 else None
        if reason := _rough(FixedNoise(one, M, seed, scale), vector):
            return reason
    except Exception as error:  # whatever a program, its record or vmap has against it
        return f"the program cannot be repeated over draws ({reason_of(error)})"
    for doubling in range(20):
        bound = FixedNoise(one, M, seed + 1000 * doubling, scale)
        found = climb(
            bound, vector, gradient_tolerance=GRADIENT, iterations=ITERATIONS, evaluations=EVALUATIONS
        )
        if not math.isfinite(found.end.value):
            return "the bound on fixed draws is not finite"
        moved = _moved(draws, vector, found.end.point, M, seed) if doubling and draws else math.inf
        vector, slope = found.end.point, float(found.end.slope.abs().max())
        history += rows_of(found, M, len(history), began)
        if slope > FLAT:
            return f"the gradient of the bound on fixed draws is {slope:.2g} where L-BFGS stopped"
        if M == 1 or moved <= MOVES or most < 2 * M:
            break
        M *= 2
    fresh, fresh_slope = FixedNoise(one, M, seed + FRESH, scale)(vector)
    place(problem.program, vector)
    moved = 0.0 if M == 1 else moved
    numbers = {
        "elbo": fresh,
        "gradient_norm": slope,
        "fresh_gradient": float(fresh_slope.abs().max()),
        "moved": moved,
        "monte_carlo_error": FROM_DOUBLING * moved,
        "num_draws": float(M),
    }
    return Averaged(numbers, history, _drawn(pair, draws, vector, seed + FRESH))


@torch.no_grad()
def _drawn(pair: Pair, draws: OneDraw | None, vector: Tensor, seed: int) -> Drawn | None:
    if draws is None or not can_be_weighed(pair.structure):
        return None
    log_weight, values = draws(vector, DRAWS, seed)
    shapes = {s.name: torch.Size((*s.batch_shape, *s.event_shape)) for s in pair.structure.latents}
    return Drawn(log_weight, values, [n + element(i, s) for n, s in shapes.items() for i in range(s.numel())])


def _numbers_of_draws(pair: Pair) -> tuple[int, int]:
    """Draws to begin with, and at the most."""
    latents = pair.structure.latents
    if not latents:
        return 1, 1
    shared = sum(math.prod(s.batch_shape) * math.prod(s.event_shape) for s in latents if not s.local)
    M = 2 ** math.ceil(math.log2(max(LEAST_DRAWS, PER_NUMBER * shared)))
    return M, max(M, min(MOST_DRAWS, NUMBERS // max(1, pair.width * max(pair.num_rows, 1))))


def _rough(bound: FixedNoise, vector: Tensor) -> str:
    """A sentence if the bound on fixed draws does not move as its gradient has it; else nothing."""
    signs = torch.randint(0, 2, vector.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    value, slope = bound(vector)
    if not math.isfinite(value):
        return "the bound is not finite at the start"
    step = STEP * signs * vector.abs().clamp_min(1.0)
    above, below = bound(vector + step)[0], bound(vector - step)[0]
    expected = float(2 * step @ slope)
    if not abs(above - below - expected) <= ROUGH * abs(expected) + 1e-9 * abs(value):
        return "the draws of the guide do not move smoothly with its parameters"
    return ""


@torch.no_grad()
def _moved(draws: OneDraw, before: Tensor, after: Tensor, num_draws: int, seed: int) -> float:
    """How far the latents' means moved at the most, in sds, or their log-sds."""
    old, new = (draws(vector, num_draws, seed)[1] for vector in (before, after))
    sd, new_sd = old.std(0), new.std(0)
    varying = new_sd > 1e-9 * new.mean(0).abs().clamp_min(1e-9)
    moved = torch.maximum((new.mean(0) - old.mean(0)).abs() / new_sd, (new_sd / sd).log().abs())[varying]
    return float(moved.max()) if len(moved) else 0.0


def _vector(leaves: list[Tensor]) -> Tensor:
    return torch.cat([p.detach().reshape(-1).double() for p in leaves])


@torch.no_grad()
def place(program: Program, vector: Tensor) -> None:
    """Copy the parts of a vector into a program's trained parameters."""
    leaves = list(program.parameters.values())
    for leaf, part in zip(leaves, vector.split([p.numel() for p in leaves]), strict=True):
        leaf.copy_(part.reshape(leaf.shape))
