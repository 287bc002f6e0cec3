"""Rewrites of a step's graph for inductor: the same numbers in fewer or cheaper operations.

    decompositions     operators in terms of others
    share_equals       operations that are written twice, done once
    delay_expansions   elementwise operations before a broadcast, not after it
    hoist_scalars      costly scalars computed once
    gather_in_place    the shares of other processes written where they belong
    transpose_factors  the transpose of a product as the product of transposes

Draws remain ATen's own, from the default generators.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, fx


def decompositions(table: dict[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """inductor's `table` without its draws, which differ from ATen's, and with the ones below."""
    own = {k: v for k, v in table.items() if torch.Tag.nondeterministic_seeded not in getattr(k, "tags", ())}
    own[torch.ops.aten.multinomial.default] = _multinomial
    own[torch.ops.aten.bernoulli.default] = _bernoulli
    own[torch.ops.aten.addmm.default] = _addmm
    pooling = torch.ops.aten.max_pool2d_with_indices.default
    own[pooling] = functools.partial(_after_lowering, own[pooling])
    return own


def _after_lowering(decomposition: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A decomposition of inductor's that reads its `lowering`, which nothing may have imported yet."""
    import_module("torch._inductor.lowering")
    return decomposition(*args, **kwargs)


def _multinomial(
    weights: Tensor, num_samples: int, replacement: bool = False, *, generator: Any = None
) -> Any:
    """One draw, from the same noise as ATen's; inductor itself would call Python for it."""
    if num_samples != 1 or generator is not None or not _is_plain(weights):
        return NotImplemented
    if exponential_by_inversion() and weights.dtype == torch.float32:
        noise = -torch.log1p(-torch.rand(weights.shape, dtype=torch.float64)).to(weights.dtype)
    else:
        # of memory of its own: what inductor makes of `weights` may be laid out in another order
        noise = torch.ops.aten.exponential.default(weights.new_empty(weights.shape))
    return (weights / noise).argmax(-1, keepdim=True)


@functools.cache
def exponential_by_inversion() -> bool:
    """Whether ATen's exponential noise is -log(1 - u) of its uniform noise, which vectorises; with MKL it is not."""
    first, second = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    noise = torch.empty(100).exponential_(generator=first)
    uniform = torch.rand(100, dtype=torch.float64, generator=second)
    same = torch.equal(first.get_state(), second.get_state())
    return same and torch.equal(noise, -torch.log1p(-uniform).float())


def _bernoulli(weights: Tensor, *, generator: Any = None) -> Any:
    """As `_multinomial`, for weights [...] of 1."""
    # of one weight for many entries the draws are laid out as those of many weights
    if generator is not None or not _is_plain(torch.empty_like(weights)):
        return NotImplemented
    noise = torch.rand(weights.shape, dtype=weights.dtype, device=weights.device)
    return (noise < weights).to(weights.dtype)


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """A product and a sum; the sum joins the kernel that reads it."""
    if beta != 1 or alpha != 1:
        return NotImplemented
    return torch.mm(left, right) + bias


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def share_equals(graph: fx.GraphModule) -> None:
    """Do what several nodes do alike once: a program asks for its parameters, and their constraints, at every site."""
    known: dict[Any, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not _is_pure(node.target):
            continue
        if node.target in SAME_VALUE:
            same = node.args[0]
        else:
            key = node.target, _hashable(node.args), _hashable(tuple(node.kwargs.items()))
            same = known.setdefault(key, node)
        if same is not node and not any(user.op == "output" for user in node.users):
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
    graph.recompile()


SAME_VALUE = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def _is_pure(target: Any) -> bool:
    """Whether the operation is known to give the same for the same arguments, and to change nothing."""
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    if target.namespace not in (
        "aten",
        "prims",
    ):  # a reduction over processes, or an operator of the user's own
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _hashable(value: Any) -> Any:
    """An argument as part of a key: 1, 1.0 and True differ."""
    if isinstance(value, list | tuple):
        return type(value), tuple(_hashable(part) for part in value)
    return value if isinstance(value, fx.Node) else (type(value), str(value))


COSTLY = (
    "pow",
    "exp",
    "log",
    "log1p",
    "expm1",
    "sqrt",
    "rsqrt",
    "tanh",
    "sigmoid",
    "lgamma",
    "digamma",
    "div",
)


def delay_expansions(graph: fx.GraphModule) -> None:
    """f(expand(x)) as expand(f(x)) for elementwise f of one tensor: the log of a scale is taken once, not per datum."""
    expand = torch.ops.aten.expand.default
    for node in list(graph.graph.nodes):
        sources = node.all_input_nodes
        if len(sources) != 1 or sources[0].target is not expand or not _is_elementwise(node):
            continue
        if any(user.op == "output" for user in node.users):  # whose layout others count on
            continue
        base: Any = sources[0]
        while base.target is expand:
            base = base.args[0]
        with graph.graph.inserting_before(node):
            small = graph.graph.node_copy(node, dict.fromkeys(sources, base).__getitem__)
            wide = graph.graph.call_function(expand, (small, list(node.meta["val"].shape)))
        small.meta["val"] = _value(node, base)
        wide.meta["val"] = small.meta["val"].expand(node.meta["val"].shape)
        node.replace_all_uses_with(wide)
        graph.graph.erase_node(node)
    graph.recompile()


def _is_elementwise(node: fx.Node) -> bool:
    value = node.meta.get("val")
    tags = getattr(node.target, "tags", ())
    return (
        isinstance(value, Tensor)
        and torch.Tag.pointwise in tags
        and value.shape == node.all_input_nodes[0].meta["val"].shape
    )


def _value(node: fx.Node, base: Any) -> Tensor:
    """The value of `node` for `base` as its only tensor, as a fake tensor."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: base.meta["val"])
    with base.meta["val"].fake_mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


def hoist_scalars(graph: fx.GraphModule) -> None:
    """Compute each costly scalar once, not in the inner loop of every kernel that reads it.

    Adam's bias corrections are two powers; inlined, they cost as much as the matrix products of a VAE.
    """
    realize = _realized()
    costly: set[fx.Node] = set()
    for node in list(graph.graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or value.dim():
            continue
        name = getattr(node.target, "_opname", "")
        if name not in COSTLY and not any(n in costly for n in node.all_input_nodes):
            continue
        if not any(_is_large(user) for user in node.users):
            costly.add(node)
            continue
        with graph.graph.inserting_after(node):
            once = graph.graph.call_function(realize, (node,))
        once.meta["val"] = value
        for user in list(node.users):
            if user is not once:
                user.replace_input_with(node, once)
    graph.recompile()


def gather_in_place(graph: fx.GraphModule) -> None:
    """Let parameters that are gathered from all processes be written where they stay, without a copy between."""
    for node in list(graph.graph.nodes):
        if str(node.target) != "pyrolvm.shared_gather.default":
            continue
        into, *others = node.args
        parts = sorted(node.users, key=lambda part: part.args[1])
        written = [_only_written(part, to) for part, to in zip(parts, into, strict=False)]
        if len(parts) != len(into) or not all(written):
            continue
        old = [copy for copies in written for copy in copies]
        with graph.graph.inserting_before(
            next(n for n in graph.graph.nodes if n.target is WRITE and n in old)
        ):
            graph.graph.call_function(torch.ops.pyrolvm.shared_gather_.default, (into, *others))
        for spent in (*old, *parts, node):
            graph.graph.erase_node(spent)
    graph.recompile()


COPY, WRITE = torch.ops.aten.copy.default, torch.ops.aten.copy_.default


def _only_written(value: fx.Node, to: fx.Node) -> list[fx.Node]:
    """The operations that write `value` to `to`, the last one first; none if it is used for anything else."""
    found: list[fx.Node] = []
    while len(value.users) == 1:
        value = next(iter(value.users))
        if value.target not in (COPY, WRITE) or value.args[0] is not to:
            return []
        found.insert(0, value)
    return found if found and found[0].target is WRITE else []


def transpose_factors(graph: fx.GraphModule) -> None:
    """(AB)^T as B^T A^T, so that the gradient of a layer's weights lies in memory as the weights do."""
    turn, product = torch.ops.aten.permute.default, torch.ops.aten.mm.default
    for node in list(graph.graph.nodes):
        source: Any = node.args[0] if node.target is turn else None
        if (
            source is None
            or source.target is not product
            or list(node.args[1]) != [1, 0]
            or len(source.users) != 1
        ):
            continue
        with graph.graph.inserting_before(source):
            factors = [graph.graph.call_function(turn, (factor, [1, 0])) for factor in reversed(source.args)]
            turned = graph.graph.call_function(product, tuple(factors))
        for own, factor in zip(factors, reversed(source.args), strict=True):
            own.meta["val"] = factor.meta["val"].permute(1, 0)
        with source.meta["val"].fake_mode:
            turned.meta["val"] = torch.mm(*(factor.meta["val"] for factor in factors))
        node.replace_all_uses_with(turned)
        for old in (node, source):
            graph.graph.erase_node(old)
    graph.recompile()


def _is_large(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.numel() > 64


@functools.cache
def _realized() -> Any:
    """An identity operator that makes inductor keep its argument in memory."""
    from torch._inductor.lowering import register_lowering

    @torch.library.custom_op("pyrolvm::realized", mutates_args=())
    def realized(value: Tensor) -> Tensor:
        return value.clone()

    realized.register_fake(torch.empty_like)
    overload = torch.ops.pyrolvm.realized.default

    @register_lowering(overload, type_promotion_kind=None)
    def lower(value: Any) -> Any:
        value.realize()
        return value

    return overload
