"""`sample`, `encode`, `reconstruct`, `evidence`, `diagnose`: what one asks of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyrolvm.data import Dataset
from pyrolvm.errors import SettingError
from pyrolvm.files import write_atomically
from pyrolvm.inference.posterior.evidence import evidence_table, khat_threshold
from pyrolvm.inference.posterior.fitted import FittedModel
from pyrolvm.inference.program.devices import resolve_device
from pyrolvm.shell.inputs import Source, label_path, listed, log_scale, read_like, transforms_of, undone
from pyrolvm.shell.outputs import ARRAYS, check_out, write_png, write_values
from pyrolvm.shell.pairs import read_setting
from pyrolvm.shell.runs import add_evidence, open_run, refuse_unknown
from pyrolvm.shell.tables import console, print_facts, print_table

EVIDENCE_DRAWS, SUMMARY_ROWS = 1000, 20
PICTURES = (*ARRAYS, ".png")


class Question:
    """A run, and the data that it is asked about, read as its own data were."""

    def __init__(self, options: Any, suffixes: tuple[str, ...] = ARRAYS) -> None:
        self.options = options
        self.path = Path(options.run)
        check_out(getattr(options, "out", None), suffixes)
        self.fitted: FittedModel
        self.fitted, self.record = open_run(self.path, options.model, resolve_device(options.device))
        self.transforms = transforms_of(self.record)

    def data(self) -> Dataset:
        """DATA with the run's columns and transforms."""
        o = self.options
        named = dict(map(read_setting, o.data_option))
        return read_like(self.record, Source(o.data, listed(o.columns), o.labels, o.key, o.header, named))

    def undone(self, values: Any) -> Any:
        """Values, or a dict of them by site, in the units of the data as they were read."""
        if isinstance(values, dict):
            return {k: self.undone(v) for k, v in values.items()}
        return undone(values.cpu().numpy(), self.transforms)

    def write_rows(self, values: Any, labels: Any = None) -> None:
        """Rows like those of the data: a table or array under the data's columns, or a picture."""
        out = self.options.out
        values = self.undone(values)
        if out is None or out.suffix.lower() != ".png":
            write_values(values, out, self.record.get("columns") or self.fitted.columns, labels)
        elif isinstance(values, dict):
            raise SettingError(f"the model has several observed sites ({', '.join(values)}): use .npz")
        else:
            write_png(values, out, self._image_shape(), self.record.get("columns"))

    def _image_shape(self) -> tuple[int, int] | None:
        shape = self.record.get("shape", [])
        recorded = (shape[-2], shape[-1]) if len(shape) >= 2 else None
        return read_image_shape(self.options.image_shape) or recorded


def read_image_shape(text: str | None) -> tuple[int, int] | None:
    """`28,28` of --image-shape."""
    if text is None:
        return None
    parts = listed(text) or []
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise SettingError(f"--image-shape {text}: write it as HEIGHT,WIDTH, e.g. 28,28")
    return int(parts[0]), int(parts[1])


def run_sample(options: Any) -> None:
    """`pyrolvm sample`."""
    question = Question(options, PICTURES)
    values = question.fitted.sample(options.num_samples, mean=options.mean, seed=options.seed)
    question.write_rows(values)


def run_reconstruct(options: Any) -> None:
    """`pyrolvm reconstruct`."""
    question = Question(options, PICTURES)
    dataset = question.data()
    values = question.fitted.reconstruct(dataset, seed=options.seed)
    question.write_rows(values, dataset.labels if options.labels else None)


def run_encode(options: Any) -> None:
    """`pyrolvm encode`."""
    question = Question(options)
    dataset = question.data()
    write_values(_codes(question.fitted, dataset, options.seed), options.out, labels=dataset.labels)


def _codes(fitted: FittedModel, dataset: Dataset, seed: int) -> dict[str, Any]:
    """Site -> codes [rows, ...]; of a latent that the model sums out, its probabilities."""
    names = [s.name for s in fitted.structure.local_latents if not s.enumerated]
    model = fitted.program.owner
    if not names and hasattr(model, "responsibilities"):
        x = fitted.batch(dataset).args[0]
        return {"component": model.responsibilities(x).detach()}
    values = fitted.encode(dataset, seed=seed)
    return values if isinstance(values, dict) else {names[0]: values}


def run_evidence(options: Any) -> None:
    """`pyrolvm evidence`."""
    question = Question(options)
    dataset = question.data()
    count = options.num_samples or (None if options.method == "ais" else EVIDENCE_DRAWS)
    table = evidence_table(
        question.fitted.pair(dataset),
        options.method,
        count,
        num_particles=options.num_particles,
        seed=options.seed,
    )
    if options.out is not None:
        known = table.dropna(axis="columns", how="all")
        write_values(known.to_numpy(), options.out, list(known.columns), dataset.labels)
    entry = _entry(options, count, dataset, table)
    _print_evidence(entry, log_scale(question.transforms, int(dataset.values[:1].size)))
    add_evidence(question.path, entry)


def _entry(options: Any, count: int | None, dataset: Dataset, table: pd.DataFrame) -> dict[str, Any]:
    more = f" ({', '.join(options.data_option)})" if options.data_option else ""
    values, k_hat = (table[name].to_numpy(float) for name in ("log_evidence", "k_hat"))
    tails = bool(np.isfinite(k_hat).any())
    return {
        "data": label_path(options.data) + more,
        "method": options.method,
        "num_samples": None if options.method == "exact" else count,
        "rows": dataset.num_rows,
        "mean": float(values.mean()),
        "standard_error": float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None,
        "min": float(values.min()),
        "max": float(values.max()),
        "untrusted": int((k_hat > khat_threshold(count)).sum()) if count and tails else None,
    }


def _print_evidence(entry: dict[str, Any], shift: float) -> None:
    draws = f", {entry['num_samples']:,} draws per row" if entry["num_samples"] else ""
    facts = [
        ("data", f"{entry['data']}: {entry['rows']:,} rows"),
        ("method", entry["method"] + draws),
        ("log p(x), mean", entry["mean"]),
        ("standard error over rows", entry["standard_error"]),
        ("min", entry["min"]),
        ("max", entry["max"]),
    ]
    if shift:
        facts.append(("mean in the data's own units", entry["mean"] - shift))
    print_facts(facts)
    unit = "nats per datum, of the standardised data" if shift else "nats per datum"
    console().print(unit, style="dim")
    if entry["untrusted"]:
        console().print(
            f"{entry['untrusted']:,} of {entry['rows']:,} rows have a k-hat too high to trust their estimate",
            style="yellow",
        )


def run_diagnose(options: Any) -> None:
    """`pyrolvm diagnose`."""
    from pyrolvm.diagnostics import diagnose
    from pyrolvm.diagnostics.inference_data import save_inference_data, to_inference_data

    question = Question(options)
    dataset = question.data()
    idata = to_inference_data(question.fitted, dataset, num_samples=options.num_samples, seed=options.seed)
    written = [save_inference_data(idata, question.path / "inference_data.nc").name]
    _print_summary(_summary(question.fitted, idata), question.path / "summary.csv")
    written.append("summary.csv")
    if not options.quick:
        diagnosis = diagnose(question.fitted, dataset, options.num_samples, seed=options.seed)
        console().print(f"\n{diagnosis.paragraph}")
        if diagnosis.k_hat is not None:
            path = question.path / "k_hat.csv"
            write_atomically(path, diagnosis.k_hat.to_csv)
            written.append(path.name)
    console().print(f"{question.path}: {', '.join(written)}", style="dim")


def _print_summary(summary: Any, path: Path) -> None:
    write_atomically(path, summary.to_csv)
    print_table(["", *summary.columns], summary.head(SUMMARY_ROWS).reset_index().to_numpy().tolist())
    if len(summary) > SUMMARY_ROWS:
        console().print(f"and {len(summary) - SUMMARY_ROWS:,} more", style="dim")


def run_report(options: Any) -> None:
    """`pyrolvm report`."""
    from pyrolvm.report import write_report

    if options.model is None:
        refuse_unknown(Path(options.run))
    written = write_report(
        Path(options.run),
        options.data,
        model=options.model,
        num_samples=options.num_samples,
        gaps=options.gaps,
        reference=options.reference,
        image_shape=read_image_shape(options.image_shape),
        device=resolve_device(options.device),
        seed=options.seed,
    )
    console().print(str(written))


def _summary(fitted: FittedModel, idata: Any) -> Any:
    """The table of the posterior: global latents if there are any, else the local ones."""
    from pyrolvm.diagnostics.inference_data import summarise

    return summarise(idata, [site.name for site in fitted.structure.global_latents])
