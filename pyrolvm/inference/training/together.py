"""Several processes before their first step: that all have the same task, and the same start."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from pyrolvm._version import __version__
from pyrolvm.errors import SettingError
from pyrolvm.inference.engine.memory import shared_memory
from pyrolvm.inference.engine.sharing import shared
from pyrolvm.inference.training.setup import Setup
from pyrolvm.processes import ALONE, Processes, here
from pyrolvm.seeds import Purpose, derived_seed

P = ParamSpec("P")
R = TypeVar("R")


def in_step(function: Callable[P, R]) -> Callable[P, R]:
    """A fit that several processes run in step: the first one alone warns, and a lost process is named by the others.

    `parallel=False` among its arguments: each by itself.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        processes = here() if kwargs.get("parallel", True) else ALONE
        if processes.is_first:
            with processes.losses_named():
                return function(*args, **kwargs)
        with processes.losses_named(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)

    return run


def device_of(processes: Processes, device: torch.device) -> torch.device:
    """The device of this process: of several on one machine each takes a CUDA device of its own."""
    if processes.count == 1 or device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", processes.local_rank % torch.cuda.device_count())


def check_alike(setup: Setup, settings: dict[str, Any], processes: Processes) -> None:
    """Raise `SettingError`, with the first difference, unless all processes are about to do the same.

    Parameters
    ----------
    settings : dict
        What must agree for a checkpoint to be of the same run.
    """
    own = {"versions": _versions(), "model": _described(setup), "num_steps": setup.problem.num_steps}
    tasks = processes.gather(own | settings)
    for rank, task in enumerate(tasks):
        apart = [name for name in tasks[0].keys() | task.keys() if task.get(name) != tasks[0].get(name)]
        if apart:
            raise SettingError(_difference(rank, min(apart, key=list(tasks[0]).index), tasks[0], task))


def _difference(rank: int, name: str, first: dict[str, Any], task: dict[str, Any]) -> str:
    remedy = "start all processes with the same script, data and settings"
    if name in ("data", "validation"):
        kind = "held-out data" if name == "validation" else "data"
        return f"process {rank} has other {kind} than process 0: {remedy}, each with all rows"
    there, here = task.get(name), first.get(name)
    if isinstance(there, dict) and isinstance(here, dict):
        part = next(k for k in (*here, *there) if here.get(k) != there.get(k))
        name, there, here = f"{name}: {part}", there.get(part, "none"), here.get(part, "none")
    return f"process {rank} has {name}={there!r} where process 0 has {here!r}: {remedy}"


def _versions() -> dict[str, str]:
    return {"pyrolvm": __version__, "torch": torch.__version__}


def _described(setup: Setup) -> dict[str, Any]:
    """The program's sites, and its parameters and buffers with their shapes."""
    problem = setup.problem
    tensors = {
        name: f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        for name, value in problem.program.tensors().items()
    }
    tensors |= {"trained": ", ".join(problem.program.parameters)}
    sites = {f"site {s.name}": f"{s.kind} {s.family} {list(s.event_shape)}" for s in problem.structure.sites}
    return sites | tensors


def share(setup: Setup, processes: Processes) -> str:
    """Let the processes share the steps of a run, from the first one's start; a sentence on how."""
    device = setup.problem.program.device
    rows = setup.plan.rows(0, 1)[0].to(device)
    seed = derived_seed(setup.seed, Purpose.CHECK, 1)
    processes.align(setup.problem.program.tensors().values())
    if device.type == "cpu":
        processes = replace(processes, memory=shared_memory(processes))
    setup.problem.processes = processes
    setup.problem, sentence = shared(setup.problem, processes, rows, seed)
    if setup.streamed is not None and setup.problem.sharing is None:
        raise SettingError(f"{sentence}, but each reads its share of the data only: pass parallel=False")
    if setup.problem.sharing is not None and processes.memory is not None:
        return f"{sentence} through memory of their machine"
    return sentence
