"""The options of all commands: whose parameters they are, and what the shell adds to them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from pyrolvm.shell.signatures import Option, keys_of, listed, model_options, options_of

MODEL, TRAINING, DATA, OUTPUT = "Model", "Training", "Data", "Output"
OBJECTIVES = keys_of("inference/objectives/choice.py", "OBJECTIVES")
SCHEDULES = keys_of("shell/fitting.py", "SCHEDULES")


def complete_model(incomplete: str) -> list[str]:
    """Names of models, and files of Python."""
    from pyrolvm.models import REGISTRY

    return completed(incomplete, map(str.lower, REGISTRY), (".py",))


def complete_data(incomplete: str) -> list[str]:
    """Names of data sets, and files that can be read."""
    from pyrolvm.data import DATASETS, SUFFIXES

    return completed(incomplete, DATASETS, SUFFIXES)


def completed(incomplete: str, names: Iterable[str], suffixes: tuple[str, ...]) -> list[str]:
    """The names, folders and files of these kinds that begin so."""
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    found = [p for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
    files = [str(p) for p in found if p.name.lower().endswith(suffixes) and not p.is_dir()]
    folders = [f"{p}/" for p in found if p.is_dir()]
    words = [*names, *sorted(files + folders)]
    return [word for word in words if word.lower().startswith(incomplete.lower())]


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model's name (see `pyrolvm models`), or file.py:ClassName for a pair of your own.",
        autocompletion=complete_model,
    ),
]
DataName = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A data set's name (see `pyrolvm datasets`), or a csv, tsv, parquet, npy, npz, idx or h5ad file; of "
        "parquet, npy and idx also many files, a folder, a pattern, or a URL.",
        autocompletion=complete_data,
    ),
]
DataNames = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help="A data set's name, a file, or many: files, a folder, a pattern, or a URL such as 's3://bucket/*.parquet'.",
        autocompletion=complete_data,
    ),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="A csv, tsv, npy or npz file; printed as csv without one.")
]
Answers = Annotated[
    str | None,
    typer.Option(
        "--out",
        "-o",
        help="A csv, tsv, npy or npz file; parquet, npy or zarr, or a URL of one, for many rows, which are written as "
        "they come, and gone on with after a kill. Printed as csv without one.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin --out anew where it is there.")]

FITTED = "inference/posterior/fitted.py"
READING = options_of("data/readers.py", "read", ("source", "mmap"), DATA) | listed(
    Option("data_option", "dict", help="Of a named data set, e.g. split=test.", panel=DATA)
)
"""Options of every command that reads DATA."""
LOADING = listed(
    Option("model", "str", help="The pair of your own that the run is of, FILE.PY:NAME; it is executed."),
    Option("device", "str", "cpu", "auto, cpu, cuda, cuda:N or mps."),
)
"""Options of every command that loads RUN."""
PICTURE = listed(Option("image_shape", "Sequence[int]", help="HEIGHT,WIDTH of a png; square by default."))
FIT = options_of(
    "inference/training/fit.py",
    "fit",
    ("model", "data", "model_kwargs", "rows", "callbacks", "checkpoint", "resume", "progress"),
    TRAINING,
    (
        ("guide", "str"),
        ("objective", f"Literal{OBJECTIVES} | str"),
        ("schedule", f"Literal{SCHEDULES}"),
        ("dtype", "str"),
        ("learning_rate", "float"),
        ("init", "Literal['auto', 'own', 'median', 'prior']"),
        ("validation", "float"),
    ),
)
ADDED = listed(
    Option("num_particles", "int", help="Draws per datum of the objective.", panel=TRAINING),
    Option(
        "alpha",
        "float",
        help="Of renyi and iwae; 0 is the importance-weighted bound. Of InfoVAE, 1 is the MMD-VAE.",
        panel=TRAINING,
    ),
    Option("gradient", "str", help="Of iwae: standard, stl or dreg.", panel=TRAINING),
    Option("num_restarts", "int", "1", "Fits from several starts; the best is kept.", panel=TRAINING),
    Option("set", "dict", help="Any option of the model, e.g. guide=full.", panel=MODEL),
    Option(
        "codes_of",
        "str",
        help="Fit --prior to the codes of this run of a model with a codebook, all else of it held.",
        panel=MODEL,
    ),
)
PREPARING = listed(
    Option("standardise", "bool", help="Mean 0 and deviation 1.", panel=DATA),
    Option("per_column", "bool", "True", "One mean and deviation for each column, or for all.", panel=DATA),
    Option("standardise_overall", "bool", help="--standardise --no-per-column.", panel=DATA),
    Option("binarise", "bool", help="0 and 1, by --threshold.", panel=DATA),
    Option("threshold", "float", help="Halfway between the extremes by default.", panel=DATA),
    Option("split_seed", "int", help="Of the rows held out; --seed by default.", panel=DATA),
)
CONSTRUCTORS = {k: o for k, o in model_options(MODEL).items() if k not in FIT}
SAMPLE = options_of(FITTED, "FittedModel.sample", ("given",))
ENCODE = options_of(FITTED, "FittedModel.encode", ("x",))
RECONSTRUCT = options_of(FITTED, "FittedModel.reconstruct", ("x",))
POSTERIOR = options_of(FITTED, "FittedModel.posterior", ("x", "corrected"))
IMPUTE = options_of(FITTED, "FittedModel.impute", ("x",))
EVIDENCE = options_of(
    "inference/posterior/evidence/__init__.py", "evidence_table", ("pair", "progress", "annealing")
)
DIAGNOSE = options_of("diagnostics/guide_quality.py", "diagnose", ("fitted", "x", "statistics", "progress"))
