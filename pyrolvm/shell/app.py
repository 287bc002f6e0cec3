"""All commands. What they do is imported when they run, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyrolvm.shell import use_commands
from pyrolvm.shell.door import Door
from pyrolvm.shell.fit_command import fit_command

app = typer.Typer(
    cls=Door,
    name="pyrolvm",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from pyrolvm._version import __version__

        print(f"pyrolvm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Bayesian latent variable models as Pyro model/guide pairs, trained by SVI.

    Start with [bold]pyrolvm fit ppca iris --latent-dim 2 --out runs/iris[/bold].
    """


app.command("fit")(fit_command)
app.command("sample")(use_commands.sample_command)
app.command("encode")(use_commands.encode_command)
app.command("reconstruct")(use_commands.reconstruct_command)
app.command("evidence")(use_commands.evidence_command)
app.command("diagnose")(use_commands.diagnose_command)
app.command("report")(use_commands.report_command)


@app.command("compare")
def compare_command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Folders of runs.")],
) -> None:
    """Runs side by side, the best first: by evidence if all have it, else held-out ELBO, else ELBO.

    [bold]Example[/bold]

    pyrolvm compare runs/*
    """
    from pyrolvm.shell.listing import compare

    compare([Path(r) for r in runs])


@app.command("models")
def models_command() -> None:
    """The models that `fit` knows by name, and their options.

    [bold]Example[/bold]

    pyrolvm models
    """
    from pyrolvm.shell.listing import list_models

    list_models()


@app.command("datasets")
def datasets_command() -> None:
    """The data sets that are known by name.

    [bold]Example[/bold]

    pyrolvm datasets
    """
    from pyrolvm.shell.listing import list_datasets

    list_datasets()
