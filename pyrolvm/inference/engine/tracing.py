"""A training step as one graph: bound, gradients, clipping and the update of torch's own optimiser.

The step is run once while its tensor operations are recorded, without Pyro's handlers and the optimiser's
Python. Nothing of Pyro or torch.optim is implemented a second time.

`_static_pyro` and `_TensorScalars` replace the values that Pyro and the optimiser read on the host. A branch
on values cannot be traced: `UntraceableError` names the operation and its line.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import pyro.infer.util
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from pyrolvm.errors import ProgramError
from pyrolvm.inference.engine import graphs
from pyrolvm.inference.engine.entries import collected, is_per_row, places_of
from pyrolvm.inference.engine.problem import Problem
from pyrolvm.inference.program.noise import kept_generators
from pyrolvm.inference.program.program import Program

Slots = dict[str, dict[str, Tensor]]

# their usual form branches on the count of steps or on gradients
BRANCHING = (torch.optim.RAdam, torch.optim.Rprop, torch.optim.ASGD)

_TORCH, _PYRO = (str(Path(module.__file__ or "").parent) for module in (torch, pyro))
_LIBRARIES = (_TORCH, _PYRO, str(Path(__file__).parents[1]))
_STANDARD = str(Path(traceback.__file__).parent)


class UntraceableError(ProgramError):
    """The program cannot be traced as one graph; the message names the operation and its line."""


@dataclass(frozen=True)
class TracedStep:
    """`graph(*state, *data, rows, *controls, *constants) -> (*new values, terms)`.

    Attributes
    ----------
    names : tuple of str
        The names of `state`, keys of `TrainingState.flatten`.
    state : tuple of tensor
        What a step may change: parameters, buffers and the optimiser's slots. The graph writes buffers in place.
    updated : tuple of int
        Positions in `state` of the new values.
    by_row : frozenset of int
        Those of them whose new value is that of the batch's rows alone.
    data : tuple of tensor [N, ...]
        The whole training data.
    rows : tensor [batch], int64
        An example of the rows of a step.
    constants : tuple of tensor
        The other tensors that the program reads.
    num_controls : int
        Controls of a step; the first is the learning rate.
    """

    graph: fx.GraphModule
    names: tuple[str, ...]
    state: tuple[Tensor, ...]
    updated: tuple[int, ...]
    data: tuple[Tensor, ...]
    rows: Tensor
    constants: tuple[Tensor, ...]
    dtype: torch.dtype
    num_controls: int = 1
    num_terms: int = 1
    by_row: frozenset[int] = frozenset()

    def in_place(self, capacity: int, minibatch: bool) -> tuple[Callable[..., tuple[()]], list[Tensor]]:
        """The step as a function that only writes to its inputs, and example inputs for it.

        `advance(index, terms, controls, rows, *state, *data, *constants)` takes step number `index` []
        of a chunk, with its row of `controls` [capacity, num_controls] and of `rows` [capacity, batch] (or all
        `rows` [N], if the data are taken whole). It writes to `terms` [capacity, num_terms] and to the state, and
        increments `index`.
        """
        device, dtype = self.rows.device, self.dtype
        split = len(self.state), len(self.state) + len(self.data)

        def advance(index: Tensor, terms: Tensor, controls: Tensor, rows: Tensor, *rest: Tensor) -> tuple[()]:
            state, data, constants = rest[: split[0]], rest[split[0] : split[1]], rest[split[1] :]
            at = index.reshape(1)
            if minibatch:
                rows = rows.index_select(0, at).reshape(-1)
            rate, *others = controls.index_select(0, at).reshape(-1).unbind()
            scheduled = [rate, *(value.to(dtype) for value in others)]
            *values, row = self.graph(*state, *data, rows, *scheduled, *constants)
            for position, value in zip(self.updated, values, strict=True):
                if position in self.by_row:
                    state[position].index_copy_(0, rows, value)
                else:
                    state[position].copy_(value)
            terms.index_copy_(0, at, row.reshape(1, -1).to(dtype))
            index.add_(1)
            return ()

        rows = self.rows.expand(capacity, -1).contiguous() if minibatch else self.rows
        chunk = [
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros(capacity, self.num_terms, dtype=dtype, device=device),
            torch.zeros(capacity, self.num_controls, dtype=torch.float64, device=device),
            rows,
        ]
        return advance, [*chunk, *self.state, *self.data, *self.constants]

    def text(self) -> str:
        """The graph and its inputs' shapes: equal texts compute the same."""
        inputs = [*self.state, *self.data, self.rows, *self.constants]
        shapes = [f"{t.dtype} {tuple(t.shape)} {t.stride()} {t.device}" for t in inputs]
        return "\n".join(
            [self.graph.code, str(self.updated), str(sorted(self.by_row)), str(len(self.state)), *shapes]
        )


def trace_step(problem: Problem, slots: Slots, rows: Tensor) -> TracedStep:
    """Trace one step; the program, its parameters and the generators are unchanged.

    Parameters
    ----------
    slots : dict
        The optimiser's state after a step.
    rows : tensor [batch], int64
        Any valid rows.

    Raises
    ------
    UntraceableError
        The program cannot be traced as one graph.
    """
    program, device = problem.program, problem.program.device
    state = {f"parameters/{k}": v for k, v in program.tensors().items()}
    for name, own in slots.items():
        state |= {f"optimizer/{k}/{name}": v.to(device, copy=True) for k, v in own.items()}
    data = [t for _, t in problem.data.tensors()]
    rate, *others = problem.controls(0, 1)[0].to(device)
    controls = [rate.clone(), *(value.to(program.dtype, copy=True) for value in others)]
    inputs = [*state.values(), *data, rows.to(device, copy=True), *controls]
    written: list[str] = []

    def run(*flat: Tensor) -> tuple[Tensor, ...]:
        at = dict(zip(state, flat, strict=False))
        rows, rate, *others = flat[len(flat) - len(controls) - 1 :]
        gradients, terms = problem.gradients(rows, others)
        new = _update(problem, at, gradients, rate, rows)
        written[:] = new
        return (*new.values(), terms)

    with program.scope(), kept_generators(device), _kept(program), _explained(), _static_pyro():
        graph, constants = graphs.record(run, inputs)
    _check_writes(graph, list(state), len(inputs))
    names = tuple(state)
    return TracedStep(
        graph,
        names,
        tuple(t.detach() for t in state.values()),
        tuple(names.index(name) for name in written),
        tuple(data),
        inputs[-1 - len(controls)],
        tuple(t.detach() for t in constants),
        program.dtype,
        len(controls),
        len(problem.terms),
        frozenset(i for i, key in enumerate(names) if _is_by_row(problem, key, state)),
    )


def _is_by_row(problem: Problem, key: str, state: dict[str, Tensor]) -> bool:
    """Whether a step updates the rows of its batch alone in the tensor of this name."""
    kind, _, owner = key.partition("/")
    owner = owner if kind == "parameters" else owner.partition("/")[2]
    return owner in problem.tables and is_per_row(state[key], state[f"parameters/{owner}"])


def _update(
    problem: Problem,
    state: dict[str, Tensor],
    gradients: Sequence[Tensor | None],
    learning_rate: Tensor,
    rows: Tensor,
) -> dict[str, Tensor]:
    """New values of the parameters that have a gradient and of their slots, by torch's own optimiser.

    Of tables they are those of the batch's entries.
    """
    names = list(problem.program.parameters)
    by_row = {key for key in state if _is_by_row(problem, key, state)}
    state = {key: value.index_select(0, rows) if key in by_row else value for key, value in state.items()}
    places = places_of(rows) if by_row else rows
    gradients = [
        collected(g, places) if g is not None and name in problem.tables else g
        for name, g in zip(names, gradients, strict=True)
    ]
    parameters = [state[f"parameters/{name}"].detach().clone() for name in names]
    optimizer = problem.optimizer.build(parameters)
    # the single-tensor form is the one without host-side grouping; all forms compute the same
    for group in optimizer.param_groups:
        group.update(lr=learning_rate, foreach=False, fused=False)
    old: dict[str, Tensor] = {}
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        parameter.grad = gradient
        for key, value in state.items():
            kind, _, slot = key.partition("/")
            slot, _, owner = slot.partition("/")
            if kind == "optimizer" and owner == name:
                # the host computes with the step count in double precision
                own = value.to(torch.float64, copy=True) if slot == "step" else value.clone()
                optimizer.state[parameter][slot] = own
                old[key] = value
    with ExitStack() as stack:
        stack.enter_context(_TensorScalars())
        stack.enter_context(torch.no_grad())
        if isinstance(optimizer, BRANCHING):
            # their form for graphs, which refuses the CPU unless something is being compiled
            optimizer.param_groups[0]["capturable"] = True
            stack.enter_context(mock.patch.object(torch.compiler, "is_compiling", return_value=True))
        if problem.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, problem.optimizer.clip_norm, foreach=False)
        for name, parameter in zip(names, parameters, strict=True):
            if name in problem.tables and parameter.grad is not None:
                parameter.grad = parameter.grad.index_select(0, places)
        optimizer.step()
    new = {}
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        if gradient is None:
            continue
        new[f"parameters/{name}"] = parameter
        for slot, value in optimizer.state[parameter].items():
            key = f"optimizer/{slot}/{name}"
            if isinstance(value, Tensor):
                new[key] = value.to(old[key].dtype)
    return new


class _TensorScalars(TorchFunctionMode):
    """Keep numbers that an optimiser reads from tensors (`step.item()`) as tensors, in double precision."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.item:
            return args[0].to(torch.float64) if args[0].is_floating_point() else args[0]
        for key in ("value", "alpha"):
            if isinstance(kwargs.get(key), Tensor):
                return _scaled(func.__name__, *args, kwargs.pop(key), **kwargs)
        return func(*args, **kwargs)


def _scaled(name: str, target: Tensor, *terms: Any) -> Tensor:
    """`target.addcdiv_(a, b, value=scale)` and its kin, for a scale that is a tensor."""
    *factors, scale = terms
    term = scale * factors[0]
    if name.startswith("addcdiv"):
        term = term / factors[1]
    elif name.startswith("addcmul"):
        term = term * factors[1]
    if name.startswith("sub"):
        term = -term
    return target.add_(term) if name.endswith("_") else target + term


# ---------------------------------------------------------------- values that Pyro reads on the host


@contextmanager
def _static_pyro() -> Iterator[None]:
    """Pyro without host reads and branches that serve only messages or speed."""
    replaced = {"torch_item": _as_tensor, "warn_if_nan": lambda *args, **kwargs: None}
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("pyro.infer"):
                for function, static in replaced.items():
                    if hasattr(module, function):
                        stack.enter_context(mock.patch.object(module, function, static))
        stack.enter_context(mock.patch.object(pyro.infer.util, "_fulldot", _masked_dot))
        # a distribution made before the trace (a PyroSample's prior) checks its values whatever the default now is
        unchecked = mock.patch.object(
            torch.distributions.Distribution, "_validate_sample", lambda *args: None
        )
        stack.enter_context(unchecked)
        stack.enter_context(_NoShortcuts())
        yield


def _as_tensor(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _masked_dot(weight: Tensor, cost: Tensor) -> Tensor:
    """sum weight * cost where the weight is not 0, the static form of a masked select."""
    return (weight * torch.where(weight > 0, cost, torch.zeros_like(cost))).sum()


class _NoShortcuts(TorchFunctionMode):
    """`Dice.compute_expectation` branches on whether some weight is 0; `_masked_dot` needs no branch."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is Tensor.__bool__ and _called_by(pyro.infer.util.Dice.compute_expectation):
            return True
        return func(*args, **(kwargs or {}))


def _called_by(function: Callable[..., Any]) -> bool:
    """Whether the nearest caller outside of torch and this file is `function`."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return frame.f_code is function.__code__


# ---------------------------------------------------------------- what a program must not do


@contextmanager
def _kept(program: Program) -> Iterator[None]:
    """Restore parameters and buffers, inside `program.scope()`. Raises `UntraceableError` if one was replaced."""
    tensors = program.tensors()
    values = {k: v.detach().clone() for k, v in tensors.items()}
    store = pyro.get_param_store()
    entries = store.get_state()
    owners = [m._buffers for module in program.modules.values() for m in module.modules()]
    buffers = [dict(owner) for owner in owners]
    try:
        yield
        before: list[dict[str, Any]] = [entries["params"], *buffers]
        after: list[dict[str, Any]] = [store.get_state()["params"], *owners]
        for old, new in zip(before, after, strict=True):
            for name in old.keys() | new.keys():
                if old.get(name) is not new.get(name):
                    raise UntraceableError(f"'{name}' becomes another tensor in every step")
    finally:
        store.clear()
        store.set_state(entries)
        for owner, buffer in zip(owners, buffers, strict=True):
            owner.update(buffer)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(values[name])


def _check_writes(graph: fx.GraphModule, names: list[str], num_inputs: int) -> None:
    for position in graphs.written_inputs(graph):
        if position >= len(names):
            raise UntraceableError(
                "the program writes to a tensor in place that is neither a parameter nor a buffer of a module"
                if position >= num_inputs
                else "the program writes to its data in place"
            )


class _LastSite(Messenger):
    """Remembers the sample site that was reached last."""

    name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.name = msg["name"]


@contextmanager
def _explained() -> Iterator[None]:
    site = _LastSite()
    try:
        with site:
            yield
    except UntraceableError:
        raise
    except Exception as error:
        where = _user_line(error) or (f"at the site '{site.name}'" if site.name else "in the optimiser")
        if _depends_on_data(error):
            raise UntraceableError(
                f"Python reads or branches on the value of a tensor {where}: "
                "use torch.where, a mask, or engine='eager'"
            ) from error
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise UntraceableError(f"it could not be traced {where}: {first[0]}") from error


def _depends_on_data(error: Exception) -> bool:
    kinds = ("data-dependent", "DataDependent", "GuardOnDataDependent")
    return any(kind in f"{type(error).__name__} {error}" for kind in kinds)


def _user_line(error: Exception) -> str | None:
    """The last line of the traceback that is the program's own."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        own = Path(frame.filename)
        if frame.filename.startswith(_LIBRARIES) or str(own.parent) == _STANDARD:
            continue
        if frame.filename.startswith("<") or (own.suffix != ".py" and not frame.line):
            continue
        return f"in {own.name}, line {frame.lineno}: `{frame.line}`"
    return None
