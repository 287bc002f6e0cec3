"""Record a tensor function's operations once and replay them without Python.

Pyro's handlers take a millisecond per run, which is most of the time of a small program. After some calls with
tensors of the same shapes, the operations of one call are recorded (`pyrolvm.inference.engine.graphs.record`) and
replayed from then on. The record must give the function's own result for the same noise; if it does not, or if
Python branches on values, the function itself is called.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any
from unittest import mock

import pyro.ops.special
import torch
from torch import Tensor, fx

from pyrolvm.inference.engine import graphs
from pyrolvm.inference.engine.reads import Reads
from pyrolvm.inference.engine.static import static_pyro
from pyrolvm.inference.program.noise import kept_generators

PATIENCE = 30
"""Calls before one is recorded: recording takes about as long."""

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]


class Recorded:
    """Calls functions of tensors, with one record for each key and shapes of inputs.

    Other tensors that a function reads must stay the same from call to call, or its `key` must change. Records
    live as long as this object.

    Parameters
    ----------
    patience : int, optional
        Calls before one is recorded; 30 by default.
    """

    def __init__(self, patience: int | None = None) -> None:
        self.patience = PATIENCE if patience is None else patience
        self.calls: dict[Any, int] = {}
        self.replays: dict[Any, Function | None] = {}

    def __call__(self, function: Function, *inputs: Tensor, key: Any = None) -> Outputs:
        """`function(*inputs)`, by a replay where there is a record."""
        key = (key, *((t.shape, t.dtype, t.device) for t in inputs))
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] > self.patience and key not in self.replays:
            self.replays[key] = _replay(function, inputs)
        return (self.replays.get(key) or function)(*inputs)


def _replay(function: Function, inputs: Outputs) -> Function | None:
    """The record of one call, or None if it differs from the call. The generators are unchanged."""
    device = inputs[0].device if inputs else torch.device("cpu")
    with suppress(Exception), warnings.catch_warnings():  # a function that cannot be recorded is called
        warnings.simplefilter("ignore")
        with kept_generators(device):
            wanted = function(*inputs)
        with kept_generators(device):
            graph, constants = record(function, inputs)
        constants = settled(graph, len(inputs), tuple(t.detach() for t in constants))

        @torch.no_grad()
        def replay(*given: Tensor) -> Outputs:
            return graph(*given, *constants)

        with kept_generators(device):
            found = replay(*inputs)
        if not graphs.written_inputs(graph) and _same(found, wanted):
            return replay
    return None


def record(
    function: Callable[..., Any], inputs: Sequence[Tensor], *, pure: bool = False
) -> tuple[fx.GraphModule, Outputs]:
    """As `graphs.record`, of a function that may read and branch on whatever does not depend on its inputs.

    With `pure` a graph without writes in place, which a few functions do not allow.

    Raises
    ------
    ChangingReadError
        It reads what depends on its inputs.
    """
    whole = torch.func.functionalize(function, remove="mutations") if pure else function

    def reading(*flat: Tensor) -> Any:
        with Reads({"an input": flat}):
            return whole(*flat)

    plain = mock.patch.object(pyro.ops.special._SafeLog, "apply", _safe_log) if pure else nullcontext()
    with static_pyro(), plain:
        return graphs.record(reading, inputs)


def _safe_log(x: Tensor) -> Tensor:
    """Pyro's `safe_log` without a function of its own: the logarithm, and no gradient where it is infinite."""
    return torch.where(x > 0, x, torch.ones_like(x)).log() + torch.where(x > 0, 0.0, -torch.inf)


@torch.no_grad()
def settled(graph: fx.GraphModule, num_inputs: int, constants: Outputs, *, fresh: bool = False) -> Outputs:
    """Compute once what does not depend on the inputs; returns the constants of the rest of the graph.

    With `fresh` also what is made of nothing (`arange`, `zeros`): only of graphs that write to nothing in place.
    """
    nodes = list(graph.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    known: dict[fx.Node, Any] = dict(zip(placeholders[num_inputs:], constants, strict=True))
    for node in nodes:
        inputs = node.all_input_nodes
        constant = (fresh or inputs) and all(n in known for n in inputs)
        if node.op == "call_function" and not _acts(node) and constant:
            target: Any = node.target
            known[node] = target(*fx.map_arg(node.args, known.get), **fx.map_arg(node.kwargs, known.get))
    wanted = [n for n, v in known.items() if isinstance(v, Tensor) and any(u not in known for u in n.users)]
    last = placeholders[-1]
    for node in wanted:
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"settled_{node.name}")
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in known)
    graph.graph.eliminate_dead_code()
    for node in placeholders[num_inputs:]:
        graph.graph.erase_node(node)
    graph.recompile()
    return tuple(known[n] for n in wanted)


def _acts(node: fx.Node) -> bool:
    """Whether an operation draws, writes in place, or is not one of torch's."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is not operator.getitem
    return target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags


def _same(found: Outputs, wanted: Outputs) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(f.shape == w.shape and torch.allclose(f, w, 1e-4, 1e-4, equal_nan=True) for f, w in pairs)
