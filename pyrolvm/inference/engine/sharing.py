"""One step over many processes: whose rows are whose, and the one reduction that makes the batch's gradient of theirs.

A batch has B rows, and process r takes B_r of them. Its program runs on these as on a batch of its own, the data plate
scaling them by N / B_r, so that its bound and gradient are estimates of the whole; their mean by rows,

    g = sum_r (B_r / B) g_r,

is the gradient of all B rows: (B_r / B) (N / B_r) = N / B for what belongs to a row, and sum_r B_r / B = 1 for what all
rows share, the KL of global latents above all, which thus counts once. Gradients, the reported terms and the changes of
buffers (running statistics, decaying averages) travel as one flat tensor, once in a step.

What is drawn outside the data plate is the same in all processes: the first one's noise, in a message of its own. Noise
within the plate is of each process's own stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import default_process_message
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pyrolvm.errors import ProgramError, SettingError
from pyrolvm.inference.engine.division import Division
from pyrolvm.inference.engine.problem import Problem
from pyrolvm.inference.program.noise import seeded
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.structure import Plate, sample_sites
from pyrolvm.plates import data_rows
from pyrolvm.processes import Processes, shared_step


@dataclass(frozen=True)
class Sharing:
    """The part of every step that is this process's.

    Attributes
    ----------
    processes : Processes
        Who shares.
    local : Problem
        The problem of the own rows, which is nobody's to share.
    batch : int
        B, the rows of a step.
    places : tensor [B_r], int64
        The places of the own rows in a batch. A tensor, so that all processes compile one program.
    plate : Plate
        The data plate.
    weight : float
        Of each own row, beside the scale that the plate brings: not 1 where the plate only knows its own length.
    trained : tuple of bool
        The parameters that have a gradient in some process.
    moved : tuple of str
        The buffers that a step changes.
    """

    processes: Processes
    local: Problem
    batch: int
    places: Tensor
    plate: Plate
    weight: float
    trained: tuple[bool, ...] = ()
    moved: tuple[str, ...] = ()

    @property
    def part(self) -> float:
        """B_r / B."""
        return len(self.places) / self.batch

    @property
    def num_bytes(self) -> int:
        """What the reduction of one step carries."""
        program = self.local.program
        tables = set(self.local.tables)
        sizes = [
            self.batch * p[:1].numel() if name in tables else p.numel()
            for (name, p), own in zip(program.parameters.items(), self.trained, strict=True)
            if own
        ]
        sizes += [program.buffers[name].numel() for name in self.moved]
        return (sum(sizes) + len(self.local.terms)) * torch.finfo(program.dtype).bits // 8

    def gradients(self, rows: Tensor, values: Sequence[Any] = ()) -> tuple[list[Tensor | None], Tensor]:
        """The gradients and terms of the whole batch: as `Problem.gradients`, for all `rows` [B]."""
        found, terms, _ = self.divided(rows, values, None)
        return list(found.values()), terms

    def divided(
        self, rows: Tensor, values: Sequence[Any], division: Division | None
    ) -> tuple[dict[str, Tensor | None], Tensor, Tensor | None]:
        """The same by name, those that are divided left out, and of these the own share [S]."""
        program = self.local.program
        before = [program.buffers[name].detach().clone() for name in self.moved]
        gradients, terms = self.own(rows, values)
        for name, gradient, trained in zip(program.parameters, gradients, self.trained, strict=True):
            if gradient is not None and not trained:
                raise ProgramError(
                    f"the parameter '{name}' has a gradient in some steps only, which several processes cannot train: "
                    "pass parallel=False"
                )
        found = dict(zip(program.parameters, self._placed(gradients), strict=True))
        moved = [program.buffers[name] for name in self.moved]
        changes = [new.detach() - old for new, old in zip(moved, before, strict=True)]
        divided = {name: found.pop(name) for name in (division.shapes if division is not None else ())}
        apart = [g for g in divided.values() if g is not None]
        given = [g for g in found.values() if g is not None]
        share, reduced = self._reduced([*given, terms, *changes], apart, division)
        totals = iter(reduced)
        found = {name: None if g is None else next(totals) for name, g in found.items()}
        terms = next(totals)
        with torch.no_grad():
            for buffer, old, change in zip(moved, before, totals, strict=True):
                buffer.copy_(old + change)
        return found, terms, share

    def own(self, rows: Tensor, values: Sequence[Any]) -> tuple[list[Tensor | None], Tensor]:
        """The gradients and terms of the own rows of a batch."""
        with ExitStack() as stack:
            stack.enter_context(shared_step(replace(self.processes, part=self.part)))
            stack.enter_context(AlikeDraws(self.plate.name, self.processes))
            if self.weight != 1.0:
                stack.enter_context(Weighed(self.plate.name, self.weight))
            return self.local.gradients(rows.index_select(0, self.places), values)

    def _placed(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Gradients of entries per row [B_r, ...] at their places of the batch, [B, ...]; zeros for what is missing."""
        found: list[Tensor | None] = []
        for (name, parameter), gradient, trained in zip(
            self.local.program.parameters.items(), gradients, self.trained, strict=True
        ):
            per_row = name in self.local.tables
            blank = parameter.new_zeros(self.batch, *parameter.shape[1:]) if per_row else None
            if not trained:
                found.append(None)
            elif gradient is None:
                found.append(torch.zeros_like(parameter) if blank is None else blank)
            else:
                found.append(gradient if blank is None else blank.index_copy(0, self.places, gradient))
        return found

    def _reduced(
        self, parts: Sequence[Tensor], apart: Sequence[Tensor], division: Division | None
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The mean of each part by the rows of the processes, all in one message; of those `apart` the own share."""
        share, own = None, self.part * torch.cat([part.reshape(-1) for part in parts])
        if division is None:
            total = self.processes.sum(own)
        else:
            share, total = division.summed(apart, self.part, own)
        sizes = [part.numel() for part in parts]
        return share, [t.reshape(p.shape).to(p.dtype) for t, p in zip(total.split(sizes), parts, strict=True)]


def shared(problem: Problem, processes: Processes, rows: Tensor, seed: int) -> tuple[Problem, str]:
    """The problem with its steps shared over `processes`, and a sentence on how.

    The program runs once on the own part of `rows`, which leaves it as it was.

    Parameters
    ----------
    rows : tensor [B], int64
        The rows of the first step.
    seed : int
        Of that run.

    Returns
    -------
    problem : Problem
        The same one, each process then taking all rows, where a program does not run on some of its rows alone.

    Raises
    ------
    SettingError
        There are more processes than rows in a step.
    """
    if (obstacle := _obstacle(problem)) is not None:
        return problem, f"each of {processes.count} processes takes all rows: {obstacle}"
    if len(rows) < processes.count:
        raise SettingError(
            f"a step has {len(rows)} rows for {processes.count} processes: give a batch_size of at least "
            f"{processes.count}, or start fewer processes"
        )
    structure, plate = problem.structure, problem.structure.data_plate
    assert plate is not None
    places = torch.arange(len(rows), device=rows.device)[processes.share(len(rows))]
    own = rows.index_select(0, places)
    data = problem.data if problem.minibatch else replace(problem.data.take(own), rows=None, total=None)
    narrow = replace(structure, data_plate=replace(plate, size=len(own)))
    local = replace(problem, data=data, structure=narrow)
    sharing = Sharing(processes, local, len(rows), places, plate, _weight(local, own, plate, seed))
    sharing = replace(sharing, **_seen(sharing, rows, seed))
    return replace(problem, data=data, terms=local.terms, sharing=sharing), (
        f"{processes.count} processes share the {len(rows):,} rows of a step"
    )


def _obstacle(problem: Problem) -> str | None:
    structure = problem.structure
    if structure.data_plate is None:
        return "the program has no data plate"
    if not structure.takes_any_rows:
        return "the program runs on all of its rows only"
    if structure.whole:
        return "the program draws its rows by itself"
    return None


def _weight(local: Problem, rows: Tensor, plate: Plate, seed: int) -> float:
    """What a row counts beside the plate's own scale: the plate carries the rows of all, or knows only these."""
    program = local.program
    with ExitStack() as stack:
        stack.enter_context(seeded(seed, program.device))
        stack.enter_context(program.untouched())
        stack.enter_context(program.scope())
        stack.enter_context(data_rows(local.num_rows, rows))
        stack.enter_context(torch.no_grad())
        trace = Pair(program, local.structure, local.batch(rows), "train").model()
    frames = [f for s in sample_sites(trace) for f in s["cond_indep_stack"] if f.name == plate.name]
    return plate.full_size / frames[0].full_size if frames else 1.0


def _seen(sharing: Sharing, rows: Tensor, seed: int) -> dict[str, Any]:
    """What a step trains and moves, by a step of this process's own rows."""
    program, problem = sharing.local.program, sharing.local
    values = problem.controls(0, 1)[0].tolist()[1:]
    with program.untouched(), seeded(seed, program.device), program.scope():
        floating = {name: b for name, b in program.buffers.items() if b.is_floating_point()}
        before = {name: (b._version, b.clone()) for name, b in floating.items()}
        found, _ = sharing.own(rows, values)
        # batch norm moves its averages without counting it as a write
        moved = [n for n, b in floating.items() if b._version != before[n][0] or not b.equal(before[n][1])]
    told = sharing.processes.gather(([g is not None for g in found], moved))
    return {
        "trained": tuple(any(own) for own in zip(*(t for t, _ in told), strict=True)),
        "moved": tuple(name for name in floating if any(name in m for _, m in told)),
    }


class AlikeDraws(Messenger):
    """Draw what stands outside the data plate from the first process's noise, in all of them."""

    def __init__(self, plate: str, processes: Processes) -> None:
        super().__init__()
        self.plate, self.processes = plate, processes

    def _pyro_sample(self, msg: Any) -> None:
        drawn = msg["done"] or msg["is_observed"] or msg["value"] is not None
        if drawn or any(frame.name == self.plate for frame in msg["cond_indep_stack"]):
            return
        with _FirstNoise(self.processes):
            default_process_message(msg)


class _FirstNoise(TorchDispatchMode):
    """Gives the first process's noise wherever noise is drawn."""

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return result
        if func._schema.is_mutable:
            return result.copy_(self.processes.of_first(result))
        return tree_map_only(Tensor, self.processes.of_first, result)


class Weighed(Messenger):
    """Let the rows of a plate that knows only its own length stand for more, as `data_plate` would."""

    def __init__(self, plate: str, weight: float) -> None:
        super().__init__()
        self.plate, self.weight = plate, weight

    def _pyro_sample(self, msg: Any) -> None:
        if any(frame.name == self.plate for frame in msg["cond_indep_stack"]):
            msg["scale"] = msg["scale"] * self.weight
