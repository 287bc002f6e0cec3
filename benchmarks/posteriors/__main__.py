"""`python -m benchmarks.posteriors [--pyro] [NAME ...]`: the table of posteriors with known answers."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from benchmarks.posteriors.programs import POSTERIORS
from benchmarks.posteriors.reference import has_reference
from benchmarks.posteriors.table import Outcome, fitted, paths, svi

RESULTS = Path("benchmarks/results/posteriors.md")
PYRO = ((1000, 1e-2), (5000, 1e-2), (1000, 1e-3), (5000, 1e-3))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.posteriors", description="Right, wrong, or flagged."
    )
    known = [name for name in POSTERIORS if has_reference(name)]
    parser.add_argument("names", nargs="*", default=known, help="posteriors; all with a reference by default")
    parser.add_argument("--pyro", action="store_true", help="Pyro's SVI with its usual settings, too")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: dict[str, dict[str, Outcome]] = {}
    for name in asked.names:
        rows[name] = row = {}
        for seed in range(asked.seeds):
            tail = f" (seed {seed})" if seed else ""
            for family in ("AutoNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal"):
                row |= {k + tail: v for k, v in fitted(name, family, seed).items()}
            row["Pathfinder" + tail] = paths(name, seed)
        if asked.pyro:
            for steps, rate in PYRO:
                row[f"SVI {steps} x {rate:g}"] = svi(name, "AutoMultivariateNormal", steps, rate)
        print(name, *(f"  {k}: {v.cell}" for k, v in row.items()), sep="\n", flush=True)
        asked.out.write_text(written(rows))


def written(rows: dict[str, dict[str, Outcome]]) -> str:
    """The table as Markdown."""
    columns = list(next(iter(rows.values())))
    lines = [
        "# Posteriors with known answers",
        "",
        "`python -m benchmarks.posteriors --pyro`. Nothing but model, data and family is given; Pyro's SVI has",
        "`AutoMultivariateNormal`, Adam, and steps x learning rate as the column says. A cell: right (means within 0.1",
        "reference sd, sds within 10%), near, or wrong (a mean off by more than 0.25 sd, or an sd ratio outside",
        "[0.75, 1.33]); what the method said of itself; the largest error of a mean in reference sds; the range of sd",
        "ratios; seconds, compiling included.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|-" * (len(columns) + 1) + "|",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(row[c].cell for c in columns) + " |")
    cells = [(c, outcome) for row in rows.values() for c, outcome in row.items()]
    lines += [
        "",
        "| | right | near | wrong and flagged | wrong and silent | right and flagged |",
        "|-|-|-|-|-|-|",
    ]
    for column in columns:
        mine = [o for c, o in cells if c == column]
        counts = (
            sum(o.right for o in mine),
            sum(not o.right and not o.wrong for o in mine),
            sum(o.wrong and not o.silent for o in mine),
            sum(o.silent for o in mine),
            sum(o.right and o.said == "flagged" for o in mine),
        )
        lines.append(f"| {column} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
