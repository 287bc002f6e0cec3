"""A long step as calls of few pieces: the steps of a loop that a program unrolled are compiled once.

The operations of a step, in the order in which they ran, are cut into segments where they repeat (`repeats`). Segments
that do the same to tensors of the same layouts are one piece, compiled once and called with different tensors.

    operations    n_1 n_2 n_3 | a b c | a b c | a b c | m_1 m_2 | d e | d e | ...
    pieces        first         loop    loop    loop    middle    back  back

Three things make the segments of a loop equal that are not so in the graph.

    Views belong to no segment: each segment makes those that it reads from the tensors behind them.
    Slices of a sequence, x[:, t], are made by the driver.
    Numbers that count the steps, as in t < lengths, become arguments.

What an operation writes in place, pieces share as memory (`in_place`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from pyrolvm.inference.engine import in_place
from pyrolvm.inference.engine.loops import chunk_capacity
from pyrolvm.inference.engine.operations import (
    COUNTED,
    PARTS,
    arguments,
    form,
    is_counted,
    is_part_of_view,
    is_view,
    part_of,
    pattern,
    slices,
)
from pyrolvm.inference.engine.pieces import Folded, Segment, written
from pyrolvm.inference.engine.repeats import repeats
from pyrolvm.inference.engine.tracing import TracedStep

WORTHWHILE = 2000
"""Operations that a step must have; others are compiled whole, in about ten seconds at most, which fuses more."""
LARGEST_SHARE = 0.5
"""Of its operations, what the pieces may have: calls of pieces take longer than one fused step, ten times as long where
the tensors are small, so that only a long compilation is worth them."""


def fold(traced: TracedStep, inputs: Sequence[Tensor], minibatch: bool) -> Folded | None:
    """The step that `traced.in_place` makes of `inputs` as calls of pieces; None if that is not worthwhile."""
    if len(traced.graph.graph.nodes) < WORTHWHILE:
        return None
    if "folded" not in traced.known:
        graph, writes = traced.operations(inputs, minibatch)
        known = in_place.share_memory(graph)
        traced.known["folded"] = _Folding(graph, writes).folded() if known else None
    folded: Folded | None = traced.known["folded"]
    if folded is not None and folded.size > LARGEST_SHARE * len(traced.graph.graph.nodes):
        return None
    return folded


def operations_to_compile(traced: TracedStep, minibatch: bool) -> int:
    """How many operations a compilation has to do with."""
    folded = fold(traced, traced.in_place(chunk_capacity(traced, minibatch), minibatch)[1], minibatch)
    return folded.size if folded is not None else len(traced.graph.graph.nodes)


class _Folding:
    def __init__(self, graph: fx.Graph, writes: set[fx.Node]) -> None:
        self.inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self.calls = [n for n in graph.nodes if n.op == "call_function"]
        self.slices = set(slices(self.calls))
        self.labels: dict[Any, int] = {}
        self.label_of = {n: self._label(n) for n in self.calls}
        self.before = list(self._groups([n for n in self.calls if n not in writes]))
        self.after = list(self._groups([n for n in self.calls if n in writes]))

    # ------------------------------------------------------------------ labels

    def _label(self, node: fx.Node) -> int:
        """A number for what the operation does, whatever values it gets."""
        key = (
            node.target,
            pattern(node.args, node.target in COUNTED and is_counted(node)),
            pattern(tuple(node.kwargs.items())),
            form(node),
            *(form(argument) for argument in node.all_input_nodes),
        )
        return self.labels.setdefault(key, len(self.labels))

    def _groups(self, nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
        """Operations with the parts of their results, without views."""
        for node in nodes:
            if node in self.slices or is_view(node) or part_of(node) is not None or node.target in PARTS:
                continue
            yield [node, *(user for user in node.users if part_of(user) is node)]

    def _is_free(self, node: fx.Node) -> bool:
        """Whether the value is a view of another."""
        return node in self.slices or is_view(node) or node.target in PARTS or is_part_of_view(node)

    # ------------------------------------------------------------------ segments

    def folded(self) -> Folded | None:
        sequence = [hash(tuple(self.label_of[n] for n in group)) for group in self.before]
        bounds = [self.before[start:end] for start, end in repeats(sequence)]
        segments = [self._segment(groups) for groups in (*bounds, self.after)]
        if any(self._root(n) in self.inputs for segment in segments[:-1] for n in segment.written):
            return None
        folded = written(self.inputs, segments, self._root)
        return folded if folded.is_dense else None

    def _root(self, node: fx.Node) -> fx.Node:
        """The value that a view is of."""
        while self._is_free(node):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _segment(self, groups: Sequence[Sequence[fx.Node]]) -> Segment:
        """The operations, with views of what they write to made within where these meet."""
        nodes = [n for group in groups for n in group]
        segment = self._filled(nodes, set())
        meeting = {root for root in map(self._root, segment.written) if self._meet(segment, root)}
        return self._filled(nodes, meeting) if meeting else segment

    def _filled(self, nodes: Sequence[fx.Node], whole: set[fx.Node]) -> Segment:
        segment = Segment(own=set(nodes), whole=whole)
        for node in nodes:
            self._add(segment, node)
        return segment

    def _meet(self, segment: Segment, root: fx.Node) -> bool:
        """Whether the segment is given memory of `root` under two names."""
        return in_place.any_meet([n for n in segment.given if self._root(n) is root])

    def _add(self, segment: Segment, node: fx.Node) -> tuple[str, int]:
        wiring = tuple(self._place(segment, argument) for argument in arguments(node))
        segment.places[node] = "in", len(segment.recipe)
        segment.recipe.append(node)
        segment.labels.append(self.label_of[node])
        segment.wiring.append(wiring)
        return segment.places[node]

    def _place(self, segment: Segment, node: fx.Node) -> tuple[str, int]:
        """Where the segment has the value; views are made within it."""
        if node in segment.places:
            return segment.places[node]
        root = self._root(node)
        inside = root in segment.places or root in segment.own or root in segment.whole
        if self._is_free(node) and (inside or not self._is_sliced(node)):
            return self._add(segment, node)
        segment.places[node] = "out", len(segment.given)
        segment.given.append(node)
        return segment.places[node]

    def _is_sliced(self, node: fx.Node) -> bool:
        """Whether the driver makes the value: a slice of a sequence, or part of one."""
        return node in self.slices
