"""Single operations of a recorded step: what they read, and what makes two of them the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from pyrolvm.inference.engine.graphs import LAYOUT

aten = torch.ops.aten

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


def arguments(node: fx.Node) -> list[fx.Node]:
    """The values that the operation reads, in their order."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def form(node: fx.Node) -> Any:
    """The layout of a value, wherever in memory it begins."""
    layout = node.meta.get(LAYOUT)
    return layout and (layout.dtype, layout.shape, layout.stride)


def pattern(value: Any, counted: bool = False) -> Any:
    """An argument without the values and, if `counted`, without the number in second place."""
    if isinstance(value, fx.Node):
        return "value"
    if isinstance(value, list | tuple):
        parts = [pattern(part) for part in value]
        if counted:
            parts[1] = type(value[1])
        return tuple(parts)
    return type(value), str(value)


def is_counted(node: fx.Node) -> bool:
    """Whether the operation is on a tensor and a number that may be a tensor as well."""
    if node.target not in COUNTED or len(node.args) != 2 or node.kwargs:
        return False
    return isinstance(node.args[1], int | float) and number_dtype(node) is not None


def number_dtype(node: fx.Node) -> Any:
    """The type of tensor that promotes as the number does; None if there is none."""
    first, number = node.args[0], node.args[1]
    own = first.meta[LAYOUT].dtype if isinstance(first, fx.Node) else None
    if own is None or own == torch.bool or isinstance(number, bool):
        return None
    if own.is_floating_point:
        return own
    return torch.int64 if isinstance(number, int) else None


def is_view(node: fx.Node) -> bool:
    """Whether the result is a view of the first argument."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or len(schema.returns) != 1 or LAYOUT not in node.meta:
        return False
    alias = schema.returns[0].alias_info
    return alias is not None and not alias.is_write and isinstance(node.args[0], fx.Node)


def part_of(node: fx.Node) -> fx.Node | None:
    """The operation with several results that this is one of."""
    source = node.args[0] if node.args else None
    return source if "getitem" in str(node.target) and isinstance(source, fx.Node) else None


def is_part_of_view(node: fx.Node) -> bool:
    """Whether the value is one of the views that an operation makes of its argument."""
    source = part_of(node)
    return source is not None and source.target in PARTS


def slices(calls: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """The slices of sequences."""
    found: dict[Any, list[fx.Node]] = {}
    for node in calls:
        if node.target in SLICES:
            found.setdefault((node.args[0], node.target, node.args[1:2]), []).append(node)
        elif is_part_of_view(node):
            found.setdefault(node.args[0], []).append(node)
    for nodes in found.values():
        if len(nodes) >= FEWEST_SLICES:
            yield from nodes
