"""Options of the shell made from the signatures of the functions that its commands call.

Names, types, defaults, choices and help are those of the function and its docstring. They are parsed from the source:
to import it would import torch, which `pyrolvm --help` need not wait for.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from pyrolvm.shell.values import Kinds, kinds_of, read_as

ROOT = Path(__file__).parents[1]
BASE = "pyrolvm.models.base"
SHORT: dict[str, tuple[str, ...]] = {
    "num_steps": ("--steps", "-n"),
    "num_epochs": ("--epochs",),
    "learning_rate": ("--lr",),
    "batch_size": ("-b",),
    "latent_dim": ("-l",),
    "num_components": ("-k",),
    "lambda_": ("--lambda",),
    "num_samples": ("-s",),
    "num_particles": ("--particles",),
    "num_restarts": ("--restarts",),
    "checkpoint_seconds": ("--checkpoint-every",),
}
"""Other spellings of an option."""
FROM_DATA = ("data_dim", "num_classes", "condition_dim")
"""Parameters of models that the data give."""


@dataclass(frozen=True)
class Option:
    """A parameter of a function, as the command line shows it.

    Parameters
    ----------
    name : str
        Of the parameter: `num_steps` is `--num-steps`.
    annotation : str
        As the source writes it.
    default : str
        The default's source; empty if there is none or it is None.
    help : str
        Its description in the docstring.
    """

    name: str
    annotation: str = ""
    default: str = ""
    help: str = ""
    choices: tuple[str, ...] = ()
    panel: str | None = None
    models: list[str] = field(default_factory=list)

    @property
    def kinds(self) -> Kinds:
        """The types of value that can be written for it."""
        return kinds_of(self.annotation)

    def read(self, value: Any) -> Any:
        """The value that the words on the command line stand for. Raises `SettingError`."""
        return value if isinstance(value, bool) else read_as(self.name, self.annotation, value)

    def parameter(self) -> inspect.Parameter:
        """What typer makes the option from; None stands for not given, so that Python's default holds."""
        flag = f"--{self.name.replace('_', '-')}"
        kinds, choices = self.kinds, self.choices or self.kinds.choices
        shown: dict[str, Any] = {"help": self.help, "rich_help_panel": self.panel}
        shown["show_default"] = self.default or False
        annotation: Any = bool | None
        if kinds.is_flag:
            flags: tuple[str, ...] = (f"{flag}/--no-{flag[2:]}",)
        else:
            flags = (flag, *SHORT.get(self.name, ()))
            annotation = list[str] if kinds.is_dict else str | None
            shown["metavar"] = "|".join(choices) if choices else kinds.metavar
            shown["autocompletion"] = words(choices) if choices else None
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=[] if kinds.is_dict else None,
            annotation=Annotated[annotation, typer.Option(*flags, **shown)],
        )


def listed(*options: Option) -> dict[str, Option]:
    """The options by name."""
    return {option.name: option for option in options}


def words(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """A completer among `choices`."""
    return lambda incomplete: [w for w in choices if w.startswith(incomplete)]


@cache
def options_of(
    file: str,
    name: str,
    leave_out: tuple[str, ...] = (),
    panel: str | None = None,
    written: tuple[tuple[str, str], ...] = (),
) -> dict[str, Option]:
    """The options of `name` ("function", "Class" or "Class.method") in a file of the package.

    `written`: (parameter, annotation) of objects that the shell makes from words.
    """
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    node = _find(tree, name.split("."))
    documented = _described(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef) and not any(getattr(n, "name", "") == "__init__" for n in node.body):
        return {}
    function = _find(node, ["__init__"]) if isinstance(node, ast.ClassDef) else node
    found = {}
    for argument, default in _arguments(function.args):
        text = dict(written).get(argument.arg) or _annotation(argument.annotation, tree)
        kind, words_ = documented.get(argument.arg, ("", ""))
        if argument.arg not in leave_out and kinds_of(text):
            choices = tuple(re.findall(r"[\"']([^\"']+)[\"']", kind)) if kind.startswith("{") else ()
            found[argument.arg] = Option(argument.arg, text, _default(default), words_, choices, panel)
    return found


def keys_of(file: str, name: str) -> list[str]:
    """The keys of a dictionary that is written out, with its type, in a file of the package."""
    body: list[Any] = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    found: Any = next(n.value for n in body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == name)
    return [key.value for key in found.keys]


def _alias(name: str, tree: ast.Module) -> ast.expr | None:
    """What a name is assigned in a file, or in the file of the package that it is imported from."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in node.targets
        ):
            return node.value
        if isinstance(node, ast.ImportFrom) and any(a.name == name for a in node.names):
            file = _file(node.module)
            return None if file is None else _alias(name, ast.parse(file.read_text(encoding="utf-8")))
    return None


def _file(module: str | None) -> Path | None:
    """The file of a module of the package."""
    package, _, path = str(module).partition(".")
    file = ROOT / f"{path.replace('.', '/')}.py"
    return file if package == ROOT.name and file.is_file() else None


def _find(node: Any, path: list[str]) -> Any:
    for name in path:
        node = next(n for n in node.body if getattr(n, "name", None) == name)
    return node


def _arguments(arguments: ast.arguments) -> list[tuple[ast.arg, ast.expr | None]]:
    """The parameters but `self`, each with its default if it has one."""
    positional = [*arguments.posonlyargs, *arguments.args]
    missing = [None] * (len(positional) - len(arguments.defaults))
    defaults = [*missing, *arguments.defaults, *arguments.kw_defaults]
    pairs = zip([*positional, *arguments.kwonlyargs], defaults, strict=True)
    return [(argument, default) for argument, default in pairs if argument.arg != "self"]


def _annotation(node: ast.expr | None, tree: ast.Module) -> str:
    """The annotation's source, a name that stands for a Literal put in full."""
    if isinstance(node, ast.Name):
        node = _alias(node.id, tree) or node
    return "" if node is None else ast.unparse(node)


def _default(node: ast.expr | None) -> str:
    text = "" if node is None else ast.unparse(node)
    return "" if text in ("None", "()") else text.strip("'\"")


def _described(docstring: str) -> dict[str, tuple[str, str]]:
    """Parameter -> (type, description) of a numpydoc docstring; `a, b : type` describes both."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=\n\S[^\n]*\n-+\n|\n\n\S|\Z)", docstring, re.S | re.M)
    found: dict[str, tuple[str, str]] = {}
    for block in re.split(r"\n(?=\S)", section[1]) if section else []:
        head, _, rest = block.partition("\n")
        names, sign, kind = head.partition(":")
        if not names.endswith(" "):  # `name: description`, in one
            rest, kind = f"{kind} {rest}", ""
        text = " ".join(rest.replace("`", "").split())
        found |= {n.strip(): (kind.strip(), text) for n in names.split(",")} if sign or rest else {}
    return found


@cache
def model_options(panel: str) -> dict[str, Option]:
    """The constructors' options of all models of the suite, each with the models that have it."""
    found: dict[str, Option] = {}
    for file, model in _registered():
        for name, option in options_of(file, model, FROM_DATA, panel).items():
            first = found.setdefault(name, replace(option, models=[], default=""))
            first.models.append(model)
    return {n: replace(o, help=f"{o.help} ({', '.join(o.models)})".strip()) for n, o in found.items()}


def _registered() -> list[tuple[str, str]]:
    """(file, class) of the models: the imports of `models/__init__.py` above the registry, which are the registry."""
    body = ast.parse((ROOT / "models/__init__.py").read_text(encoding="utf-8")).body
    above = itertools.takewhile(lambda node: not isinstance(node, ast.AnnAssign), body)
    lines = [node for node in above if isinstance(node, ast.ImportFrom) and node.module != BASE]
    found = [(_file(node.module), a.name) for node in lines for a in node.names]
    return [(str(file.relative_to(ROOT)), name) for file, name in found if file is not None]


def sharing(*groups: dict[str, Option]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add options to a command that takes them as `**shared`; its own parameters stand where both have a name."""

    def share(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own}
        added = {
            o.name: o.parameter() for group in reversed(groups) for o in group.values() if o.name not in names
        }
        command.__signature__ = signature.replace(parameters=[*own, *added.values()])  # type: ignore[attr-defined]
        command.__annotations__ |= {name: p.annotation for name, p in added.items()}
        return command

    return share


def given(words_: dict[str, Any], *groups: dict[str, Option]) -> dict[str, Any]:
    """The values of the options of `groups` that were given on the command line."""
    known = {name: option for group in groups for name, option in group.items()}
    return {n: known[n].read(v) for n, v in words_.items() if n in known and v is not None and v != []}
