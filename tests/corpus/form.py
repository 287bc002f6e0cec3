"""The form of a program of the corpus: how it is built, and what is expected of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO

QUESTIONS = (
    "posterior",
    "predict",
    "encode",
    "reconstruct",
    "sample",
    "log_evidence",
    "diagnose",
    "export",
    "save and load",
)
"""What is asked of a fit, see `corpus.asked`."""
NO_LATENTS_OF_ROWS = {"encode": "no local latents"}
"""What a program declines whose latents all data share."""


@dataclass(frozen=True)
class Pair:
    """A model and its guide as they would be passed to `SVI`, and the arguments of a step.

    Parameters
    ----------
    guide : callable, AutoGuide or str
        A name is that of an AutoGuide.
    objective : callable
        Makes Pyro's loss: `TraceEnum_ELBO`, or `lambda: TraceEnum_ELBO(max_plate_nesting=1)`.
    """

    model: Any
    guide: Any
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    objective: Callable[[], Any] = Trace_ELBO


@dataclass(frozen=True)
class Case:
    """A program and what is expected of it.

    Attributes
    ----------
    name : str
        Its function's name with spaces.
    about : str
        What it is, in one sentence.
    kind : str
        Its file's name.
    builder : callable
        Makes the `Pair` anew.
    compiled : bool or str
        Whether the compiled engine runs it, or words of the reason why not.
    declines : mapping
        Question -> words of the sentence that declines it. All others are answered.
    missing : mapping
        Measure of `diagnose` -> words of the reason why it is not computed, apart from those that `diagnose` names for
        want of latents of each datum.
    refused : str
        Words of the sentence by which `fit` refuses the program; empty for those that run.
    apart : str
        Why its bound is not that of `SVI`; empty where it is.
    gaps : tuple of str
        Questions whose answers have NaN where a mask leaves a latent out.
    noise : bool
        Whether `fit` and `SVI` draw the same numbers from the same seed, so that their bounds agree to rounding. Else
        they are compared within their error.
    quick : bool
        Whether the test suite runs it.
    quick_compiled : bool
        Whether the test suite compiles it.
    """

    name: str
    about: str
    kind: str
    builder: Callable[[], Pair]
    compiled: bool | str = True
    declines: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""
    apart: str = ""
    gaps: tuple[str, ...] = ()
    noise: bool = True
    quick: bool = True
    quick_compiled: bool = False

    def build(self) -> Pair:
        """The program with its networks and data as they are every time."""
        torch.manual_seed(0)
        with pyro.get_param_store().scope():
            return self.builder()


CORPUS: dict[str, Case] = {}


def program(builder: Callable[[], Pair] | None = None, **expected: Any) -> Any:
    """Put the function that builds a program into the corpus, with what is expected of it (see `Case`)."""
    if builder is None:
        return partial(program, **expected)
    name = builder.__name__.replace("_", " ")
    assert name not in CORPUS, f"two programs are called '{name}'"
    assert set(expected.get("declines", {})) <= set(QUESTIONS), expected
    about = (builder.__doc__ or "").strip()
    CORPUS[name] = Case(name, about, builder.__module__.rpartition(".")[2], builder, **expected)
    return builder


def load_all() -> dict[str, Case]:
    """Every program of the files beside this one."""
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if not file.stem.startswith(("_", "test_")):
            importlib.import_module(f"corpus.{file.stem}")
    return CORPUS
