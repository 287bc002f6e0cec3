"""A training step as one graph: bound, gradients, clipping and the update of torch's own optimiser.

The step is run once while its tensor operations are recorded, without Pyro's handlers and the optimiser's
Python. Nothing of Pyro or torch.optim is implemented a second time.

The values that Pyro and the optimiser read on the host are replaced (`static`). A branch on values cannot be traced:
`UntraceableError` names the operation and its line (`untraceable`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from pyrolvm.inference.engine import graphs
from pyrolvm.inference.engine.division import SHARE, Division
from pyrolvm.inference.engine.draws import by_inversion
from pyrolvm.inference.engine.problem import Problem
from pyrolvm.inference.engine.reads import ROWS, Buffer, Reads
from pyrolvm.inference.engine.static import plain_lstms, static_pyro
from pyrolvm.inference.engine.untraceable import check_writes, explained, kept
from pyrolvm.inference.engine.updating import division, is_by_row, updated
from pyrolvm.inference.program.noise import kept_generators

Slots = dict[str, dict[str, Tensor]]


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
    division : Division, optional
        How the optimiser's work is divided among processes. `state` then has a share in place of the slots of the
        parameters that are divided.
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
    division: Division | None = None
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
    parted = division(problem, slots)
    state = {f"parameters/{k}": v for k, v in program.tensors().items()}
    for name, own in slots.items():
        if parted is None or name not in parted.shapes:
            state |= {f"optimizer/{k}/{name}": v.to(device, copy=True) for k, v in own.items()}
    if parted is not None:
        state |= parted.take(program.parameters, slots)
    data = [t for _, t in problem.data.tensors()]
    rate, *others = problem.controls(0, 1)[0].to(device)
    controls = [rate.clone(), *(value.to(program.dtype, copy=True) for value in others)]
    inputs = [*state.values(), *data, rows.to(device, copy=True), *controls]
    written: list[str] = []
    read: set[str] = set()

    def run(*flat: Tensor) -> tuple[Tensor, ...]:
        with Reads(_changing(problem, state, flat, len(controls)), lambda: site.name) as reads:
            found = step(*flat)
        read.update(reads.buffers)
        return found

    def step(*flat: Tensor) -> tuple[Tensor, ...]:
        at = dict(zip(state, flat, strict=False))
        rows, rate, *others = flat[len(flat) - len(controls) - 1 :]
        gradients, terms = _gradients(problem, parted, rows, others)
        new = updated(problem, at, gradients, rate, rows, parted)
        if parted is not None:
            divided = [f"parameters/{name}" for name in parted.shapes]
            whole = parted.memory.gather(new[f"parameters/{SHARE}"], [at[key] for key in divided])
            new |= dict(zip(divided, whole, strict=True))
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
    check_writes(graph, list(state), len(inputs), read)
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
        frozenset(i for i, key in enumerate(names) if is_by_row(problem, key, state)),
        parted,
    )


def _gradients(
    problem: Problem, parted: Division | None, rows: Tensor, values: Sequence[Any]
) -> tuple[dict[str, Tensor | None], Tensor]:
    """The gradient of each parameter that the optimiser trains, and the terms."""
    if parted is None or problem.sharing is None:
        gradients, terms = problem.gradients(rows, values)
        return dict(zip(problem.program.parameters, gradients, strict=True)), terms
    found, terms, share = problem.sharing.divided(rows, values, parted)
    return found | {SHARE: share}, terms


def _changing(
    problem: Problem, state: dict[str, Tensor], flat: Sequence[Tensor], num_controls: int
) -> dict[str, list[Tensor]]:
    """What is another value in the next step, in words."""
    buffers = {f"parameters/{name}" for name in problem.program.buffers}
    found = {
        (Buffer if key in buffers else str)(f"'{key.partition('/')[2]}'"): [value]
        for key, value in zip(state, flat, strict=False)
    }
    found["a control"] = list(flat[len(flat) - num_controls :])
    if problem.minibatch:
        found[ROWS] = [flat[len(flat) - num_controls - 1]]
    return found
