"""A step as calls of pieces, and how segments of its operations are written as such.

Values are numbered: the inputs of the step first, then what its calls and slices make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from pyrolvm.inference.engine.graphs import LAYOUT, Layout
from pyrolvm.inference.engine.in_place import is_dense, targets
from pyrolvm.inference.engine.operations import COUNTED, is_counted, number_dtype


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
    is_dense : bool
        Whether the results of pieces fill their memory, as those of the compiler do.
    """

    num_inputs: int
    pieces: list[fx.GraphModule] = field(default_factory=list)
    strides: list[list[tuple[int, ...]]] = field(default_factory=list)
    layouts: list[list[Layout]] = field(default_factory=list)
    steps: list[Call | Slice | Number] = field(default_factory=list)
    num_values: int = 0
    size: int = 0
    is_dense: bool = True

    def examples(self, piece: int) -> list[Tensor]:
        """Example arguments of a piece."""
        return [layout.example() for layout in self.layouts[piece]]


@dataclass
class Segment:
    """Some operations in order, and all that makes them the same as others.

    Attributes
    ----------
    recipe : list of node
        Its operations, and the views that they read.
    wiring : list
        For each, where its arguments come from: ("in", place in the recipe) or ("out", place in `given`).
    given : list of node
        Values from outside: inputs, results of other segments, slices of sequences.
    labels : list of int
        What each operation of the recipe does.
    whole : set of node
        Values of which it makes every view itself.
    """

    recipe: list[fx.Node] = field(default_factory=list)
    wiring: list[tuple[Any, ...]] = field(default_factory=list)
    given: list[fx.Node] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    own: set[fx.Node] = field(default_factory=set)
    whole: set[fx.Node] = field(default_factory=set)
    places: dict[fx.Node, tuple[str, int]] = field(default_factory=dict)

    @property
    def written(self) -> list[fx.Node]:
        """What its operations write to in place."""
        return [target for node in self.recipe for target in targets(node)]


def written(
    inputs: Sequence[fx.Node], segments: Sequence[Segment], root: Callable[[fx.Node], fx.Node]
) -> Folded:
    """The segments as calls of pieces; `root` is the value that a view is of."""
    writer = _Writer(inputs, segments, root)
    writer.write()
    return writer.result


class _Writer:
    """Numbers the values and writes the calls."""

    def __init__(
        self, inputs: Sequence[fx.Node], segments: Sequence[Segment], root: Callable[[fx.Node], fx.Node]
    ) -> None:
        self.segments, self.root = segments, root
        self.needed = {root(n) for segment in segments for n in segment.given}
        self.result = Folded(len(inputs))
        self.numbers = {n: i for i, n in enumerate(inputs)}
        self.result.num_values = len(inputs)
        self.constants: dict[tuple[torch.dtype, float], int] = {}

    def write(self) -> None:
        kinds: dict[Any, list[int]] = {}
        for i, segment in enumerate(self.segments):
            kinds.setdefault((tuple(segment.labels), tuple(segment.wiring)), []).append(i)
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

    def _piece(self, segments: Sequence[Segment], *, last: bool) -> _Piece:
        piece = _Piece(segments, self.needed)
        writes = any(self.root(n) not in segments[0].own for n in segments[0].written)
        if piece.outputs or writes or last:
            piece.number = len(self.result.pieces)
            graph = piece.graph()
            self.result.pieces.append(graph)
            made = [segments[0].recipe[i].meta[LAYOUT] for i in piece.outputs]
            self.result.strides.append([layout.stride for layout in made])
            self.result.is_dense &= all(map(is_dense, made))
            self.result.size += len(segments[0].recipe)
            given = [n.meta[LAYOUT] for n in segments[0].given]
            self.result.layouts.append(given + [Layout(dtype, (), (), 0) for _, dtype in piece.lifted])
        return piece

    def _call(self, piece: _Piece, segment: Segment) -> None:
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
            root = self.root(node)
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

    def __init__(self, segments: Sequence[Segment], needed: set[fx.Node]) -> None:
        self.first = segments[0]
        places = range(len(self.first.recipe))
        self.outputs = [
            i for i in places if any(s.recipe[i] in needed and s.recipe[i] in s.own for s in segments)
        ]
        self.lifted = [
            (i, number_dtype(self.first.recipe[i]))
            for i in places
            if is_counted(self.first.recipe[i]) and len({s.recipe[i].args[1] for s in segments}) > 1
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
