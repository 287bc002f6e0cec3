"""`python -m benchmarks.posteriors [--pyro] [--numpyro] [--pymc PYTHON] [NAME ...]`: the table of posteriors."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from benchmarks.posteriors.further import FURTHER
from benchmarks.posteriors.peers import NUMPYRO, numpyro_svi, pymc
from benchmarks.posteriors.programs import POSTERIORS
from benchmarks.posteriors.reference import has_reference
from benchmarks.posteriors.table import Outcome, fitted, paths, svi

RESULTS = Path("benchmarks/results/posteriors.md")
RESULTS_FURTHER = Path("benchmarks/results/posteriors_further.md")
PYRO = ((1000, 1e-2), (5000, 1e-3))
FAMILIES = ("AutoNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal")
METHODS = {"advi": "ADVI", "fullrank_advi": "full-rank ADVI", "pathfinder": "Pathfinder"}
T = TypeVar("T")
Row = dict[str, Outcome | str]
"""Column -> what came out, or in words why nothing did."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.posteriors", description="Right, wrong, or flagged."
    )
    parser.add_argument("names", nargs="*", help="posteriors; the fifteen of `programs.py` by default")
    parser.add_argument("--further", action="store_true", help="those of `further.py`")
    parser.add_argument("--pyro", action="store_true", help="Pyro's SVI with its usual settings, too")
    parser.add_argument("--numpyro", action="store_true", help="NumPyro's SVI, too")
    parser.add_argument("--pymc", metavar="PYTHON", help="PyMC, too, in the environment of this Python")
    parser.add_argument("--only-peers", action="store_true", help="none of ours")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    asked.names = asked.names or [
        n for n in POSTERIORS if has_reference(n) and (n in FURTHER) == asked.further
    ]
    asked.out = asked.out or (RESULTS_FURTHER if asked.further else RESULTS)
    warnings.simplefilter("ignore")
    began, rows, peers = time.perf_counter(), dict[str, Row](), dict[str, Row]()
    for name in asked.names:
        rows[name] = {} if asked.only_peers else ours(name, asked.seeds)
        peers[name] = {column: tried(run) for column, run in theirs(name, asked)}
        print(
            name, *(f"  {k}: {cell(v)}" for k, v in (rows[name] | peers[name]).items()), sep="\n", flush=True
        )
        minutes = (time.perf_counter() - began) / 60
        asked.out.write_text(written(rows, peers, versions(asked.pymc), minutes))


def ours(name: str, seeds: int) -> Row:
    """What nothing but model, data and family gives."""
    row: Row = {}
    for seed in range(seeds):
        tail = f" (seed {seed})" if seed else ""
        for family in FAMILIES:
            found = tried(lambda f=family, s=seed: fitted(name, f, s))  # type: ignore[misc]
            both = {family: found} | ({"linear response": found} if family == "AutoNormal" else {})
            row |= {k + tail: v for k, v in (both if isinstance(found, str) else found).items()}
        row["Pathfinder" + tail] = tried(lambda s=seed: paths(name, s))  # type: ignore[misc]
    return row


def theirs(name: str, asked: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Outcome | str]]]:
    """The peers that are asked for: column, and what runs it."""
    for steps, rate in PYRO if asked.pyro else ():
        yield (
            f"Pyro full {steps} x {rate:g}",
            lambda s=steps, r=rate: svi(name, "AutoMultivariateNormal", s, r),  # type: ignore[misc]
        )
    for family, short in (("AutoNormal", "mean field"), ("AutoMultivariateNormal", "full")):
        for steps, rate in NUMPYRO if asked.numpyro else ():
            yield (
                f"NumPyro {short} {steps} x {rate:g}",
                lambda f=family, s=steps, r=rate: numpyro_svi(name, f, s, r),  # type: ignore[misc]
            )
    for method, title in METHODS.items() if asked.pymc else ():
        yield f"PyMC {title}", lambda m=method: pymc(asked.pymc, name, m)  # type: ignore[misc]


def tried(run: Callable[[], T]) -> T | str:
    """What it gives; the error in words where it fails."""
    try:
        return run()
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"


def cell(found: Outcome | str) -> str:
    """As the table shows it."""
    return found if isinstance(found, str) else found.cell


def versions(python: str | None) -> str:
    """What ran, in words."""
    names = ["torch", "pyro-ppl", "numpyro", "jax"]
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if python is not None:
        names = "from importlib.metadata import version as v; "
        code = names + "print('pymc', v('pymc') + ', pymc-extras', v('pymc-extras'))"
        found.append(subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip())
    return f"Python {platform.python_version()}, {', '.join(found)}"


def written(rows: dict[str, Row], peers: dict[str, Row], told: str, minutes: float) -> str:
    """The tables as Markdown."""
    options = "".join(f" {a}" for a in sys.argv[1:] if a.startswith("--") and a != "--out")
    lines = [
        "# Posteriors with known answers",
        "",
        f"One run of `python -m benchmarks.posteriors{options}`. Nothing but model, data and",
        "family is given. A cell: right (means within 0.1 reference sd, sds within 10%), near, or wrong (a mean off by",
        "more than 0.25 sd, or an sd ratio outside [0.75, 1.33]); what the method said of itself (right, flagged; of",
        "linear response also kept); the largest error of a mean in reference sds; the range of sd ratios; seconds of",
        f"one thread, compiling included. {told}; {minutes:.1f} minutes in all.",
        "",
    ]
    if any(rows.values()):
        lines += [*table(rows), "", *counts(rows)]
    if any(peers.values()):
        lines += [
            "",
            "## Peers",
            "",
            "Steps x learning rate of Adam as the column says; PyMC with its defaults. SVI and ADVI say nothing of",
            "themselves. Pyro and NumPyro in float64.",
            "",
            *table(peers),
            "",
            *counts(peers),
        ]
    return "\n".join(lines) + "\n"


def table(rows: dict[str, Row]) -> list[str]:
    """A line for each posterior."""
    columns = list(next(iter(rows.values())))
    head = ["| | " + " | ".join(columns) + " |", "|-" * (len(columns) + 1) + "|"]
    return head + [f"| {n} | " + " | ".join(cell(row[c]) for c in columns) + " |" for n, row in rows.items()]


def counts(rows: dict[str, Row]) -> list[str]:
    """How often each column is right, near and wrong, and what it said."""
    lines = [
        "| | right | right and flagged | near | near and flagged | wrong and flagged | wrong and silent | no answer |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for column in next(iter(rows.values())):
        cells = [row[column] for row in rows.values()]
        mine = [o for o in cells if isinstance(o, Outcome)]
        near = [o for o in mine if not o.right and not o.wrong]
        numbers = (
            sum(o.right and o.said != "flagged" for o in mine),
            sum(o.right and o.said == "flagged" for o in mine),
            sum(o.said != "flagged" for o in near),
            sum(o.said == "flagged" for o in near),
            sum(o.wrong and not o.silent for o in mine),
            sum(o.silent for o in mine),
            len(cells) - len(mine),
        )
        lines.append(f"| {column} | " + " | ".join(map(str, numbers)) + " |")
    return lines


if __name__ == "__main__":
    main()
