"""A training step as one graph: bound, gradients, clipping and the update of torch's own optimiser.

The step is run once while its tensor operations are recorded, without Pyro's handlers and the optimiser's
Python. Nothing of Pyro or torch.optim is implemented a second time.

The values that Pyro and the optimiser read on the host are replaced (`static`). A branch on values cannot be traced:
`UntraceableError` names the operation and its line (`untraceable`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from pyrolvm.inference.engine import graphs
from pyrolvm.inference.engine.draws import by_inversion
from pyrolvm.inference.engine.entries import collected, is_per_row, places_of
from pyrolvm.inference.engine.problem import Problem
from pyrolvm.inference.engine.reads import ROWS, Reads
from pyrolvm.inference.engine.static import TensorScalars, plain_lstms, static_pyro
from pyrolvm.inference.engine.untraceable import check_writes, explained, kept
from pyrolvm.inference.program.noise import kept_generators

Slots = dict[str, dict[str, Tensor]]

# their usual form branches on the count of steps or on gradients
BRANCHING = (torch.optim.RAdam, torch.optim.Rprop, torch.optim.ASGD)


@dataclass(frozen=True)
class TracedStep:
    """`graph(*state, *data, rows, *controls, *constants) -> (*new values, terms)`.

    Attributes
    ----------
    names : tuple of str
        The names of `state`, keys of `TrainingState.flatten`.
    state : tuple of tensor
        What a step may change: parameters, buffers and the optimiser's slots. The graph writes buffers in place.
    updated : tuple of int
        Positions in `state` of the new values.
    by_row : frozenset of int
        Those of them whose new value is that of the batch's rows alone.
    data : tuple of tensor [N, ...]
        The whole training data.
    rows : tensor [batch], int64
        An example of the rows of a step.
    constants : tuple of tensor
        The other tensors that the program reads.
    num_controls : int
        Controls of a step; the first is the learning rate.
    known : dict
        What has been found out about the step.
    """

    graph: fx.GraphModule
    names: tuple[str, ...]
    state: tuple[Tensor, ...]
    updated: tuple[int, ...]
    data: tuple[Tensor, ...]
    rows: Tensor
    constants: tuple[Tensor, ...]
    dtype: torch.dtype
    num_controls: int = 1
    num_terms: int = 1
    by_row: frozenset[int] = frozenset()
    known: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def in_place(self, capacity: int, minibatch: bool) -> tuple[Callable[..., tuple[()]], list[Tensor]]:
        """The step as a function that only writes to its inputs, and example inputs for it.

        `advance(index, terms, controls, rows, *state, *data, *constants)` takes step number `index` []
        of a chunk, with its row of `controls` [capacity, num_controls] and of `rows` [capacity, batch] (or all
        `rows` [N], if the data are taken whole). It writes to `terms` [capacity, num_terms] and to the state, and
        increments `index`.
        """
        split = len(self.state), len(self.state) + len(self.data)

        def advance(index: Tensor, terms: Tensor, controls: Tensor, rows: Tensor, *rest: Tensor) -> tuple[()]:
            state, data, constants = rest[: split[0]], rest[split[0] : split[1]], rest[split[1] :]
            rows, *scheduled = self._taken(minibatch, index, controls, rows)
            *values, row = self.graph(*state, *data, rows, *scheduled, *constants)
            return self._written(index, terms, rows, row, *state, *values)

        rows = self.rows.expand(capacity, -1).contiguous() if minibatch else self.rows
        device = self.rows.device
        chunk = [
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros(capacity, self.num_terms, dtype=self.dtype, device=device),
            torch.zeros(capacity, self.num_controls, dtype=torch.float64, device=device),
            rows,
        ]
        return advance, [*chunk, *self.state, *self.data, *self.constants]

    def _taken(self, minibatch: bool, index: Tensor, controls: Tensor, rows: Tensor) -> list[Tensor]:
        """The step's rows and controls."""
        at = index.reshape(1)
        if minibatch:
            rows = rows.index_select(0, at).reshape(-1)
        rate, *others = controls.index_select(0, at).reshape(-1).unbind()
        return [rows, rate, *(value.to(self.dtype) for value in others)]

    def _written(self, index: Tensor, terms: Tensor, rows: Tensor, row: Tensor, *rest: Tensor) -> tuple[()]:
        """Write the terms and the new values behind the state."""
        state, values = rest[: len(self.state)], rest[len(self.state) :]
        for position, value in zip(self.updated, values, strict=True):
            if position in self.by_row:
                state[position].index_copy_(0, rows, value)
            else:
                state[position].copy_(value)
        terms.index_copy_(0, index.reshape(1), row.reshape(1, -1).to(self.dtype))
        index.add_(1)
        return ()

    def operations(self, inputs: Sequence[Tensor], minibatch: bool) -> tuple[fx.Graph, set[fx.Node]]:
        """What `in_place` does to its `inputs` as one flat graph, and those operations that write.

        Nothing is computed.
        """
        index, terms, controls, rows = inputs[:4]
        last = 4 + len(self.state)
        whole, layout = fx.Graph(), graphs.Layout.of
        given = [whole.placeholder(f"input_{i}") for i in range(len(inputs))]
        for node, tensor in zip(given, inputs, strict=True):
            node.meta[graphs.LAYOUT] = layout(tensor)
        take = partial(self._taken, minibatch)
        before, _ = graphs.record(take, [index, controls, rows], mode="fake")
        taken = graphs.inlined(whole, before, [given[0], given[2], given[3]])
        data = last + len(self.data)
        *values, row = graphs.inlined(whole, self.graph, [*given[4:data], *taken, *given[data:]])
        computed = set(whole.nodes)
        examples = [node.meta[graphs.LAYOUT].example() for node in (row, *values)]
        written = [index, terms, self.rows, examples[0], *self.state, *examples[1:]]
        after, _ = graphs.record(self._written, written, mode="fake")
        graphs.inlined(whole, after, [*given[:2], taken[0], row, *given[4:last], *values])
        whole.output(())
        whole.eliminate_dead_code()
        return whole, set(whole.nodes) - computed

    def text(self) -> str:
        """The graph and its inputs' shapes: equal texts compute the same."""
        inputs = [*self.state, *self.data, self.rows, *self.constants]
        shapes = [f"{t.dtype} {tuple(t.shape)} {t.stride()} {t.device}" for t in inputs]
        return "\n".join(
            [self.graph.code, str(self.updated), str(sorted(self.by_row)), str(len(self.state)), *shapes]
        )


def trace_step(problem: Problem, slots: Slots, rows: Tensor) -> TracedStep:
    """Trace one step; the program, its parameters and the generators are unchanged.

    Parameters
    ----------
    slots : dict
        The optimiser's state after a step.
    rows : tensor [batch], int64
        Any valid rows.

    Raises
    ------
    UntraceableError
        The program cannot be traced as one graph.
    """
    program, device = problem.program, problem.program.device
    state = {f"parameters/{k}": v for k, v in program.tensors().items()}
    for name, own in slots.items():
        state |= {f"optimizer/{k}/{name}": v.to(device, copy=True) for k, v in own.items()}
    data = [t for _, t in problem.data.tensors()]
    rate, *others = problem.controls(0, 1)[0].to(device)
    controls = [rate.clone(), *(value.to(program.dtype, copy=True) for value in others)]
    inputs = [*state.values(), *data, rows.to(device, copy=True), *controls]
    written: list[str] = []

    def run(*flat: Tensor) -> tuple[Tensor, ...]:
        with Reads(_changing(problem, state, flat, len(controls)), lambda: site.name):
            return step(*flat)

    def step(*flat: Tensor) -> tuple[Tensor, ...]:
        at = dict(zip(state, flat, strict=False))
        rows, rate, *others = flat[len(flat) - len(controls) - 1 :]
        gradients, terms = problem.gradients(rows, others)
        new = _update(problem, at, gradients, rate, rows)
        written[:] = new
        return (*new.values(), terms)

    with (
        program.scope(),
        kept_generators(device),
        kept(program),
        explained() as site,
        static_pyro(),
        plain_lstms(),
        by_inversion(),
    ):
        graph, constants = graphs.record(run, inputs)
    check_writes(graph, list(state), len(inputs))
    names = tuple(state)
    return TracedStep(
        graph,
        names,
        tuple(t.detach() for t in state.values()),
        tuple(names.index(name) for name in written),
        tuple(data),
        inputs[-1 - len(controls)],
        tuple(t.detach() for t in constants),
        program.dtype,
        len(controls),
        len(problem.terms),
        frozenset(i for i, key in enumerate(names) if _is_by_row(problem, key, state)),
    )


def _changing(
    problem: Problem, state: dict[str, Tensor], flat: Sequence[Tensor], num_controls: int
) -> dict[str, list[Tensor]]:
    """What is another value in the next step, in words."""
    found = {f"'{key.partition('/')[2]}'": [value] for key, value in zip(state, flat, strict=False)}
    found["a control"] = list(flat[len(flat) - num_controls :])
    if problem.minibatch:
        found[ROWS] = [flat[len(flat) - num_controls - 1]]
    return found


def _is_by_row(problem: Problem, key: str, state: dict[str, Tensor]) -> bool:
    """Whether a step updates the rows of its batch alone in the tensor of this name."""
    kind, _, owner = key.partition("/")
    owner = owner if kind == "parameters" else owner.partition("/")[2]
    return owner in problem.tables and is_per_row(state[key], state[f"parameters/{owner}"])


def _update(
    problem: Problem,
    state: dict[str, Tensor],
    gradients: Sequence[Tensor | None],
    learning_rate: Tensor,
    rows: Tensor,
) -> dict[str, Tensor]:
    """New values of the parameters that have a gradient and of their slots, by torch's own optimiser.

    Of tables they are those of the batch's entries.
    """
    names = list(problem.program.parameters)
    by_row = {key for key in state if _is_by_row(problem, key, state)}
    state = {key: value.index_select(0, rows) if key in by_row else value for key, value in state.items()}
    places = places_of(rows) if by_row else rows
    gradients = [
        collected(g, places) if g is not None and name in problem.tables else g
        for name, g in zip(names, gradients, strict=True)
    ]
    parameters = [state[f"parameters/{name}"].detach().clone() for name in names]
    optimizer = problem.optimizer.build(parameters)
    # the single-tensor form is the one without host-side grouping; all forms compute the same
    for group in optimizer.param_groups:
        group.update(lr=learning_rate, foreach=False, fused=False)
    # all have taken as many steps (see `CompiledEngine.run`): what follows from the count is computed once for all
    steps = [value for key, value in state.items() if key.startswith("optimizer/step/")]
    old: dict[str, Tensor] = {}
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        parameter.grad = gradient
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
            torch.nn.utils.clip_grad_norm_(parameters, problem.optimizer.clip_norm, foreach=False)
        for name, parameter in zip(names, parameters, strict=True):
            if name in problem.tables and parameter.grad is not None:
                parameter.grad = parameter.grad.index_select(0, places)
        optimizer.step()
    new = {}
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        if gradient is None:
            continue
        new[f"parameters/{name}"] = parameter
        for slot, value in optimizer.state[parameter].items():
            key = f"optimizer/{slot}/{name}"
            if isinstance(value, Tensor):
                new[key] = value.to(old[key].dtype)
    return new
