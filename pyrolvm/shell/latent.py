"""Commands that go through the latent space of a run: pictures in rows and columns, or their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pyrolvm.shell.options import LOADING, PICTURE, READING, DataName, Out, RunName
from pyrolvm.shell.signatures import given, options_of, sharing

SPACE = "inference/posterior/latent_space.py"
INTERPOLATE = options_of(SPACE, "interpolate", ("fitted", "x"))
TRAVERSE = options_of(SPACE, "traverse", ("fitted", "x"))
GRID = options_of(SPACE, "latent_grid", ("fitted", "x"))
SHIFT = options_of(SPACE, "shift", ("fitted", "x", "vector"))
Rows = Annotated[
    str, typer.Option("--rows", "-r", metavar="A,B", help="Numbers of the rows of DATA, counted from 0.")
]


@sharing(INTERPOLATE, PICTURE, READING, LOADING)
def interpolate(run: RunName, data: DataName, rows: Rows = "0,1", out: Out = None, **shared: Any) -> None:
    """The way from each of the rows to the next, through the latent space of RUN.

    [bold]Example[/bold]

    pyrolvm interpolate runs/vae digits --rows 0,5,9 --kind spherical --out way.png
    """
    _pictures("interpolate", INTERPOLATE, run, data, rows, out, shared)


@sharing(TRAVERSE, PICTURE, READING, LOADING)
def traverse(run: RunName, data: DataName, rows: Rows = "0", out: Out = None, **shared: Any) -> None:
    """One latent dimension of RUN moves in each line of pictures, the others stay at the code of the row.

    [bold]Example[/bold]

    pyrolvm traverse runs/vae digits --rows 3 --dims 0,1 --out moved.png
    """
    _pictures("traverse", TRAVERSE, run, data, rows, out, shared)


@sharing(GRID, PICTURE, READING, LOADING)
def grid(run: RunName, data: DataName, rows: Rows = "0", out: Out = None, **shared: Any) -> None:
    """Two latent dimensions of RUN at quantiles of their prior; DATA give the condition where it has one.

    [bold]Example[/bold]

    pyrolvm grid runs/vae digits --dims 0,1 --out plane.png
    """
    _pictures("latent_grid", GRID, run, data, rows, out, shared)


@sharing(PICTURE, READING, LOADING)
def analogy(run: RunName, data: DataName, rows: Rows = "0,1,2", out: Out = None, **shared: Any) -> None:
    """Row a is to b as c is to d: a, b, c as RUN makes them, and d = c + (b - a).

    [bold]Example[/bold]

    pyrolvm analogy runs/vae digits --rows 0,10,1 --out analogy.png
    """
    _pictures("analogy", {}, run, data, rows, out, shared)


@sharing(SHIFT, PICTURE, READING, LOADING)
def shift(
    run: RunName,
    data: DataName,
    label: Annotated[
        str, typer.Option("--label", help="The attribute: that of the rows of DATA with this label.")
    ],
    rows: Rows = "0",
    out: Out = None,
    **shared: Any,
) -> None:
    """Rows with less and more of an attribute, along the difference of the mean codes with and without it.

    [bold]Example[/bold]

    pyrolvm shift runs/vae digits --label 3 --rows 0,1,2 --out more-three.png
    """
    from pyrolvm.inference.posterior.latent_space import attribute_vector

    def vector(question: Any) -> tuple[Any, ...]:
        return (attribute_vector(question.fitted, question.dataset, question.has_label(label)),)

    _pictures("shift", SHIFT, run, data, rows, out, shared, vector)


@sharing(PICTURE, READING, LOADING)
def recondition(
    run: RunName,
    data: DataName,
    conditions: Annotated[
        str, typer.Option("--conditions", metavar="A,B", help="The labels to decode under.")
    ],
    rows: Rows = "0",
    out: Out = None,
    **shared: Any,
) -> None:
    """The style of each row under other labels: the same latents, other conditions.

    [bold]Example[/bold]

    pyrolvm recondition runs/cvae digits --rows 0,1,2 --conditions 0,1,2,3,4,5,6,7,8,9 --out styles.png
    """
    from pyrolvm.shell.values import label_words

    def codes(question: Any) -> tuple[Any, ...]:
        return (question.recipe.codes(label_words(conditions)),)

    _pictures("recondition", {}, run, data, rows, out, shared, codes)


def _pictures(
    name: str,
    options: dict[str, Any],
    run: str,
    data: str,
    rows: str,
    out: Path | None,
    shared: dict[str, Any],
    more: Callable[[Any], tuple[Any, ...]] = lambda question: (),
) -> None:
    from pyrolvm.inference.posterior import latent_space
    from pyrolvm.shell.asking import PICTURES, Question

    question = Question(run, shared, out, PICTURES, data)
    extra = more(question)
    values = getattr(latent_space, name)(
        question.fitted, question.take(rows), *extra, **given(shared, options)
    )
    question.write_grid(values)
