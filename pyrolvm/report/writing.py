"""From a run folder to its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyrolvm import load
from pyrolvm.diagnostics.guide_quality import diagnose
from pyrolvm.errors import RunFolderError, SettingError
from pyrolvm.files import read_json, write_atomically
from pyrolvm.inference.posterior.saving import CONFIG
from pyrolvm.report.findings import Findings, data_record, given_data, held_out_evidence
from pyrolvm.report.parts import render
from pyrolvm.report.sections import all_sections, titled
from pyrolvm.shell.runs import open_run

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
    data: the name of a data set or a file, read as the run's own data were; or an array, tensor, table or
        `Dataset` as the model sees it. None reads the recorded data again if they are still the same; False
        keeps to what the run folder says.
    model, guide: of a pair of your own, as in `pyrolvm.load`; for a run of the shell also `model="file.py:Name"`.
    num_samples: draws per datum. max_rows: data that are looked at one by one, drawn at random if there are more.
    gaps, reference: also split the evidence gap, or compare with NUTS (True or "nuts"); see `diagnose`. They take
        minutes.
    image_shape: [height, width] if rows are pictures and their columns do not say so.

    Raises `RunFolderError` if the folder is no run or cannot be written, `DataError` for data that do not fit,
    `SettingError` for too few draws or rows.
    """
    path = Path(path)
    _check(num_samples=(num_samples, 25), max_rows=(max_rows, 2))
    from_shell = isinstance(model, str)
    fitted = (
        open_run(path, model, device)[0]
        if from_shell
        else load(path, model=model, guide=guide, device=device)
    )
    config = read_json(path / CONFIG)
    given, diagnosis = given_data(data_record(config), data), None
    if given.train is not None:
        options: dict[str, Any] = {"gaps": gaps, "reference": reference or None}
        diagnosis = diagnose(fitted, given.train, num_samples, max_rows=max_rows, seed=seed, **options)
    held_out = held_out_evidence(fitted, given.held_out, diagnosis, max_rows, seed)
    shape = None if image_shape is None else tuple(image_shape)
    found = Findings(path, fitted, config, given, diagnosis, held_out, shape, seed)
    return _write(path / REPORT, render(titled(found), all_sections(found)))


def _check(**numbers: tuple[Any, int]) -> None:
    for name, (value, least) in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise SettingError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _write(file: Path, text: str) -> Path:
    try:
        write_atomically(file, lambda p: p.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(f"{file} could not be written: {error.strerror or error}") from None
    return file
