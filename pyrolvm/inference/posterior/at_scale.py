"""Questions about more rows than fit into memory: asked part by part, and written as the answers come."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro.distributions import Delta
from torch import Tensor

from pyrolvm.data.arrays import Batch
from pyrolvm.data.far.streamed import StreamedDataset
from pyrolvm.data.far.writing import AnswerFile, check_answer_file
from pyrolvm.errors import ProgramError, count, one_of
from pyrolvm.inference.posterior.evidence import CHAINS, DRAWS, evidence_table, khat_threshold
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.handlers import Means
from pyrolvm.inference.program.structure import base
from pyrolvm.processes import ALONE, here
from pyrolvm.progress import progress_bar
from pyrolvm.seeds import Purpose, derived_seed

PART_ROWS, PART_BYTES = 2**16, 2**26
"""Rows of a part, at the most, and bytes of its data."""
QUANTILES = (0.05, 0.5, 0.95)

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Answers:
    """What was written.

    Attributes
    ----------
    path : Path
    num_rows : int
    table : DataFrame
        Of each column with one number a row: `mean`, `sd`, `min`, `max` over all rows, and how many are `missing`.
    num_untrusted : int or None
        Rows whose k-hat is too high to trust their estimate; None where there is no k-hat.
    """

    path: Path
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
    out = Path(out).expanduser()
    check_answer_file(out)
    processes = here() if parallel else ALONE
    rows = _Rows(fitted, data)
    size = max(1, min(PART_ROWS, PART_BYTES // rows.row_bytes)) if part_rows is None else part_rows
    file = AnswerFile(out, rows.num_rows, count("part_rows", size))
    ask = partial(_asked, fitted, QUESTIONS[question], options, seed)
    record = {"question": question, "options": {k: repr(v) for k, v in options.items()}, "seed": seed}
    record |= {"data": rows.fingerprint(), "fit": _fingerprint(fitted)}
    if processes.is_first:
        file.begin(record, overwrite)
        _make_room(file, partial(ask, rows))
    processes.barrier()
    share = processes.share(file.num_parts)
    parts = [part for part in range(share.start, share.stop) if not file.is_done(part)]
    with progress_bar(question, len(parts), enabled=progress and processes.is_first, unit=" parts") as bar:
        for part in parts:
            columns = ask(rows, part, *file.rows(part))
            file.write(part, columns, _note(columns, _khat_limit(question, options)))
            bar.advance()
    processes.barrier()
    notes = list(file.taken())
    processes.barrier()
    if processes.is_first and file.is_complete:
        file.finish()
    return _answers(out, rows.num_rows, notes)


def _make_room(file: AnswerFile, ask: Callable[..., Columns]) -> None:
    """Ask about two rows, for what answers look like; where that fails nothing is begun."""
    if any(file.is_done(part) for part in range(file.num_parts)):
        return
    try:
        file.make_room(ask(0, 0, min(2, file.num_rows)))
    except BaseException:
        file.finish()
        raise


class _Rows:
    """Any data, some rows at a time."""

    def __init__(self, fitted: FittedModel, data: Any) -> None:
        self.streamed = data if isinstance(data, StreamedDataset) else None
        self.batch: Batch | None = None if self.streamed is not None else fitted.batch(data)
        self._reader = None if self.streamed is None else self.streamed.reader()
        self.labels = getattr(data, "labels", None)

    @property
    def num_rows(self) -> int:
        if self.streamed is not None:
            return self.streamed.num_rows
        assert self.batch is not None
        return self.batch.num_rows

    @property
    def row_bytes(self) -> int:
        if self.streamed is not None:
            return self.streamed.row_bytes
        assert self.batch is not None
        return 4 * max(1, sum(t.numel() for _, t in self.batch.tensors()) // max(1, self.num_rows))

    def fingerprint(self) -> str:
        source: Any = self.batch if self.streamed is None else self.streamed
        return source.fingerprint()

    def take(self, first: int, stop: int) -> tuple[Any, np.ndarray | None]:
        """(rows `first .. stop - 1` as a question takes them, their labels)."""
        if self._reader is not None:
            found = self._reader.rows(first, stop)
            return found, found.labels
        assert self.batch is not None
        rows = torch.arange(first, stop, device=self.batch.indices.device)
        return self.batch.take(rows), None if self.labels is None else np.asarray(self.labels)[first:stop]


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


# ------------------------------------------------------------------ questions


def _encode(fitted: FittedModel, x: Any, *, seed: int) -> Columns:
    means = fitted.encode(x, seed=seed)
    if not isinstance(means, dict):
        names = [s.name for s in fitted.structure.local_latents if s.in_guide]
        means = {(names or [fitted.structure.enumerated[0].name])[0]: means}
    return {
        k: _array(v) for k, v in (means | {f"{n}_sd": sd for n, sd in deviations(fitted, x).items()}).items()
    }


def _log_evidence(
    fitted: FittedModel, x: Any, method: str = "importance", num_samples: int | None = None, **options: Any
) -> Columns:
    table = evidence_table(fitted.pair(x), method, num_samples, progress=False, **options)
    return {name: table[name].to_numpy() for name in table.columns}


def _diagnose(fitted: FittedModel, x: Any, num_samples: int = DRAWS, *, seed: int) -> Columns:
    found = _log_evidence(fitted, x, num_samples=num_samples, seed=seed)
    return {n: found[n] for n in ("k_hat", "effective_sample_size", "log_evidence", "elbo")}


def _posterior(fitted: FittedModel, x: Any, num_samples: int = 100, *, seed: int) -> Columns:
    sites = [s for s in fitted.structure.local_latents if not s.point]
    if not sites:
        raise ProgramError("the program draws no latents of each row: ask for encode, or log_evidence")
    parts: dict[str, list[np.ndarray]] = {}
    for draws in fitted.draw_chunks(x, num_samples, seed=seed):
        for site in sites:
            for name, value in _summary(site.name, draws.values[site.name], site.discrete):
                parts.setdefault(name, []).append(_array(value))
    return {name: np.concatenate(found) for name, found in parts.items()}


def _summary(name: str, draws: Tensor, discrete: bool) -> Iterator[tuple[str, Tensor]]:
    """Of draws [draws, rows, ...]: the most frequent value and its share if discrete, else moments and quantiles."""
    if discrete:
        mode = draws.mode(0).values
        yield f"{name}_mode", mode
        yield f"{name}_share", (draws == mode).float().mean(0)
        return
    yield f"{name}_mean", draws.mean(0)
    yield f"{name}_sd", draws.std(0)
    for q, value in zip(QUANTILES, _quantiles(draws), strict=True):
        yield f"{name}_q{100 * q:.0f}", value


def _quantiles(draws: Tensor) -> Tensor:
    """Linear between order statistics, [quantiles, rows, ...]; torch's own refuses 2^24 numbers."""
    ordered = draws.sort(0).values
    place = torch.tensor(QUANTILES, dtype=draws.dtype) * (len(draws) - 1)
    low = place.floor().long()
    high = (low + 1).clamp(max=len(draws) - 1)
    share = (place - low).reshape(-1, *[1] * (draws.dim() - 1)).to(draws.device)
    return ordered[low] + share * (ordered[high] - ordered[low])


QUESTIONS: dict[str, Callable[..., Columns]] = {
    "encode": _encode,
    "log_evidence": _log_evidence,
    "posterior": _posterior,
    "diagnose": _diagnose,
}


@torch.no_grad()
def deviations(fitted: FittedModel, x: Any) -> dict[str, Tensor]:
    """Standard deviations of q(z | x) at the guide's means, site -> [rows, ...], where there is a closed form."""
    names = [s.name for s in fitted.structure.local_latents if not s.discrete and not s.point]
    parts: list[dict[str, Tensor]] = []
    for pair in fitted.pair(x).chunks():
        trace = pair.guide(None, Means())
        found: Any = {n: trace.nodes[n]["fn"] for n in names if n in trace.nodes}
        # an AutoGuide computes its latents from auxiliary draws: of such a point the spread is not 0 but unknown
        found = {n: fn for n, fn in found.items() if not isinstance(base(fn), Delta)}
        try:
            parts.append({n: d.stddev.expand_as(trace.nodes[n]["value"]) for n, d in found.items()})
        except NotImplementedError:
            return {}
    return {n: torch.cat([p[n] for p in parts]) for n in parts[0]}


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


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


def _answers(path: Path, num_rows: int, notes: list[dict[str, Any]]) -> Answers:
    names = list(dict.fromkeys(name for note in notes for name in note["columns"]))
    table = {name: _merged([n["columns"][name] for n in notes if name in n["columns"]]) for name in names}
    counted = [n["untrusted"] for n in notes if "untrusted" in n]
    frame = pd.DataFrame.from_dict(table, "index", columns=["mean", "sd", "min", "max", "missing"])
    return Answers(path, num_rows, frame, sum(counted) if counted else None)


def _merged(parts: list[list[Any]]) -> list[float]:
    """[mean, sd (of one less than the number), min, max, missing] of all parts."""
    number, mean, squares = 0, 0.0, 0.0
    for n, m, s, *_ in parts:
        if n:
            apart, total = m - mean, number + n
            squares += s + apart**2 * number * n / total
            mean, number = mean + apart * n / total, total
    low = [p[3] for p in parts if p[3] is not None]
    high = [p[4] for p in parts if p[4] is not None]
    missing = sum(p[5] for p in parts)
    if not number:
        return [np.nan, np.nan, np.nan, np.nan, missing]
    sd = float(np.sqrt(squares / (number - 1))) if number > 1 else np.nan
    return [mean, sd, min(low), max(high), missing]


def draws_of(method: str, num_samples: int | None) -> int | None:
    """The draws of each row that an estimate of the evidence takes; None of an exact one."""
    return None if method == "exact" else num_samples or (CHAINS if method == "ais" else DRAWS)
