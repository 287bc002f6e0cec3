"""`python -m benchmarks`: measure, print, write."""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import machine
from benchmarks.contenders import CONTENDERS
from benchmarks.measure import FULL, QUICK, Settings, measure
from benchmarks.process import measure_processes
from benchmarks.report import Report
from benchmarks.rows import CUDA_SWEEPS, SWEEPS, Row, all_rows, chosen
from benchmarks.syncs import count_syncs

PARTS = ("steps", "sweeps", "processes", "syncs")
PROCESS_ROWS = ("ppca-256", "hierarchical", "vae-400")
SWEPT = ("compiled", "pyro", "torch", "torch-compile", "cuda-graph", "numpyro-scan", "numpyro-jit")
NOT_QUICK = ("numpyro-run",)  # every call compiles: only long runs say what a step costs


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time SVI steps side by side.")
    rows, names = ", ".join(all_rows()), ", ".join(CONTENDERS)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=f"shell patterns; all by default: {rows}")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", choices=CONTENDERS, help=names)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="all by default")
    parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs, not how fast")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser.parse_args(arguments)


class Session:
    """One run of the command: parts that add to a report, which is written after each of its lines."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.device = torch.device(options.device)
        self.settings = QUICK if options.quick else FULL
        names = options.contenders or [n for n in CONTENDERS if not (options.quick and n in NOT_QUICK)]
        facts = {**asdict(self.settings), "quick": options.quick}
        self.report = Report(machine.describe(self.device), facts, names)
        self.name = options.device + ("-quick" if options.quick else "")

    def run(self) -> None:
        """Every part asked for."""
        before, cores = machine.load(), self.report.machine["cores allowed"]
        if before is not None and before > cores / 4:
            self._say(f"the machine is busy (load {before} on {cores} cores): the times will mean little")
        for part in self.options.parts:
            getattr(self, part)()
        self.report.machine["load average at the end"] = machine.load()
        files = self.report.write(self.options.out, self.name)
        self.report.show(self.console)
        self.console.print(f"written: {files[0]} and {files[1]}")

    def steps(self) -> None:
        """The main table."""
        for row in chosen(self.options.rows):
            self.report.titles[row.name] = row.about
            self.report.rows[row.name] = self._measure(row, self.report.contenders, self.settings)
            self.report.write(self.options.out, self.name)

    def sweeps(self) -> None:
        """Cost against sizes; the extremes only if it is to be quick."""
        names = [name for name in self.report.contenders if name in SWEPT]
        settings = replace(self.settings, repeats=max(3, self.settings.repeats // 2))
        for title, (make, values) in (SWEEPS | (CUDA_SWEEPS if self.device.type == "cuda" else {})).items():
            table = self.report.sweeps.setdefault(title, {})
            for value in (values[0], values[-1]) if self.options.quick else values:
                table[str(value)] = self._measure(make(value), names, settings)
                self.report.write(self.options.out, self.name)

    def processes(self) -> None:
        """First steps and memory."""
        rows = [r.name for r in chosen(self.options.rows)] if self.options.rows else list(PROCESS_ROWS)
        for row in rows[:1] if self.options.quick else rows:
            for name in self.report.contenders:
                if name not in ("floor", "numpyro-run", "pythae"):
                    self._say(f"process: {row}, {name}")
                    self.report.processes.append(measure_processes(row, name, self.options.device))
            self.report.write(self.options.out, self.name)

    def syncs(self) -> None:
        """Waits inside a chunk, of every row if on CUDA, else of one."""
        rows = chosen(self.options.rows)
        for row in rows if self.device.type == "cuda" else rows[:1]:
            self._say(f"profile: {row.name}")
            try:
                self.report.syncs.append(count_syncs(row, self.device))
            except Exception as error:
                self.report.syncs.append(
                    {"row": row.name, "verdict": f"{type(error).__name__}: {error}"[:200]}
                )

    def _measure(self, row: Row, names: list[str], settings: Settings) -> list:
        return measure(row, names, self.device, settings, self._say)

    def _say(self, text: str) -> None:
        self.console.log(text, _stack_offset=2)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device here")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # one device for all contenders
    with ExitStack() as stack:
        if not options.quick:  # start-up is measured from empty caches
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            os.environ["PYROLVM_CACHE"] = f"{folder}/pyrolvm"
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        Session(options, Console()).run()


if __name__ == "__main__":
    main()
