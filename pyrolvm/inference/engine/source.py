"""inductor's C++ for one step, rearranged to take many steps per call, and cut into parts to compile at once.

inductor writes a function that allocates its buffers, makes its views, runs the kernels and frees everything.
For a small model the allocations and views take most of the time. `looped` puts the kernels into a loop and leaves
the rest before it: buffers live as long as the call, and a buffer that takes over another's memory becomes a second
name of it.

Lines are recognised by their form. Any other line stays within the loop.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

LARGEST_KEPT = 2**23
"""Larger buffers (elements) are allocated and freed in each step, as inductor planned, to save memory."""

WRAPPER_WEIGHT, HEADER_LENGTH = 6, 20_000
"""How many characters of kernels take as long to compile as one of the wrapper; as long as their headers beside its."""
PART_LENGTH = 100_000
"""Characters of kernels that are worth another part, which reads the headers again."""
_KERNEL = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
_BEGIN = "    py::gil_scoped_release_simple release;\n"
_END = "} // inductor_entry_impl\n"
_INPUTS = re.compile(r" *auto inputs = steal_from_raw_handles_to_raii_handles\(input_handles, \d+\);")
_INPUT = re.compile(r" *auto (arg\w+) = std::move\(inputs\[\d+\]\);")
_SIZES = re.compile(r" *static constexpr int64_t \*?(int_array_\d+)(?:\[\] = \{(.*)\}|=nullptr);")
_DECLARED = re.compile(r" *AtenTensorHandle (buf\d+)_handle;")
_ALLOCATED = re.compile(
    r" *AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_empty_strided\(\d+, (int_array_\d+), int_array_\d+, \w+, "
    r"cached_torch_device_type_cpu, 0, &(buf\d+)_handle\)\);"
)
_OWNED = re.compile(r" *RAIIAtenTensorHandle (buf\d+)\(\1_handle\);")
_REUSED = re.compile(r" *auto (buf\d+) = std::move\((buf\d+)\);.*")
_VIEW = (
    r"wrap_with_raii_handle_if_needed\("
    r"reinterpret_tensor_wrapper\((\w+), \d+, int_array_\d+, int_array_\d+, \d+L\)\)"
)
_ALIAS = re.compile(rf" *auto (buf\d+) = {_VIEW};(?: (?:buf\d+|arg\w+)\.reset\(\);)? *(?://.*)?")
_RESET = re.compile(r" *(\w+)\.reset\(\);")
_GIVEN = re.compile(r"(\w+)\.release\(\)|std::move\((\w+)\)")
_ANY_VIEW = re.compile(_VIEW)


@dataclass
class _Parts:
    """Lines before the loop and within it, and the names that outlive a step."""

    once: list[str] = field(default_factory=list)
    each: list[str] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)


def looped(code: str) -> str:
    """`code` with `pyrolvm::num_steps` steps in its entry function. Raises `RuntimeError` for code of another form."""
    head, begin, rest = code.partition(_BEGIN)
    body, end, tail = rest.partition(_END)
    if not begin or not end:
        raise RuntimeError("inductor's C++ has another form than is known")
    parts = _Parts()
    lines = body.splitlines()
    given = _given_away(lines)
    for line in lines:
        _place(line, parts, given)
    loop = ["    for (int64_t left = pyrolvm::num_steps; left > 0; --left) {", *parts.each, "    }"]
    return head + begin + "\n".join([*parts.once, *loop]) + "\n" + end + tail


def kernels_apart(code: str) -> tuple[str, list[str]]:
    """The code without its kernels, which it declares, and each of them with its headers."""
    wrapper, end, rest = code.partition(_END)
    before, *kernels = rest.split(_KERNEL)
    return wrapper + end + before, [_KERNEL + kernel for kernel in kernels]


def balanced(first: str, others: Sequence[str], most: int) -> list[str]:
    """Up to `most` parts, the first of which begins with `first`, that take about as long to compile."""
    most = min(most, 2 + sum(map(len, others)) // PART_LENGTH, 1 + len(others))
    made = [[first], *([] for _ in range(most - 1))]
    loads = [WRAPPER_WEIGHT * len(first) + HEADER_LENGTH, *(0 for _ in made[1:])]
    for other in sorted(others, key=len, reverse=True):
        least = loads.index(min(loads))
        made[least].append(other)
        loads[least] += len(other)
    return ["".join(part) for part in made]


def _given_away(lines: list[str]) -> set[str]:
    """Names whose tensor another owner takes and frees."""
    names = set()
    for line in lines:
        if not (_INPUT.fullmatch(line) or _REUSED.fullmatch(line)):
            names |= {name for match in _GIVEN.finditer(line) for name in match.groups() if name}
    if any(name.startswith("arg") for name in names):
        raise RuntimeError("inductor's C++ gives an input away")
    return names


def _place(line: str, parts: _Parts, given: set[str]) -> None:
    """Put the line before the loop or into it, or drop it."""
    if _INPUTS.fullmatch(line):
        parts.once.append(line)
    elif match := _INPUT.fullmatch(line):
        parts.kept.add(match[1])
        parts.once.append(line)
    elif match := _SIZES.fullmatch(line):
        values = [int(n) for n in re.findall(r"\d+", match[2] or "")]
        parts.sizes[match[1]] = math.prod(values)
        parts.once.append(line)
    elif (match := _DECLARED.fullmatch(line)) and match[1] not in given:
        parts.each.append(line)
    elif match := _ALLOCATED.fullmatch(line):
        _allocate(match, parts, given)
    elif (match := _OWNED.fullmatch(line)) and match[1] in parts.kept:
        parts.once.append(line)
    elif (match := _REUSED.fullmatch(line)) and match[2] in parts.kept:
        parts.once.append(f"    auto& {match[1]} = {match[2]};")
        parts.kept.add(match[1])
    elif (match := _ALIAS.fullmatch(line)) and match[2] in parts.kept and match[1] not in given:
        parts.once.append(line.partition(";")[0] + ";")
        parts.kept.add(match[1])
    elif not ((match := _RESET.fullmatch(line)) and match[1] in parts.kept):
        parts.each.append(_with_views(line, parts))


def _allocate(match: re.Match[str], parts: _Parts, given: set[str]) -> None:
    """Move an allocation and its declaration before the loop, unless the buffer is large or given away."""
    size, name = match[1], match[2]
    if name in given or parts.sizes[size] > LARGEST_KEPT:
        parts.each.append(match[0])
        return
    declaration = next(i for i in reversed(range(len(parts.each))) if f"{name}_handle;" in parts.each[i])
    parts.once += [parts.each.pop(declaration), match[0]]
    parts.kept.add(name)


def _with_views(line: str, parts: _Parts) -> str:
    """The line, with views of tensors that outlive the step moved before the loop."""

    def view(match: re.Match[str]) -> str:
        if match[1] not in parts.kept:
            return match[0]
        if match[0] not in parts.views:
            parts.views[match[0]] = f"view_{len(parts.views)}"
            parts.once.append(f"    auto {parts.views[match[0]]} = {match[0]};")
        return parts.views[match[0]]

    return line if line.lstrip().startswith("auto ") else _ANY_VIEW.sub(view, line)
