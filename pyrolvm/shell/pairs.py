"""MODEL on the command line: a name of the registry, or `file.py:name` for a pair of the user's own."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pyrolvm.errors import ProgramError, SettingError
from pyrolvm.models import REGISTRY

ALIASES = {
    "gmm": "GaussianMixture",
    "mixture": "GaussianMixture",
    "fa": "BayesianFactorAnalysis",
    "factoranalysis": "BayesianFactorAnalysis",
    "betavae": "PowerVAE",
}
FLAGGED = ("latent_dim", "num_components", "likelihood", "hidden", "covariance", "eta", "beta")
"""Constructor arguments that have a flag of their own; all others are `--set name=value`."""


@dataclass(frozen=True)
class Pair:
    """What MODEL named: a class to build, or a program as it is.

    text: as it was typed. cls: a class with `model` and `guide`. program, guide: a ready instance or function.
    """

    text: str
    cls: type | None = None
    program: Any = None
    guide: Any = None

    @property
    def name(self) -> str:
        """The name of the class or function."""
        return self.cls.__name__ if self.cls is not None else self.text.rpartition(":")[2]

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The constructor's arguments by name, without `data_dim`, which the data give."""
        if self.cls is None:
            return {}
        return {k: p for k, p in _parameters(self.cls).items() if k != "data_dim"}

    @property
    def takes_columns(self) -> bool:
        """Whether it is built with `data_dim`, and so for rows that are vectors."""
        return self.cls is not None and "data_dim" in _parameters(self.cls)

    def arguments(self, given: dict[str, Any], data_dim: int) -> dict[str, Any]:
        """The constructor's arguments: those given, checked, and `data_dim`. Raises `SettingError`."""
        if given and self.cls is None:
            raise SettingError(
                f"{self.text} is built already, so it takes no {_flag(next(iter(given)))}: name a class instead"
            )
        for name in given:
            self._check_known(name)
        missing = [n for n, p in self.options.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        for name in missing:
            if name not in given:
                raise SettingError(f"{self.name} needs {_flag(name)}: e.g. {_flag(name)}{_example(name)}")
        return {"data_dim": data_dim, **given} if self.takes_columns else given

    def _check_known(self, name: str) -> None:
        known = self.options
        if name == "data_dim":
            raise SettingError("data_dim is taken from the data: leave it out")
        if name in known or any(p.kind is p.VAR_KEYWORD for p in known.values()):
            return
        near = difflib.get_close_matches(name, known, n=2)
        hint = f"did you mean {' or '.join(map(_flag, near))}? " if near else ""
        raise SettingError(
            f"{self.name} has no option {_flag(name)}: {hint}it has {', '.join(map(_flag, known))}"
        )

    def build(self, arguments: dict[str, Any]) -> Any:
        """The model, or (model, guide). Raises `SettingError` if the class refuses the arguments."""
        if self.cls is None:
            return self.program if self.guide is None else (self.program, self.guide)
        try:
            model = self.cls(**arguments)
        except (SettingError, ProgramError):
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            said = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
            raise SettingError(f"{self.name} cannot be built with {said}: {first_line(error)}") from None
        return as_pair(model, self.guide)


def as_pair(model: Any, guide: Any = None) -> Any:
    """`model` as `fit` takes it; of a plain object, its two methods."""
    from torch import nn

    if guide is not None:
        return model, guide
    if isinstance(model, nn.Module) or not hasattr(model, "guide"):
        return model
    return model.model, model.guide


def find_pair(text: str, guide: str | None = None) -> Pair:
    """The pair that MODEL (and --guide) name.

    A file is executed: it is the user's own. Raises `SettingError` or `ProgramError` in one line.
    """
    if ".py" not in text:
        if guide is not None:
            raise SettingError(f"{text} brings its own guide: leave --guide out (or say --set guide={guide})")
        return Pair(text, cls=REGISTRY[registry_name(text)])
    file, _, name = text.rpartition(":") if ".py:" in text else (text, "", "")
    module = load_file(Path(file))
    value = find_value(module, file, name) if name else _only_class(module, file)
    found_guide = _find_guide(guide, module, file) if guide is not None else None
    if isinstance(value, type):
        return Pair(text, cls=_checked_class(value, text), guide=found_guide)
    return _ready(text, file, value, found_guide)


def _ready(text: str, file: str, value: Any, guide: Any) -> Pair:
    """The pair of an instance with both methods, or of a function and its guide."""
    if guide is not None:
        return Pair(text, program=value, guide=guide)
    if not hasattr(value, "guide"):
        raise ProgramError(
            f"{text} brings no guide: add --guide NAME, a function of {file} or an AutoGuide such as AutoNormal"
        )
    built = as_pair(value)
    program, own = built if isinstance(built, tuple) else (built, None)
    return Pair(text, program=program, guide=own)


def registry_name(text: str) -> str:
    """The class that `text` means: any case, with or without hyphens, or its capitals (bfa)."""
    known = {_plain(name): name for name in REGISTRY}
    known |= {"".join(c for c in name if c.isupper()).lower(): name for name in REGISTRY} | known
    known |= {alias: name for alias, name in ALIASES.items() if name in REGISTRY}
    if _plain(text) in known:
        return known[_plain(text)]
    near = [known[n] for n in difflib.get_close_matches(_plain(text), known, n=3)]
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
    raise SettingError(
        f"there is no model '{text}': {hint}the models are {', '.join(REGISTRY)}; a pair of your own is "
        "file.py:ClassName"
    )


def load_file(path: Path) -> ModuleType:
    """Execute the user's file as a module. Raises `ProgramError` with the line that failed."""
    if not path.is_file():
        raise ProgramError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"_pyrolvm_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # it may import the files beside it
    try:
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except Exception as error:
        raise ProgramError(f"{path} failed at {_where(error, path)}: {first_line(error)}") from error
    finally:
        sys.path.pop(0)
    return module


def _where(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}"
    own = path.resolve()
    frames = [
        f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == own
    ]
    return f"line {frames[-1]}" if frames else "import"


def find_value(module: ModuleType, file: str, name: str) -> Any:
    """A name of the user's file, or `ProgramError` with the names that are near."""
    if hasattr(module, name):
        return getattr(module, name)
    own = _own_names(module)
    near = difflib.get_close_matches(name, own, n=2)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ProgramError(f"{file} has no '{name}': {hint}it defines {_listed(own)}")


def _only_class(module: ModuleType, file: str) -> type:
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    pairs = [c for c in own if hasattr(c, "model") and hasattr(c, "guide")]
    if len(pairs) == 1:
        return pairs[0]
    raise ProgramError(f"say which of {file} to fit, {file}:NAME: it defines {_listed(_own_names(module))}")


def _own_names(module: ModuleType) -> list[str]:
    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and callable(v)}
    return [k for k, v in own.items() if getattr(v, "__module__", module.__name__) == module.__name__]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "no class or function"


def _checked_class(cls: type, text: str) -> type:
    if hasattr(cls, "model") and hasattr(cls, "guide"):
        return cls
    raise ProgramError(f"the class {text} must define model(self, x) and guide(self, x)")


def _find_guide(name: str, module: ModuleType, file: str) -> Any:
    from pyro.infer import autoguide

    if hasattr(module, name):
        return getattr(module, name)
    if name in autoguide.__all__ and name.startswith("Auto"):
        return getattr(autoguide, name)
    if ".py:" in name:
        other, _, inner = name.rpartition(":")
        return find_value(load_file(Path(other)), other, inner)
    return find_value(module, file, name)


def read_setting(text: str) -> tuple[str, Any]:
    """`name=value` of --set: JSON, Python's True, False and None, numbers with commas as a list, else text."""
    name, sign, value = text.partition("=")
    if not sign or not name.strip().isidentifier():
        raise SettingError(f"--set {text}: write it as name=value, e.g. --set activation=tanh")
    return name.strip(), read_value(value)


def read_value(text: str) -> Any:
    """The value that `text` writes."""
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    for candidate in (text, f"[{text}]" if "," in text else text):
        try:
            value = json.loads(candidate)
        except json.JSONDecodeError:
            continue
        return value
    return text


def first_line(error: BaseException) -> str:
    """An error of others in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class, by name."""
    kinds = (inspect.Parameter.VAR_POSITIONAL,)
    found = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return {k: p for k, p in list(found.items())[1:] if p.kind not in kinds}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}" if name in FLAGGED else f"--set {name}="


def _example(name: str) -> str:
    return " 2" if name in FLAGGED else "..."


def _plain(text: str) -> str:
    return text.lower().replace("-", "").replace("_", "").replace(" ", "")
