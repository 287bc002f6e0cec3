"""The command `pyrolvm`: the shell's commands, and `report`, which shell and page each know nothing of."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pyrolvm.shell.app import app
from pyrolvm.shell.options import LOADING, READING, RunName, complete_data
from pyrolvm.shell.signatures import given, options_of, sharing

__all__ = ["app"]

REPORT = options_of("report/writing.py", "write_report", ("path", "data", "model", "guide", "device"))


@app.command("report")
@sharing(REPORT, READING, LOADING)
def report(
    run: RunName,
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA]",
            help="Other data than those the run was fitted to.",
            autocompletion=complete_data,
        ),
    ] = None,
    **shared: Any,
) -> None:
    """Write report.html in RUN: the run, its diagnosis and what the model found, on one page.

    [bold]Example[/bold]

    pyrolvm report runs/iris
    """
    from pyrolvm.report import write_report
    from pyrolvm.shell.arguments import source_of
    from pyrolvm.shell.printing import console

    source = None if data is None else source_of(data, given(shared, READING))
    console().print(str(write_report(run, source, **given(shared, REPORT, LOADING))))
