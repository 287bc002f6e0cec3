"""A step in parts: each compiled, and between them what the processes tell each other, called from Python.

For sums that no loop without Python can hold: a group whose operation cannot be captured with the step, or that the
code which inductor writes does not know. Such a step is

    a compiled gradient, a sum over the processes, a compiled update,

with a further part for each draw that all processes have alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pyrolvm.inference.engine import inductor
from pyrolvm.inference.engine.loops import StaticLoop
from pyrolvm.inference.engine.tracing import TracedStep

TELLING = ("_c10d_functional.", "pyrolvm.shared_")
"""Operators through which processes tell each other something, by how their names begin."""


@dataclass(frozen=True)
class Part:
    """Operations that are compiled as one.

    Attributes
    ----------
    given, made : tuple of node
        Of the whole graph: what the part reads that others made, and what others read that it makes.
    run : callable
        Values of `given` -> values of `made`.
    """

    given: tuple[fx.Node, ...]
    made: tuple[fx.Node, ...]
    run: Callable[[Sequence[Tensor]], Sequence[Tensor]]


def tells(graph: fx.GraphModule) -> bool:
    """Whether processes tell each other something within the step."""
    return any(_is_telling(node) for node in graph.graph.nodes)


class SplitLoop(StaticLoop):
    """Runs the parts of the step from Python, and what stands between them."""

    def __init__(self, traced: TracedStep, minibatch: bool) -> None:
        """Compile the parts."""
        super().__init__(traced, minibatch)
        whole = inductor.functional(self._advance, self._inputs)
        self._given = [node for node in whole.graph.nodes if node.op == "placeholder"]
        self._constants = {
            node: getattr(whole, str(node.target)) for node in whole.graph.nodes if node.op == "get_attr"
        }
        self._parts = [_compiled(own) if isinstance(own, list) else own for own in _sequence(whole.graph)]
        self._kept = [_read_later(self._parts[i + 1 :]) for i in range(len(self._parts))]
        self._advance = self._step

    def _step(self, *given: Tensor) -> tuple[()]:
        inputs = self._constants | dict(zip(self._given, given, strict=True))
        values: dict[fx.Node, Any] = dict(inputs)
        for part, kept in zip(self._parts, self._kept, strict=True):
            if isinstance(part, Part):
                values |= zip(part.made, part.run([values[node] for node in part.given]), strict=True)
            else:
                args, kwargs = fx.map_arg((part.args, part.kwargs), values.__getitem__)
                values[part] = part.target(*args, **kwargs)  # type: ignore[operator]
            values = {node: value for node, value in values.items() if node in inputs or node in kept}
        return ()


def _is_telling(node: fx.Node) -> bool:
    """Whether the operation is of several processes, or takes one of its results."""
    while "getitem" in str(node.target):
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "call_function" and str(node.target).startswith(TELLING)


def _sequence(graph: fx.Graph) -> list[fx.Node | list[fx.Node]]:
    """The operations between those of several processes together, and these one by one."""
    found: list[Any] = [[]]
    for node in graph.nodes:
        if node.op == "call_function":
            if _is_telling(node):
                found += [node, []]
            else:
                found[-1].append(node)
    return [own for own in found if own != []]


def _compiled(nodes: Sequence[fx.Node]) -> Part:
    """The operations as one part."""
    own = set(nodes)
    given = tuple(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in own))
    made = tuple(
        node for node in nodes if any(user not in own and user.op != "output" for user in node.users)
    )
    graph, copies = fx.Graph(), {}
    for i, node in enumerate(given):
        copies[node] = graph.placeholder(f"given_{i}")
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in made))
    return Part(given, made, inductor.fused(fx.GraphModule(torch.nn.Module(), graph)))


def _read_later(parts: Iterable[Part | fx.Node]) -> set[fx.Node]:
    return {
        node for part in parts for node in (part.given if isinstance(part, Part) else part.all_input_nodes)
    }
