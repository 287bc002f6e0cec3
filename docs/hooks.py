"""MkDocs hooks: the menu of the systems, files within pages, and equations as MathML, without script or network."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

# what pymdownx.arithmatex writes for $...$ and $$...$$ with `generic: true`
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)

FILE = re.compile(r"^\{\{ (\S+) \}\}$", re.M)

# log p: a thin space, unless a bracket follows
FUNCTION = re.compile(r'(<mi>(?:log|exp|det|min)</mi>)(?!<mo stretchy="false">&#x00028;)')


def on_config(config: Any) -> Any:
    """Replace a folder of the menu (`Systems: systems/`) by its pages, so that a new page is listed by itself."""
    for entry in config.nav:
        for title, target in entry.items():
            if isinstance(target, str) and target.endswith("/"):
                pages = sorted(Path(config.docs_dir, target).glob("*.md"))
                entry[title] = [target + page.name for page in pages]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with each line `{{ path }}` replaced by that file of the repository."""
    root = Path(__file__).parents[1]
    return FILE.sub(lambda found: (root / found[1]).read_text("utf-8"), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """The page's HTML with each equation as MathML."""
    content = INLINE.sub(lambda found: _mathml(found[1], "inline"), content)
    return DISPLAY.sub(lambda found: _mathml(found[1], "block"), content)


def _mathml(equation: str, display: str) -> str:
    made = convert(html.unescape(equation), display=display)
    made = made.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")  # ~ as a relation: space around it
    return FUNCTION.sub(r'\1<mspace width="0.167em" />', made)
