"""`make corpus`: every program beside SVI, compiled, and asked all questions; the table of it.

    python -m corpus [WORDS ...] [--missing]

Results are kept program by program in benchmarks/results/corpus.json: an interrupted run goes on with --missing.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from corpus import asked
from corpus.form import QUESTIONS, Case, load_all

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TIMED = 300
"""Steps that are timed."""
COMPILED = 3000
"""Compiled steps that are timed."""
TURNS = 3
"""Runs of which the quickest counts, where eager steps are timed."""
OF_COMPILED = ("compiled", "compiling", "not_compiled", "compiled_faults")
"""What is found anew where a program is compiled anew."""
HEADER = (
    "| program | bound as SVI | compiled | questions declined | SVI | eager | compiled | compiling |\n"
    "|---|---|---|---|---:|---:|---:|---:|\n"
)


def measured(case: Case) -> dict[str, Any]:
    """What the table has of one program."""
    found: dict[str, Any] = {"kind": case.kind, "about": case.about, "faults": []}
    if case.refused:
        found |= {"refused": case.refused, "faults": [f for f in [asked.refusal(case)] if f]}
        return found
    wrong = asked.disagreement(case)
    found["bound"] = case.apart or ("to rounding" if case.noise else "within its error")
    found["bound"] = "no" if wrong else found["bound"]
    found["faults"] += [f for f in [wrong, *asked.faults(case)] if f]
    found["declined"] = [q for q in QUESTIONS if q in case.declines]
    return found | timed(case)


def timed(case: Case) -> dict[str, Any]:
    """Seconds of one step of `SVI` and of the eager engine: the least of some runs in turns.

    Seconds of this thread, which other programs on the machine change little.
    """
    if case.refused:
        return {}
    svi, eager = [], []
    for _ in range(TURNS):
        svi.append(asked.under_svi(case.build(), TIMED // 6).seconds)
        eager.append(_step(case, TIMED // 6))
    return {"svi": min(svi), "eager": min(eager)}


def _step(case: Case, num_steps: int, **options: Any) -> float:
    """Seconds of a step of `fit`, those of the first report left out."""
    marks: list[tuple[int, float]] = []
    asked.fitted(case.build(), num_steps, callbacks=[partial(_mark, marks)], **options)
    (first, begun), (last, done) = marks[0], marks[-1]
    return (done - begun) / (last - first)


def _mark(marks: list[tuple[int, float]], report: Any) -> None:
    marks.append((report.step, time.thread_time()))


def compiled(case: Case) -> dict[str, Any]:
    """What the table has of the compiled engine."""
    if case.refused:
        return {"not_compiled": ""}
    wrong, seconds = asked.parted(case)
    if wrong or case.compiled is not True:
        reason = wrong.removeprefix("does not compile: ") or str(case.compiled)
        return {"not_compiled": reason, "compiled_faults": [wrong] if wrong else []}
    return {"compiled": _step(case, COMPILED, engine="compiled"), "compiling": seconds}


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    title = f"**{name}**: {found['about'].rstrip('.')}"
    if "refused" in found:
        return f"| {title} | refused: {found['refused']} | | | | | | |\n"
    refusal = f"no: {_short(found['not_compiled'])}" if "not_compiled" in found else "not tried"
    compiled = "yes" if "compiled" in found else refusal
    declined = ", ".join(found["declined"]) or "none"
    times = [found.get(k) for k in ("svi", "eager", "compiled")]
    cells = ["" if t is None else f"{1e3 * t:.3g} ms" for t in times]
    cells.append(f"{found['compiling']:.1f} s" if "compiling" in found else "")
    return f"| {title} | {found['bound']} | {compiled} | {declined} | {' | '.join(cells)} |\n"


def _short(reason: str) -> str:
    return reason.split("\n")[0].replace("|", "\\|")[:160]


def _faults(found: dict[str, Any]) -> list[str]:
    return [*found["faults"], *found.get("compiled_faults", [])]


def table(results: dict[str, Any]) -> str:
    """The whole as Markdown."""
    ran = [r for r in results.values() if "refused" not in r]
    gain = sorted(r["svi"] / r["compiled"] for r in ran if "compiled" in r)
    tried = [r for r in ran if "compiled" in r or "not_compiled" in r]
    slower = sorted(r["eager"] / r["svi"] for r in ran)
    lines = [
        f"{len(results)} programs; {len(ran)} run under `fit` unmodified; {len(gain)} of {len(tried)} tried compile; "
        f"{sum(not _faults(r) for r in results.values())} are as expected in every respect. ",
    ]
    if gain:
        lines.append(
            f"`SVI.step` takes {gain[len(gain) // 2]:.0f} times as long as a compiled step in the median "
            f"({gain[0]:.1f} to {gain[-1]:.0f}); an eager step {slower[len(slower) // 2]:.2f} times that of `SVI`, "
            f"{slower[-1]:.2f} at the most. "
        )
    lines.append(
        f"Seconds are of the processor; steps of `SVI` and eager ones the least of {TURNS} runs in turns. "
    )
    load = f"{os.cpu_count()} cores under a load of {os.getloadavg()[0]:.0f}"
    lines.append(f"One thread of a machine with {load}, torch {torch.__version__}.\n\n")
    body = "".join(
        row(name, found) for name, found in sorted(results.items(), key=lambda i: (i[1]["kind"], i[0]))
    )
    faults = [f"- {name}: {f}\n" for name, found in results.items() for f in _faults(found)]
    return "".join(lines) + HEADER + body + ("\nNot as expected:\n\n" + "".join(faults) if faults else "")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m corpus", description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of names; all programs by default")
    parser.add_argument("--missing", action="store_true", help="only programs that have no results yet")
    parser.add_argument(
        "--times", action="store_true", help="only the times of SVI and of the eager engine, anew"
    )
    parser.add_argument(
        "--compile", action="store_true", help="only what the table has of the compiled engine"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases, path = load_all(), RESULTS / "corpus.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results = {name: found for name, found in results.items() if name in cases}
    wanted = [name for name in cases if not options.words or any(word in name for word in options.words)]
    os.environ["PYROLVM_CACHE"] = tempfile.mkdtemp()  # nothing is compiled beforehand
    parts: list[tuple[Callable[[Case], dict[str, Any]], str]] = [(measured, "about"), (compiled, "compiled")]
    parts = [(timed, "about")] if options.times else parts[options.compile :]
    for measure, done in parts:
        for name in wanted:
            found = results.get(name, {})
            if (options.times or options.compile) and not found:
                continue
            if options.missing and (done in found or f"not_{done}" in found):
                continue
            begun = time.perf_counter()
            if measure is compiled:
                found = {k: v for k, v in found.items() if k not in OF_COMPILED}
            results[name] = found | measure(cases[name])
            print(f"{name}: {time.perf_counter() - begun:.0f} s {_faults(results[name]) or ''}", flush=True)
            path.write_text(json.dumps(results, indent=1))
            (RESULTS / "corpus.md").write_text(table(results))


if __name__ == "__main__":
    main()
