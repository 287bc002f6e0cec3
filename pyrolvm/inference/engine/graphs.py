"""Graphs of tensor operations that torch recorded, and all that the engines use of make_fx (torch 2.11 to 2.13).

    record      run a function and record its tensor operations
    unrecorded  operations within a record that it leaves out                (`reads` watches it)
    inlined     a graph appended to another
    written     what operations write to

`inductor` has what the engines use of torch's compiler. A part of either that is missing in another version of torch
raises an exception there; the engines then run eagerly, with the reason in `fitted.engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, fx

REMOVED_OPS = ("_record_function", "_linalg_check_errors")


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """The layout of `tensor`."""
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def example(self) -> Tensor:
        """A tensor of this layout."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


LAYOUT = "layout"
"""Where a node of a recorded graph keeps the `Layout` of its value."""


def _set_layout(proxy: Any, value: Any) -> Any:
    if isinstance(value, Tensor) and value.layout == torch.strided:
        proxy.node.meta[LAYOUT] = Layout.of(value)
    return proxy


def record(
    function: Callable[..., Any], inputs: Sequence[Tensor], mode: Literal["real", "fake"] = "real"
) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The operations of `function(*inputs)`, run once on these tensors, and the constants that it reads.

    An input that the function reaches by another name is that input of the graph. In the `mode` "fake" nothing is
    computed and no input changes.

    Returns
    -------
    graph : GraphModule
        Its arguments are the inputs, then the constants.
    constants : tuple of tensor
        The other tensors that the function reads.
    """
    from torch.fx.experimental import proxy_tensor

    # a fake tensor for each operation, with the stack that made it, is most of the time of a trace
    with mock.patch.object(proxy_tensor, "set_meta", _set_layout):
        graph = proxy_tensor.make_fx(function, tracing_mode=mode)(*inputs)
    for node in reversed(graph.graph.nodes):
        # profiler marks with their objects, and a check that reads its result on the host
        removed = node.op == "get_attr" or any(name in str(node.target) for name in REMOVED_OPS)
        if removed and not node.users:
            graph.graph.erase_node(node)
    for node in graph.graph.nodes:
        _of_one_type(node)
    return graph, _lift_constants(graph, inputs)


def _of_one_type(node: fx.Node) -> None:
    """Say which type a tensor is made in (`torch.ones(3)`), which else is the default where the graph is run."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.all_input_nodes or LAYOUT not in node.meta or node.kwargs.get("dtype"):
        return
    if any(argument.name == "dtype" and argument.kwarg_only for argument in schema.arguments):
        node.kwargs = {**node.kwargs, "dtype": node.meta[LAYOUT].dtype}


def unrecorded() -> AbstractContextManager[Any]:
    """Operations inside are run and not recorded: their results are constants of the graph."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


def _lift_constants(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Make the tensors that the graph holds inputs; one that is an input by another name becomes that input."""
    nodes = graph.graph
    placeholders = [n for n in nodes.nodes if n.op == "placeholder"]
    known = {_memory(t): p for t, p in zip(inputs, placeholders, strict=True)}
    constants: list[Tensor] = []
    for node in list(nodes.nodes):
        if node.op != "get_attr":
            continue
        value: Any = getattr(graph, str(node.target))
        if _memory(value) not in known:
            with nodes.inserting_after(placeholders[-1]):
                placeholders.append(nodes.placeholder(f"constant_{len(constants)}"))
            placeholders[-1].meta[LAYOUT] = Layout.of(value)
            constants.append(value)
            known[_memory(value)] = placeholders[-1]
        node.replace_all_uses_with(known[_memory(value)])
        nodes.erase_node(node)
    graph.recompile()
    return tuple(constants)


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.numel() == 0:
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.device


def inlined(graph: fx.Graph, part: fx.GraphModule, inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """Append the operations of `part` on `inputs` to `graph`; its outputs there."""
    placeholders = [n for n in part.graph.nodes if n.op == "placeholder"]
    copied = graph.graph_copy(part.graph, dict(zip(placeholders, inputs, strict=True)))
    return list(copied) if isinstance(copied, list | tuple) else [copied]  # type: ignore[list-item]


def written(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The inputs of their graph that the operations write to in place, directly or through a view."""
    base: dict[fx.Node, fx.Node] = {}
    found = set()
    for node in nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if isinstance(value, fx.Node) and argument.alias_info is not None:
                base[node] = base.get(value, value)
                if argument.alias_info.is_write and base[node].op == "placeholder":
                    found.add(base[node])
    return found


def written_inputs(graph: fx.GraphModule) -> list[int]:
    """Positions of the inputs that the graph writes to in place."""
    nodes = list(graph.graph.nodes)
    found = written(nodes)
    return [i for i, n in enumerate(n for n in nodes if n.op == "placeholder") if n in found]
