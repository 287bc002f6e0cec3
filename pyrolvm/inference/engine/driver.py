"""C++ of a folded step: inductor's code of each piece, and a program of calls that a small interpreter runs.

Every piece stands in a namespace of its own. `cpp/driver.h` has the interpreter; what is written here is its program,
as numbers, so that the length of a sequence costs the C++ compiler nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from pyrolvm.inference.engine import inductor
from pyrolvm.inference.engine.pieces import Call, Folded, Number, Slice

CALL, SLICE, DROP = range(3)
_INCLUDE = re.compile(r"^#include .*$", re.MULTILINE)
_RELEASE = "    py::gil_scoped_release_simple release;\n"
TYPES = {torch.float32: "float", torch.float64: "double", torch.int64: "int64_t"}


def source(folded: Folded) -> tuple[str, list[str]]:
    """`inductor_entry_impl` for steps made of pieces, which it declares, and these, each with its headers.

    Raises `RuntimeError` for pieces in Python.
    """
    with inductor.quiet():  # entered once: it takes a while
        codes = [_piece(folded, i) for i in range(len(folded.pieces))]
    once, each = _program(folded)
    strides = [n for kinds in folded.strides for own in kinds for n in (len(own), *own)]
    names = [f"piece_{i}" for i in range(len(codes))]
    entry = "inductor_entry_impl(AtenTensorHandle*, AtenTensorHandle*)"
    lines = [
        "namespace pyrolvm {",
        *(f"namespace {name} {{ void {entry}; }}" for name in names),
        "using Piece = void (*)(AtenTensorHandle*, AtenTensorHandle*);",
        f"#define NUM_VALUES {folded.num_values}",
        *_numbers(folded),
        *(_table(name, table) for name, table in (("once", once), ("each", each), ("strides", strides))),
        f"static const int64_t first_stride[] = {{{', '.join(map(str, _starts(folded)))}}};",
        f"static const Piece pieces[] = {{{', '.join(f'{name}::inductor_entry_impl' for name in names)}}};",
        "}",
    ]
    return "\n".join(lines), codes


def _piece(folded: Folded, index: int) -> str:
    graph = inductor.functional(folded.pieces[index], folded.examples(index))
    inductor.keep_strides(graph, folded.strides[index])
    code = inductor.cpp_source(graph, long=True)
    if "PyGILState" in code or "PyObject" in code:
        raise RuntimeError("a piece of the step calls Python")
    body = _INCLUDE.sub("", code).replace('extern "C"', "static").replace(_RELEASE, "")
    headers = inductor.WRAPPER_HEADER + inductor.KERNEL_HEADER
    return f"{headers}namespace pyrolvm::piece_{index} {{\n{body}\n}}\n"


def _numbers(folded: Folded) -> Iterator[str]:
    """The numbers that stand for values of no dimensions."""
    numbers = [step for step in folded.steps if isinstance(step, Number)]
    yield "static void set_numbers(std::vector<RAIIAtenTensorHandle>& values) {"
    for step in numbers:
        kind = str(step.dtype).removeprefix("torch.")
        yield f"    values[{step.value}] = number<{TYPES[step.dtype]}>(aoti_torch_dtype_{kind}(), {step.number!r});"
    yield "}"


def _table(name: str, numbers: list[int]) -> str:
    return f"static const int64_t {name}[] = {{{', '.join(map(str, [*numbers, -1]))}}};"


def _program(folded: Folded) -> tuple[list[int], list[int]]:
    """What is done once, and in each step: slices of inputs outlive a step."""
    once: list[int] = []
    each: list[int] = []
    last = {v: i for i, step in enumerate(folded.steps) for v in _read(step)}
    lasting = set(range(folded.num_inputs))
    for i, step in enumerate(folded.steps):
        if isinstance(step, Slice):
            (once if step.source in lasting else each).extend(_slice(step))
            if step.source in lasting:
                lasting.add(step.value)
        elif isinstance(step, Call):
            each += [CALL, step.piece, len(step.inputs), *step.inputs, len(step.outputs), *step.outputs]
        else:
            lasting.add(step.value)
        for value in _read(step):
            if last[value] == i and value not in lasting:
                each += [DROP, value]
    return once, each


def _starts(folded: Folded) -> list[int]:
    """Where in the table of strides those of each piece begin."""
    lengths = [sum(1 + len(own) for own in kinds) for kinds in folded.strides]
    return [sum(lengths[:i]) for i in range(len(lengths))]


def _read(step: Call | Slice | Number) -> tuple[int, ...]:
    if isinstance(step, Call):
        return tuple(dict.fromkeys(step.inputs))
    return (step.source,) if isinstance(step, Slice) else ()


def _slice(step: Slice) -> list[int]:
    layout = step.layout
    return [SLICE, step.source, step.value, len(layout.shape), layout.offset, *layout.shape, *layout.stride]
