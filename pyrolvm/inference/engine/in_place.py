"""Operations in place within a recorded step: whose memory a value is, so that the step may be cut into pieces.

The result of an operation in place is what it wrote to, under another name. Pieces share memory, not names: a piece
that returned the result would return a copy, laid out in another way, and what is written to it later would be lost to
whoever reads the first.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import fx

from pyrolvm.inference.engine.graphs import LAYOUT, Layout
from pyrolvm.inference.engine.operations import PARTS, arguments, is_view, part_of

aten = torch.ops.aten

VIEWS = {
    aten.unsafe_split.Tensor: aten.split.Tensor,
    aten.unsafe_split_with_sizes.default: aten.split_with_sizes.default,
}
"""Views that torch does not call so -> the same by their name."""


def share_memory(graph: fx.Graph) -> bool:
    """Let every operation read memory by the name under which it was made or first viewed.

    False if an operation writes in a way that is not known here.
    """
    views: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        node.target = VIEWS.get(node.target, node.target)
        if torch.Tag.inplace_view in getattr(node.target, "tags", ()):
            node.target = _plain(node.target)
        if node.target is None:
            return False
        if is_view(node) or node.target in PARTS or part_of(node) is not None:
            key = node.target, str(node.args), str(node.kwargs)
            first = views.setdefault(key, node)
            if first is not node:
                node.replace_all_uses_with(first)
        elif (written := targets(node)) and not _returns_nothing(node):
            if len(written) != 1 or not _returns_target(node):
                return False
            node.replace_all_uses_with(written[0])
    return True


def _plain(target: Any) -> Any:
    """The view that an operation such as `transpose_` makes of its own argument; None where it is no view."""
    packet = getattr(aten, target._opname.rstrip("_"), None)
    names = [argument.name for argument in target._schema.arguments]
    for overload in packet.overloads() if packet is not None else ():
        schema = getattr(packet, overload)._schema
        own, made = [argument.name for argument in schema.arguments], schema.returns
        if own == names and len(made) == 1 and made[0].alias_info is not None:
            return getattr(packet, overload)
    return None


def targets(node: fx.Node) -> list[fx.Node]:
    """The values that the operation writes to."""
    schema = getattr(node.target, "_schema", None)
    found: list[fx.Node] = []
    for i, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            fx.map_arg(node.args[i] if i < len(node.args) else node.kwargs.get(argument.name), found.append)
    return found


def _returns_nothing(node: fx.Node) -> bool:
    return not node.target._schema.returns  # type: ignore[union-attr]


def _returns_target(node: fx.Node) -> bool:
    returns = node.target._schema.returns  # type: ignore[union-attr]
    return len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write


def meet(first: fx.Node, second: fx.Node) -> bool:
    """Whether two values of the same memory may have an element in common."""
    same = first.target is second.target and arguments(first) == arguments(second)
    one, other = (node.meta.get(LAYOUT) for node in (first, second))
    if not same or one is None or other is None or _overlaps(arguments(first)[0]):
        return True
    if first.target is aten.select.int:
        return first.args[1] != second.args[1] or one.offset == other.offset
    return part_of(first) is None or first.args[1] == second.args[1]


def any_meet(nodes: list[fx.Node]) -> bool:
    """Whether two of the values may have an element in common."""
    return any(meet(*pair) for pair in combinations(nodes, 2))


def _overlaps(node: fx.Node) -> bool:
    """Whether elements of the value may share memory."""
    source = node.args[0] if node.target in PARTS else node
    layout = source.meta.get(LAYOUT) if isinstance(source, fx.Node) else None
    return layout is None or not _extent_is_free(layout)


def _extent_is_free(layout: Layout) -> bool:
    reached = 0
    for stride, size in sorted(zip(layout.stride, layout.shape, strict=True)):
        if size > 1 and stride <= reached:
            return False
        reached += stride * (size - 1)
    return True


def is_dense(layout: Layout) -> bool:
    """Whether the elements fill a stretch of memory, each once."""
    reached = 1
    for stride, size in sorted(zip(layout.stride, layout.shape, strict=True)):
        if size > 1 and stride != reached:
            return False
        reached *= size
    return True
