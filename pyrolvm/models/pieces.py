"""Pieces of a model that go by a name with settings: "iaf", "iaf:4", "iaf:num_flows=4,hidden=64".

A piece in words can be typed in the shell and is kept in a run folder, which builds it again.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import nn

from pyrolvm.errors import SettingError, one_of


class Piece(nn.Module):
    """A part of a model, of whose constructor the first arguments are `sizes` and the others settings.

    A piece keeps each setting as an attribute of the same name.
    """

    sizes: ClassVar[tuple[str, ...]] = ("latent_dim",)
    known: ClassVar[Mapping[str, type[Piece]]] = {}

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """The names of its settings and their defaults, the one that needs no name first."""
        parameters = inspect.signature(cls).parameters
        return {name: p.default for name, p in parameters.items() if name not in cls.sizes}

    @property
    def text(self) -> str | None:
        """The words that build a fresh one like it; None of a class that has no name."""
        name = next((name for name, cls in self.known.items() if cls is type(self)), None)
        others = {k: getattr(self, k) for k, v in self.settings().items() if getattr(self, k) != v}
        if name is None or not others:
            return name
        return f"{name}:{','.join(f'{k}={v}' for k, v in others.items())}"


P = TypeVar("P", bound=Piece)


def plain(argument: Any) -> Any:
    """A constructor's argument as a run folder can keep it: numpy's numbers as Python's, a named piece in words."""
    if isinstance(argument, Piece):
        return argument.text or argument
    return argument.item() if isinstance(argument, np.generic) else argument


def make_piece(kind: str, piece: str | P, known: Mapping[str, type[P]], **sizes: int) -> P:
    """The piece in these words, or `piece` itself.

    Parameters
    ----------
    kind : str
        What it is, for errors: "guide", "prior".
    piece : str or Piece
    known : mapping
        Name -> class.
    **sizes : int
        Its first arguments.

    Raises
    ------
    SettingError
        For an unknown name or setting, or an instance of other sizes.
    """
    if isinstance(piece, str):
        name, colon, words = piece.partition(":")
        cls = known[one_of(kind, name, known)]
        given = _settings(f"the {kind} {name!r}", words, cls.settings()) if colon else {}
        return cls(**sizes, **given)
    if not isinstance(piece, Piece):
        one_of(kind, piece, known)  # raises
    for size, value in sizes.items():
        if getattr(piece, size) != value:
            raise SettingError(
                f"the {kind} {type(piece).__name__} was built for {size}={getattr(piece, size)}: "
                f"give it {size}={value}"
            )
    return piece


def _settings(what: str, words: str, known: dict[str, Any]) -> dict[str, Any]:
    """`4,hidden=64` as {"num_flows": 4, "hidden": 64}."""
    found: dict[str, Any] = {}
    for word in words.split(","):
        name, equals, value = word.rpartition("=")
        name = name.strip() if equals else next(iter(known), "")
        if name not in known or name in found:
            has = f"has {', '.join(known)}" if known else "has no settings"
            raise SettingError(f"{what} {has}, but was given {word.strip()!r}")
        try:
            found[name] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise SettingError(f"{name}={value!r} of {what} must be a number") from None
    return found
