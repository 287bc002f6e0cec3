"""Where a pair's functions, networks and tensors are found, by whichever route it reaches them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import pyro.infer.autoguide
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger
from torch import Tensor, nn

from pyrolvm.errors import ProgramError, one_of
from pyrolvm.inference.program.per_datum import PerDatum
from pyrolvm.inference.program.semi_amortised import SemiAmortised
from pyrolvm.inference.program.semi_implicit_guide import SemiImplicitGuide
from pyrolvm.plates import DATA_PLATE, current_rows

AUTOGUIDES = tuple(
    name
    for name, kind in vars(pyro.infer.autoguide).items()
    if isinstance(kind, type)
    and issubclass(kind, AutoGuide | GuideMessenger)
    and name not in ("AutoGuide", "AutoContinuous", "AutoMessenger")
)
"""The guides that go by their names."""

ROW_GUIDES: dict[str, type[PerDatum | SemiAmortised]] = {
    "per_datum": PerDatum,
    "semi_amortised": SemiAmortised,
}
"""Guides that are made for a program and take the place of its own for the latents of each datum, by name."""


def row_guide(record: dict[str, Any] | None) -> PerDatum | SemiAmortised | None:
    """The guide that a run folder names; None of a run with another kind of guide."""
    if record is None:
        return None
    return ROW_GUIDES[record["name"]](**record["arguments"])


def resolve(model: Any, guide: Any, start: Any = None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Model and guide as two callables of the same arguments; raises `ProgramError` for anything else.

    `start` places an AutoGuide that is made here (Pyro's `init_loc_fn`).
    """
    pair = isinstance(model, nn.Module) and _is_pair(model)
    program = model.model if pair else model
    if not callable(program):
        raise ProgramError(
            f"model must be a LatentVariableModel or a callable, not {type(model).__name__}: "
            "pass an instance such as PPCA(data_dim=4, latent_dim=2) or a function"
        )
    if inspect.isclass(program):
        raise ProgramError(
            f"model is the class {program.__name__}: pass an instance, {program.__name__}(...)"
        )
    own = getattr(model, "guide", None) if pair else None
    if guide is None:
        guide = own
    if guide is None:
        raise ProgramError(
            "this model brings no guide: pass one by name, guide=..., a function of the model's arguments or an "
            "AutoGuide such as pyro.infer.autoguide.AutoNormal"
        )
    if isinstance(guide, str):
        one_of("guide", guide, (*ROW_GUIDES, *AUTOGUIDES, SemiImplicitGuide.__name__))
        named: Any = ROW_GUIDES.get(guide) or getattr(pyro.infer.autoguide, guide, SemiImplicitGuide)
        guide = named() if guide in ROW_GUIDES else named
    if isinstance(guide, type):
        guide = guide() if guide in ROW_GUIDES.values() else _built(guide, program, start)
    if isinstance(guide, PerDatum | SemiAmortised):
        guide.bind(program, own)
    if isinstance(guide, AutoGuide) and guide.create_plates is None:
        guide.create_plates = _RowPlates(guide)
    if isinstance(guide, GuideMessenger):
        guide = _Interleaved(guide)
    if not callable(guide):
        raise ProgramError(f"guide must be callable, not {type(guide).__name__}")
    return program, guide


def _is_pair(model: nn.Module) -> bool:
    """Whether a module's `model` is the program, not a `forward` that calls `model` (of a `ForecastingModel`)."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    called = code is not None and "model" in code.co_names and not callable(getattr(model, "guide", None))
    known = callable(getattr(type(model), "knows", None))
    return callable(getattr(model, "model", None)) and (known or not called)


def _built(guide: type, program: Callable[..., Any], start: Any) -> Any:
    """An AutoGuide of its class."""
    needs = [
        p.name for p in inspect.signature(guide).parameters.values() if p.default is p.empty and p.kind < 2
    ]
    if len(needs) > 1:
        raise ProgramError(
            f"the guide {guide.__name__} needs {', '.join(needs[1:])} beside the model: pass one that is built, "
            f"guide={guide.__name__}(model, {', '.join(f'{n}=...' for n in needs[1:])})"
        )
    if start is not None and issubclass(guide, AutoGuide) and _takes_start(guide):
        return guide(program, init_loc_fn=start)  # type: ignore[call-arg]
    return guide(program)


def _takes_start(guide: type) -> bool:
    return any("init_loc_fn" in inspect.signature(kind).parameters for kind in guide.__mro__[:2])


class _Interleaved:
    """A guide that runs inside the model (AutoNormalMessenger), as a plain one: what is observed is no draw."""

    def __init__(self, guide: GuideMessenger) -> None:
        self.__self__ = guide

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with pyro.poutine.block(hide_fn=lambda msg: msg["type"] == "sample" and msg["is_observed"]):
            return self.__self__(*args, **kwargs)


class _RowPlates:
    """The data plate of an AutoGuide, over the rows of the batch.

    Left to itself an AutoGuide subsamples at random, so that the parameters of other rows than those of
    the batch would be trained on it.
    """

    def __init__(self, guide: AutoGuide) -> None:
        self.guide = guide

    def __call__(self, *args: Any, **kwargs: Any) -> list[pyro.plate]:
        rows = current_rows()
        if rows is None:
            return []
        frames = [f for f in self.guide._prototype_frames.values() if f.full_size == rows.total]
        frames.sort(key=lambda f: (f.name != DATA_PLATE, f.dim))
        return [pyro.plate(f.name, rows.total, subsample=rows.indices, dim=f.dim) for f in frames[:1]]


def modules_of(source: Any, model: Any, guide: Any) -> dict[str, nn.Module]:
    """Prefix -> module, each module once; a pair that is one module has no prefix."""
    owners = [source, getattr(model, "__self__", model), getattr(guide, "__self__", guide)]
    found: list[tuple[str, nn.Module]] = []
    for role, owner in zip(("model.", "model.", "guide."), owners, strict=True):
        if isinstance(owner, nn.Module) and all(owner is not m for _, m in found):
            found.append((role, owner))
    if len(found) == 1:
        return {"": found[0][1]}
    return dict(found)


def leaves(root: Tensor) -> Iterator[Tensor]:
    """The leaf tensors that `root` was computed from and that ask for a gradient."""
    stack, seen = [root.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack.extend(parent for parent, _ in node.next_functions)


def explain_unregistered(leaf: Tensor, functions: tuple[Callable[..., Any], ...]) -> str:
    """Why a leaf would never be trained, and what to type."""
    for function in functions:
        for name, module in reachable_modules(function):
            if any(leaf is p for p in module.parameters()):
                return (
                    f"the network '{name}' ({type(module).__name__}) is used but no site registers it, so it "
                    f"would never be trained: write pyro.module('{name}', {name}) in the model or guide"
                )
    return (
        f"a tensor of shape {tuple(leaf.shape)} that asks for a gradient is used but no site registers it, "
        "so it would never be trained: make it a pyro.param; or, if a network has it that every call makes anew, make "
        "that once, outside the program, and register it by pyro.module; or take it as it is by .detach()"
    )


def reachable_modules(function: Any) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a plain function sees: its closure, the globals it names, what it is bound to or was given."""
    while isinstance(function, functools.partial):
        given = {f"argument {i}": value for i, value in enumerate(function.args)} | function.keywords
        yield from _among(given)
        for value in given.values():  # what a handler of Pyro's is put around: poutine.scale(model, ...), say
            if inspect.isroutine(value) or isinstance(value, functools.partial):
                yield from reachable_modules(value)
        function = function.func
    owner = getattr(function, "__self__", function)
    if not isinstance(owner, nn.Module) and not inspect.isfunction(owner):
        yield from _among(getattr(owner, "__dict__", {}))
        function = function if owner is not function else type(owner).__call__
    function = inspect.unwrap(getattr(function, "__func__", function))
    if inspect.isfunction(function):
        closure = inspect.getclosurevars(function)
        yield from _among({**closure.globals, **closure.nonlocals})


def floating_type(*functions: Any) -> torch.dtype:
    """float64 if the networks that plain functions see are of float64, else float32."""
    modules = (module for function in functions for _, module in reachable_modules(function))
    kinds = {p.dtype for module in modules for p in module.parameters() if p.is_floating_point()}
    return torch.float64 if kinds == {torch.float64} else torch.float32


def _among(values: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    yield from ((name, value) for name, value in values.items() if isinstance(value, nn.Module))
