"""The command `pyrolvm`: its options are those of the functions that it calls, its work is imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from pyrolvm.shell import commands, latent
from pyrolvm.shell.door import Door

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

    Options are the parameters of the Python functions: what a message calls batch_size=64 is --batch-size 64 here.
    """


# what fit does not know may be an option of the model's own constructor
app.command("fit", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(commands.fit)
for _command in (
    commands.sample,
    commands.encode,
    commands.posterior,
    commands.most_probable,
    commands.reconstruct,
    latent.interpolate,
    latent.traverse,
    latent.grid,
    latent.analogy,
    latent.shift,
    latent.recondition,
    commands.impute,
    commands.evidence,
    commands.diagnose,
    commands.compare,
    commands.models,
    commands.datasets,
):
    app.command(_command.__name__.replace("_", "-"))(_command)
