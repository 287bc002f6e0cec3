"""The problem that engines solve: one loss and its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyrolvm.controls import Schedule, controlled, value_of
from pyrolvm.data.batch import Batch
from pyrolvm.errors import ProgramError, SettingError
from pyrolvm.inference.engine.optimizers import OptimizerSpec
from pyrolvm.inference.objectives import Objective
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import Structure
from pyrolvm.plates import data_rows
from pyrolvm.processes import ALONE, Processes

if TYPE_CHECKING:
    from pyrolvm.inference.engine.division import Division

BOUND = "elbo"
LEARNING_RATE, KL_WEIGHT = "learning_rate", "kl_weight"


class Shared(Protocol):
    """Steps whose rows several processes share: see `engine.sharing`."""

    @property
    def processes(self) -> Processes:
        """Who shares."""

    @property
    def trained(self) -> tuple[bool, ...]:
        """The parameters that have a gradient in some process."""

    @property
    def moved(self) -> tuple[str, ...]:
        """The buffers that a step changes."""

    @property
    def local(self) -> Problem:
        """The problem of the own rows alone."""

    @property
    def places(self) -> Tensor:
        """The places of the own rows in a batch: [B_r], int64."""

    def gradients(self, rows: Tensor, values: Sequence[Any]) -> tuple[list[Tensor | None], Tensor]:
        """As `Problem.gradients`, of all rows."""

    def divided(
        self, rows: Tensor, values: Sequence[Any], division: Division | None
    ) -> tuple[dict[str, Tensor | None], Tensor, Tensor | None]:
        """The same by name, those that are divided left out, and of these the own share."""


@dataclass
class Problem:
    """The fixed part of a run, shared by all engines: a pure function of parameters, rows, controls and noise.

    Parameters
    ----------
    data : Batch
        The training data, on the program's device.
    minibatch : bool
        Whether each step takes some rows; otherwise it uses all data.
    num_rows : int
        N, the rows of the training data.
    schedules : dict
        Control -> number, or function of the share of the run done. Has the KL weight only if it is not constantly 1.
    num_steps : int
        The length of the run; of one without, the steps after which schedules stay at their ends.
    terms : tuple of str
        The columns that `loss` reports, the bound first; complete once `loss` has run.
    processes : Processes
        Those that run together, in step.
    sharing : Shared, optional
        How they share the rows of a step; each takes all rows if there is none.
    """

    program: Program
    structure: Structure
    objective: Objective
    optimizer: OptimizerSpec
    data: Batch
    minibatch: bool
    num_rows: int
    schedules: dict[str, Schedule] = field(default_factory=dict)
    num_steps: int = 1
    terms: tuple[str, ...] = (BOUND,)
    processes: Processes = ALONE
    sharing: Shared | None = None

    # ------------------------------------------------------------------ controls

    @property
    def scheduled(self) -> tuple[str, ...]:
        """The controls that may change between steps, the learning rate first."""
        return (LEARNING_RATE, *(name for name, value in self.schedules.items() if callable(value)))

    @property
    def constants(self) -> dict[str, float]:
        """The controls given as numbers."""
        return {name: float(v) for name, v in self.schedules.items() if not callable(v)}

    def controls(self, first_step: int, num_steps: int) -> Tensor:
        """The scheduled controls of each step: [num_steps, len(scheduled)], float64, on the host."""
        columns = [self.optimizer.learning_rates(first_step, num_steps, self.num_steps)]
        for name in self.scheduled[1:]:
            shares = (min(1.0, (first_step + k + 1) / self.num_steps) for k in range(num_steps))
            columns.append([value_of(name, self.schedules[name], share) for share in shares])
        return torch.tensor(columns, dtype=torch.float64).T.contiguous()

    def values_at(self, step: int) -> dict[str, float]:
        """Every control but the learning rate after `step` steps."""
        row = self.controls(max(0, step - 1), 1)[0].tolist()
        return dict(zip(self.scheduled[1:], row[1:], strict=True)) | self.constants

    # ------------------------------------------------------------------ loss and gradient

    def batch(self, rows: Tensor) -> Batch:
        """The data of `rows` [batch], with their row numbers and N."""
        taken = self.data.take(rows) if self.minibatch else self.data
        if taken.rows is rows and taken.total == self.num_rows:
            return taken
        return replace(taken, rows=rows, total=self.num_rows)

    @property
    def tables(self) -> tuple[str, ...]:
        """Parameters [N, ...] of which a step trains the entries of its rows alone."""
        return self.structure.row_tables if self.minibatch else ()

    def loss(
        self, rows: Tensor, values: Sequence[Any] = (), entries: Mapping[str, Tensor] | None = None
    ) -> Loss:
        """The loss to minimise and the terms to report, both in nats per datum.

        Call it inside `program.scope()`.

        Parameters
        ----------
        rows : tensor [batch], int64
            Row numbers of the batch.
        values : sequence of numbers or tensors []
            The scheduled controls except the learning rate, in the order of `scheduled`.
        entries : dict of tensor [batch, ...], optional
            Table -> the entries of `rows` to use in place of the table's own.
        """
        given = {id(self.program.parameters[name]): entry for name, entry in (entries or {}).items()}
        controls = {**self.constants, **dict(zip(self.scheduled[1:], values, strict=True))}
        batch, weight = self.batch(rows), controls.get(KL_WEIGHT)
        weighted = nullcontext() if weight is None else _KLWeight(weight)
        self.program.forget()
        with data_rows(self.num_rows, rows, given), controlled(controls), weighted:
            pair = Pair(self.program, self.structure, batch, "train")
            result = self.objective.estimate(pair, controls)
        bound, terms = result.bound, dict(result.terms)
        remainder = None
        if weight is not None:  # what is reported is the ELBO itself, not the weighted one
            if not {"log_likelihood", "kl"} <= terms.keys():
                raise SettingError(unweighable(type(self.objective).__name__))
            remainder = (bound - (terms["log_likelihood"] - terms["kl"])).detach() / self.structure.num_data
            terms |= {k: v / weight for k, v in terms.items() if k == "kl" or k.startswith("kl_")}
            bound = terms["log_likelihood"] - terms["kl"]
        n = self.structure.num_data
        if self.program.knows("columns"):
            terms |= {name: n * value for name, value in self.program.contract.columns().items()}
        self.terms = (BOUND, *terms)
        own = None if result.own_loss is None else result.own_loss / n
        reported = torch.stack([bound, *terms.values()]).detach() / n
        return Loss(result.surrogate / n, own, reported, remainder)

    def gradients(
        self, rows: Tensor, values: Sequence[Any] = (), grow: bool = False
    ) -> tuple[list[Tensor | None], Tensor]:
        """The gradient of each parameter (None where it has none), and the terms. Arguments as of `loss`.

        Parameters that this run makes, those of a branch not taken before, are trained from now on if `grow` (their
        gradients come last); else they are refused.

        Of `tables` it is that of their entries, [batch, ...]. Gradients are computed here only; where processes share
        the rows, each has the gradient of all of them.
        """
        if self.sharing is not None:
            return self.sharing.gradients(rows, values)
        parameters = self.program.parameters
        taken = {n: parameters[n].detach().index_select(0, rows).requires_grad_() for n in self.tables}
        loss = self.loss(rows, values, taken)
        if new := self.program.unmet():
            if not grow:
                raise ProgramError(
                    f"the parameter '{new[0]}' appears in some steps only: call pyro.param for it in every run"
                )
            self.program.gather()
        leaves = list((parameters | taken).values())
        found: list[Tensor | None] = list(
            torch.autograd.grad(loss.surrogate, leaves, allow_unused=True, retain_graph=loss.own is not None)
        )
        if loss.own is not None:
            owned = {id(p) for m in self.objective.modules().values() for p in m.parameters()}
            places = [i for i, leaf in enumerate(leaves) if id(leaf) in owned]
            own = torch.autograd.grad(loss.own, [leaves[i] for i in places], allow_unused=True)
            for i, gradient in zip(places, own, strict=True):
                found[i] = gradient
        self.program.forget()
        return found, loss.terms


@dataclass(frozen=True)
class Loss:
    """A loss per datum: `surrogate` for the pair, `own` for the objective's modules if they have one, [terms].

    `remainder` is what a weighted bound is beside its likelihood and KL: not 0 where the objective is no ELBO, None
    where nothing is weighted.
    """

    surrogate: Tensor
    own: Tensor | None
    terms: Tensor
    remainder: Tensor | None


def unweighable(what: str) -> str:
    """Why the KL of `what` has no weight, and what to do."""
    return (
        f"kl_warmup and the control 'kl_weight' weigh the KL of the ELBO apart from the likelihood, which {what} does "
        "not have: leave them out"
    )


def schedules_of(
    model: Mapping[str, Schedule],
    objective: Objective,
    given: Mapping[str, Schedule] | None,
    kl_warmup: float,
) -> dict[str, Schedule]:
    """The schedules of a run: the model's, the objective's and the user's; later ones override.

    A KL weight that is constantly 1 is left out.

    Raises
    ------
    SettingError
        `given` has a learning rate, or a KL weight besides `kl_warmup`.
    """
    given = dict(given or {})
    if LEARNING_RATE in given:
        raise SettingError("the learning rate is an argument of its own: learning_rate=0.01, or a function")
    if kl_warmup and KL_WEIGHT in given:
        raise SettingError("give kl_warmup or controls={'kl_weight': ...}, not both")
    if kl_warmup:
        # linear (Bowman et al. 2016; Sonderby et al. 2016)
        given[KL_WEIGHT] = lambda share: min(1.0, share / kl_warmup)
    found = {**model, **objective.controls(), **given}
    if not callable(found.get(KL_WEIGHT, 1.0)) and found.get(KL_WEIGHT, 1.0) == 1.0:
        found.pop(KL_WEIGHT, None)
    return found


class _KLWeight(Messenger):
    """Multiply log p(z) and log q(z) of every latent site by a weight."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not isinstance(msg["fn"], _Subsample):
            msg["scale"] = msg["scale"] * self.weight
