"""What one asks of a run: the run loaded, its data read as its own were, and the answers written and printed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyrolvm.data import Dataset, StreamedDataset
from pyrolvm.errors import SettingError, count
from pyrolvm.files import write_atomically
from pyrolvm.inference.posterior.at_scale import Answers, draws_of, write_answers
from pyrolvm.inference.posterior.evidence import evidence_table, khat_threshold
from pyrolvm.inference.posterior.questions import QUESTIONS
from pyrolvm.processes import here
from pyrolvm.runs import add_evidence, open_run
from pyrolvm.runs.recipe import SAMPLED_ROWS
from pyrolvm.shell.arguments import source_of
from pyrolvm.shell.options import LOADING, PICTURE, READING
from pyrolvm.shell.outputs import ARRAYS, PARTS, check_image_shape, checked_out, write_png, write_values
from pyrolvm.shell.printing import caution, console, note, print_facts, print_table
from pyrolvm.shell.signatures import given
from pyrolvm.shell.values import label_words

SUMMARY_ROWS = 20
PICTURES = (*ARRAYS, ".png")
ANSWERS = (*ARRAYS, *PARTS)


class Question:
    """A run, the data that it is asked about, and `out`, the file of the answer: one of the kinds `suffixes`.

    With `streamed`, data that are larger than memory are not read yet: their rows are asked about some at a time. Where
    `out` is elsewhere it is the `url`.
    """

    def __init__(
        self,
        run: str,
        shared: dict[str, Any],
        out: str | Path | None = None,
        suffixes: tuple[str, ...] = ARRAYS,
        data: str | list[str] | None = None,
        streamed: bool = False,
    ) -> None:
        self.path, self.out, self.url = Path(run), *checked_out(out, suffixes)
        shape = check_image_shape(given(shared, PICTURE).get("image_shape"), self.out)
        self.saved = open_run(self.path, **given(shared, LOADING))
        self.fitted, self.recipe = self.saved.fitted, self.saved.recipe
        recorded = self.recipe.shape[-2:]
        self.image_shape = shape or (tuple(recorded) if len(recorded) == 2 else None)
        text = "\n".join(data) if isinstance(data, list) else data
        self.source = source_of(text or "", given(shared, READING))
        self.dataset: Dataset | Any = None if text is None else self.recipe.read(self.source, streamed)

    @property
    def suffix(self) -> str:
        """The kind of file that is written; a csv is printed where none is."""
        return ".csv" if self.out is None else self.out.suffix.lower()

    def write_rows(self, values: Any, across: int | None = None) -> None:
        """Rows like those of the data: a table or array under their columns, or a picture, `across` in a line."""
        values, columns = self.recipe.undo(values), self.saved.columns
        if self.out is None or self.suffix != ".png":
            write_values(values, self.out, columns, self._labels() if self.source.labels else {})
        elif isinstance(values, dict):
            raise SettingError(f"the model has several observed sites ({', '.join(values)}): use .npz")
        else:
            write_png(values, self.out, self.image_shape, columns, across)

    def take(self, rows: str) -> Any:
        """The rows of DATA with these numbers."""
        numbers, last = label_words(rows), self.dataset.num_rows - 1
        for number in numbers:
            if not isinstance(number, int) or not 0 <= number <= last:
                raise SettingError(f"rows={rows}: write numbers from 0 to {last}, e.g. 0,{min(5, last)}")
        return self.dataset.take(np.array(numbers, dtype=int))

    def has_label(self, label: str) -> np.ndarray:
        """Which rows of DATA have the label, bool [rows]."""
        labels = self.dataset.labels
        if labels is None:
            raise SettingError(f"{self.dataset.name} has no labels: name their column, labels=...")
        if self.recipe.record.get("labelled"):
            return labels == self.recipe.codes(label_words(label))[0]
        return labels.astype(str) == label

    def write_grid(self, values: torch.Tensor) -> None:
        """Pictures [rows, columns, ...] as one picture, or as a table or array of all."""
        rows, columns = values.shape[:2]
        flat = self.recipe.undo(values.reshape(rows * columns, *values.shape[2:]))
        if self.out is not None and self.suffix == ".png":
            write_png(flat, self.out, self.image_shape, self.saved.columns, columns)
        else:
            places = {"line": np.repeat(np.arange(rows), columns), "place": np.tile(np.arange(columns), rows)}
            write_values(flat, self.out, self.saved.columns, places)

    def sample(self, labels: str | None = None, num_samples: int | None = None, **options: Any) -> None:
        """`pyrolvm sample`; the labels, in words, in turn."""
        if labels is None:
            if self.recipe.record.get("labelled"):
                raise SettingError("the model takes labels: give those of the new rows, e.g. labels=0,1")
            return self.write_rows(self.fitted.sample(count("num_samples", num_samples or 1), **options))
        codes = self.recipe.codes(label_words(labels))
        turns = np.resize(codes, count("num_samples", num_samples or len(codes)))
        return self.write_rows(self.fitted.sample(len(turns), given={"y": turns}, **options), len(codes))

    @property
    def is_large(self) -> bool:
        """Whether the answer is written as it comes."""
        return self.suffix in PARTS or self.url is not None or isinstance(self.dataset, StreamedDataset)

    def write_answers(self, question: str, overwrite: bool = False, **options: Any) -> Answers:
        """Ask about all rows, some at a time; every one of several processes about its share."""
        out = self.url or self.out
        if out is None:
            raise SettingError(
                f"{self.source.called} has {self.dataset.num_rows:,} rows, which are written as they come: give --out "
                "FILE.parquet, FILE.npy or FILE.zarr"
            )
        answers = write_answers(self.fitted, self.dataset, out, question, overwrite=overwrite, **options)
        if here().is_first:
            note(f"{answers.num_rows:,} rows: {out}")
        return answers

    def posterior(self, overwrite: bool = False, num_samples: int = 100, seed: int = 0) -> None:
        """`pyrolvm posterior`: what draws of the latents of each row say."""
        if self.is_large:
            self.write_answers("posterior", overwrite, num_samples=num_samples, seed=seed)
        else:
            found = QUESTIONS["posterior"](self.fitted, self.dataset, num_samples=num_samples, seed=seed)
            write_values(found, self.out, beside=self._beside())

    def encode(self, refine: bool = False, seed: int = 0, overwrite: bool = False) -> None:
        """`pyrolvm encode`: means and standard deviations of q(z | x), with the rows' numbers and labels.

        With `refine` of the guide refined for each row, whose bounds before and after are columns beside them.
        """
        if self.is_large:
            if refine:
                raise SettingError("--refine is for rows in memory, written as .csv, .tsv, .npy or .npz")
            self.write_answers("encode", overwrite, seed=seed)
            return
        fitted, beside = self.fitted, self._beside()
        if refine:
            fitted = refined = fitted.refine(self.dataset, seed=seed)
            beside |= {name: refined.table[name].to_numpy() for name in ("elbo_start", "elbo", "gap")}
            note(refined.sentence)
        codes = QUESTIONS["encode"](fitted, self.dataset, seed=seed)
        if self.suffix == ".npy":  # the means alone
            sites = {site.name for site in fitted.structure.latents}
            codes = {name: value for name, value in codes.items() if name in sites}
        write_values(codes, self.out, beside=beside)

    def most_probable(self) -> None:
        """`pyrolvm most-probable`: a column for each site, one array if all have one value a row."""
        found = self.fitted.most_probable(self.dataset)
        sites = [s.name for s in self.fitted.structure.enumerated]
        each = found if isinstance(found, dict) else {sites[0]: found}
        values: Any = each
        if all(v.dim() == 1 for v in each.values()):  # [rows, steps]
            values, sites = torch.stack([*each.values()], 1), list(each)
        write_values(values, self.out, sites, self._beside())

    def _beside(self) -> dict[str, Any]:
        """What identifies a row of an answer."""
        return {"row": np.arange(self.dataset.num_rows)} | self._labels()

    def _labels(self) -> dict[str, Any]:
        """The column of labels, where the data have them."""
        labels = self.dataset.labels
        return {} if labels is None else {"label": labels}

    def impute(self, **options: Any) -> None:
        """`pyrolvm impute`."""
        found = self.fitted.impute(self.dataset, **options)
        missing = found.missing.cpu().numpy()
        source = self.source.like(self.recipe.record).read()  # not rounded by transforms
        source = source.load() if isinstance(source, StreamedDataset) else source
        read = source.values.reshape(missing.shape)
        filled = {n: self.recipe.undo(getattr(found, n)) for n in ("mean", "lower", "upper")}
        arrays = {name: np.where(missing, values, read) for name, values in filled.items()}
        if self.suffix in (".csv", ".tsv"):
            gaps = np.flatnonzero(missing.any(0))
            names = self.saved.columns or [f"column_{i}" for i in range(found.mean.shape[1])]
            ends = [f"{names[i]}_{end}" for end in ("lower", "upper") for i in gaps]
            beside = (arrays["lower"][:, gaps], arrays["upper"][:, gaps])
            write_values(
                np.concatenate([arrays["mean"], *beside], 1), self.out, [*names, *ends], self._labels()
            )
        else:
            write_values(arrays["mean"] if self.suffix == ".npy" else arrays, self.out, beside=self._labels())
        if self.out is not None:
            note(repr(found))

    def evidence(
        self,
        method: str = "importance",
        num_samples: int | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        """`pyrolvm evidence`."""
        if self.is_large:
            answers = self.write_answers(
                "log_evidence", overwrite, method=method, num_samples=num_samples, **options
            )
            found = answers.table.loc["log_evidence"].astype(float).to_dict()
            untrusted = answers.num_untrusted
        else:
            table = evidence_table(self.fitted.pair(self.dataset), method, num_samples, **options)
            if self.out is not None:
                known = table.dropna(axis="columns", how="all")
                write_values(known.to_numpy(), self.out, list(known.columns), self._beside())
            found = table["log_evidence"].agg(["mean", "std", "min", "max"]).rename({"std": "sd"}).to_dict()
            untrusted = _untrusted(table["k_hat"].to_numpy(float), draws_of(method, num_samples))
        entry = self._entry(method, draws_of(method, num_samples), found, untrusted)
        if here().is_first:
            _print_evidence(entry, self.recipe.log_scale(math.prod(self.dataset.row_shape)))
            add_evidence(self.path, entry)

    def _entry(
        self, method: str, draws: int | None, found: dict[Any, Any], untrusted: int | None
    ) -> dict[str, Any]:
        more = ", ".join(f"{k}={v}" for k, v in self.source.options.items())
        rows = self.dataset.num_rows
        return {
            "data": Path(self.source.called).name + (f" ({more})" if more else ""),
            "method": method,
            "num_samples": draws,
            "rows": rows,
            "mean": float(found["mean"]),
            "standard_error": float(found["sd"] / rows**0.5) if rows > 1 else None,
            "min": float(found["min"]),
            "max": float(found["max"]),
            "untrusted": untrusted,
        }

    def diagnose(self, quick: bool = False, overwrite: bool = False, **options: Any) -> None:
        """`pyrolvm diagnose`: the verdict first, then the latents that all rows share.

        With `out`, k-hat and evidence of every row; of data larger than memory the rest is of a sample.
        """
        from pyrolvm.diagnostics import diagnose
        from pyrolvm.diagnostics.affordable import affordable
        from pyrolvm.diagnostics.inference_data import save_inference_data, summarise, to_inference_data

        written = []
        if self.out is not None or self.url is not None:
            shown = {k: options[k] for k in ("num_samples", "seed") if k in options}
            answers = self.write_answers("diagnose", overwrite, **shown)
            if answers.num_untrusted:
                caution(f"{answers.num_untrusted:,} of {answers.num_rows:,} rows have a k-hat too high")
        if isinstance(self.dataset, StreamedDataset):
            total, self.dataset = self.dataset.num_rows, self.dataset.sample(SAMPLED_ROWS)
            note(f"of the {total:,} rows, {self.dataset.num_rows:,} evenly spaced ones are looked at")
        if not quick:
            diagnosis = diagnose(self.fitted, self.dataset, **options)
            console().print(f"{diagnosis.paragraph}\n")
            if diagnosis.k_hat is not None:
                write_atomically(self.path / "k_hat.csv", diagnosis.k_hat.to_csv)
                written.append("k_hat.csv")
        shared = {k: options[k] for k in ("num_samples", "max_rows", "seed") if k in options}
        extent = affordable(self.fitted, self.fitted.pair(self.dataset), **shared)
        idata = to_inference_data(
            self.fitted,
            self.dataset,
            num_samples=extent.num_samples,
            prior_samples=extent.prior_samples,
            rows=extent.rows,
            seed=options.get("seed", 0),
        )
        if extent.sentence:
            note(f"inference_data.nc has {extent.sentence}.")
        written.append(save_inference_data(idata, self.path / "inference_data.nc").name)
        names = [site.name for site in self.fitted.structure.global_latents]
        summary = summarise(idata, names)
        write_atomically(self.path / "summary.csv", summary.to_csv)
        if names or quick:
            _print_summary(summary)
        note(f"{self.path}: {', '.join([*written, 'summary.csv'])}")


def _untrusted(k_hat: np.ndarray, draws: int | None) -> int | None:
    """Rows whose k-hat is too high; None where there is none."""
    return int((k_hat > khat_threshold(draws)).sum()) if draws and np.isfinite(k_hat).any() else None


def _print_evidence(entry: dict[str, Any], shift: float) -> None:
    draws = f", {entry['num_samples']:,} draws per row" if entry["num_samples"] else ""
    print_facts(
        ("data", f"{entry['data']}: {entry['rows']:,} rows"),
        ("method", entry["method"] + draws),
        ("log p(x), mean", entry["mean"]),
        ("standard error over rows", entry["standard_error"]),
        ("min", entry["min"]),
        ("max", entry["max"]),
        ("mean in the data's own units", entry["mean"] - shift if shift else None),
    )
    note("nats per datum, of the standardised data" if shift else "nats per datum")
    if entry["untrusted"]:
        rows = f"{entry['untrusted']:,} of {entry['rows']:,} rows"
        caution(f"{rows} have a k-hat too high to trust their estimate")


def _print_summary(summary: pd.DataFrame) -> None:
    print_table(["", *summary.columns], summary.head(SUMMARY_ROWS).reset_index().to_numpy().tolist())
    if len(summary) > SUMMARY_ROWS:
        note(f"and {len(summary) - SUMMARY_ROWS:,} more in summary.csv")
