"""From a run folder to its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyrolvm.diagnostics import diagnose
from pyrolvm.errors import RunFolderError, count
from pyrolvm.files import write_atomically
from pyrolvm.report.findings import Findings, find_data, held_out_evidence
from pyrolvm.report.model import image_shape as shape_of
from pyrolvm.report.parts import render
from pyrolvm.report.sections import all_sections, titled
from pyrolvm.runs import open_run

REPORT = "report.html"


def write_report(
    path: str | Path,
    data: Any = None,
    *,
    model: Any = None,
    guide: Any = None,
    num_samples: int = 1000,
    max_rows: int = 500,
    gaps: bool = False,
    reference: bool | str = False,
    image_shape: Sequence[int] | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Path:
    """Write `report.html` in the run folder `path`, in one step, and return where it is.

    Parameters
    ----------
    path : str or Path
        The run folder, written by the shell or by `FittedModel.save`.
    data : str, Path, Source, array, tensor, DataFrame, Dataset or False, optional
        A data set's name, a file or a `pyrolvm.runs.Source`, read as the run's own data were; or data as the model
        sees them. None reads the recorded data again if they are still the same; False leaves the data out.
    model, guide : object, optional
        Of a pair of your own, as in `pyrolvm.load`; or `model="file.py:Name"`.
    num_samples : int
        Draws per datum, at least 25.
    max_rows : int
        Data that are looked at one by one, drawn at random if there are more.
    gaps : bool
        Also split the evidence gap; takes minutes.
    reference : bool or str
        Also compare with NUTS (True or "nuts"); takes minutes.
    image_shape : sequence of int, optional
        [height, width] of rows that are pictures, if their columns do not show it.
    device : str
        As in `pyrolvm.load`.
    seed : int
        Of the draws.

    Raises
    ------
    RunFolderError
        The folder is no run or cannot be written.
    DataError
        The data do not fit.
    SettingError
        Too few draws or rows, or an image shape that is not that of a row.
    """
    count("num_samples", num_samples, least=25)
    count("max_rows", max_rows, least=2)
    run = open_run(Path(path), model, guide, device)
    shape = shape_of(run, image_shape)
    prepared, reason = find_data(run.recipe, data)
    diagnosis = None
    if prepared is not None:
        options: dict[str, Any] = {"gaps": gaps, "reference": reference or None}
        diagnosis = diagnose(run.fitted, prepared.train, num_samples, max_rows=max_rows, seed=seed, **options)
    held_out = held_out_evidence(run.fitted, prepared, diagnosis, max_rows, seed)
    found = Findings(run, prepared, reason, diagnosis, held_out, shape, num_samples, seed)
    file, text = run.path / REPORT, render(titled(found), all_sections(found))
    try:
        write_atomically(file, lambda p: p.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(f"{file} could not be written: {error.strerror or error}") from None
    return file
