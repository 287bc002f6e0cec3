"""The shell's options are the parameters of the functions: names, types, defaults, choices."""

import inspect

import pytest
from typer.testing import CliRunner

import pyrolvm
from pyrolvm.cli import REPORT, app
from pyrolvm.diagnostics import diagnose
from pyrolvm.errors import SettingError
from pyrolvm.inference.posterior.evidence import evidence_table
from pyrolvm.report import write_report
from pyrolvm.shell import options as shell
from pyrolvm.shell.signatures import FROM_DATA, _described
from pyrolvm.shell.values import kinds_of, read_as

HELP = {"TERMINAL_WIDTH": "200", "COLUMNS": "200"}
PAIRS = {
    "fit": (
        shell.FIT,
        pyrolvm.fit,
        {"model", "data", "more", "model_kwargs", "rows", "callbacks", "checkpoint", "resume", "progress"},
    ),
    "sample": (shell.SAMPLE, pyrolvm.FittedModel.sample, {"self", "given"}),
    "encode": (shell.ENCODE, pyrolvm.FittedModel.encode, {"self", "x"}),
    "evidence": (shell.EVIDENCE, evidence_table, {"pair", "progress", "annealing"}),
    "diagnose": (shell.DIAGNOSE, diagnose, {"fitted", "x", "statistics", "progress"}),
    "report": (REPORT, write_report, {"path", "data", "model", "guide", "device"}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_parameter_is_an_option_with_its_default(name):
    options, function, own = PAIRS[name]
    parameters = inspect.signature(function).parameters
    assert set(options) == set(parameters) - own
    for parameter, option in options.items():
        default = parameters[parameter].default
        assert option.default == ("" if default in (None, ()) else str(default))
    shown = CliRunner().invoke(app, [name, "--help"], env=HELP).output
    for parameter in options:
        assert f"--{parameter.replace('_', '-')[:18]}" in shown


@pytest.mark.parametrize("cls", pyrolvm.REGISTRY.values(), ids=pyrolvm.REGISTRY.keys())
def test_every_option_of_a_constructor_is_an_option_of_fit(cls):
    known = set(shell.CONSTRUCTORS) | set(shell.FIT)
    names = set(inspect.signature(cls).parameters) - set(FROM_DATA)
    assert names <= known
    for name in names & set(shell.CONSTRUCTORS):
        assert cls.__name__ in shell.CONSTRUCTORS[name].models


def test_options_of_constructors_are_those_of_models():
    named = {model for option in shell.CONSTRUCTORS.values() for model in option.models}
    assert named <= set(pyrolvm.REGISTRY)


def test_choices_come_from_the_annotation():
    assert shell.CONSTRUCTORS["covariance"].kinds.choices == ("full", "diagonal", "spherical")
    shown = CliRunner().invoke(app, ["fit", "--help"], env=HELP).output
    assert "full|diagonal|spherical" in shown


@pytest.mark.parametrize(
    ("annotation", "words", "value"),
    [
        ("int | None", "3", 3),
        ("int | None", "None", None),
        ("float", "3", 3.0),
        ("float | Callable[[float], float]", "1e-3", 1e-3),
        ("float | str | None", "shared", "shared"),
        ("float | str | None", "0.5", 0.5),
        ("str | nn.Module", "mlp", "mlp"),
        ("str", "2", "2"),
        ("Sequence[int]", "200,100", [200, 100]),
        ("collections.abc.Sequence[int] | None", "32", [32]),
        ("Sequence[str] | None", "1990,2000", ["1990", "2000"]),
        ("typing.Literal['none', 'conjugate']", "none", "none"),
        ("Optional[int]", "4", 4),
        ("bool | None", "true", True),
        ("dict[str, Any] | None", ["beta=0.5", "betas=0.9,0.99"], {"beta": 0.5, "betas": [0.9, 0.99]}),
        ("", "[1, 'a']", [1, "a"]),
    ],
)
def test_words_are_read_by_the_annotation(annotation, words, value):
    found = read_as("x", annotation, words)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ("int", "2.5"),
        ("int", "True"),
        ("float", "nan"),
        ("float", "inf"),
        ("int | None", "many"),
        ("Literal['a']", "b"),
    ],
)
def test_words_of_another_type_are_refused(annotation, words):
    with pytest.raises(SettingError, match="x="):
        read_as("x", annotation, words)


def test_what_no_words_can_stand_for_is_no_option():
    assert not kinds_of("Callable[[Optimizer], LRScheduler] | None")
    assert not kinds_of("torch.dtype | None")


def test_numpydoc_parameters_are_read():
    found = _described(
        """Do.

    Parameters
    ----------
    a, b : int
        Two of them,
        in two lines.
    c : {"x", "y"}, optional
        A choice.

    Returns
    -------
    d : int
        Not a parameter.
    """.replace("\n    ", "\n")
    )
    assert found == {
        "a": ("int", "Two of them, in two lines."),
        "b": ("int", "Two of them, in two lines."),
        "c": ('{"x", "y"}, optional', "A choice."),
    }


def test_rooms_stand_apart():
    """The shell and the report know nothing of each other, and `runs` knows neither."""
    from test_package import ROOT, imports

    for room, forbidden in {
        "runs": ("pyrolvm.shell", "pyrolvm.report", "pyrolvm.plots"),
        "shell": ("pyrolvm.report",),
        "report": ("pyrolvm.shell",),
    }.items():
        for path in (ROOT / room).rglob("*.py"):
            for name in imports(path):
                assert not name.startswith(forbidden), f"{path.relative_to(ROOT)} imports {name}"
