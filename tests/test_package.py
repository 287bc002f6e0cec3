"""The package's front: every public name is there, nothing heavy is imported to say hello, rooms keep apart."""

import ast
import graphlib
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


def test_every_registered_model_is_public():
    assert {"load", "fit", "DataError", *pyrolvm.REGISTRY} <= set(pyrolvm.__all__)
    assert len(set(pyrolvm.__all__)) == len(pyrolvm.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = pyrolvm.fitt
    with pytest.raises(AttributeError, match="no attribute 'PPCAA'"):
        _ = pyrolvm.PPCAA


def imported(statement):
    code = f"import sys; {statement}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def test_the_shells_help_waits_for_nothing_heavy():
    assert imported("import pyrolvm, pyrolvm.cli; from pyrolvm import DataError, cli") == []
    assert imported("from pyrolvm.__main__ import app; app(['--help'], standalone_mode=False)") == []


def test_training_does_not_import_arviz_or_the_plots():
    assert not {"arviz", "matplotlib", "sklearn"} & set(imported("import pyrolvm; pyrolvm.fit; pyrolvm.PPCA"))


FLOORS = (
    "_version errors plates controls seeds files processes progress signals semi_implicit",
    "data",
    "models inference.program",
    "inference.objectives",
    "inference.engine",
    "inference.log_joint",
    "inference.posterior",
    "inference.training",
    "inference",
    "diagnostics",
    "runs plots",
    "report",
    "shell sklearn",
    "cli",
    "__init__",
    "__main__ demo",
)
"""Rooms from the ground up: a file imports its own room and the floors below, not what stands beside it."""

GROUND = FLOORS[0].split()
APART = {"inference": "models", "diagnostics": "models plots", "plots": "models inference diagnostics"}
"""What a room does not import although it stands below."""


def modules():
    """Every file of the package by its name in it: `data.plan`, `inference` for its `__init__`."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__", path


FILES = dict(modules())


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_file(name):
    """The file that `pyrolvm.x.y` stands in; None for other packages."""
    first, *parts = name.split(".")
    if first != "pyrolvm":
        return None
    ends = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((end for end in ends if end in FILES), "__init__")


GRAPH = {file: {f for n in imports(path) if (f := imported_file(n))} - {file} for file, path in FILES.items()}


def is_in(file, room):
    return file == room or file.startswith(f"{room}.")


def room_of(file):
    rooms = [room for floor in FLOORS for room in floor.split() if is_in(file, room)]
    return max(rooms, key=len, default=None)


def floor_of(room):
    return next(i for i, floor in enumerate(FLOORS) if room in floor.split())


def may_import(file, other):
    room, below = room_of(file), room_of(other)
    if room == below or (room in GROUND and below in GROUND):
        return True
    apart = any(
        is_in(file, r) and any(is_in(other, o) for o in others.split()) for r, others in APART.items()
    )
    return floor_of(below) < floor_of(room) and not apart


@pytest.mark.parametrize(
    ("file", "other", "allowed"),
    [
        ("data.plan", "seeds", True),
        ("seeds", "data.plan", False),
        ("models.vae", "data.arrays", True),
        ("models.vae", "inference.program.pair", False),
        ("inference.training.fit", "models", False),
        ("inference.training.fit", "inference.engine.cache", True),
        ("inference.engine.cache", "inference", False),
        ("diagnostics.gaps", "inference", True),
        ("plots.quality", "diagnostics.gaps", False),
        ("report.writing", "shell.runs", False),
        ("runs.folder", "inference.posterior.saving", True),
        ("__init__", "models", True),
    ],
)
def test_the_table_of_floors(file, other, allowed):
    assert may_import(file, other) is allowed


def test_every_file_has_a_floor():
    assert [file for file in FILES if room_of(file) is None] == []


def test_a_file_imports_only_what_stands_below_it():
    wrong = [(file, other) for file in FILES for other in GRAPH[file] if not may_import(file, other)]
    assert [f"{file} imports {other}" for file, other in wrong] == []


def test_no_imports_run_in_a_circle():
    graphlib.TopologicalSorter(GRAPH).prepare()  # CycleError names the files


def test_only_one_file_imports_arviz():
    users = {file for file, path in FILES.items() if any(n.split(".")[0] == "arviz" for n in imports(path))}
    assert users == {"diagnostics.inference_data"}
