"""What to type where a program fails: the commonest mistakes, told by what Pyro and torch say of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace

from pyrolvm.data.batch import Batch
from pyrolvm.inference.program.structure import sample_sites


def _plate(found: re.Match[str], batch: Batch) -> str:
    plate, site, dim, size, other = found.groups()
    if int(other) == batch.num_rows == batch.total_rows:
        return (
            f"'{site}' has the {other} rows of the data and the plate '{plate}' has {size}: make it of {other}, or, if "
            f"'{plate}' is another plate of the program, give this one a name of its own"
        )
    if int(other) == batch.total_rows != int(size):
        return (
            f"something at '{site}' is of all {other} rows and no argument, so that it does not come with the {size} "
            "rows of a batch: pass it to model and guide as an argument"
        )
    return (
        f"the batch of '{site}' has {other} entries where the plate '{plate}' has {size} rows (dimension {dim}): if "
        f"the {other} belong to one datum, write .to_event(1) at '{site}'"
    )


def _dtypes(found: re.Match[str], _: Batch) -> str:
    kinds = {"float": "float32", "double": "float64"}
    one, other = (kinds.get(kind.lower(), "integers") for kind in found.groups())
    if "integers" in (one, other):
        return "the data are integers where a network takes floats: write x.float() in the program"
    return (
        f"one of them is {one} and the other {other}: write network.float() before the fit, or pass dtype='float64' to "
        "fit and write network.double()"
    )


def _types(found: re.Match[str], _: Batch) -> str:
    return (
        f"numbers of {found.group(1)} meet others of {found.group(2)}: make all of them alike, such as by .double() at "
        "the program's float32 constants"
    )


def _device(_: re.Match[str], batch: Batch) -> str:
    where = next((t.device for _, t in batch.tensors()), "cpu")
    return (
        f"a network or a tensor of the program lies on another device than the data, which are on '{where}': write "
        f"network.to('{where}') before the fit, or pass device= to fit"
    )


def _events(found: re.Match[str], _: Batch) -> str:
    wanted, there = map(int, found.groups())
    return f"a .to_event({wanted}) stands at a distribution of {there} dimensions: write .to_event({there}) or less"


def _named_twice(found: re.Match[str], _: Batch) -> str:
    return (
        f"give one of the two sites '{found.group(1)}' another name; if that is a plate, make it once, "
        "plate = pyrolvm.data_plate(x), and write `with plate:` twice"
    )


def _real(_: re.Match[str], batch: Batch) -> str:
    for name, tensor in batch.tensors():
        if tensor.is_floating_point() and tensor.isnan().any():
            where = tensor.isnan().nonzero()[0].tolist()
            return f"{name} holds NaN at index {where}: drop or fill such rows, or leave them out by poutine.mask"
    return "a network gives NaN or infinite values: standardise the data, or start its weights smaller"


def _positive(found: re.Match[str], _: Batch) -> str:
    return (
        f"'{found.group(1)}' must be positive: give its pyro.param constraint=dist.constraints.positive, or pass a "
        "network's output through softplus or exp"
    )


def _columns(found: re.Match[str], _: Batch) -> str:
    return f"a layer that takes {found.group(3)} columns gets {found.group(2)}: give the network the width of its data"


def _observed(found: re.Match[str], _: Batch) -> str:
    return f"the guide observes '{found.group(1)}': take obs= off there, as the guide draws the latents"


def _discrete(found: re.Match[str], _: Batch) -> str:
    name = found.group(1)
    return (
        f"to have '{name}' summed out, mark it in the model by infer={{'enumerate': 'parallel'}}; else write a guide "
        f"that samples '{name}'"
    )


def _arguments(_: re.Match[str], batch: Batch) -> str:
    names = [f"args[{i}]" for i in range(len(batch.args))] + list(batch.kwargs)
    return f"model and guide are called with the same arguments, here {', '.join(names) or 'none'}: let both take them"


def _from_one(found: re.Match[str], batch: Batch) -> str:
    size = int(found.group(1))
    for name, t in batch.tensors():
        if not t.is_floating_point() and t.numel() and (int(t.min()), int(t.max())) == (1, size):
            return f"{name} counts from 1 to {size}, and an index counts from 0: pass {name} - 1"
    return _numbers(found, batch)


def _index(_: re.Match[str], batch: Batch) -> str:
    names = [n for n, t in batch.tensors() if t.is_floating_point() and bool((t == t.round()).all())]
    return f"{' or '.join(names) or 'a tensor of floats'} is used as an index: write .long() there in the program"


def _of_torch(found: re.Match[str], _: Batch) -> str:
    return f"a {found.group(1)} of torch.distributions stands in the program: take pyro.distributions.{found.group(1)}"


def _numbers(found: re.Match[str], batch: Batch) -> str:
    numbers = [name for name, t in batch.tensors() if t.dtype is torch.int64 and t.dim() == 1]
    if batch.num_rows == batch.total_rows or int(found.group(1)) != batch.num_rows or not numbers:
        return ""
    name = numbers[0].removeprefix("args[").removesuffix("]")
    return (
        f"if the program takes rows out of the data by the numbers in {numbers[0]}, a minibatch may part these alone: "
        f"pass rows={name if name.isdigit() else repr(name)} to fit, so that the other arguments stay whole"
    )


HINTS: tuple[tuple[str, Callable[[re.Match[str], Batch], str]], ...] = (
    (r"Shape mismatch inside plate\('(\w+)'\) at site (\S+) dim (-\d+), (\d+) vs (\d+)", _plate),
    (r"same dtype, but got:? (\w+) and (\w+)", _dtypes),
    (r"expected scalar type (\w+) but found (\w+)", _types),
    (r"is not on the expected device|to be on the same device", _device),
    (r"reinterpreted_batch_ndims <= len\(base_distribution.batch_shape\), actual (\d+) vs (\d+)", _events),
    (r"Expected parameter \w+ .* to satisfy the constraint (?:Real\(\)|IndependentConstraint\(Real)", _real),
    (r"Expected parameter (\w+) .* to satisfy the constraint GreaterThan(?:Eq)?\(lower_bound=0", _positive),
    (r"site (\S+) must be sampled in trace", _observed),
    (r"Continuous inference cannot handle discrete sample site '(\S+)'", _discrete),
    (r"\(\) (?:takes \d+ positional|missing \d+ required|got an unexpected keyword)", _arguments),
    (r"Multiple sample sites named '(\S+)'", _named_twice),
    (r"out of bounds for dimension 0 with size (\d+)", _from_one),
    (r"tensors used as indices must be", _index),
    (r"'(\w+)' object has no attribute '(?:event_dim|has_enumerate_support|expand_by)'", _of_torch),
)
"""What an error says, and what to type."""
LAST = ((r"mat1 and mat2 shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x(\d+)\)", _columns),)
"""The same, where no latent has another shape in the guide than in the model, which explains it better."""


FREE_DIM = -8
"""Left of all plates that a program is likely to have."""
Hints = tuple[tuple[str, Callable[[re.Match[str], Batch], str]], ...]


def hint_of(error: Exception, batch: Batch, hints: Hints = HINTS) -> str:
    """What to type, on a line of its own; empty for an error that is not known."""
    for pattern, hint in hints:
        if (found := re.search(pattern, str(error))) and (typed := hint(found, batch)):
            return "\n" + typed
    return ""


def reason_of(error: Exception) -> str:
    """What an error says, without Pyro's table of shapes and without values by the page."""
    return re.split(r"\n\s*Trace Shapes:|, but found invalid values:", str(error))[0].strip()


def shapes_apart(guide: Trace, model: Callable[..., Any], batch: Batch) -> str:
    """A latent whose values have another shape in the guide than in the model alone, if there is one."""
    with pyro.poutine.trace() as alone, suppress(Exception):  # it may fail later, or run by luck
        model(*batch.args, **batch.kwargs)
    nodes: dict[str, Any] = alone.trace.nodes
    for site in sample_sites(guide):
        other = nodes.get(site["name"])
        if other is not None and other["value"].shape != site["value"].shape:
            shapes = [list(s["value"].shape) for s in (other, site)]
            return (
                f"\n'{site['name']}' is {shapes[0]} in the model and {shapes[1]} in the guide: give its distribution "
                "the same shape in both"
            )
    return ""


def summed_out_alone(program: Any, batch: Batch) -> str:
    """Whether the pair runs where its discrete latents are summed out, though not at one value of them."""
    with suppress(Exception), pyro.poutine.enum(first_available_dim=FREE_DIM):
        drawn = pyro.poutine.trace(program.guide).get_trace(*batch.args, **batch.kwargs)
        replayed = pyro.poutine.replay(program.model, trace=drawn)
        made = pyro.poutine.trace(replayed).get_trace(*batch.args, **batch.kwargs)
        sites = [s for t in (made, drawn) for s in sample_sites(t)]
        names = list(dict.fromkeys(s["name"] for s in sites if "_enumerate_dim" in s["infer"]))
        if names:
            return (
                f"\nthe model runs where its discrete latents ({', '.join(names)}) are summed out, and fails at one "
                f"value of them, which all questions need: index by pyro.ops.indexing.Vindex(...)[..., {names[-1]}], "
                "which takes both"
            )
    return ""


def why_fails(guide: Trace, program: Any, batch: Batch) -> str:
    """Why the model fails after this run of the guide, beside what its error says; empty if nothing is known."""
    return shapes_apart(guide, program.model, batch) or summed_out_alone(program, batch)
