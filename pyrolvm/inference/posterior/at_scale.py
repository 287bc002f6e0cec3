"""Questions about more rows than fit into memory: asked part by part, and written as the answers come."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyrolvm.data.far.places import Place
from pyrolvm.data.far.streamed import StreamedDataset
from pyrolvm.data.far.writing import AnswerFile, check_answer_file
from pyrolvm.errors import SettingError, count, one_of
from pyrolvm.inference.posterior.evidence import CHAINS, DRAWS, khat_threshold
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.posterior.questions import QUESTIONS, Columns
from pyrolvm.processes import ALONE, Processes, here
from pyrolvm.progress import Bar, progress_bar
from pyrolvm.seeds import Purpose, derived_seed

PART_ROWS, PART_BYTES = 2**16, 2**26
"""Rows of a part, at the most, and bytes of its data."""


@dataclass(frozen=True)
class Answers:
    """What was written.

    Attributes
    ----------
    path : Path or str
        Where; a URL is a str.
    num_rows : int
    table : DataFrame
        Of each column with one number a row: `mean`, `sd`, `min`, `max` over all rows, and how many are `missing`.
    num_untrusted : int or None
        Rows whose k-hat is too high to trust their estimate; None where there is no k-hat.
    """

    path: Path | str
    num_rows: int
    table: pd.DataFrame
    num_untrusted: int | None = None

    def __repr__(self) -> str:
        high = "" if self.num_untrusted is None else f"; {self.num_untrusted:,} with a k-hat too high"
        return f"Answers: {self.num_rows:,} rows in {self.path}{high}\n{self.table.to_string()}"


def write_answers(
    fitted: FittedModel,
    data: Any,
    out: str | os.PathLike[str],
    question: str = "encode",
    *,
    part_rows: int | None = None,
    overwrite: bool = False,
    seed: int = 0,
    parallel: bool = True,
    progress: bool = True,
    **options: Any,
) -> Answers:
    """Ask about every row of `data`, some rows at a time, and write the answers as they come.

    Called again after it was interrupted, with the same arguments, it goes on behind the parts that are done. Under
    torch's launcher every process answers its share. The numbers do not depend on either.

    Parameters
    ----------
    data : StreamedDataset, or data as `fit` takes them
        Of a `StreamedDataset` only the rows of a part are in memory.
    out : str or Path
        A file here, or a URL that fsspec writes (`"s3://bucket/NAME.parquet"`). It is there when all of it is; until
        then `OUT.progress` is.
        `NAME.parquet`, a folder with a file for every part, whose columns begin with the number of the row (and its
        label); `NAME.npy`, the first answer alone, [rows, ...]; or `NAME.zarr`, a group with an array for each answer.
    question : {"encode", "log_evidence", "posterior", "diagnose"}
        "encode": means and standard deviations of q(z | x). "log_evidence": log p(x) in nats with its standard error
        and diagnostics; `options` as of `evidence_table`. "posterior": mean, sd and quantiles (5, 50, 95%) of draws of
        the latents of each row; `num_samples=100`. "diagnose": k-hat, effective sample size, ELBO and log p(x) of each
        row by importance weights; `num_samples=1000`.
    part_rows : int, optional
        Rows of a part; by default 65,536, or as many as have 64 MiB of data.
    overwrite : bool
        Begin anew where the file is there.

    Returns
    -------
    Answers

    Raises
    ------
    SettingError
        The file cannot be written, is there already, or was begun for another question, other data or another fit.
    """
    one_of("question", question, QUESTIONS)
    place = Place.of(out)
    check_answer_file(place)
    processes = here() if parallel else ALONE
    rows = _Rows(fitted, data)
    size = max(1, min(PART_ROWS, PART_BYTES // rows.row_bytes)) if part_rows is None else part_rows
    file = AnswerFile(place, rows.source.num_rows, count("part_rows", size))
    ask = partial(_asked, fitted, QUESTIONS[question], options, seed, rows)
    record = {"question": question, "options": {k: repr(v) for k, v in options.items()}, "seed": seed}
    record |= {"data": rows.source.fingerprint(), "fit": _fingerprint(fitted)}
    limit = _khat_limit(question, options)
    with processes.losses_named():
        _check_alike(processes, record)
        processes.first(lambda: _begin(file, record, overwrite, ask))
        share, done = processes.share(file.num_parts), file.done()
        parts = [part for part in range(share.start, share.stop) if part not in done]
        with progress_bar(
            question, len(parts), enabled=progress and processes.is_first, unit=" parts"
        ) as bar:
            processes.each(lambda: _write(file, parts, ask, limit, bar))
        notes = processes.first(file.finish)
    return _answers(place.name, rows.source.num_rows, notes)


def _write(
    file: AnswerFile, parts: list[int], ask: Callable[..., Columns], limit: float | None, bar: Bar
) -> None:
    for part in parts:
        columns = ask(part, *file.rows(part))
        file.write(part, columns, _note(columns, limit))
        bar.advance()


def _check_alike(processes: Processes, record: dict[str, Any]) -> None:
    """Raise `SettingError` where processes ask something else, or of something else."""
    for rank, other in enumerate(processes.gather(record)):
        differ = [k for k in record if other[k] != record[k]]
        if differ:
            raise SettingError(
                f"process {rank} asks with another {differ[0]} ({other[differ[0]]}, not {record[differ[0]]}): start "
                "all processes with the same question, data and fit"
            )


def _begin(file: AnswerFile, record: dict[str, Any], overwrite: bool, ask: Callable[..., Columns]) -> None:
    """Begin, or go on; two rows are asked about first, and where that fails nothing is begun."""
    if not file.begin(record, overwrite):
        return
    try:
        file.make_room(ask(0, 0, min(2, file.num_rows)))
    except BaseException:
        file.withdraw()
        raise


class _Rows:
    """Any data, some rows at a time."""

    def __init__(self, fitted: FittedModel, data: Any) -> None:
        streamed = isinstance(data, StreamedDataset)
        self.source: Any = (
            data if streamed else fitted.batch(data)
        )  # either counts its rows and has a fingerprint
        self.labels = getattr(data, "labels", None)
        self._reader = data.reader() if streamed else None

    @property
    def row_bytes(self) -> int:
        if self._reader is not None:
            return self.source.row_bytes
        return 4 * max(1, sum(t.numel() for _, t in self.source.tensors()) // max(1, self.source.num_rows))

    def take(self, first: int, stop: int) -> tuple[Any, np.ndarray | None]:
        """(rows `first .. stop - 1` as a question takes them, their labels)."""
        if self._reader is not None:
            found = self._reader.rows(first, stop)
            return found, found.labels
        rows = torch.arange(first, stop, device=self.source.indices.device)
        return self.source.take(rows), None if self.labels is None else np.asarray(self.labels)[first:stop]


def _asked(
    fitted: FittedModel,
    question: Callable[..., Columns],
    options: dict[str, Any],
    seed: int,
    rows: _Rows,
    part: int,
    first: int,
    stop: int,
) -> Columns:
    """The answers to one part: row numbers, labels, and what was asked."""
    x, labels = rows.take(first, stop)
    found = question(fitted, x, seed=derived_seed(seed, Purpose.PART, part), **options)
    beside = {"row": np.arange(first, stop)} | ({} if labels is None else {"label": labels})
    return beside | found


def _fingerprint(fitted: FittedModel) -> str:
    """A digest of the parameters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(fitted.program.tensors().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------ notes of parts, and what they say together


def _khat_limit(question: str, options: dict[str, Any]) -> float | None:
    if question not in ("log_evidence", "diagnose") or options.get("method") in ("exact", "ais"):
        return None
    return khat_threshold(options.get("num_samples") or DRAWS)


def _note(columns: Columns, limit: float | None) -> dict[str, Any]:
    """Per column of one number a row: [number, mean, squares about it, min, max, missing]; k-hats above the limit."""
    found: dict[str, Any] = {"columns": {}}
    for name, array in columns.items():
        if array.ndim == 1 and array.dtype.kind == "f":
            there = array[np.isfinite(array)].astype(np.float64)
            mean = float(there.mean()) if len(there) else 0.0
            ends = [float(there.min()), float(there.max())] if len(there) else [None, None]
            squares = float(((there - mean) ** 2).sum())
            found["columns"][name] = [len(there), mean, squares, *ends, len(array) - len(there)]
    if limit is not None and np.isfinite(columns["k_hat"]).any():
        found["untrusted"] = int((columns["k_hat"] > limit).sum())
    return found


def _answers(path: Path | str, num_rows: int, notes: list[dict[str, Any]]) -> Answers:
    names = list(dict.fromkeys(name for note in notes for name in note["columns"]))
    table = {name: _merged([n["columns"][name] for n in notes if name in n["columns"]]) for name in names}
    counted = [n["untrusted"] for n in notes if "untrusted" in n]
    frame = pd.DataFrame.from_dict(table, "index", columns=["mean", "sd", "min", "max", "missing"])
    return Answers(path, num_rows, frame, sum(counted) if counted else None)


def _merged(parts: list[list[Any]]) -> list[float]:
    """[mean, sd (of one less than the number), min, max, missing] of all parts."""
    n, means, squares, low, high, missing = np.array(parts, dtype=float).T  # None is NaN
    if not (number := n.sum()):
        return [np.nan, np.nan, np.nan, np.nan, int(missing.sum())]
    mean = (n * means).sum() / number
    total = (squares + n * (means - mean) ** 2).sum()
    sd = np.sqrt(total / (number - 1)) if number > 1 else np.nan
    return [mean, sd, np.nanmin(low), np.nanmax(high), int(missing.sum())]


def draws_of(method: str, num_samples: int | None) -> int | None:
    """The draws of each row that an estimate of the evidence takes; None of an exact one."""
    return None if method == "exact" else num_samples or (CHAINS if method == "ais" else DRAWS)
