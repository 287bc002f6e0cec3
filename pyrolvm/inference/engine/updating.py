"""The update of a traced step, by torch's own optimiser, and whether its work is divided among processes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor

from pyrolvm.inference.engine.division import SHARE, Division
from pyrolvm.inference.engine.entries import collected, is_elementwise, is_per_row, places_of
from pyrolvm.inference.engine.problem import Problem
from pyrolvm.inference.engine.static import TensorScalars

# their usual form branches on the count of steps or on gradients
BRANCHING = (torch.optim.RAdam, torch.optim.Rprop, torch.optim.ASGD)
LEAST = 2**15
"""Entries from which on dividing gains more than it costs: two meetings of the processes in place of one."""


def is_by_row(problem: Problem, key: str, state: dict[str, Tensor]) -> bool:
    """Whether a step updates the rows of its batch alone in the tensor of this name."""
    kind, _, owner = key.partition("/")
    owner = owner if kind == "parameters" else owner.partition("/")[2]
    return owner in problem.tables and is_per_row(state[key], state[f"parameters/{owner}"])


def updated(
    problem: Problem,
    state: dict[str, Tensor],
    gradients: dict[str, Tensor | None],
    learning_rate: Tensor,
    rows: Tensor,
    parted: Division | None,
) -> dict[str, Tensor]:
    """New values of the parameters that have a gradient and of their slots, by torch's own optimiser.

    Of tables they are those of the batch's entries.
    """
    by_row = {key for key in state if is_by_row(problem, key, state)}
    state = {key: value.index_select(0, rows) if key in by_row else value for key, value in state.items()}
    places = places_of(rows) if by_row else rows
    parameters = {name: state[f"parameters/{name}"].detach().clone() for name in gradients}
    optimizer = problem.optimizer.build(list(parameters.values()))
    # the single-tensor form is the one without host-side grouping; all forms compute the same
    for group in optimizer.param_groups:
        group.update(lr=learning_rate, foreach=False, fused=False)
    # all have taken as many steps (see `CompiledEngine.run`): what follows from the count is computed once for all
    steps = [value for key, value in state.items() if key.startswith("optimizer/step/")]
    old: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        gradient = gradients[name]
        per_row = gradient is not None and name in problem.tables
        parameter.grad = collected(gradient, places) if per_row else gradient  # type: ignore[arg-type]
        for key, value in state.items():
            kind, _, slot = key.partition("/")
            slot, _, owner = slot.partition("/")
            if kind == "optimizer" and owner == name:
                # the host computes with the step count in double precision
                own = steps[0].to(torch.float64, copy=True) if slot == "step" else value.clone()
                optimizer.state[parameter][slot] = own
                old[key] = value
    with ExitStack() as stack:
        stack.enter_context(TensorScalars())
        stack.enter_context(torch.no_grad())
        if isinstance(optimizer, BRANCHING):
            # their form for graphs, which refuses the CPU unless something is being compiled
            optimizer.param_groups[0]["capturable"] = True
            stack.enter_context(mock.patch.object(torch.compiler, "is_compiling", return_value=True))
        if problem.optimizer.clip_norm is not None:
            _clip(parameters, problem.optimizer.clip_norm, parted)
        for name, parameter in parameters.items():
            if name in problem.tables and parameter.grad is not None:
                parameter.grad = parameter.grad.index_select(0, places)
        optimizer.step()
    new = {}
    for name, parameter in parameters.items():
        if gradients[name] is None:
            continue
        new[f"parameters/{name}"] = parameter
        for slot, value in optimizer.state[parameter].items():
            key = f"optimizer/{slot}/{name}"
            if isinstance(value, Tensor):
                new[key] = value.to(old[key].dtype)
    return new


def _clip(parameters: dict[str, Tensor], most: float, parted: Division | None) -> None:
    """Clip the gradients by their global norm, to which every process's share belongs."""
    if parted is None:
        torch.nn.utils.clip_grad_norm_(parameters.values(), most, foreach=False)
        return
    own = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    share = torch.nn.utils.get_total_norm([own.pop(SHARE)], foreach=False)
    others = torch.nn.utils.get_total_norm(list(own.values()), foreach=False)
    norm = (parted.memory.sum(share.square()) + others.square()).sqrt()
    torch.nn.utils.clip_grads_with_norm_(list(parameters.values()), most, norm, foreach=False)


def division(problem: Problem, slots: Mapping[str, Mapping[str, Tensor]]) -> Division | None:
    """How the optimiser's work on the problem is divided; None where it is not.

    Parameters
    ----------
    slots : dict
        The optimiser's state after a step.
    """
    sharing, program = problem.sharing, problem.program
    if sharing is None or sharing.processes.memory is None or not is_elementwise(problem.optimizer):
        return None
    trained = zip(program.parameters.items(), sharing.trained, strict=True)
    found = {name: p for (name, p), own in trained if own and name not in problem.tables}
    kinds = {t.dtype for t in found.values()} | {program.buffers[name].dtype for name in sharing.moved}
    if sum(t.numel() for t in found.values()) < LEAST or kinds != {program.dtype}:
        return None
    of_entries = {
        slot
        for slot in slots.get(next(iter(found)), {})
        if all(slots[name][slot].shape == p.shape for name, p in found.items())
    }
    return Division(
        sharing.processes, {name: p.shape for name, p in found.items()}, tuple(sorted(of_entries))
    )
