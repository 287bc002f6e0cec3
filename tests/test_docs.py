"""The documentation: its programs run as they stand, its equations convert, its pages name what there is."""

import functools
import importlib.util
import re
from pathlib import Path

import pytest

import pyrolvm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
LONGEST = 88  # characters of a line of code that fit into the page's width

SLOW = ["did-it-work.md"]


def programs(page):
    return [code for language, code in CODE.findall((DOCS / page).read_text("utf-8")) if language == "python"]


def run(page, blocks):
    """The blocks one after another in one namespace, as a reader would type them."""
    names = {"__name__": "__main__"}
    for index, block in enumerate(blocks):
        exec(compile(block, f"{page}, program {index}", "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # arviz 0.23's own, under pandas 3.1
@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in PAGES if programs(p)],
)
def test_the_programs_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    """With the eager engine unless the page chooses one: compiling would take longer than these programs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pyrolvm, "fit", functools.partial(pyrolvm.fit, engine="eager"))
    run(page, programs(page))


def test_the_closed_form_of_ppca_is_the_number_on_its_page(capsys):
    run("systems/ppca.md", programs("systems/ppca.md"))
    assert "-2.6998" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_no_line_of_code_is_wider_than_the_page(page):
    for _, code in CODE.findall((DOCS / page).read_text("utf-8")):
        assert max(map(len, code.splitlines())) <= LONGEST


def hooks():
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES)
def test_every_equation_becomes_mathml(page):
    """As the Markdown extension hands it to the hook; a command that the converter does not know stays a command."""
    convert = hooks().on_page_content
    text = re.sub(r"`[^`]*`", "", CODE.sub("", (DOCS / page).read_text("utf-8")))
    displayed = re.findall(r"\$\$(.+?)\$\$", text, re.S)
    inline = re.findall(r"\$([^$\n]+)\$", re.sub(r"\$\$.+?\$\$", "", text, flags=re.S))
    pieces = [rf'<div class="arithmatex">\[{e}\]</div>' for e in displayed]
    pieces += [rf'<span class="arithmatex">\({e}\)</span>' for e in inline]
    for piece in pieces:
        made = convert(piece)
        assert made.startswith("<math")
        assert "\\" not in made


def test_a_relation_has_space_around_it():
    made = hooks().on_page_content(r'<span class="arithmatex">\(z \sim \log p(x)\)</span>')
    assert "<mo>&#x0223C;</mo>" in made
    assert '<mi>log</mi><mspace width="0.167em" /><mi>p</mi>' in made


def test_every_public_name_is_in_the_reference():
    """`::: home.name` shows one name, `::: room` the `__all__` of a room, which must be written out to be found."""
    shown = set()
    for page in PAGES:
        for path in re.findall(r"^::: pyrolvm\.(\S+)$", (DOCS / page).read_text("utf-8"), re.M):
            shown |= {
                path.rsplit(".", 1)[-1],
                *names_in(ROOT / "pyrolvm" / path.replace(".", "/") / "__init__.py"),
            }
    rooms = {"data", "models", "inference", "diagnostics", "plots", "report", "runs"}
    assert set(pyrolvm.__all__) <= shown | rooms


def names_in(path):
    """What the file's `__all__` lists as it is written."""
    listed = re.search(r"__all__ = \[(.*?)\]", path.read_text("utf-8"), re.S) if path.exists() else None
    return re.findall(r'"(\w+)"', listed[1]) if listed else []


def test_a_page_shows_a_file_of_the_repository():
    page = hooks().on_page_markdown((DOCS / "any-program.md").read_text("utf-8"))
    assert (ROOT / "benchmarks" / "results" / "corpus.md").read_text("utf-8") in page
    assert "{{" not in page
