"""The options of the commands that ask something of a run; what they do is in `using.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyrolvm.shell.completion import words
from pyrolvm.shell.options import ASKING, READING, DataName, Run, namespace, sharing


@sharing(ASKING)
def sample_command(
    run: Run,
    num_samples: Annotated[int, typer.Option("--num-samples", "-s", min=1, help="Rows to draw.")] = 16,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A csv, tsv, npy, npz or png file; else printed as csv."),
    ] = None,
    mean: Annotated[bool, typer.Option("--mean", help="Means of p(x | z) instead of draws.")] = False,
    image_shape: Annotated[
        str | None, typer.Option(metavar="HEIGHT,WIDTH", help="Of a png; square by default.")
    ] = None,
    **shared: Any,
) -> None:
    """Draw new data from the model of RUN, in the units of its data.

    [bold]Examples[/bold]

    pyrolvm sample runs/iris --num-samples 1000 --out new.csv

    pyrolvm sample runs/vae --num-samples 64 --mean --out digits.png
    """
    options = namespace(locals())
    from pyrolvm.shell.using import run_sample

    run_sample(options)


@sharing(READING, ASKING)
def encode_command(
    run: Run,
    data: DataName,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A csv, tsv, npy or npz file; else printed as csv.")
    ] = None,
    **shared: Any,
) -> None:
    """Where the guide of RUN puts each row of DATA: means of q(z | x), or class probabilities.

    [bold]Example[/bold]

    pyrolvm encode runs/iris iris --out codes.csv
    """
    options = namespace(locals())
    from pyrolvm.shell.using import run_encode

    run_encode(options)


@sharing(READING, ASKING)
def reconstruct_command(
    run: Run,
    data: DataName,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A csv, tsv, npy, npz or png file; else printed as csv."),
    ] = None,
    image_shape: Annotated[
        str | None, typer.Option(metavar="HEIGHT,WIDTH", help="Of a png; square by default.")
    ] = None,
    **shared: Any,
) -> None:
    """The mean of p(x | z) at each row's code, in the units of the data.

    [bold]Example[/bold]

    pyrolvm reconstruct runs/vae digits --out reconstructions.png
    """
    options = namespace(locals())
    from pyrolvm.shell.using import run_reconstruct

    run_reconstruct(options)


@sharing(READING, ASKING)
def evidence_command(
    run: Run,
    data: DataName,
    method: Annotated[
        str,
        typer.Option(
            help="importance, iwae, prior, ais or exact.",
            autocompletion=words("importance iwae prior ais exact"),
        ),
    ] = "importance",
    num_samples: Annotated[
        int | None,
        typer.Option("--num-samples", "-s", min=1, help="Draws per row; 1000 by default (ais: 16 chains)."),
    ] = None,
    num_particles: Annotated[int | None, typer.Option("--particles", help="Of iwae: K.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write log p(x) of each row: csv, tsv, npy or npz.")
    ] = None,
    **shared: Any,
) -> None:
    """Estimate log p(x) of each row of DATA under RUN, in nats; noted in the run for `compare`.

    [bold]Examples[/bold]

    pyrolvm evidence runs/vae mnist --data-option split=test --num-samples 5000

    pyrolvm evidence runs/iris iris --method exact --out evidence.csv
    """
    options = namespace(locals())
    from pyrolvm.shell.using import run_evidence

    run_evidence(options)


@sharing(READING, ASKING)
def diagnose_command(
    run: Run,
    data: DataName,
    num_samples: Annotated[int, typer.Option("--num-samples", "-s", min=1, help="Draws per row.")] = 500,
    quick: Annotated[bool, typer.Option("--quick", help="Only the draws and their summary.")] = False,
    **shared: Any,
) -> None:
    """How good the guide of RUN is on DATA: evidence, k-hat, collapse, predictive checks, and draws for ArviZ.

    Writes inference_data.nc, summary.csv and k_hat.csv (one row per datum) to the run folder.

    [bold]Examples[/bold]

    pyrolvm diagnose runs/iris iris --num-samples 1000

    pyrolvm diagnose runs/iris iris --quick
    """
    options = namespace(locals())
    from pyrolvm.shell.using import run_diagnose

    run_diagnose(options)


@sharing(ASKING)
def report_command(
    run: Run,
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Other data than those the run was fitted to.")
    ] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", "-s", min=1, help="Draws per row.")] = 1000,
    image_shape: Annotated[
        str | None, typer.Option(metavar="HEIGHT,WIDTH", help="Of rows that are pictures.")
    ] = None,
    gaps: Annotated[bool, typer.Option("--gaps", help="Also split the evidence gap; takes minutes.")] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="Also compare with NUTS; takes minutes.")
    ] = False,
    **shared: Any,
) -> None:
    """Write report.html in RUN: what the run folder and its diagnosis say, on one page.

    [bold]Example[/bold]

    pyrolvm report runs/iris
    """
    options = namespace(locals())
    from pyrolvm.shell.using import run_report

    run_report(options)
