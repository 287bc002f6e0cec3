"""Arguments and options that commands share, and the command line that repeats a command."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from pyrolvm.shell.completion import complete_data, complete_model

MODEL, TRAINING, DATA, OUTPUT = "Model", "Training", "Data", "Output"
SILENT = ("resume", "overwrite", "quiet")
"""Options that do not change the numbers of a run, left out of the command that repeats it."""

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model's name (see `pyrolvm models`), or file.py:ClassName for a pair of your own.",
        autocompletion=complete_model,
    ),
]
DataName = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A data set's name (see `pyrolvm datasets`), or a csv, tsv, parquet, npy, npz, idx or h5ad file.",
        autocompletion=complete_data,
    ),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")]
Columns = Annotated[str | None, typer.Option(metavar="A,B", help="Columns to take.", rich_help_panel=DATA)]
Labels = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Column to keep apart as labels.", rich_help_panel=DATA)
]
Key = Annotated[
    str | None, typer.Option(help="Array of an npz file, or layer of an h5ad file.", rich_help_panel=DATA)
]
Header = Annotated[
    bool | None,
    typer.Option("--header/--no-header", help="Whether a csv's first row is names.", rich_help_panel=DATA),
]
DataOption = Annotated[
    list[str],
    typer.Option(
        metavar="NAME=VALUE", help="Option of a named data set, e.g. split=test.", rich_help_panel=DATA
    ),
]
OwnModel = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.PY:NAME", help="The pair of your own that the run is of; the file is executed."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the random numbers.")]

READING: dict[str, tuple[Any, Any]] = {
    "columns": (Columns, None),
    "labels": (Labels, None),
    "key": (Key, None),
    "header": (Header, None),
    "data_option": (DataOption, []),
}
"""Options of every command that reads DATA: name -> (annotation, default)."""
ASKING: dict[str, tuple[Any, Any]] = {"seed": (Seed, 0), "model": (OwnModel, None), "device": (Device, "cpu")}
"""Options of every command that asks something of a run."""


def sharing(*groups: dict[str, tuple[Any, Any]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add options to a command that takes them as `**shared`; typer reads them from its signature."""
    added = {name: option for group in groups for name, option in group.items()}

    def share(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in added.items()
        ]
        command.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        command.__annotations__ |= {name: annotation for name, (annotation, _) in added.items()}
        return command

    return share


def namespace(own: dict[str, Any]) -> SimpleNamespace:
    """The arguments of a command, those of `sharing` among the others."""
    shared = own.pop("shared")
    return SimpleNamespace(**own, **shared)


def repeatable(context: Any) -> str:
    """The command line that does the same again, from what was said on this one."""
    said = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if source is not None and source.name == "COMMANDLINE" and parameter.name not in SILENT:
            said += _words(parameter, context.params[parameter.name])
    return shlex.join(["pyrolvm", context.info_name, *said])


def _words(parameter: Any, value: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [str(value)]
    if isinstance(value, bool):
        return [parameter.opts[0] if value else parameter.secondary_opts[0]]
    values = value if isinstance(value, list | tuple) else [value]
    return [word for v in values for word in (parameter.opts[0], str(v))]
