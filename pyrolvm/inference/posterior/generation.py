"""New data from a fitted pair: local latents from the prior, global ones from the guide."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrolvm.data.arguments import leaves
from pyrolvm.data.arrays import as_batch, as_tensor
from pyrolvm.data.batch import Batch
from pyrolvm.errors import DataError, ProgramError, SettingError
from pyrolvm.inference.posterior.record import Record
from pyrolvm.inference.posterior.rows import num_carrying
from pyrolvm.inference.posterior.suiting import carries
from pyrolvm.inference.program.draws import tidy
from pyrolvm.inference.program.handlers import kind_of, location
from pyrolvm.inference.program.pair import Pair
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.running import explained
from pyrolvm.inference.program.structure import sample_sites


def generated(fitted: Record, num_samples: int, given: Any, mean: bool) -> dict[str, Tensor]:
    """Observed site -> [num_samples, ...], each row at a draw of the global latents of its own."""
    structure, pair = fitted.structure, _pair(fitted, num_samples, given)
    rows = structure.chunkable
    with explained(pair.batch, "model"):
        if rows and not structure.global_latents:
            return _made(pair, {}, mean)
        singles = pair.split(1) if rows else [pair] * num_samples
        parts = [_made(single, _global_draw(fitted), mean) for single in singles]
    join = torch.cat if rows else torch.stack
    return {n: join([p[n] for p in parts]) for n in parts[0]}


def _pair(fitted: Record, num_samples: int, given: Any) -> Pair:
    """The pair that makes `num_samples` rows: on what is given, or on placeholders for the data."""
    program, structure = fitted.program, fitted.structure
    rows = torch.arange(num_samples, device=program.device)
    if given is not None:
        batch = _conditioned(fitted, given, num_samples)
    elif structure.chunkable and num_carrying(fitted) > 1:
        raise SettingError(
            "the program has several arguments, and sample() does not know which values to condition on: pass "
            "given={...} with all arguments but the data, e.g. sample(3, given={'y': labels})"
        )
    elif not structure.chunkable:
        batch = fitted.real_rows
    elif program.contract is not None:  # a model of the contract generates when it is given None
        batch = Batch((None,), rows=rows, total=num_samples)
    else:
        example = fitted.real_rows
        batch = example.take(rows % example.num_rows).numbered(rows).of(num_samples)
    return Pair(program, structure, batch)


def _global_draw(fitted: Record) -> dict[str, Tensor]:
    """The global latents, drawn from the guide."""
    names = {s.name for s in fitted.structure.global_latents}
    if not names:
        return {}
    nothing = fitted.example is None and fitted.program.contract is not None
    example = Batch((None,)) if nothing else fitted.real_rows
    guide = Pair(fitted.program, fitted.structure, example.of(fitted.num_rows)).guide()
    return {s["name"]: s["value"] for s in sample_sites(guide) if s["name"] in names}


def _conditioned(fitted: Record, given: Any, num_samples: int) -> Batch:
    """The arguments of a program whose data are to be made: what is given, the settings of its call, else None.

    Values of one row stand for all. Raises `DataError` for other numbers of rows.
    """
    program = fitted.program
    taken = {
        n: p
        for n, p in inspect.signature(program.model).parameters.items()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    settings = _settings(fitted.call, list(taken))
    passed = _by_name(program, given, list(taken), settings)
    rows = torch.arange(num_samples, device=program.device)
    usual = {name: None if p.default is p.empty else p.default for name, p in taken.items()}
    made = {
        n: v if n in settings and not isinstance(v, Tensor) else _by_row(passed, n, rows, program)
        for n, v in passed.kwargs.items()
    }
    values = {name: (usual | settings | made)[name] for name in taken}
    kwargs = {name: values.pop(name) for name, p in taken.items() if p.kind is p.KEYWORD_ONLY}
    places = {name: f"args[{i}]" for i, name in enumerate(values)}
    shared = settings.keys() - passed.kwargs.keys()
    parts = [part for name in shared for part, _ in leaves(settings[name], places.get(name, name))]
    return Batch(tuple(values.values()), kwargs, rows=rows, total=num_samples, shared=frozenset(parts))


def _by_name(program: Program, given: Any, names: list[str], settings: Mapping[str, Any]) -> Batch:
    """What is given, by the model's names: by position it is the last of the arguments that are no settings."""
    if not isinstance(given, Mapping):
        found = as_batch(given, program.dtype, program.device).args
        data = [name for name in names if name not in settings]
        return Batch((), dict(zip(data[len(data) - len(found) :], found, strict=True)))
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise SettingError(f"given has '{unknown[0]}', but the model's arguments are {', '.join(names)}")
    return as_batch(dict(given), program.dtype, program.device)


def _by_row(passed: Batch, name: str, rows: Tensor, program: Program) -> Any:
    """The value of an argument for each of the rows; what is neither a number nor a tensor as it is."""
    value = passed.kwargs[name]
    if isinstance(value, int | float):
        dtype = program.dtype if isinstance(value, float) else None
        value = as_tensor(value, name, passed).to(program.device, dtype)
    if not isinstance(value, Tensor):
        return value
    if value.dim() and len(value) not in (1, len(rows)):
        raise DataError(f"given['{name}'] has {len(value)} rows: pass 1, or {len(rows)}, the rows to make")
    alone = not value.dim() or len(value) == 1
    return value.reshape(1, *value.shape[1:])[rows * 0] if alone else value


def _settings(call: Batch | None, names: list[str]) -> dict[str, Any]:
    """What a call passes beside rows of data, by the model's names."""
    if call is None:
        return {}
    by_position = zip(names, call.args, strict=False)
    found = {name: v for i, (name, v) in enumerate(by_position) if not carries(call, i)}
    return found | {name: v for name, v in call.kwargs.items() if not carries(call, name)}


def _made(pair: Pair, shared: dict[str, Tensor], mean: bool) -> dict[str, Tensor]:
    """Observed site -> a draw, or the mean of its distribution, at one draw of the global latents."""
    model = pair.simulate(given=shared)
    if mean:
        return locations(pair, model)
    return {s["name"]: tidy(pair.structure, s, s["value"])[0] for s in _data_sites(pair, model)}


def locations(pair: Pair, model: Trace) -> dict[str, Tensor]:
    """Observed site -> the mean of its distribution in a trace of the model: [rows, ...]."""
    found = {}
    for site in _data_sites(pair, model):
        try:
            found[site["name"]] = tidy(pair.structure, site, location(site["fn"]))[0]
        except NotImplementedError:
            raise ProgramError(
                f"the distribution of '{site['name']}' ({kind_of(site['fn'])}) has neither a mean nor sample(): "
                "write one of them in its class"
            ) from None
    return found


def _data_sites(pair: Pair, model: Trace) -> list[Any]:
    names = {s.name for s in pair.structure.observed}
    return [s for s in sample_sites(model) if s["name"] in names]
