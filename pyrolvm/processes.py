"""The processes that work on one thing together, as torch's launcher starts them, and what they tell each other.

    torchrun --nproc-per-node 4 script.py

starts a script four times, and each finds out here which of them it is: `here()` is the process group that the script
has made, or the one that the launcher's environment describes, which is then made (gloo on CPUs, NCCL on CUDA). A
process that nobody launched is the first of one: it needs no group, and nothing of what follows costs it anything.
Whatever is shared out over processes, the batches of a fit or the rows of a question, asks for `rank` and `count` only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pyrolvm.errors import SettingError

PATIENCE = timedelta(minutes=30)
"""How long one process waits for the others: they compile and read data at their own speed."""


@dataclass(frozen=True)
class Processes:
    """One process among those that work together: which one it is.

    Attributes
    ----------
    rank : int
        Which one this is, from 0.
    count : int
        How many there are.
    group : ProcessGroup, optional
        What they talk by on the CPU; None of one alone.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints, writes and decides."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """What the first process has for `value`; what the others pass is not used."""
        if self.count == 1:
            return value
        box = [value if self.is_first else None]
        dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What every process has for `value`, in the order of their ranks, for all of them."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self.group)
        return found

    def barrier(self) -> None:
        """Wait until all have come here."""
        if self.count > 1:
            self.gather(None)

    def share(self, total: int) -> slice:
        """The part of `total` things in a row that is this process's: parts differ in length by one at the most."""
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)


ALONE = Processes()
_made: dict[int, Any] = {}


def here() -> Processes:
    """Find out which process this is among those started together; makes their group at the first call.

    Raises
    ------
    SettingError
        A part of the launcher's environment is missing or is no number.
    """
    if not (dist.is_available() and dist.is_initialized()):
        _, count = launched(os.environ)
        if count == 1:
            return ALONE
        dist.init_process_group(timeout=PATIENCE)
    if dist.get_world_size() == 1:
        return ALONE
    return Processes(dist.get_rank(), dist.get_world_size(), _talking())


def _talking() -> Any:
    """The group of all processes that carries what is on the CPU."""
    world = dist.group.WORLD
    if "gloo" in str(dist.get_backend_config(world)):
        return world
    if id(world) not in _made:
        _made.clear()
        _made[id(world)] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _made[id(world)]


def launched(environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank and count by the launcher's environment: (0, 1) where nothing was launched.

    Raises
    ------
    SettingError
        A part of it is missing or is no number.
    """
    if not {"RANK", "WORLD_SIZE"} & environment.keys() or environment.get("WORLD_SIZE") == "1":
        return 0, 1
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        there = [name for name in needed if name not in missing]
        raise SettingError(
            f"the environment has {' and '.join(there)} but not {' and '.join(missing)}: start the processes by "
            "torchrun --nproc-per-node 2 script.py, or pass parallel=False for a fit of this process alone"
        )
    return _number(environment, "RANK"), _number(environment, "WORLD_SIZE")


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment[name]
    if not value.isdecimal():
        raise SettingError(
            f"the environment's {name} must be a whole number, not {value!r}: torchrun sets it"
        )
    return int(value)
