"""What words on the command line stand for, by the annotation of the parameter that they are for."""

from __future__ import annotations

import ast
import inspect
import math
import numbers
from dataclasses import dataclass
from typing import Any

from pyrolvm.errors import SettingError, one_of

DICTS = ("dict", "Mapping")
LISTS = ("Sequence", "list", "tuple", "Iterable")
WORDS = {"true": True, "false": False}
METAVARS = {"int": "INT", "float": "FLOAT", "list": "A,B", "dict": "NAME=VALUE", "str": "TEXT"}


@dataclass(frozen=True)
class Kinds:
    """The alternatives of an annotation that can be written as words: "int", "float", "str", "bool", ..."""

    names: tuple[str, ...]
    choices: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(set(self.names) - {"None"})

    @property
    def is_flag(self) -> bool:
        """Whether the option takes no value."""
        return "bool" in self.names

    @property
    def is_dict(self) -> bool:
        """Whether the option is NAME=VALUE, any number of times."""
        return "dict" in self.names

    @property
    def metavar(self) -> str:
        """What stands for the value in the help."""
        plain = [METAVARS[n.partition("[")[0]] for n in self.names if n.partition("[")[0] in METAVARS]
        return "|".join(plain) or "VALUE"


def kinds_of(annotation: str) -> Kinds:
    """The alternatives of an annotation; those that no words can stand for (callables, tensors) are left out."""
    if not annotation:
        return Kinds(("Any",))
    names: list[str] = []
    choices: list[str] = []
    for part in _alternatives(ast.parse(annotation, mode="eval").body):
        base = part.value if isinstance(part, ast.Subscript) else part
        name = getattr(base, "id", None) or getattr(base, "attr", None) or str(getattr(base, "value", ""))
        if name == "Literal" and isinstance(part, ast.Subscript):
            choices += [str(v) for v in _elements(ast.literal_eval(part.slice))]
            names.append("Literal")
        elif name in DICTS:
            names.append("dict")
        elif name in LISTS:
            names.append("list[str]" if ast.unparse(part).endswith("[str]") else "list")
        elif name in ("int", "float", "str", "bool", "None", "Any"):
            names.append(name)
    return Kinds(tuple(names), tuple(choices))


def _alternatives(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        return [*_alternatives(node.left), *_alternatives(node.right)]
    # at run time a union with a Literal is typing.Optional[...]
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).removeprefix("typing.") in (
        "Optional",
        "Union",
    ):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice, ast.Constant(None)]
        return [a for part in inner for a in _alternatives(part)]
    return [node]


def annotation_text(annotation: Any) -> str:
    """An annotation, or what became of it at run time, as its source writes it."""
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _elements(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def read_as(name: str, annotation: str, words: Any) -> Any:
    """The value of the parameter `name` that `words` (one, or a list of NAME=VALUE) stand for.

    Raises `SettingError` if they stand for nothing of the annotated types.
    """
    kinds = kinds_of(annotation)
    if kinds.is_dict:
        return dict(map(read_setting, words))
    value, found = literal(words), set(kinds.names)
    if words in kinds.choices or (value is None and "None" in found):
        return words if words in kinds.choices else None
    if isinstance(value, bool):
        if found & {"bool", "Any"}:
            return value
    elif isinstance(value, numbers.Integral) and "int" in found:
        return int(value)
    elif isinstance(value, numbers.Real) and "float" in found and math.isfinite(value):
        return float(value)
    if "list[str]" in found:
        return [part.strip() for part in words.split(",") if part.strip()]
    if "list" in found and not isinstance(value, str | None):
        return value if isinstance(value, list) else [value]
    if found & {"str", "Any"}:
        return words if "str" in found else value
    if kinds.choices:
        return one_of(name, words, kinds.choices)
    raise SettingError(f"{name}={words} must be of type {annotation}")


def read_setting(text: str) -> tuple[str, Any]:
    """`name=value` as a pair; the value a number, a list, True, False, None or text."""
    name, sign, value = text.partition("=")
    if not sign or not name.strip().isidentifier():
        raise SettingError(f"{text}: write it as name=value, e.g. activation=tanh")
    return name.strip(), literal(value)


def literal(text: str) -> Any:
    """The Python literal that `text` writes, lists without brackets too; else the text."""
    if text in WORDS:
        return WORDS[text]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return list(value) if isinstance(value, tuple) else value


def label_words(text: str) -> list[Any]:
    """Labels as they are written: numbers where they are numbers."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        return [int(word) for word in words]
    except ValueError:
        return words


def read_flags(words: list[str]) -> dict[str, str]:
    """`--name value` and `--name=value` of options that the shell does not know."""
    found: dict[str, str] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            raise SettingError(
                f"unexpected argument {word}: MODEL and DATA are all that stands without a flag"
            )
        name, sign, value = word.lstrip("-").partition("=")
        alone = not left or left[0].startswith("--")
        found[name.replace("-", "_")] = value if sign else "True" if alone else left.pop(0)
    return found
