"""Griffe extension: what plain text in a docstring means otherwise in Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

WORD_JOINER = "\u2060"


class PlainShapes(griffe.Extension):
    """`E[b] [rows, data_dim]` is a shape after an expectation, not a link."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **_: Any) -> None:
        """Part the two brackets by a character of no width."""
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = re.sub(r"\]( ?)\[", rf"]\1{WORD_JOINER}[", obj.docstring.value)
