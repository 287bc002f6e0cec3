"""All commands: which function each calls, and what the shell adds to its options."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pyrolvm.shell.options import (
    ADDED,
    CONSTRUCTORS,
    DIAGNOSE,
    ENCODE,
    EVIDENCE,
    FIT,
    IMPUTE,
    LOADING,
    OUTPUT,
    PICTURE,
    POSTERIOR,
    PREPARING,
    READING,
    RECONSTRUCT,
    SAMPLE,
    Answers,
    DataName,
    DataNames,
    ModelName,
    Out,
    Overwrite,
    RunName,
)
from pyrolvm.shell.signatures import given, sharing

output = partial(typer.Option, rich_help_panel=OUTPUT)
SILENT = ("resume", "overwrite", "quiet")
"""Options that do not change the numbers of a run, left out of the command that repeats it."""


@sharing(FIT, ADDED, PREPARING, READING, CONSTRUCTORS)
def fit(
    context: typer.Context,
    model: ModelName,
    data: DataName,
    out: Annotated[str, output("--out", "-o", metavar="RUN", help="Folder of the run.")],
    resume: Annotated[bool, output("--resume", help="Continue a stopped run.")] = False,
    overwrite: Annotated[bool, output("--overwrite", help="Replace the run in --out.")] = False,
    inference_data: Annotated[
        bool, output("--inference-data", help="Write inference_data.nc for ArviZ.")
    ] = False,
    quiet: Annotated[bool, output("--quiet", "-q", help="Errors and warnings only.")] = False,
    **shared: Any,
) -> None:
    """Fit MODEL to DATA and write the run folder: `pyrolvm.fit`, with the options of the model's constructor.

    [bold]Examples[/bold]

    pyrolvm fit ppca iris --latent-dim 2 --num-steps 2000 --out runs/iris

    pyrolvm fit gmm faithful --num-components 2 --standardise --num-restarts 5 --out runs/faithful

    pyrolvm fit vae digits -l 8 --binarise --hidden 200,200 -b 128 --epochs 50 --lr 0.001 --validation 0.1 -o runs/vae

    pyrolvm fit ppca 's3://bucket/big/*.parquet' -l 8 -b 512 --epochs 3 --standardise --out runs/big

    pyrolvm fit mine.py:MyModel table.csv --columns height,weight --num-layers 2 --out runs/mine

    Bounds are in nats per datum, higher is better. After Ctrl-C, the same command with --resume continues.
    """
    from pyrolvm.shell.fitting import Job, run_fit

    options = given(shared, FIT, ADDED, PREPARING, READING)
    own = {n: shared[n] for n in CONSTRUCTORS if n not in options and shared[n] not in (None, [])}
    job = Job(model, data, options, own, context.args)
    run_fit(job, Path(out), _repeated(context), resume, overwrite, inference_data, quiet)


def _repeated(context: Any) -> str:
    """The command line that does the same again, from what was given on this one."""
    words = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if source is not None and source.name == "COMMANDLINE" and parameter.name not in SILENT:
            words += _words(parameter, context.params[parameter.name])
    return shlex.join(["pyrolvm", context.info_name, *words, *context.args])


def _words(parameter: Any, value: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [str(value)]
    if isinstance(value, bool):
        return [parameter.opts[0] if value else parameter.secondary_opts[0]]
    values = value if isinstance(value, list | tuple) else [value]
    return [word for v in values for word in (parameter.opts[0], str(v))]


@sharing(SAMPLE, PICTURE, LOADING)
def sample(
    run: RunName,
    out: Out = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels", metavar="A,B", help="Of the new rows, in turn, for a model that takes labels."
        ),
    ] = None,
    **shared: Any,
) -> None:
    """Draw new data from the model of RUN, in the units of its data; --out may be a png.

    [bold]Examples[/bold]

    pyrolvm sample runs/iris --num-samples 1000 --out new.csv

    pyrolvm sample runs/vae --num-samples 64 --mean --out digits.png

    pyrolvm sample runs/cvae --labels 0,1,2,3 --num-samples 40 --out some.png
    """
    from pyrolvm.shell.asking import PICTURES, Question

    question = Question(run, shared, out, PICTURES)
    question.sample(labels, **given(shared, SAMPLE))


@sharing(ENCODE, READING, LOADING)
def encode(
    run: RunName,
    data: DataNames,
    out: Answers = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Improve q(z | x) for each row alone first, the model held.")
    ] = False,
    overwrite: Overwrite = False,
    **shared: Any,
) -> None:
    """Where the guide of RUN puts each row of DATA: mean and sd of q(z | x), or class probabilities.

    [bold]Examples[/bold]

    pyrolvm encode runs/iris iris --out codes.csv

    pyrolvm encode runs/vae digits --refine --out refined.csv

    pyrolvm encode runs/big big/*.parquet --out codes.parquet
    """
    from pyrolvm.shell.asking import ANSWERS, Question

    question = Question(run, shared, out, ANSWERS, data, streamed=True)
    question.encode(refine, overwrite=overwrite, **given(shared, ENCODE))


@sharing(POSTERIOR, READING, LOADING)
def posterior(
    run: RunName, data: DataNames, out: Answers = None, overwrite: Overwrite = False, **shared: Any
) -> None:
    """Draws of the latents of each row of DATA in numbers: mean, sd, and quantiles at 5, 50 and 95%.

    [bold]Examples[/bold]

    pyrolvm posterior runs/iris iris --num-samples 1000 --out latents.csv

    pyrolvm posterior runs/big 's3://bucket/big/*.parquet' --out latents.parquet
    """
    from pyrolvm.shell.asking import ANSWERS, Question

    question = Question(run, shared, out, ANSWERS, data, streamed=True)
    question.posterior(overwrite, **given(shared, POSTERIOR))


@sharing(READING, LOADING)
def most_probable(run: RunName, data: DataName, out: Out = None, **shared: Any) -> None:
    """The values of discrete latents that RUN sums out, most probable together for each row of DATA: of a chain a path.

    -1 stands where a mask of the program leaves a step out. `encode` has the probabilities of each alone.

    [bold]Examples[/bold]

    pyrolvm most-probable runs/faithful faithful --out clusters.csv

    pyrolvm most-probable runs/hmm sequences.csv --model hmm.py:Chain --out paths.csv
    """
    from pyrolvm.shell.asking import Question

    Question(run, shared, out, data=data).most_probable()


@sharing(RECONSTRUCT, PICTURE, READING, LOADING)
def reconstruct(run: RunName, data: DataName, out: Out = None, **shared: Any) -> None:
    """The mean of p(x | z) at each row's code, in the units of the data; --out may be a png.

    [bold]Example[/bold]

    pyrolvm reconstruct runs/vae digits --out reconstructions.png
    """
    from pyrolvm.shell.asking import PICTURES, Question

    question = Question(run, shared, out, PICTURES, data)
    question.write_rows(question.fitted.reconstruct(question.dataset, **given(shared, RECONSTRUCT)))


@sharing(IMPUTE, READING, LOADING)
def impute(run: RunName, data: DataName, out: Out = None, **shared: Any) -> None:
    """DATA with what is missing filled, in their units: averages of draws, and intervals beside them.

    A csv has the filled table, then NAME_lower and NAME_upper of the columns with gaps; an npz mean, lower and upper.

    [bold]Example[/bold]

    pyrolvm impute runs/bfi bfi.csv --interval 0.8 --out filled.csv
    """
    from pyrolvm.shell.asking import Question

    Question(run, shared, out, data=data).impute(**given(shared, IMPUTE))


@sharing(EVIDENCE, READING, LOADING)
def evidence(
    run: RunName, data: DataNames, out: Answers = None, overwrite: Overwrite = False, **shared: Any
) -> None:
    """Estimate log p(x) of each row of DATA under RUN, in nats; noted in the run for `compare`.

    [bold]Examples[/bold]

    pyrolvm evidence runs/vae mnist --data-option split=test --num-samples 5000

    pyrolvm evidence runs/iris iris --method exact --out evidence.csv
    """
    from pyrolvm.shell.asking import ANSWERS, Question

    question = Question(run, shared, out, ANSWERS, data, streamed=True)
    question.evidence(overwrite=overwrite, **given(shared, EVIDENCE))


@sharing(DIAGNOSE, READING, LOADING)
def diagnose(
    run: RunName,
    data: DataNames,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="Also k-hat and evidence of every row: a parquet, npy or zarr file, or its URL.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only the draws and their summary.")] = False,
    overwrite: Overwrite = False,
    **shared: Any,
) -> None:
    """How good the guide of RUN is on DATA: evidence, k-hat, collapse, predictive checks, and draws for ArviZ.

    Writes inference_data.nc, summary.csv and k_hat.csv (one row per datum) to the run folder.

    [bold]Examples[/bold]

    pyrolvm diagnose runs/iris iris --num-samples 1000

    pyrolvm diagnose runs/iris iris --quick

    pyrolvm diagnose runs/big big/*.parquet --num-samples 200 --out k_hat.parquet
    """
    from pyrolvm.data.far.writing import SUFFIXES
    from pyrolvm.shell.asking import Question

    question = Question(run, shared, out, SUFFIXES, data, streamed=True)
    question.diagnose(quick, overwrite, **given(shared, DIAGNOSE))


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Folders of runs.")],
) -> None:
    """Runs side by side, the best first: by evidence if all have it, else held-out ELBO, else ELBO.

    [bold]Example[/bold]

    pyrolvm compare runs/*
    """
    from pyrolvm.shell.listing import compare

    compare([Path(r) for r in runs])


def models() -> None:
    """The models that `fit` knows by name, and their options.

    [bold]Example[/bold]

    pyrolvm models
    """
    from pyrolvm.shell.listing import list_models

    list_models()


def datasets() -> None:
    """The data sets that are known by name.

    [bold]Example[/bold]

    pyrolvm datasets
    """
    from pyrolvm.shell.listing import list_datasets

    list_datasets()
