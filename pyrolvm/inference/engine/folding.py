"""A long step as calls of few pieces: the steps of a loop that a program unrolled are compiled once.

The operations of a step, in the order in which they ran, are cut into segments where they repeat (`repeats`). Segments
that do the same to tensors of the same layouts are one piece, compiled once and called with different tensors.

    operations    n_1 n_2 n_3 | a b c | a b c | a b c | m_1 m_2 | d e | d e | ...
    pieces        first         loop    loop    loop    middle    back  back

Three things make the segments of a loop equal that are not so in the graph.

    Views belong to no segment: each segment makes those that it reads from the tensors behind them.
    Slices of a sequence, x[:, t], are made by the driver.
    Numbers that count the steps, as in t < lengths, become arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from pyrolvm.inference.engine.graphs import LAYOUT, Layout
from pyrolvm.inference.engine.loops import chunk_capacity
from pyrolvm.inference.engine.repeats import repeats
from pyrolvm.inference.engine.tracing import TracedStep

aten = torch.ops.aten

WORTHWHILE = 500
"""Operations that a step must have; others are compiled whole, which fuses more."""
LARGEST_SHARE = 0.5
"""Of its operations, what the pieces may have: calls of pieces take longer than one fused step, ten times as long where
the tensors are small, so that only a long compilation is worth them."""
FEWEST_SLICES = 3
"""Slices of one tensor, in one dimension, that make it a sequence."""
SLICES = (aten.select.int, aten.slice.Tensor)
PARTS = (aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default)
COUNTED = {
    aten.lt.Scalar: aten.lt.Tensor,
    aten.le.Scalar: aten.le.Tensor,
    aten.gt.Scalar: aten.gt.Tensor,
    aten.ge.Scalar: aten.ge.Tensor,
    aten.eq.Scalar: aten.eq.Tensor,
    aten.ne.Scalar: aten.ne.Tensor,
    aten.add.Tensor: aten.add.Tensor,
    aten.sub.Tensor: aten.sub.Tensor,
    aten.mul.Tensor: aten.mul.Tensor,
    aten.div.Tensor: aten.div.Tensor,
}
"""Operations on a tensor and a number -> the same on a tensor of no dimensions."""


@dataclass(frozen=True)
class Call:
    """A piece called: numbers of the values that it reads, of those that it makes."""

    piece: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """A view of a value: its layout, whose offset counts from that of the value."""

    source: int
    value: int
    layout: Layout


@dataclass(frozen=True)
class Number:
    """A value of no dimensions that is the same in every step."""

    value: int
    dtype: torch.dtype
    number: float


@dataclass
class Folded:
    """A step as calls of pieces.

    Attributes
    ----------
    pieces : list of GraphModule
        Each takes and returns tensors; it may write to what it takes.
    layouts : list of list of Layout
        Of the arguments of each piece.
    strides : list of list of tuple
        Of the results of each piece.
    steps : list of Call, Slice or Number
        In order. The first values are the inputs of the step.
    num_values : int
        Values in all.
    size : int
        Operations of all pieces: what is compiled.
    """

    num_inputs: int
    pieces: list[fx.GraphModule] = field(default_factory=list)
    strides: list[list[tuple[int, ...]]] = field(default_factory=list)
    layouts: list[list[Layout]] = field(default_factory=list)
    steps: list[Call | Slice | Number] = field(default_factory=list)
    num_values: int = 0
    size: int = 0

    def largest(self, piece: int) -> int:
        """Elements of the largest tensor that a piece computes with."""
        nodes = self.pieces[piece].graph.nodes
        layouts = [n.meta[LAYOUT] for n in nodes if LAYOUT in n.meta]
        return max((math.prod(layout.shape) for layout in [*layouts, *self.layouts[piece]]), default=0)

    def examples(self, piece: int) -> list[Tensor]:
        """Example arguments of a piece."""
        return [layout.example() for layout in self.layouts[piece]]


def fold(traced: TracedStep, inputs: Sequence[Tensor], minibatch: bool) -> Folded | None:
    """The step that `traced.in_place` makes of `inputs` as calls of pieces; None if that is not worthwhile."""
    if len(traced.graph.graph.nodes) < WORTHWHILE:
        return None
    if "folded" not in traced.known:
        traced.known["folded"] = _Folding(*traced.operations(inputs, minibatch)).folded()
    folded: Folded | None = traced.known["folded"]
    if folded is not None and folded.size > LARGEST_SHARE * len(traced.graph.graph.nodes):
        return None
    return folded


def operations_to_compile(traced: TracedStep, minibatch: bool) -> int:
    """How many operations a compilation has to do with."""
    folded = fold(traced, traced.in_place(chunk_capacity(traced, minibatch), minibatch)[1], minibatch)
    return folded.size if folded is not None else len(traced.graph.graph.nodes)


@dataclass
class _Segment:
    """Some operations in order, and all that makes them the same as others.

    Attributes
    ----------
    recipe : list of node
        Its operations, and the views that they read.
    wiring : list
        For each, where its arguments come from: ("in", place in the recipe) or ("out", place in `given`).
    given : list of node
        Values from outside: inputs, results of other segments, slices of sequences.
    """

    recipe: list[fx.Node] = field(default_factory=list)
    wiring: list[tuple[Any, ...]] = field(default_factory=list)
    given: list[fx.Node] = field(default_factory=list)
    own: set[fx.Node] = field(default_factory=set)
    places: dict[fx.Node, tuple[str, int]] = field(default_factory=dict)


class _Folding:
    def __init__(self, graph: fx.Graph, writes: set[fx.Node]) -> None:
        self.inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self.calls = [n for n in graph.nodes if n.op == "call_function"]
        self.slices = set(_slices(self.calls))
        self.labels: dict[Any, int] = {}
        self.label_of = {n: self._label(n) for n in self.calls}
        self.before = list(self._groups([n for n in self.calls if n not in writes]))
        self.after = list(self._groups([n for n in self.calls if n in writes]))

    # ------------------------------------------------------------------ labels

    def _label(self, node: fx.Node) -> int:
        """A number for what the operation does, whatever values it gets."""
        key = (
            node.target,
            _pattern(node.args, node.target in COUNTED and _is_counted(node)),
            _pattern(tuple(node.kwargs.items())),
            _form(node),
            *(_form(argument) for argument in node.all_input_nodes),
        )
        return self.labels.setdefault(key, len(self.labels))

    def _groups(self, nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
        """Operations with the parts of their results, without views."""
        for node in nodes:
            if node in self.slices or _is_view(node) or _part_of(node) is not None or node.target in PARTS:
                continue
            yield [node, *(user for user in node.users if _part_of(user) is node)]

    def _is_free(self, node: fx.Node) -> bool:
        """Whether the value is a view of another."""
        return node in self.slices or _is_view(node) or node.target in PARTS or _is_piece_of_view(node)

    # ------------------------------------------------------------------ segments

    def folded(self) -> Folded | None:
        sequence = [hash(tuple(self.label_of[n] for n in group)) for group in self.before]
        bounds = [self.before[start:end] for start, end in repeats(sequence)]
        segments = [self._segment(groups) for groups in (*bounds, self.after)]
        if any(_writes_inputs(segment) for segment in segments[:-1]):
            return None
        needed = {self._root(n) for segment in segments for n in segment.given}
        return _Writer(self, segments, needed).written()

    def _root(self, node: fx.Node) -> fx.Node:
        """The value that a view is of."""
        while self._is_free(node):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def _segment(self, groups: Sequence[Sequence[fx.Node]]) -> _Segment:
        segment = _Segment(own={n for group in groups for n in group})
        for group in groups:
            for node in group:
                self._add(segment, node)
        return segment

    def _add(self, segment: _Segment, node: fx.Node) -> tuple[str, int]:
        wiring = tuple(self._place(segment, argument) for argument in _arguments(node))
        segment.places[node] = "in", len(segment.recipe)
        segment.recipe.append(node)
        segment.wiring.append(wiring)
        return segment.places[node]

    def _place(self, segment: _Segment, node: fx.Node) -> tuple[str, int]:
        """Where the segment has the value; views are made within it."""
        if node in segment.places:
            return segment.places[node]
        inside = self._root(node) in segment.places or self._root(node) in segment.own
        if self._is_free(node) and (inside or not self._is_sliced(node)):
            return self._add(segment, node)
        segment.places[node] = "out", len(segment.given)
        segment.given.append(node)
        return segment.places[node]

    def _is_sliced(self, node: fx.Node) -> bool:
        """Whether the driver makes the value: a slice of a sequence, or part of one."""
        return node in self.slices


class _Writer:
    """Numbers the values and writes the calls."""

    def __init__(self, folding: _Folding, segments: Sequence[_Segment], needed: set[fx.Node]) -> None:
        self.folding, self.segments, self.needed = folding, segments, needed
        self.result = Folded(len(folding.inputs))
        self.numbers = {n: i for i, n in enumerate(folding.inputs)}
        self.result.num_values = len(folding.inputs)
        self.constants: dict[tuple[torch.dtype, float], int] = {}

    def written(self) -> Folded:
        kinds: dict[Any, list[int]] = {}
        for i, segment in enumerate(self.segments):
            labels = tuple(self.folding.label_of[n] for n in segment.recipe)
            kinds.setdefault((labels, tuple(segment.wiring)), []).append(i)
        made = {i: kind for kind in kinds.values() for i in kind}
        known: dict[int, _Piece] = {}
        for i, segment in enumerate(self.segments):
            first = made[i][0]
            if first not in known:
                known[first] = self._piece(
                    [self.segments[k] for k in made[i]], last=i == len(self.segments) - 1
                )
            if known[first].number is not None:
                self._call(known[first], segment)
        return self.result

    def _piece(self, segments: Sequence[_Segment], *, last: bool) -> _Piece:
        piece = _Piece(segments, self.needed)
        if piece.outputs or last:
            piece.number = len(self.result.pieces)
            graph = piece.graph()
            self.result.pieces.append(graph)
            self.result.strides.append([segments[0].recipe[i].meta[LAYOUT].stride for i in piece.outputs])
            self.result.size += len(segments[0].recipe)
            given = [n.meta[LAYOUT] for n in segments[0].given]
            self.result.layouts.append(given + [Layout(dtype, (), (), 0) for _, dtype in piece.lifted])
        return piece

    def _call(self, piece: _Piece, segment: _Segment) -> None:
        inputs = [self._value(n) for n in segment.given]
        inputs += [self._constant(dtype, segment.recipe[at].args[1]) for at, dtype in piece.lifted]
        outputs = []
        for at in piece.outputs:
            outputs.append(self._new())
            self.numbers[segment.recipe[at]] = outputs[-1]
        assert piece.number is not None
        self.result.steps.append(Call(piece.number, tuple(inputs), tuple(outputs)))

    def _new(self) -> int:
        self.result.num_values += 1
        return self.result.num_values - 1

    def _value(self, node: fx.Node) -> int:
        if node not in self.numbers:
            root = self.folding._root(node)
            own, base = node.meta[LAYOUT], root.meta[LAYOUT]
            layout = Layout(own.dtype, own.shape, own.stride, own.offset - base.offset)
            source, self.numbers[node] = self._value(root), self._new()
            self.result.steps.append(Slice(source, self.numbers[node], layout))
        return self.numbers[node]

    def _constant(self, dtype: torch.dtype, number: Any) -> int:
        key = dtype, float(number)
        if key not in self.constants:
            self.constants[key] = self._new()
            self.result.steps.append(Number(self.constants[key], *key))
        return self.constants[key]


class _Piece:
    """What equal segments have in common.

    Attributes
    ----------
    outputs : list of int
        Places in the recipe of the values that others read.
    lifted : list of (int, dtype)
        Places of the numbers that differ between the segments.
    """

    number: int | None = None

    def __init__(self, segments: Sequence[_Segment], needed: set[fx.Node]) -> None:
        self.first = segments[0]
        places = range(len(self.first.recipe))
        self.outputs = [
            i for i in places if any(s.recipe[i] in needed and s.recipe[i] in s.own for s in segments)
        ]
        self.lifted = [
            (i, _number_dtype(self.first.recipe[i]))
            for i in places
            if _is_counted(self.first.recipe[i]) and len({s.recipe[i].args[1] for s in segments}) > 1
        ]

    def graph(self) -> fx.GraphModule:
        """The piece as a function of what it is given, then of the numbers."""
        graph, known = fx.Graph(), dict[fx.Node, fx.Node]()
        for i, node in enumerate(self.first.given):
            known[node] = graph.placeholder(f"given_{i}")
        numbers = {at: graph.placeholder(f"number_{i}") for i, (at, _) in enumerate(self.lifted)}
        for i, node in enumerate(self.first.recipe):
            copied = known[node] = graph.node_copy(node, known.__getitem__)
            if i in numbers:
                copied.target = COUNTED[node.target]  # type: ignore[index]
                copied.args = (copied.args[0], numbers[i])
        graph.output(tuple(known[self.first.recipe[i]] for i in self.outputs))
        return fx.GraphModule(torch.nn.Module(), graph)


# ---------------------------------------------------------------------- single operations


def _arguments(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _form(node: fx.Node) -> Any:
    """The layout of a value, wherever in memory it begins."""
    layout = node.meta.get(LAYOUT)
    return layout and (layout.dtype, layout.shape, layout.stride)


def _pattern(value: Any, counted: bool = False) -> Any:
    """An argument without the values and, if `counted`, without the number in second place."""
    if isinstance(value, fx.Node):
        return "value"
    if isinstance(value, list | tuple):
        parts = [_pattern(part) for part in value]
        if counted:
            parts[1] = type(value[1])
        return tuple(parts)
    return type(value), str(value)


def _is_counted(node: fx.Node) -> bool:
    """Whether the operation is on a tensor and a number that may be a tensor as well."""
    if node.target not in COUNTED or len(node.args) != 2 or node.kwargs:
        return False
    return isinstance(node.args[1], int | float) and _number_dtype(node) is not None


def _number_dtype(node: fx.Node) -> Any:
    """The type of tensor that promotes as the number does; None if there is none."""
    first, number = node.args[0], node.args[1]
    own = first.meta[LAYOUT].dtype if isinstance(first, fx.Node) else None
    if own is None or own == torch.bool or isinstance(number, bool):
        return None
    if own.is_floating_point:
        return own
    return torch.int64 if isinstance(number, int) else None


def _is_view(node: fx.Node) -> bool:
    """Whether the result is a view of the first argument."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or len(schema.returns) != 1 or LAYOUT not in node.meta:
        return False
    alias = schema.returns[0].alias_info
    return alias is not None and not alias.is_write and isinstance(node.args[0], fx.Node)


def _part_of(node: fx.Node) -> fx.Node | None:
    """The operation with several results that this is one of."""
    source = node.args[0] if node.args else None
    return source if "getitem" in str(node.target) and isinstance(source, fx.Node) else None


def _is_piece_of_view(node: fx.Node) -> bool:
    source = _part_of(node)
    return source is not None and source.target in PARTS


def _slices(calls: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """The slices of sequences."""
    found: dict[Any, list[fx.Node]] = {}
    for node in calls:
        if node.target in SLICES:
            found.setdefault((node.args[0], node.target, node.args[1:2]), []).append(node)
        elif _is_piece_of_view(node):
            found.setdefault(node.args[0], []).append(node)
    for nodes in found.values():
        if len(nodes) >= FEWEST_SLICES:
            yield from nodes


def _writes_inputs(segment: _Segment) -> bool:
    """Whether the segment writes to an input of the step."""
    base: dict[fx.Node, fx.Node] = {}
    for node in segment.recipe:
        schema = getattr(node.target, "_schema", None)
        for argument, value in zip(schema.arguments if schema else (), node.args, strict=False):
            if isinstance(value, fx.Node) and argument.alias_info is not None:
                base[node] = base.get(value, value)
                if argument.alias_info.is_write and base[node].op == "placeholder":
                    return True
    return False
