"""The arguments of a model's constructor, and the source of data, from the words of a command line."""

from __future__ import annotations

import typing
from inspect import Parameter
from pathlib import Path
from typing import Any

from pyrolvm.errors import SettingError, did_you_mean
from pyrolvm.runs import NamedModel, Source, open_run
from pyrolvm.runs.source import CHOICES
from pyrolvm.shell.options import FIT, PREPARING
from pyrolvm.shell.values import annotation_text, read_as

TRANSFORMS = ("standardise", "standardise_overall", "binarise")


def constructor_arguments(
    named: NamedModel, words: dict[str, str], settings: dict[str, Any], from_data: dict[str, Any]
) -> dict[str, Any]:
    """The constructor's arguments: by flag, by --set, and what the data give. Raises `SettingError`."""
    known = named.options
    free = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for name in [*words, *settings]:
        if name in words and name in settings:
            raise SettingError(f"{name} is given twice: by its flag and by --set")
        if named.cls is None:
            raise SettingError(
                f"{named.text} is built already, so it takes no {_flag(name)}: name a class instead"
            )
        if name in named.from_data:
            raise SettingError(f"{name} is taken from the data: leave it out")
        if name not in known and not free:
            raise SettingError(_unknown(named, name))
    needed = [n for n, p in known.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    for name in needed:
        if name not in words and name not in settings:
            raise SettingError(f"{named.name} needs {_flag(name)}: e.g. {_flag(name)} 2")
    try:
        hints = typing.get_type_hints(named.cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError, AttributeError):  # annotations that mean nothing at run time
        hints = {}
    read = {n: read_as(n, annotation_text(hints.get(n, Parameter.empty)), w) for n, w in words.items()}
    return from_data | read | settings


def source_of(data: str, options: dict[str, Any]) -> Source:
    """DATA and the options that choose among it."""
    chosen = {name: options[name] for name in CHOICES if name in options}
    return Source(data, **chosen, options=options.get("data_option", {}))


def run_of_codes(run: str | None, named: NamedModel, own: dict[str, str], options: dict[str, Any]) -> Any:
    """The run whose codes a prior is fitted to, None if there is none. Raises `SettingError` if it cannot be one."""
    if run is None:
        return None
    first = open_run(Path(run))
    if type(first.fitted.model) is not named.cls or not hasattr(first.fitted.model, "with_prior"):
        raise SettingError(
            f"codes_of={run} is a run of {type(first.fitted.model).__name__}: give the run of a model with a codebook, "
            "and its name as MODEL"
        )
    if "prior" not in own:
        raise SettingError(f"codes_of={run} needs the prior to fit to its codes, e.g. prior=pixelcnn")
    other = next((n for n in [*own, *options.get("set", {})] if n != "prior"), None)
    if other is not None:
        raise SettingError(f"{other} is that of codes_of={run}: leave it out")
    prepared = next((n for n in TRANSFORMS if options.get(n)), None)
    if prepared is not None:
        raise SettingError(f"the data are prepared as those of codes_of={run} were: leave {prepared} out")
    return first


def held(first: Any) -> dict[str, Any]:
    """The constructor's arguments of a model of which the prior alone is trained."""
    return {} if first is None else {**first.fitted.model.constructor, "hold": True}


def _unknown(named: NamedModel, name: str) -> str:
    hint = did_you_mean(name, [*named.options, *FIT, *PREPARING], _flag)
    has = f"it has {', '.join(map(_flag, named.options))}" if named.options else "it has none"
    return f"{named.name} has no option {_flag(name)}: {hint}{has}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
