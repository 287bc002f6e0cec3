"""The processes that work on one thing together, as torch's launcher starts them, and what they tell each other.

    torchrun --nproc-per-node 4 script.py

starts a script four times, and each finds out here which of them it is: `here()` is the process group that the script
has made, or the one that the launcher's environment describes, which is then made (gloo on CPUs, NCCL on CUDA). A
process that nobody launched is the first of one: it needs no group, and nothing of what follows costs it anything.
Whatever is shared out over processes, the batches of a fit or the rows of a question, asks for `rank` and `count` only.
"""

from __future__ import annotations

import atexit
import functools
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pyrolvm.errors import PyrolvmError, SettingError
from pyrolvm.signals import interrupts_noted

T = TypeVar("T")

ROLL_CALL = 5.0
"""Seconds for those that are left to say so."""
PATIENCE = timedelta(minutes=30)
"""How long one process waits for the others: they compile and read data at their own speed."""
STEP_PATIENCE = timedelta(seconds=45)
"""How long within steps, which all begin together."""


class Memory(Protocol):
    """Memory that processes of one machine share."""

    def sums(self, value: Tensor) -> bool:
        """Whether `sum` takes such a tensor."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes."""

    def scatter(self, values: Sequence[Tensor], rest: Tensor, scale: float, length: int) -> Tensor:
        """The own share of the sum of `scale` times the `values` in a row, and after it the sum of the `rest`."""

    def gather(self, share: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """The shares of all processes in a row, as tensors of these shapes."""

    def gather_into(self, into: Sequence[Tensor], share: Tensor) -> None:
        """Write the shares of all processes to such tensors."""

    def close(self) -> None:
        """Take part no more."""


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
    steps : ProcessGroup, optional
        What sums on the CPU go by within steps.
    memory : Memory, optional
        Memory that they share, through which sums go instead where it takes them.
    names : tuple of str
        Of all, for messages.
    restarted : bool
        Whether the launcher has started these processes again, after one of them was lost.
    part : float
        Within a step: the part of its rows that is this process's.
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    steps: Any = None
    memory: Memory | None = None
    names: tuple[str, ...] = ()
    restarted: bool = False
    part: float = 1.0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints, writes and decides."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """Whether this is the first one of its machine, as the launcher numbers them."""
        return self.local_rank == 0

    @property
    def local_rank(self) -> int:
        """Which one of its machine this is, as the launcher numbers them."""
        return int(os.environ.get("LOCAL_RANK", self.rank))

    @property
    def may_restart(self) -> bool:
        """Whether the launcher starts these processes again when one of them is lost."""
        return self.count > 1 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"

    def share(self, total: int) -> slice:
        """The part of `total` things in a row that is this process's: parts differ in length by one at the most."""
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    # ------------------------------------------------------------------ what is told

    def broadcast(self, value: T) -> T:
        """What the first process has for `value`; what the others pass is not used."""
        if self.count == 1:
            return value
        box = [value if self.is_first else None]
        dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """What every process has for `value`, in the order of their ranks, for all of them."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self.group)
        return found

    @torch.no_grad()
    def align(self, tensors: Iterable[Tensor]) -> None:
        """Give all `tensors` the values that they have in the first process."""
        for tensor in tensors if self.count > 1 else ():
            value = tensor.detach().cpu().contiguous().clone()
            dist.broadcast(value, 0, group=self.group)
            if not self.is_first:
                tensor.copy_(value)

    def barrier(self) -> None:
        """Wait until all have come here."""
        self.gather(None)

    def close(self) -> None:
        """Leave the shared memory; who still waits there for this process hears that it has ended."""
        if self.memory is not None:
            self.memory.close()

    # ------------------------------------------------------------------ what is done

    def each(self, action: Callable[[], T]) -> T:
        """`action()`; where it fails in one process, all raise: none waits for another that has given up."""
        if self.count == 1:
            return action()
        result: T | None = None
        error: Exception | None = None
        try:
            result = action()
        except Exception as caught:
            error = caught
        self.agree(error)
        return result  # type: ignore[return-value]

    def first(self, action: Callable[[], T]) -> T:
        """What `action()` gives in the first process, which alone runs it, for all; where it fails, all raise."""
        return self.broadcast(self.each(lambda: action() if self.is_first else None))  # type: ignore[return-value]

    def agree(self, error: Exception | None) -> None:
        """Raise the `error` of this process, or one that names the process which has one.

        Raises
        ------
        PyrolvmError
            Another process has an error.
        """
        said = self.gather(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        for rank, sentence in enumerate(said):
            if sentence is not None:
                raise PyrolvmError(f"process {rank} of {self.count} cannot go on: {sentence}")

    @contextmanager
    def losses_named(self) -> Iterator[None]:
        """Within the block, an error because another process has ended or hangs says which one it was.

        Raises
        ------
        LostProcessError
            Another process has ended or hangs.
        """
        try:
            yield
        except Exception as error:
            if self.count == 1 or not _is_of_connection(error):
                raise
            with interrupts_noted():  # the launcher ends those that are left
                lost = self._lost()
            if not lost:
                raise
            names = " and ".join(self.names[rank] for rank in lost)
            what = "ended before the fit did, and with it this one: see its own last words, if it had time for any"
            if "timed out" in str(error).lower():
                what = "does not answer the others: it is stopped or waits for something else, or its machine is lost"
            raise LostProcessError(
                f"{names} {what}; torchrun --max-restarts=3 begins again by itself, from the checkpoint if fit has one"
            ) from error

    def _lost(self) -> list[int]:
        """Those that do not answer a roll call in the store, within a few seconds."""
        others = [rank for rank in range(self.count) if rank != self.rank]
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"pyrolvm/left/{self.rank}", "1")
            end = time.monotonic() + ROLL_CALL
            while others and time.monotonic() < end:
                time.sleep(0.1)
                others = [rank for rank in others if not store.check([f"pyrolvm/left/{rank}"])]
        except Exception:  # the first process keeps the store, unless the launcher does
            return [0] if self.rank else []
        return others

    # ------------------------------------------------------------------ tensors within a step

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes, as an operation that a graph of tensor operations can hold."""
        if self.count == 1:
            return value
        if self.memory is not None and self.memory.sums(value):
            return self.memory.sum(value)
        operations = torch.ops._c10d_functional
        group: Any = self.steps if value.device.type == "cpu" else dist.group.WORLD
        begun = operations.all_reduce(value.contiguous(), "sum", group.group_name)
        return operations.wait_tensor(begun)

    def mean(self, value: Tensor) -> Tensor:
        """The mean by rows of what the processes of a step estimate, with the gradient of the own estimate.

        For a loss that is no sum over rows: each process has its value, and the mean of their gradients is the
        gradient.
        """
        if self.count == 1:
            return value
        return value + (self.sum(self.part * value.detach()) - value).detach()

    def of_first(self, value: Tensor) -> Tensor:
        """The first process's `value`, likewise."""
        if self.count == 1:
            return value
        kind = torch.uint8 if value.dtype == torch.bool else value.dtype
        return self.sum(value.to(kind) * _flag(self.is_first, kind, value.device)).to(value.dtype)


ALONE = Processes()
_sharing: ContextVar[Processes] = ContextVar("pyrolvm_sharing", default=ALONE)
_unlaunched: ContextVar[bool] = ContextVar("pyrolvm_unlaunched", default=False)
_made: dict[int, Processes] = {}


class LostProcessError(PyrolvmError):
    """Another process of a fit has ended before it, or hangs."""


def sharing() -> Processes:
    """Those that share the rows of the training step that runs now; one alone outside of such a step.

    A model that adds up over the rows of a batch by itself, without a gradient, adds up over all of them by
    `sharing().sum(value)`.
    """
    return _sharing.get()


@contextmanager
def shared_step(processes: Processes) -> Iterator[None]:
    """Within the block, `processes` share the rows of a step."""
    token = _sharing.set(processes)
    try:
        yield
    finally:
        _sharing.reset(token)


@contextmanager
def unlaunched() -> Iterator[None]:
    """Within the block this process is one alone."""
    token = _unlaunched.set(True)
    try:
        yield
    finally:
        _unlaunched.reset(token)


def here() -> Processes:
    """Find out which process this is among those started together; makes their group at the first call.

    Raises
    ------
    SettingError
        A part of the launcher's environment is missing or is no number.
    """
    if _unlaunched.get():
        return ALONE
    if not (dist.is_available() and dist.is_initialized()):
        _, count = launched(os.environ)
        if count == 1:
            return ALONE
        _make_group()
    if dist.get_world_size() == 1:
        return ALONE
    world = id(dist.group.WORLD)
    if world not in _made:
        _made.clear()
        steps = dist.new_group(backend="gloo", timeout=STEP_PATIENCE)
        nameless = Processes(dist.get_rank(), dist.get_world_size(), _talking(), steps)
        own = f"process {nameless.rank} of {nameless.count} (pid {os.getpid()} on {socket.gethostname()})"
        names, attempts = zip(*nameless.gather((own, _attempt())), strict=True)
        # each machine counts the restarts that its own processes were the cause of
        _made[world] = replace(nameless, names=names, restarted=any(attempts))
    return _made[world]


def _make_group() -> None:
    """The group that the launcher's environment describes.

    On one machine the launcher's store outlives those that were lost, and would give their addresses to their
    successors.
    """
    if _attempt() and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store, rank, count = next(dist.rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(f"pyrolvm/attempt_{_attempt()}", store)
        dist.init_process_group(store=store, rank=rank, world_size=count, timeout=PATIENCE)
    else:
        dist.init_process_group(timeout=PATIENCE)
    atexit.register(_end_group)


def _end_group() -> None:
    """Before the interpreter ends: threads of the group that are left would abort it."""
    _made.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@functools.cache
def _flag(value: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 or 0, as the same tensor at every call: a constant of a recorded graph, which is then that of all processes."""
    return torch.tensor(value, dtype=dtype, device=device)


def _talking() -> Any:
    """The group of all processes that carries what is on the CPU."""
    world = dist.group.WORLD
    if "gloo" in str(dist.get_backend_config(world)):
        return world
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _is_of_connection(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, is of a message that did not get through."""
    words = ("gloo", "nccl", "c10d", "connection", "broken pipe", "socket", "shared memory")
    while error is not None:
        if isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


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
