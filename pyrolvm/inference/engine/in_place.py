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
        elif is_write(node):
            written = target_of(node)
            if written is None:
                return False
            node.replace_all_uses_with(written)
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


def is_write(node: fx.Node) -> bool:
    """Whether the operation writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def target_of(node: fx.Node) -> fx.Node | None:
    """The value that the operation writes to and returns; None if it does something else."""
    schema = node.target._schema  # type: ignore[union-attr]
    places = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    returned = [r.alias_info is not None and r.alias_info.is_write for r in schema.returns]
    if len(places) != 1 or returned != [True]:
        return None
    at = places[0]
    found = node.args[at] if at < len(node.args) else node.kwargs.get(schema.arguments[at].name)
    return found if isinstance(found, fx.Node) else None


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
