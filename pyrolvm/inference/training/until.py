"""Steps until converged: a learning rate that starts high and falls, and the end when a lower one would gain nothing.

The run is a sequence of stages, each at one rate of its own, g_0 > g_1 > ... At a constant rate the iterates
become stationary around a point that is biased by the rate, with a spread that shrinks with it; their average over the
stationary part is far better than any of them. At growing intervals of a stage the bound is estimated at the
iterate and at the average of the recent ones, always on the same rows and noise, so that differences are precise:

    v_j(theta),  j = 1..M,      gain = mean_j [ v_j(new) - v_j(old) ],   se = sd_j / sqrt(M).

A stage ends when the bound no longer gains what matters (or its own noise) from one interval to the next and, where
parameters are of latents that all data share, the two halves of the iterates agree: split R-hat, with the effective
sample size that their autocorrelation leaves. The next stage starts at the better of iterate and average, with a lower
rate. The run ends when, judged by the gains of the last stages, the next one is predicted to gain less than matters.
The first rate is the best of several in a short race from the start; a rate at which the bound is lost or not finite is
given up for a lower one.

Facts from: Welandawe, Andersen, Vehtari and Huggins (2022), "Robust, automated, and accurate black-box variational
inference"; Dhaka et al. (2020), "Robust, accurate stochastic optimization for variational inference".
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pyrolvm.inference.engine import Problem, TrainingState
from pyrolvm.inference.posterior.convergence import Convergence, recorded, what_matters
from pyrolvm.inference.posterior.history import History
from pyrolvm.inference.training.bounds import Bounds
from pyrolvm.inference.training.iterates import Iterates, flattened
from pyrolvm.inference.training.rules import LOOK_EVERY, SHARE_OF_MATTER, has_networks, is_shared

RATES, OF_NETWORKS = (0.1, 0.03, 0.01, 0.003, 0.001), (0.001, 0.0003)
"""Those of the race. At higher ones networks learn faster at first and lose units, and whole latents, for good."""
FIRST_LOOKS, GROWTH = 10, 2
"""Looks of a stage until the bound is first estimated, and by how much the stage grows to the next estimate."""
FALL = {True: 0.5, False: 0.3}
"""The rate of the next stage, where latents are shared by all data and where they are not."""
SETTLED = 1.1
"""Split R-hat of iterates that are stationary."""
LEAST_SHARE = 1e-4
"""Of the first rate: no stage is lower."""
PATIENT_LOOKS = 80
"""Looks of a stage that waits for its iterates alone."""
MOST_SEEN = 2**24
"""Numbers of the iterates that are seen between two looks."""
TENFOLD = 10.0
"""Networks have converged when a run of ten times the length would gain less than so many times what matters."""
LEAST_RATIO = 0.75
"""Of the gain of a doubling of the steps to the gain of the one before, as a run of networks is predicted to go on."""
STAGE = 0.25
"""The least length of a stage of networks, as a share of the run so far."""


@dataclass
class Until:
    """The rule that lowers the rate of a run and ends it.

    Parameters
    ----------
    problem : Problem
        Of the run.
    bounds : Bounds
        Estimates of its bound.
    fixed : bool
        The user chose the rate: it is kept, and the first stage is the only one.
    first_step : int
        Where schedules end; nothing is judged before.
    """

    prefix = "until/"
    every = LOOK_EVERY
    problem: Problem
    bounds: Bounds
    fixed: bool = False
    first_step: int = 0
    stage: int = 0
    looks: int = 0
    due: int = FIRST_LOOKS
    first_rate: float = 0.0
    best: np.ndarray = field(default_factory=lambda: np.empty(0))
    stage_start: np.ndarray = field(default_factory=lambda: np.empty(0))
    best_parameters: dict[str, Tensor] = field(default_factory=dict)
    gains: list[float] = field(default_factory=list)
    record: list[tuple[int, float]] = field(default_factory=list)
    verdict: Convergence | None = None

    def __post_init__(self) -> None:
        self.shared = is_shared(self.problem.structure)
        self.iterates = Iterates(self.shared)

    # ------------------------------------------------------------------ the run

    def begin(self, state: TrainingState) -> TrainingState:
        """Choose the first rate and estimate the bound at the start; the state to go on from."""
        state = state.clone()
        if not self.fixed:
            rates = OF_NETWORKS if has_networks(self.problem.program) else RATES
            ready = self.bounds.ready(state)
            scores = [self.bounds.raced(rate, ready) for rate in rates]
            self.first_rate = self.rate = rates[int(np.argmax(scores))]
            state.parameters = self.bounds.whole(state.parameters)
        if self.bounds.held_out is not None:
            self.due = 1
        if not self.first_step:
            self._begin_stages(state)
        return state

    def _begin_stages(self, state: TrainingState) -> None:
        self._keep_best(state.parameters, self.bounds(state, state.parameters))
        self.stage_start = self.best

    def ahead(self, step: int) -> int:
        """As `Rule.ahead`: to the end of the interval."""
        if not len(self.best):
            return -(-max(self.first_step, step + 1) // self.every) * self.every - step
        size = sum(p.numel() for p in self.problem.program.parameters.values())
        looks = min(self.due - self.looks, max(1, MOST_SEEN // max(size, 1)))
        return looks * self.every - step % self.every

    def seen(self) -> Tensor:
        """As `Rule.seen`: the iterate."""
        return flattened(self.problem.program.parameters)

    def note(self, step: int, seen: Tensor) -> None:
        """As `Rule.note`."""
        if step >= self.first_step:
            self.looks += 1
            self.iterates.add(seen)

    def look(self, state: TrainingState, history: History) -> tuple[TrainingState, str | None]:
        """At the end of an interval decide. The state to go on from, and a reason to stop."""
        if state.step < self.first_step:
            return state, None
        if not len(self.best):
            state = state.clone()
            self._begin_stages(state)
        if self.looks < self.due:
            return state, None
        state = state.clone()
        self.iterates.take_in()
        r_hat = self.iterates.r_hat(FIRST_LOOKS)
        parameters, values = self._estimated(state, r_hat)
        gain, error = _gain(values, self.best)
        early = self.bounds.held_out is not None and self.looks < FIRST_LOOKS  # the best may be soon behind
        lost = gain < -max(self._matter * (TENFOLD if early else 1), 3 * error)
        if gain > 0 or (r_hat <= SETTLED and not lost):  # a stationary mean is surer than its estimated gain
            self._keep_best(parameters, values)
        self.record.append((state.step, _mean(self.best)))
        waits = r_hat > SETTLED and self.looks < PATIENT_LOOKS
        if self.shared:
            going = gain > max(self._matter, 2 * error) or waits
        else:
            going = self.tenfold > TENFOLD * self._matter and (gain > self._matter or self.fixed)
        if (going or early) and (self.fixed or not lost):
            self.due = self.looks + 1 if early else self.looks * GROWTH
            self.iterates.average_anew()
            return state, None
        return self._end_stage(state, r_hat, lost)

    def retreat(self, state: TrainingState) -> TrainingState | None:
        """A state to go on from after steps that were not finite, at a lower rate; None if nothing can be lowered."""
        if self.fixed or self.rate <= self.first_rate * LEAST_SHARE:
            return None
        self._next_stage(self.rate * 0.1)
        best = self.bounds.whole(self.best_parameters or state.parameters)
        return TrainingState(best, {}, state.step, state.random)

    def ended(self, step: int) -> Convergence:
        """The verdict on a run that ended at `step`."""
        if self.verdict is not None:
            return self.verdict
        words = f"not yet: after {step:,} steps"
        if self.shared or self.tenfold == math.inf:
            words += " the bound still rises, or its iterates still move"
        else:
            words += f" ten times as many are predicted to gain {self.tenfold:.2g} {self._unit}"
        alone = not self.shared and self.bounds.held_out is None
        held = ", or hold rows out (validation=0.1): it ends where they gain no more" if alone else ""
        return Convergence(False, f"{words}; go on by init=fitted{held}", {})

    def _estimated(self, state: TrainingState, r_hat: float) -> tuple[dict[str, Tensor], np.ndarray]:
        """The better of the mean and the last iterate, and its bounds; a stationary mean is the better one."""
        last, mean = state.parameters, state.parameters | self.iterates.named(self.problem.program.parameters)
        found = [(p, self.bounds(state, p)) for p in ((mean,) if r_hat <= SETTLED else (mean, last))]
        return max(found, key=lambda f: _mean(f[1]))

    # ------------------------------------------------------------------ stages

    def _end_stage(self, state: TrainingState, r_hat: float, lost: bool) -> tuple[TrainingState, str | None]:
        gain, error = _gain(self.best, self.stage_start)
        predicted = self._predicted(gain)
        numbers = {"gain": gain, "error": error, "tolerance": self._matter, "r_hat": r_hat}
        numbers["ess"] = self.iterates.effective_size(FIRST_LOOKS)
        numbers |= {} if self.fixed else {"learning_rate": self.rate}
        numbers |= {"elbo" if self.bounds.held_out is None else "held_out_elbo": _mean(self.best)}
        numbers = {k: float(v) for k, v in numbers.items() if math.isfinite(v)}
        state = TrainingState(
            self.bounds.whole(self.best_parameters), {} if lost else state.optimizer, state.step, state.random
        )
        if not self.shared:
            self.verdict = self._of_networks(numbers, lost)
        elif self.fixed:
            self.verdict = self._of_fixed_rate(numbers)
        elif self.stage and predicted + 0.5 * error < SHARE_OF_MATTER * self._matter:
            self.verdict = self._of_stages(gain, error, numbers)
        if self.verdict is None and self.rate <= self.first_rate * LEAST_SHARE:
            words = (
                f"the bound still gained {gain:.2g} ± {error:.1g} {self._unit} at the lowest learning rate"
            )
            self.verdict = Convergence(None, f"cannot tell: {words}", numbers)
        if self.verdict is not None:
            return state, self.verdict.reason
        self.gains.append(gain)
        self._next_stage(self.rate * FALL[self.shared])
        return state, None

    def _next_stage(self, rate: float) -> None:
        self.stage, self.rate, self.stage_start = self.stage + 1, rate, self.best
        self.iterates.clear()
        steps = self.record[-1][0] if self.record and not self.shared else 0
        self.looks, self.due = 0, max(FIRST_LOOKS, round(STAGE * steps / LOOK_EVERY))
        self.due = self.due if self.bounds.held_out is None else 1

    @property
    def tenfold(self) -> float:
        """What a run of ten times the length would gain: doubling after doubling less, as the last two did."""
        if not self.record or self.record[-1][0] < 4 * self.record[0][0]:
            return math.inf
        steps, values = np.log2([s for s, _ in self.record]), [v for _, v in self.record]
        before, half, now = (float(np.interp(steps[-1] - k, steps, values)) for k in (2, 1, 0))
        ratio = (now - half) / (half - before) if half > before else 1.0
        r = min(max(ratio, LEAST_RATIO), 1.0)
        whole = int(math.log2(10))
        return (now - half) * (
            sum(r**k for k in range(1, whole + 1)) + (math.log2(10) - whole) * r ** (whole + 1)
        )

    def _predicted(self, gain: float) -> float:
        """What the next stage gains, if gains go on shrinking as they did."""
        ratio = gain / self.gains[-1] if self.gains and self.gains[-1] > 0 else 1.0
        return gain * min(max(ratio, 0.25), 0.75)

    def _of_networks(self, numbers: dict[str, float], lost: bool) -> Convergence | None:
        more, least = self.tenfold, TENFOLD * self._matter
        if not self.fixed and (self.stage < 1 + lost or numbers["gain"] > least):
            return None
        numbers = numbers | {"tolerance": least}
        if more < math.inf:
            numbers |= {"tenfold": more}
            words = f"ten times as many steps are predicted to gain {more:.2g}"
        else:
            words = f"lowering the learning rate to {self.rate:.1g} gained {numbers['gain']:.2g}"
        words += f" {self._unit}{' held out' if self.bounds.held_out else ''}"
        return Convergence(True, f"converged: {words}, less than the {least:.2g} that would matter", numbers)

    def _of_stages(self, gain: float, error: float, numbers: dict[str, float]) -> Convergence:
        words = (
            f"at the learning rate {self.rate:.1g} the bound changed by {gain:.2g} ± {error:.1g} {self._unit}"
        )
        if "r_hat" in numbers:
            words += f", and the iterates are stationary (R-hat {numbers['r_hat']:.2f})"
        return Convergence(True, f"converged: {words}", numbers)

    def _of_fixed_rate(self, numbers: dict[str, float]) -> Convergence:
        seen = "at the learning rate given the bound rises no more"
        if numbers.get("r_hat", 0.0) > SETTLED:
            moving = f"its iterates still move (R-hat {numbers['r_hat']:.2f}); leave learning_rate out"
            return Convergence(None, f"cannot tell: {seen}, and {moving}", numbers)
        return Convergence(True, f"converged: {seen}", numbers)

    # ------------------------------------------------------------------ what is looked at

    def _keep_best(self, parameters: dict[str, Tensor], values: np.ndarray) -> None:
        self.best, self.best_parameters = values, _copied(parameters)

    @property
    def rate(self) -> float:
        """The present learning rate; of a schedule that was given, nan."""
        rate = self.problem.optimizer.learning_rate
        return math.nan if callable(rate) else rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self.problem.optimizer.learning_rate = rate

    @property
    def _matter(self) -> float:
        return what_matters(self.problem.structure, _mean(self.best))

    @property
    def _unit(self) -> str:
        return "nats per datum" if self.problem.structure.data_plate else "nats in total"

    # ------------------------------------------------------------------ checkpoints

    def flatten(self) -> dict[str, Tensor]:
        """All that it has seen as CPU tensors, for a checkpoint."""
        numbers = [self.stage, self.looks, self.due, self.iterates.averaged, self.first_rate, self.rate]
        arrays = {"numbers": numbers, "best": self.best, "stage_start": self.stage_start, "gains": self.gains}
        arrays |= {"record": self.record}
        found = {k: torch.as_tensor(np.asarray(v, np.float64)) for k, v in arrays.items()}
        if self.verdict is not None:
            found["verdict"] = torch.tensor(
                list(json.dumps(self.verdict.record()).encode()), dtype=torch.uint8
            )
        found["mean"] = self.iterates.mean.cpu().clone()
        if self.iterates.rows:
            found["iterates"] = torch.from_numpy(np.stack(self.iterates.rows))
        if self.iterates.pending:
            found["pending"] = torch.stack(self.iterates.pending).cpu()
        found |= {f"parameters/{k}": v.detach().cpu().clone() for k, v in self.best_parameters.items()}
        return {self.prefix + k: v for k, v in found.items()}

    def unflatten(self, saved: dict[str, Tensor], device: torch.device) -> None:
        """Restore what `flatten` gave; no change if the checkpoint has none."""
        found = {k.removeprefix(self.prefix): v for k, v in saved.items()}
        if "numbers" not in found:
            return
        *counts, self.first_rate, rate = found["numbers"].tolist()
        self.stage, self.looks, self.due, self.iterates.averaged = map(int, counts)
        if not self.fixed:
            self.rate = rate
        self.best, self.stage_start = found["best"].numpy(), found["stage_start"].numpy()
        self.gains = found["gains"].tolist()
        self.record = [(int(step), value) for step, value in found["record"].reshape(-1, 2).tolist()]
        if "verdict" in found:
            self.verdict = recorded(json.loads(bytes(found["verdict"].tolist())))
        self.iterates.rows = list(found["iterates"].numpy()) if "iterates" in found else []
        self.iterates.mean = found["mean"].to(device)
        self.iterates.pending = list(found["pending"].to(device)) if "pending" in found else []
        prefix = "parameters/"
        saved = {k: v.to(device) for k, v in found.items() if k.startswith(prefix)}
        self.best_parameters = {k.removeprefix(prefix): v for k, v in saved.items()}


def _gain(new: np.ndarray, old: np.ndarray) -> tuple[float, float]:
    """The mean of new - old and its standard error, 0 of a single value; -inf where the new is not finite."""
    apart = new - old
    if not np.isfinite(apart).all():
        return -math.inf, 0.0
    return float(apart.mean()), float(apart.std(ddof=1) / math.sqrt(len(apart))) if len(apart) > 1 else 0.0


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if np.isfinite(values).all() else -math.inf


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in tensors.items()}
