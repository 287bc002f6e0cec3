"""The package's front: every public name is there, nothing heavy is imported to say hello, rooms keep apart."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyrolvm

ROOT = Path(pyrolvm.__file__).parent
HEAVY = ("torch", "pyro", "arviz", "sklearn", "matplotlib", "pandas")


@pytest.mark.parametrize("name", pyrolvm.__all__)
def test_every_public_name_is_there(name):
    assert getattr(pyrolvm, name) is not None
    assert name in dir(pyrolvm)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = pyrolvm.fitt


def imported(statement):
    code = f"import sys; {statement}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_shells_help_waits_for_nothing_heavy():
    assert imported("import pyrolvm, pyrolvm.cli") == []


def test_training_does_not_import_arviz_or_the_plots():
    assert not {"arviz", "matplotlib", "sklearn"} & set(imported("import pyrolvm; pyrolvm.fit; pyrolvm.PPCA"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("models", ("pyrolvm.inference", "pyrolvm.diagnostics", "pyrolvm.plots", "pyrolvm.data")),
        ("inference", ("pyrolvm.models", "pyrolvm.diagnostics", "pyrolvm.plots")),
        ("data", ("pyrolvm.models", "pyrolvm.inference", "pyrolvm.diagnostics", "pyrolvm.plots")),
        ("plots", ("pyrolvm.models", "pyrolvm.inference", "pyrolvm.diagnostics")),
        ("diagnostics", ("pyrolvm.models", "pyrolvm.plots")),
    ],
)
def test_rooms_import_only_what_stands_below_them(room, forbidden):
    for path in (ROOT / room).rglob("*.py"):
        for name in imports(path):
            assert not name.startswith(forbidden), f"{path.relative_to(ROOT)} imports {name}"


def test_only_one_file_imports_arviz():
    users = {
        p.relative_to(ROOT).as_posix()
        for p in ROOT.rglob("*.py")
        if any(n.split(".")[0] == "arviz" for n in imports(p))
    }
    assert users == {"diagnostics/inference_data.py"}
