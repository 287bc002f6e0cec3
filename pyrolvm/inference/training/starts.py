"""Where a run starts: `init=` of `fit`.

"auto"      a fresh model starts from the data where it knows how; else where the program itself puts its parameters; if
            the bound is infinite there, an AutoGuide looks elsewhere: at medians, at draws of the prior, nearer to zero
"own"       where the program itself puts its parameters (`initialise=False` is its older name)
"median"    an AutoGuide at the medians of the prior
"prior"     an AutoGuide at a draw of the prior
{...}       values of sites (of an AutoGuide, its other sites at medians) or of parameters, by name
a fit       the parameters of a `FittedModel` of the same program; its optimiser stays behind
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_median, init_to_sample, init_to_uniform
from torch import Tensor

from pyrolvm.errors import ProgramError, SettingError, did_you_mean, one_of
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.program import Program
from pyrolvm.inference.program.structure import Structure

NAMES = ("auto", "own", "median", "prior")
Strategy = Callable[..., Tensor]
PRIOR_DRAWS = 10
"""Draws of the prior that are tried where the bound is infinite."""


class InfiniteBoundError(ProgramError):
    """The bound is not finite before the first step."""


def checked(init: Any, initialise: bool) -> Any:
    """`init` if it is one. Raises `SettingError`."""
    if isinstance(init, str):
        one_of("init", init, NAMES)
    elif not isinstance(init, Mapping | FittedModel):
        raise SettingError(
            f"init is one of {', '.join(NAMES)}, a dict of values by site, or a fitted model, not "
            f"{type(init).__name__}"
        )
    if initialise:
        return init
    if not isinstance(init, str) or init not in ("auto", "own"):
        raise SettingError("initialise=False is the older name of init='own': give init alone")
    return "own"


def from_data(init: Any) -> bool:
    """Whether a fresh model starts from its data."""
    return isinstance(init, Mapping) or (isinstance(init, str) and init == "auto")


def strategies(init: Any) -> Iterator[Strategy | None]:
    """How an AutoGuide is placed (None: as it places itself), and where to look if the bound is infinite there."""
    if isinstance(init, Mapping):
        yield partial(_given, values={k: torch.as_tensor(v) for k, v in init.items()})
    elif init == "median":
        yield init_to_median
    elif init == "prior":
        yield from [init_to_sample] * (1 + PRIOR_DRAWS)
    elif init == "auto":
        yield from [None, init_to_median, *[init_to_sample] * PRIOR_DRAWS]
        yield from (partial(init_to_uniform, radius=radius) for radius in (2.0, 0.5, 0.1))
    else:
        yield None


def _given(site: Any, values: Mapping[str, Tensor]) -> Tensor:
    fallback = init_to_median(site)
    if site["name"] not in values:
        return fallback
    value = values[site["name"]].to(device=fallback.device, dtype=fallback.dtype)
    try:
        return value.expand(fallback.shape).clone()
    except RuntimeError:
        raise ProgramError(
            f"init has '{site['name']}' in the shape {list(value.shape)}, and the site is {list(fallback.shape)}"
        ) from None


def set_values(program: Program, structure: Structure, init: Any) -> None:
    """The part of `init` that goes to parameters rather than to an AutoGuide."""
    if isinstance(init, FittedModel):
        own = program.tensors()
        program.load(
            {k: v.to(program.device) for k, v in init.program.tensors().items() if k in own or _is_own(k)}
        )
    elif isinstance(init, Mapping):
        placed = {s.name for s in structure.latents} if program.auto_guide is not None else set()
        for name in init.keys() - placed:
            _set(program, name, torch.as_tensor(init[name]), placed)
    elif isinstance(init, str) and init in ("median", "prior") and program.auto_guide is None:
        raise SettingError(
            f"init='{init}' places an AutoGuide, and this guide has parameters of its own: init={{name: value}} sets "
            "them, init='own' leaves them as they are"
        )


def _is_own(name: str) -> bool:
    return not name.startswith("objective.")


def _set(program: Program, name: str, value: Tensor, sites: set[str]) -> None:
    if name not in program.parameters:
        known = [*sites, *program.parameters]
        near = did_you_mean(name, known)
        raise SettingError(
            f"init names '{name}', which is no site or parameter: {near}choose from {', '.join(known)}"
        )
    parameter, transform = program.parameters[name], program.transform_of(name)
    with torch.no_grad():
        value = value.to(device=parameter.device, dtype=parameter.dtype)
        value = value if transform is None else transform.inv(value)
        if value.numel() not in (1, parameter.numel()):
            raise SettingError(
                f"init has '{name}' in the shape {list(value.shape)}, and it is {list(parameter.shape)}"
            )
        parameter.copy_(
            value.expand(parameter.shape) if value.numel() == 1 else value.reshape(parameter.shape)
        )
