"""A model by its name: a class of the registry, `file.py:name` or `package.module:name` for a pair of one's own."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pyro.infer import autoguide
from torch import nn

from pyrolvm.data.embedded import DATASETS
from pyrolvm.errors import ProgramError, PyrolvmError, SettingError, did_you_mean
from pyrolvm.inference.program.routes import ROW_GUIDES
from pyrolvm.inference.program.semi_implicit_guide import SemiImplicitGuide
from pyrolvm.models import REGISTRY

ALIASES = {
    "gmm": "GaussianMixture",
    "mixture": "GaussianMixture",
    "fa": "BayesianFactorAnalysis",
    "factoranalysis": "BayesianFactorAnalysis",
    "betavae": "PowerVAE",
}


@dataclass(frozen=True)
class NamedModel:
    """What a name stands for: a class to build, or a program as it is.

    Parameters
    ----------
    text : str
        The name as it was given.
    cls : type, optional
        A class with the methods `model` and `guide`.
    program : object, optional
        A ready instance or function.
    guide : object, optional
        The guide of a function.
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
        """The constructor's parameters by name, without those that the data give."""
        return {k: p for k, p in self.parameters.items() if k not in self.from_data}

    @property
    def from_data(self) -> tuple[str, ...]:
        """The constructor's parameters that the data give."""
        return ("data_dim", "num_classes", "condition_dim") if self.takes_labels else ("data_dim",)

    @property
    def takes_labels(self) -> bool:
        """Whether it is a model of (x, y), whose y are the labels of the data."""
        return bool(getattr(self.cls, "takes_labels", False))

    @property
    def takes_columns(self) -> bool:
        """Whether it is built with `data_dim`, hence for rows that are vectors."""
        return "data_dim" in self.parameters

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The constructor's parameters by name; none of what is built already."""
        found = {} if self.cls is None else inspect.signature(self.cls).parameters
        return {k: p for k, p in found.items() if p.kind is not p.VAR_POSITIONAL}

    def build(self, arguments: dict[str, Any]) -> Any:
        """The model, or (model, guide). Raises `SettingError` if the class refuses the arguments."""
        if self.cls is None:
            return as_pair(self.program, self.guide)
        try:
            model = self.cls(**arguments)
        except PyrolvmError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            given = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
            raise SettingError(f"{self.name} cannot be built with {given}: {first_line(error)}") from None
        return as_pair(model, self.guide)


def as_pair(model: Any, guide: Any = None) -> Any:
    """`model` as `fit` takes it; of a plain object, its two methods."""
    if guide is None and not isinstance(model, nn.Module):
        return model.model, model.guide
    return model if guide is None else (model, guide)


def described(name: Any, arguments: dict[str, Any] | None) -> str:
    """The model as it is built: PPCA(data_dim=4, latent_dim=2)."""
    if arguments is None:
        return str(name)
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


def find_model(text: str, guide: str | None = None) -> NamedModel:
    """The model (and guide) of this name. A file is executed: it is the user's own.

    Parameters
    ----------
    text : str
        A name of the registry in any case, an alias, `file.py`, `file.py:name` or `package.module:name`.
    guide : str, optional
        A name in the same file, an AutoGuide's name, `file.py:name`, or of any model "per_datum" and its kin.

    Raises
    ------
    SettingError
        There is no such model.
    ProgramError
        The file fails, or what it defines is no pair.
    """
    if ".py" not in text and ":" not in text:
        if guide is not None and guide not in ROW_GUIDES:
            raise SettingError(f"{text} brings its own guide: leave guide={guide} out")
        return NamedModel(text, cls=REGISTRY[registry_name(text)], guide=guide)
    place, _, name = text.rpartition(":") if ":" in text else (text, "", "")
    module = _module(place)
    value = _resolve(module, place, name) if name else _only_class(module, place)
    found = _find_guide(guide, module, place) if guide is not None else None
    if isinstance(value, type):
        if not (hasattr(value, "model") and hasattr(value, "guide")):
            raise ProgramError(f"the class {text} must define model(self, x) and guide(self, x)")
        return NamedModel(text, cls=value, guide=found)
    if found is None and not hasattr(value, "guide"):
        raise ProgramError(
            f"{text} brings no guide: add guide=NAME, a function of {place} or an AutoGuide such as AutoNormal"
        )
    return NamedModel(text, program=value, guide=found)


def registry_name(text: str) -> str:
    """The class that `text` means: any case, with or without hyphens, or its capitals (bfa)."""
    known = {"".join(c for c in name if c.isupper()).lower(): name for name in REGISTRY}
    known |= {name.lower(): name for name in REGISTRY}
    known |= {alias: name for alias, name in ALIASES.items() if name in REGISTRY}
    plain = text.lower().replace("-", "").replace("_", "")
    if plain in known:
        return known[plain]
    hint = did_you_mean(plain, known, known.__getitem__)
    if text.replace("-", "_") in DATASETS:
        hint = "it is a data set, which comes after the model; "
    raise SettingError(
        f"there is no model '{text}': {hint}the models are {', '.join(REGISTRY)}; a pair of your own is "
        "file.py:ClassName"
    )


def _module(place: str) -> ModuleType:
    """The user's file or package as a module. Raises `ProgramError` with the line that failed."""
    path = Path(place)
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ImportError as error:
            raise ProgramError(f"{place} cannot be imported: {error}") from None
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
    frames = traceback.extract_tb(error.__traceback__)
    own = [f.lineno for f in frames if Path(f.filename).resolve() == path.resolve()]
    return f"line {own[-1]}" if own else "import"


def _resolve(module: ModuleType, place: str, name: str) -> Any:
    try:
        return pkgutil.resolve_name(f"{module.__name__}:{name}")
    except (AttributeError, ValueError):
        raise ProgramError(f"{place} has no '{name}': it defines {_own_names(module)}") from None


def _only_class(module: ModuleType, place: str) -> type:
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    pairs = [c for c in own if hasattr(c, "model") and hasattr(c, "guide")]
    if len(pairs) == 1:
        return pairs[0]
    raise ProgramError(f"name what to fit of {place}, {place}:NAME: it defines {_own_names(module)}")


def _own_names(module: ModuleType) -> str:
    own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    return ", ".join(k for k in own if not k.startswith("_")) or "no class or function"


def _find_guide(name: str, module: ModuleType, place: str) -> Any:
    if name in ROW_GUIDES:
        return name
    if hasattr(module, name):
        return getattr(module, name)
    if name.startswith("Auto") and name in autoguide.__all__:
        return getattr(autoguide, name)
    if name == SemiImplicitGuide.__name__:
        return SemiImplicitGuide
    other, _, inner = name.rpartition(":")
    return _resolve(_module(other), other, inner) if other else _resolve(module, place, name)


def first_line(error: BaseException) -> str:
    """An error of others in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
