"""The options of `pyrolvm fit`. What they do is imported when it runs, so that --help is quick."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Annotated

import typer

from pyrolvm.shell.completion import words
from pyrolvm.shell.options import (
    DATA,
    MODEL,
    OUTPUT,
    TRAINING,
    Columns,
    DataName,
    DataOption,
    Header,
    Key,
    Labels,
    ModelName,
    repeatable,
)


def fit_command(
    context: typer.Context,
    model: ModelName,
    data: DataName,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="RUN", help="Folder of the run.", rich_help_panel=OUTPUT)
    ],
    latent_dim: Annotated[
        int | None, typer.Option("--latent-dim", "-l", help="Dimensions of z.", rich_help_panel=MODEL)
    ] = None,
    num_components: Annotated[
        int | None, typer.Option("--num-components", "-k", help="Of a mixture.", rich_help_panel=MODEL)
    ] = None,
    likelihood: Annotated[
        str | None, typer.Option(help="Of the decoder: bernoulli, gaussian, ...", rich_help_panel=MODEL)
    ] = None,
    hidden: Annotated[
        str | None,
        typer.Option(metavar="200,200", help="Sizes of the hidden layers.", rich_help_panel=MODEL),
    ] = None,
    covariance: Annotated[
        str | None, typer.Option(help="full, diagonal or spherical.", rich_help_panel=MODEL)
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Power of the likelihood.", rich_help_panel=MODEL)] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the KL.", rich_help_panel=MODEL)] = None,
    set: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any option of the model, e.g. guide=full.",
            rich_help_panel=MODEL,
        ),
    ] = [],  # noqa: B006  (typer reads it, nothing writes to it)
    guide: Annotated[
        str | None,
        typer.Option(help="Guide of your own function: a name, or e.g. AutoNormal.", rich_help_panel=MODEL),
    ] = None,
    initialise: Annotated[
        bool,
        typer.Option(
            "--initialise/--no-initialise",
            help="Start from the data (k-means, principal components) where the model knows how.",
            rich_help_panel=MODEL,
        ),
    ] = True,
    steps: Annotated[
        int | None, typer.Option("--steps", "-n", help="Steps; 1000 by default.", rich_help_panel=TRAINING)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data.", rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "-b", help="Rows per step; all by default.", rich_help_panel=TRAINING),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="Of the optimiser.", rich_help_panel=TRAINING)
    ] = 1e-3,
    optimizer: Annotated[
        str,
        typer.Option(
            help="adam, sgd, ...",
            rich_help_panel=TRAINING,
            autocompletion=words("adam adamw adamax nadam radam adagrad adadelta rmsprop sgd"),
        ),
    ] = "adam",
    schedule: Annotated[
        str,
        typer.Option(
            help="Of the learning rate: cosine, exponential or none.",
            rich_help_panel=TRAINING,
            autocompletion=words("none cosine exponential"),
        ),
    ] = "none",
    clip_norm: Annotated[
        float | None, typer.Option(help="Largest norm of the gradient.", rich_help_panel=TRAINING)
    ] = None,
    kl_warmup: Annotated[
        float,
        typer.Option(help="Share of the steps over which the KL's weight rises.", rich_help_panel=TRAINING),
    ] = 0.0,
    validation: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Rows to hold out, e.g. 0.1.", rich_help_panel=TRAINING),
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between held-out bounds.", rich_help_panel=TRAINING)
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Held-out bounds without progress before the run ends.", rich_help_panel=TRAINING),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="trace, meanfield, tracegraph, enum or renyi; what suits the model by default.",
            rich_help_panel=TRAINING,
            autocompletion=words("trace meanfield tracegraph enum renyi"),
        ),
    ] = None,
    particles: Annotated[
        int | None, typer.Option(help="Draws per datum of the objective.", rich_help_panel=TRAINING)
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Of renyi; 0 is the importance-weighted bound.", rich_help_panel=TRAINING),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=1, help="Fits from several starts; the best is kept.", rich_help_panel=TRAINING)
    ] = 1,
    seed: Annotated[
        int, typer.Option(min=0, help="Of starting values, batches and noise.", rich_help_panel=TRAINING)
    ] = 0,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=TRAINING)
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or float64.", rich_help_panel=TRAINING)] = "float32",
    engine: Annotated[
        str,
        typer.Option(
            help="auto, compiled or eager.",
            rich_help_panel=TRAINING,
            autocompletion=words("auto compiled eager"),
        ),
    ] = "auto",
    on_nan: Annotated[
        str,
        typer.Option(help="If the run diverges: raise, rollback or skip.", rich_help_panel=TRAINING),
    ] = "raise",
    columns: Columns = None,
    labels: Labels = None,
    key: Key = None,
    header: Header = None,
    data_option: DataOption = [],  # noqa: B006
    standardise: Annotated[
        bool, typer.Option("--standardise", help="Mean 0 and deviation 1 per column.", rich_help_panel=DATA)
    ] = False,
    standardise_overall: Annotated[
        bool,
        typer.Option(
            "--standardise-overall", help="One mean and deviation for all columns.", rich_help_panel=DATA
        ),
    ] = False,
    binarise: Annotated[
        bool, typer.Option("--binarise", help="0 and 1, by --threshold.", rich_help_panel=DATA)
    ] = False,
    threshold: Annotated[
        float | None, typer.Option(help="Halfway between extremes by default.", rich_help_panel=DATA)
    ] = None,
    split_seed: Annotated[
        int | None, typer.Option(help="Of the rows held out; --seed by default.", rich_help_panel=DATA)
    ] = None,
    checkpoint_every: Annotated[
        float, typer.Option(metavar="SECONDS", help="Between checkpoints.", rich_help_panel=OUTPUT)
    ] = 30.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was stopped.", rich_help_panel=OUTPUT)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel=OUTPUT)
    ] = False,
    inference_data: Annotated[
        bool,
        typer.Option("--inference-data", help="Write inference_data.nc for ArviZ.", rich_help_panel=OUTPUT),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Errors and warnings only.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Fit MODEL to DATA and write the run folder.

    [bold]Examples[/bold]

    pyrolvm fit ppca iris --latent-dim 2 --steps 2000 --out runs/iris

    pyrolvm fit gmm faithful --num-components 2 --standardise --restarts 5 --out runs/faithful

    pyrolvm fit vae digits -l 8 --binarise --hidden 200,200 -b 128 --epochs 50 --lr 0.001 --validation 0.1 -o runs/vae

    pyrolvm fit mine.py:MyModel table.csv --columns height,weight --set num_layers=2 --out runs/mine

    Bounds are in nats per datum, higher is better. Stopped by Ctrl-C, it says how to go on.
    """
    options = SimpleNamespace(**locals())
    from pyrolvm.shell.training import run_fit

    run_fit(options, repeatable(context))
