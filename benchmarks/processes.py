"""Steps per second of several processes: `python -m benchmarks.processes --out benchmarks/results/processes.json`.

Each contender trains the same model on the same data at the same global batch in 1 and in 2 processes of one thread,
started as torch's launcher starts them:

    pyrolvm      `fit(..., engine="compiled")`
    eager        `fit(..., engine="eager")`
    apart        as pyrolvm, but each process has a fit of its own with its part of the batch: what two processes could
                 gain if they had nothing to tell each other
    ddp          a loop by hand around `DistributedDataParallel`: closed-form KL, fused Adam, `index_select`
    lightning    the same loss in a `LightningModule`; only where `lightning` is importable (--python names such one)

Steps are counted over `--seconds`, after the first ones, which compile. Sums of several sizes are timed, too, by gloo's
"messages" and through "memory" of the machine, and there in "shares": each process adds up its own, and all get all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pyrolvm
from pyrolvm.inference.engine.memory import shared_memory
from pyrolvm.inference.training import fit as fitting
from pyrolvm.models import PPCA, VAE, BayesianFactorAnalysis, GaussianMixture
from pyrolvm.processes import here

ROWS_OF_DATA, BATCH = 20_000, 512
CONTENDERS = ("pyrolvm", "apart", "ddp", "lightning", "eager")
OURS = ("pyrolvm", "apart", "eager")
"""For any model; the other loops are written for a VAE."""
SUMS = ("messages", "memory", "shares")
SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
"""Floats of a message."""
ASSUMED = ((2e-5, 2.5e10), (1e-5, 2e11))
"""Latency and bandwidth of a network of 200 Gbit/s and of links within a machine: assumed, not measured."""


def images() -> Tensor:
    """Random binary images, of the shape of MNIST's."""
    return (torch.rand(ROWS_OF_DATA, 784, generator=torch.Generator().manual_seed(0)) < 0.2).float()


def columns() -> Tensor:
    return torch.randn(ROWS_OF_DATA, 64, generator=torch.Generator().manual_seed(0))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "VAE 784-400-20": (lambda: VAE(784, 20), images),
    "convolutional VAE": (lambda: VAE(784, 20, encoder="conv", decoder="conv"), images),
    "PPCA 64-8": (lambda: PPCA(64, 8), columns),
    "mixture of 10 in 64": (lambda: GaussianMixture(64, 10, covariance="diagonal"), columns),
    "factor analysis 64-8": (lambda: BayesianFactorAnalysis(64, 8), columns),
}
TWO = ("VAE 784-400-20", "convolutional VAE")


# ---------------------------------------------------------------------- contenders


class Clock:
    """Counts the steps of some seconds, after some seconds of warm-up that begin at the first look."""

    def __init__(self, seconds: float, warm_up: float = 1.0) -> None:
        self.seconds, self.warm_up = seconds, warm_up
        self.began = self.start = 0.0
        self.first = self.rate = 0.0

    def __call__(self, step: int) -> bool:
        """Whether enough has been seen."""
        now = time.perf_counter()
        self.began = self.began or now
        if not self.start:
            if now - self.began > self.warm_up:
                self.start, self.first = now, step
            return False
        self.rate = (step - self.first) / (now - self.start)
        return now - self.start > self.seconds


def ours(contender: str, model: nn.Module, x: Tensor, clock: Clock) -> dict[str, Any]:
    seen: list[Any] = []
    share = fitting.share

    def noted(setup: Any, processes: Any) -> str:
        sentence = share(setup, processes)
        seen.append(setup.problem.sharing)
        return sentence

    fitting.share = noted
    apart = contender == "apart"
    batch = BATCH // int(os.environ.get("WORLD_SIZE", "1")) if apart else BATCH
    engine = "eager" if contender == "eager" else "compiled"
    fitted = pyrolvm.fit(
        model, x, batch_size=batch, num_steps=10**6, learning_rate=1e-3, engine=engine, progress=False,
        parallel=not apart, callbacks=[lambda report: "seen enough" if clock(report.step) else None],
    )  # fmt: skip
    return {"elbo": fitted.elbo, "bytes": seen[0].num_bytes if seen and seen[0] is not None else 0}


class Loss(nn.Module):
    """The negative ELBO per datum of a Bernoulli VAE, as written by hand, with the suite's own networks."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = vae.encoder, vae.decoder

    def forward(self, x: Tensor) -> Tensor:
        loc, scale = self.encoder(x)
        z = loc + scale * torch.randn_like(loc)
        kl = 0.5 * (scale.square() + loc.square() - 1).sum() - scale.log().sum()
        fit = nn.functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return (fit + kl) / len(x)


def ddp(model: nn.Module, x: Tensor, clock: Clock) -> dict[str, Any]:
    processes = here()
    loss: nn.Module = Loss(model)
    own = BATCH // processes.count
    if processes.count > 1:
        loss = nn.parallel.DistributedDataParallel(loss)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3, fused=True)
    generator, step, ended = torch.Generator().manual_seed(0), 0, torch.zeros(1)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(x) // BATCH * BATCH].view(-1, BATCH):
            optimizer.zero_grad(set_to_none=True)
            value = loss(x.index_select(0, rows[processes.rank * own : (processes.rank + 1) * own]))
            value.backward()
            optimizer.step()
            step += 1
            if step % 50 == 0:  # all end together
                ended.fill_(clock(step))
                if processes.count > 1:
                    dist.broadcast(ended, 0)
                if ended.item():
                    return {"elbo": -value.item()}


def lightning(model: nn.Module, x: Tensor, clock: Clock) -> dict[str, Any]:
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.loss = Loss(model)

        def training_step(self, batch: Any, index: int) -> Tensor:
            if self.global_step % 50 == 0:
                ended = torch.tensor([float(clock(self.global_step))])
                if dist.is_initialized():
                    dist.broadcast(ended, 0)
                self.trainer.should_stop = bool(ended.item())
            return self.loss(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    data = torch.utils.data.TensorDataset(x)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH // processes, shuffle=True, drop_last=True)
    pl.Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_epochs=-1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Module(), loader)  # fmt: skip
    return {}


def sums(way: str) -> dict[str, Any]:
    """Median seconds of one reduction by its size in floats, in one of the ways of `SUMS`."""
    processes = here()
    if way != "messages":
        processes = replace(processes, memory=shared_memory(processes))

    def by_shares(value: Tensor) -> None:
        share = processes.memory.scatter([value], value[:1], 1.0, len(value) // processes.count)
        processes.memory.gather(share[:-1], [value])

    reduce = by_shares if way == "shares" else processes.sum
    found = {}
    for size in SIZES:
        value, times = torch.ones(size), []
        for _ in range(max(5, 20_000_000 // size // 20) if size > 10_000 else 300):
            start = time.perf_counter()
            reduce(value)
            times.append(time.perf_counter() - start)
        found[size] = statistics.median(times)
    return found


def work(contender: str, name: str, seconds: float) -> None:
    """One contender in this process; the first one prints what it found."""
    torch.set_num_threads(1)
    if contender in SUMS:
        found = sums(contender)
    else:
        torch.manual_seed(0)
        build, data = MODELS[name]
        model, x, clock = build(), data(), Clock(seconds)
        if contender in OURS:
            found = ours(contender, model, x, clock)
        else:
            found = (ddp if contender == "ddp" else lightning)(model, x, clock)
        found |= {"steps_per_second": clock.rate, "parameters": sum(p.numel() for p in model.parameters())}
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))


# ---------------------------------------------------------------------- the table


def launch(python: str, count: int, *arguments: str) -> dict[str, Any]:
    """Run `work` in `count` processes of one thread; what the first one found."""
    command = [python, "-m", "benchmarks.processes", "--work", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(count)}
        started.append(
            subprocess.Popen(
                command, env=environment | (own if count > 1 else {}), stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    words = [process.communicate() for process in started]
    lines = [line for line in words[0][0].splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(words[0][1][-2000:])
    return json.loads(lines[-1])


def constants(record: dict[str, Any], by: str) -> tuple[float, float]:
    """Latency in seconds and bandwidth in bytes per second of a message, by least squares over relative errors."""
    times = {4 * int(size): seconds for size, seconds in record[f"{by}, 2 processes"].items()}
    weights = torch.tensor(list(times.values()), dtype=torch.float64).reciprocal()
    sizes = torch.tensor(list(times), dtype=torch.float64)
    columns = torch.stack([weights, sizes * weights], 1)
    solution = torch.linalg.lstsq(columns, torch.ones(len(times), 1, dtype=torch.float64)).solution.flatten()
    return float(solution[0]), 1 / float(solution[1])


def message(count: int, size: float, latency: float, bandwidth: float) -> float:
    """Seconds of a reduction of `size` bytes over `count` processes: of a tree's latency and a ring's bandwidth."""
    return math.ceil(math.log2(count)) * latency + 2 * (count - 1) / count * size / bandwidth


def predict(record: dict[str, Any]) -> None:
    """Print the share of a step that is computation, by the cost model: a calculation, no measurement."""
    measured = [constants(record, by) for by in SUMS if f"{by}, 2 processes" in record]
    for latency, bandwidth in measured:
        print(f"measured: latency {1e3 * latency:.3f} ms, bandwidth {bandwidth / 1e9:.2f} GB/s")
    counts = (2, 8, 32, 128, 512)
    print("| computing | bytes | latency, bandwidth |" + "".join(f" {count} |" for count in counts))
    for links in (*measured, *ASSUMED):
        for compute, size in ((1e-3, 2.6e6), (1e-2, 2.6e6), (1e-1, 4e8)):
            shares = [compute / (compute + message(count, size, *links)) for count in counts]
            cells = "".join(f" {share:.2f} |" for share in shares)
            shown = f"{1e6 * links[0]:.0f} us, {links[1] / 1e9:.1f} GB/s"
            print(f"| {1e3 * compute:g} ms | {size / 1e6:g} MB | {shown} |{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", help="what one process does: CONTENDER MODEL SECONDS")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--models", nargs="*", default=list(TWO), choices=list(MODELS))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=[*CONTENDERS, *SUMS])
    parser.add_argument(
        "--predict", action="store_true", help="what the cost model says of what was measured"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="an interpreter that has lightning, for that row"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "processes.json")
    options = parser.parse_args()
    if options.work:
        contender, name, seconds = options.work
        work(contender, name, float(seconds))
        return
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.predict:
        predict(record)
        return
    for contender in (c for c in SUMS if c in options.contenders):
        record[f"{contender}, 2 processes"] = launch(sys.executable, 2, contender, "none", "0")
        options.out.write_text(json.dumps(record, indent=2) + "\n")
    for name in options.models:
        for contender in (c for c in options.contenders if c in OURS or (c not in SUMS and "VAE" in name)):
            python = options.python if contender == "lightning" else sys.executable
            counts = (2,) if contender == "apart" else (1, 2)
            found = {n: launch(python, n, contender, name, str(options.seconds)) for n in counts}
            record.setdefault(name, {})[contender] = found
            rates = [found[n]["steps_per_second"] for n in counts]
            shown = " ".join(f"{rate:8.1f}" for rate in rates)
            print(f"{name:24} {contender:10} {shown} steps/s  {rates[-1] / rates[0]:.2f}", flush=True)
            options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
