"""Annealed importance sampling: a lower bound on log p(x) that does not depend on the guide.

From z_0 ~ p_0, the prior or the guide, through f_t = p_0^(1 - beta_t) p(x, z)^beta_t, 0 = beta_0 < ... < beta_T = 1,

    log w = sum_t (beta_t - beta_{t-1}) [log p(x, z_{t-1}) - log p_0(z_{t-1})],      z_t ~ T_t(. | z_{t-1})

with T_t a move of Hamiltonian Monte Carlo that leaves f_t invariant. Then E[w] = p(x), and the log of the
mean of w over chains underestimates log p(x) on average, and less with more steps and chains. Run backwards
from an exact draw of p(z | x), E[1 / w] = 1 / p(x), and the same mean overestimates it
(`pyrolvm.inference.posterior.evidence.bdmc`).

A pilot run adapts the step sizes, one for each datum and part of the path. They are then fixed: if they were
adapted along the way, w would be biased.

Neal (2001), "Annealed importance sampling", Statistics and Computing 11.
Wu, Burda, Salakhutdinov and Grosse (2017), "On the quantitative analysis of decoder-based generative
models", ICLR, for the schedule and the use.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyrolvm.errors import SettingError, count, one_of
from pyrolvm.inference.posterior.evidence.chunks import evidence_chunks
from pyrolvm.inference.posterior.evidence.hmc import State, adapted, hmc_move
from pyrolvm.inference.posterior.evidence.importance import check_guide
from pyrolvm.inference.posterior.evidence.streams import StreamingLogMeanExp
from pyrolvm.inference.posterior.evidence.target import STARTS, Target
from pyrolvm.inference.program.draws import refuse_enumeration
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import refuse_bound
from pyrolvm.progress import PATIENCE, progress_bar
from pyrolvm.seeds import Purpose, derived_seed

SCHEDULES = ("sigmoid", "geometric", "linear")
PILOT_CHAINS, PILOT_MOVES, PILOT_WARMUP = 4, 100, 20


@dataclass(frozen=True)
class Annealing:
    """The path of annealing.

    Parameters
    ----------
    num_steps : int
        T, steps from p_0 to the posterior.
    start : {"prior", "guide"}
        p_0.
    schedule : {"sigmoid", "geometric", "linear"}
        "sigmoid" is slow at both ends, "geometric" at the start, where beta rises from 1e-4.
    num_leapfrog : int
        Leapfrog steps of one move.

    Raises
    ------
    SettingError
        An argument is not valid.
    """

    num_steps: int = 500
    start: str = "prior"
    schedule: str = "sigmoid"
    num_leapfrog: int = 10

    def __post_init__(self) -> None:
        one_of("start", self.start, STARTS)
        one_of("schedule", self.schedule, SCHEDULES)
        count("num_steps", self.num_steps)
        count("num_leapfrog", self.num_leapfrog)

    @property
    def betas(self) -> list[float]:
        """beta_0 = 0 < ... < beta_T = 1. The sigmoid's is that of Wu et al. (2017), appendix A: over [-4, 4]."""
        s = torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64)
        if self.schedule == "geometric":
            betas = 10 ** (-4 * (1 - s))
        elif self.schedule == "sigmoid":
            betas = torch.sigmoid(8 * s - 4)
            betas = (betas - betas[0]) / (betas[-1] - betas[0])
        else:
            betas = s
        return [0.0, *betas[1:-1].tolist(), 1.0]

    @property
    def pilot_stride(self) -> int:
        """The pilot run makes a move at every `pilot_stride`-th temperature."""
        return max(1, -(-(self.num_steps - 1) // PILOT_MOVES))

    @property
    def num_moves(self) -> int:
        """Moves of the pilot run and of the chains together."""
        stops = self.num_steps - 1
        return stops and PILOT_WARMUP + -(-stops // self.pilot_stride) + stops


def ais_evidence(
    pair: Pair, num_chains: int, annealing: Annealing, seed: int, *, progress: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Yield log_evidence, standard_error, effective_sample_size and acceptance, each [rows], of some rows at a time."""
    check_annealable(pair, annealing)
    total = len(pair.batch.indices) * annealing.num_moves
    with progress_bar("log p(x), ais", total, enabled=progress, unit="moves", after=PATIENCE) as bar:
        for index, (part, _) in enumerate(evidence_chunks(pair, num_chains)):
            watch = partial(bar.advance, len(part.batch.indices))
            with seeded(derived_seed(seed, Purpose.EVIDENCE, index), pair.device):
                target = Target(part, num_chains, annealing.start)
                log_weight, acceptance = forward(
                    target, annealing, pilot(part, annealing, watch=watch), watch
                )
            stream = StreamingLogMeanExp.empty(log_weight)
            stream.add(log_weight)
            yield {
                "log_evidence": stream.value,
                "standard_error": stream.standard_error,
                "effective_sample_size": stream.effective_sample_size,
                "acceptance": acceptance,
            }


Watch = Callable[[], None]
"""Called after every move."""


def _alone() -> None:
    """No progress is shown."""


def forward(
    target: Target, annealing: Annealing, step_sizes: Tensor, watch: Watch = _alone
) -> tuple[Tensor, Tensor]:
    """Chains from the start to the posterior: log w [chains, rows] in nats, float64, and mean acceptance [rows]."""
    return _anneal(target, annealing, step_sizes, target.initial, 1, watch)


def backward(
    target: Target, annealing: Annealing, step_sizes: Tensor, u: Tensor, watch: Watch = _alone
) -> tuple[Tensor, Tensor]:
    """As `forward`, for chains from exact posterior draws u [chains, rows, dim] back to the start."""
    return _anneal(target, annealing, step_sizes, u, -1, watch)


def _anneal(
    target: Target, annealing: Annealing, step_sizes: Tensor, u: Tensor, direction: int, watch: Watch
) -> tuple[Tensor, Tensor]:
    """T weights with T - 1 moves between them."""
    betas = annealing.betas
    increments = [b - a for a, b in itertools.pairwise(betas)][::direction]
    stops = list(zip(betas[1:-1], step_sizes, strict=True))[::direction]
    state = State.at(target.densities, u)
    log_w, acceptance = increments[0] * state.log_ratio.double(), torch.zeros_like(state.log_ratio)
    for increment, (beta, step_size) in zip(increments[1:], stops, strict=True):
        state, accepted = hmc_move(target.slope, state, beta, step_size, annealing.num_leapfrog)
        log_w = log_w + increment * state.log_ratio.double()
        acceptance = acceptance + accepted
        watch()
    return log_w, acceptance.mean(0) / max(len(stops), 1)


def pilot(
    pair: Pair, annealing: Annealing, held: dict[str, Tensor] | None = None, watch: Watch = _alone
) -> Tensor:
    """Step sizes [num_steps - 1, rows] near the target acceptance, from a shorter run of few chains."""
    betas = annealing.betas[1:-1]
    if not betas:
        return torch.empty(0, pair.num_rows, device=pair.device)
    target = Target(pair, PILOT_CHAINS, annealing.start, held)
    state = State.at(target.densities, target.initial)
    step_size = torch.full((pair.num_rows,), 0.5, device=pair.device)
    for _ in range(PILOT_WARMUP):
        state, acceptance = hmc_move(target.slope, state, betas[0], step_size, annealing.num_leapfrog)
        step_size = adapted(step_size, acceptance)
        watch()
    found, every = [], annealing.pilot_stride
    for beta in betas[::every]:
        state, acceptance = hmc_move(target.slope, state, beta, step_size, annealing.num_leapfrog)
        step_size = adapted(step_size, acceptance)
        found.append(step_size)
        watch()
    return torch.stack(found).repeat_interleave(every, 0)[: len(betas)]


def check_annealable(pair: Pair, annealing: Annealing) -> None:
    """Raise `SettingError` if chains cannot run at once, or there is no density to start from."""
    refuse_enumeration(pair.structure, "method='ais'")
    refuse_bound(pair.structure, "method='ais'")
    check_guide(pair.structure, "ais", annealing.start == "prior")
    if not pair.vectorized:
        raise SettingError(
            "method='ais' runs all chains at once, but this program's draws cannot be taken under a further plate "
            "on the left: let it index dimensions from the right ([..., k]), or use method='importance'"
        )
