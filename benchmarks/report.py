"""The tables: on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import CONTENDERS
from benchmarks.goals import NUMPYRO, outcomes
from benchmarks.measure import Result

RATIOS = {
    "Pyro": ("pyro",),
    "Pyro Jit": ("pyro-jit",),
    "torch by hand": ("torch",),
    "torch.compile": ("torch-compile",),
    "CUDA graph": ("cuda-graph",),
    "NumPyro (its best)": NUMPYRO,
    "pythae": ("pythae",),
    "scikit-learn": ("scikit-learn",),
}
"""How many times longer than our compiled engine; the floor is given the other way round."""

NOTES = (
    "Microseconds per training step: the median of the repetitions, and in brackets the range of all of them.",
    "Contenders of a row ran in turns in one process after a warm-up; time to the first step is not in it.",
    "All validation is off for every contender; Adam with the same learning rate, from the same parameters,"
    " and (but for NumPyro's svi.run and pythae, which draw their own) the same minibatches.",
)


@dataclass
class Report:
    """All that one run of the benchmark found."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    contenders: list[str]
    rows: dict[str, list[Result]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    sweeps: dict[str, dict[str, list[Result]]] = field(default_factory=dict)
    processes: list[dict[str, Any]] = field(default_factory=list)
    syncs: list[dict[str, Any]] = field(default_factory=list)

    def tables(self, brief: bool = False) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, header, lines) of every table that has something in it; `brief` for a narrow terminal."""
        titles = {} if brief else self.titles
        found = [("Microseconds per step", *_times(self.rows, titles, self.contenders, brief))]
        found += [("Time per step as a multiple of pyrolvm compiled", *_ratios(self.rows, titles))]
        found += [("Goals", *_goals(self))]
        found += [("Seconds until the first steps are done, in this process", *_start_up(self))]
        for title, rows in self.sweeps.items():
            found.append((f"Microseconds per step by {title}", *_times(rows, {}, self.contenders, brief)))
        found.append(("Start-up and memory, each in a process of its own", *_processes(self.processes)))
        found.append(("Waits of the compiled engine (profiler)", *_syncs(self.syncs)))
        return [table for table in found if table[2]]

    def reasons(self) -> list[str]:
        """Why cells are empty, one line for each contender and reason."""
        found: dict[tuple[str, str], list[str]] = {}
        for rows in (self.rows, *self.sweeps.values()):
            for name, results in rows.items():
                for r in results:
                    if r.reason:
                        found.setdefault((CONTENDERS[r.contender].title, r.reason), []).append(name)
        found |= {
            (CONTENDERS[p["contender"]].title, f"own process: {p['first']['reason']}"): [p["row"]]
            for p in self.processes
            if "reason" in p["first"]
        }
        return [f"{title}: {reason} ({', '.join(names)})" for (title, reason), names in found.items()]

    def markdown(self) -> str:
        """The whole report."""
        parts = ["# pyrolvm beside its peers", *NOTES, "## Machine", *_facts(self.machine | self.settings)]
        for title, header, lines in self.tables():
            parts += [f"## {title}", _markdown_table(header, lines)]
        if self.reasons():
            parts += ["## Empty cells", "\n".join(f"- {reason}" for reason in self.reasons())]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """NAME.md and NAME.json in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        files = folder / f"{name}.md", folder / f"{name}.json"
        files[0].write_text(self.markdown())
        files[1].write_text(json.dumps(_without_nan(asdict(self)), indent=1))
        return files

    def show(self, console: Console) -> None:
        """Print the tables."""
        for title, header, lines in self.tables(brief=True):
            table = Table(*header, title=title, title_justify="left")
            for line in lines:
                table.add_row(*line)
            console.print(table)
        for reason in self.reasons():
            console.print(reason, style="dim", highlight=False)
        versions = ", ".join(f"{k} {v}" for k, v in self.machine["versions"].items())
        console.print(f"{self.machine['processor']}, {self.machine['torch threads']} threads; {versions}")


def _facts(facts: dict[str, Any]) -> list[str]:
    lines = []
    for key, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"- {key}: {text}")
    return ["\n".join(lines)]


def _times(
    rows: dict[str, list[Result]], titles: dict[str, str], contenders: list[str], brief: bool
) -> tuple[list[str], list[list[str]]]:
    timed = {r.contender for results in rows.values() for r in results if r.microseconds}
    present = [name for name in contenders if name in timed]
    lines = []
    for name, results in rows.items():
        cells = {r.contender: r for r in results}
        lines.append([titles.get(name, name), *(_cell(cells.get(c), brief) for c in present)])
    return ["row", *(CONTENDERS[c].title for c in present)], lines


def _cell(result: Result | None, brief: bool) -> str:
    if result is None or not result.microseconds:
        return "-"
    if brief:
        return _number(result.median)
    low, high = min(result.microseconds), max(result.microseconds)
    return f"{_number(result.median)} ({_number(low)}-{_number(high)})"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ratios(rows: dict[str, list[Result]], titles: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for name, results in rows.items():
        medians = {r.contender: r.median for r in results}
        ours = medians.get("compiled", math.nan)
        line = [_number(_best(medians, others) / ours) for others in RATIOS.values()]
        floor = _number(ours / medians.get("floor", math.nan))
        lines.append([titles.get(name, name), *line, floor, _break_even(results)])
    return ["row", *RATIOS, "ours / matrix products", "pays after (steps)"], lines


def _goals(report: Report) -> tuple[list[str], list[list[str]]]:
    device = "cuda" if "accelerator" in report.machine else "cpu"
    lines = []
    for row, results in report.rows.items():
        for goal, reached in outcomes(device, row, {r.contender: r.median for r in results}):
            verdict = "met" if reached >= goal.at_least else "missed"
            lines.append([row, goal.against, _number(goal.at_least), _number(reached), verdict])
    return ["row", "time of this over ours", "at least", "measured", ""], lines


def _best(medians: dict[str, float], names: tuple[str, ...]) -> float:
    """The least of the medians that there are."""
    return min((v for n in names if (v := medians.get(n, math.nan)) > 0), default=math.nan)


def _start_up(report: Report) -> tuple[list[str], list[list[str]]]:
    names = [n for n in report.contenders if n not in ("floor", "numpyro-run")]
    lines = []
    for row, results in report.rows.items():
        found = {r.contender: r.start_up for r in results}
        lines.append([row, *(_seconds(found.get(name, math.nan)) for name in names)])
    return ["row", *(CONTENDERS[name].title for name in names)], lines


def _break_even(results: list[Result]) -> str:
    """Steps after which the compiled engine's start-up is won back from `SVI.step`, in this process."""
    found = {r.contender: r for r in results}
    if not {"compiled", "pyro"} <= found.keys():
        return "-"
    gain = 1e-6 * (found["pyro"].median - found["compiled"].median)
    steps = (found["compiled"].start_up - found["pyro"].start_up) / gain
    return str(round(max(0.0, steps))) if gain > 0 and math.isfinite(steps) else "-"


def _seconds(value: float) -> str:
    return "< 0.1" if value < 0.1 else _number(value)  # less is the difference of two noisy times


def _processes(processes: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    measured = [p for p in processes if "reason" not in p["first"]]
    known = ("seconds", "seconds with imports", "peak MB", "MB after imports", "peak MB on the device")
    keys = [k for k in known if any(k in p["first"] for p in measured)]
    header = ["row", "contender", *(f"{k}, {which}" for k in keys for which in ("first", "second"))]
    lines = []
    for p in measured:
        cells = [_number(p[which].get(k, math.nan)) for k in keys for which in ("first", "second")]
        lines.append([p["row"], CONTENDERS[p["contender"]].title, *cells])
    return header, lines


def _syncs(syncs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for found in syncs:
        events = {k: v for k, v in found.get("events", {}).items() if any(v)}
        listed = ", ".join(f"{k} {v[0]} and {v[1]}" for k, v in events.items()) or "none"
        lines.append([found["row"], listed, found["verdict"]])
    return ["row", "events in a chunk, and in one of twice its steps", "verdict"], lines


def _markdown_table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def _without_nan(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
