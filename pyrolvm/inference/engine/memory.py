"""Sums over the processes of one machine through memory that they share, where gloo would send messages to itself.

A message of gloo goes through the sockets of the machine, at less than a tenth of the bandwidth of its memory, and
takes a third of a millisecond however short it is. `shared_memory` is a file in memory that all processes map; the sum
is `cpp/shared_sum.h`, one operator of torch, which the compiled step calls as C++.

Where processes are on several machines, or there is no compiler, they go on with gloo.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyrolvm.processes as module
from pyrolvm.inference.engine import native
from pyrolvm.processes import Processes

FOLDER = Path("/dev/shm")
LINE = 128
"""Bytes of a process's line, as in shared_sum.h."""
LARGEST_SLOT, SLOTS = 2**20, 2**24
"""Bytes of a slot at the most, and of one slot of each process: with the second ones, half a container's 64 MiB."""
TYPES = (torch.float32, torch.float64, torch.int64, torch.uint8)
"""What can be summed, in the order of shared_sum.h."""
OPTIONS = ("-O3", "-march=native", "-std=c++17", "-fopenmp-simd", "-shared", "-fPIC", "-w")

_operators = torch.library.Library("pyrolvm", "FRAGMENT")
_operators.define("shared_sum(Tensor value, Tensor memory, Tensor place) -> Tensor")


def _sum(value: Tensor, memory: Tensor, place: Tensor) -> Tensor:
    found = torch.empty_like(value)
    pointers = (t.data_ptr() for t in (memory, place, value, found))
    error = _function()(*pointers, value.numel(), TYPES.index(value.dtype))
    if error is not None:
        raise RuntimeError(error.decode(errors="replace"))
    return found


_operators.impl("shared_sum", _sum, "CPU")
_operators.impl("shared_sum", lambda value, memory, place: torch.empty_like(value), "Meta")


class SharedMemory:
    """Memory that all processes have mapped, and the place of this one among them.

    Parameters
    ----------
    file : int
        Its descriptor, which this object closes.
    """

    def __init__(self, file: int, rank: int, count: int) -> None:
        self._file = file
        slot = self.slot(count)
        self._map = mmap.mmap(file, os.fstat(file).st_size)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        patience = int(1000 * module.STEP_PATIENCE.total_seconds())
        self._place = torch.tensor([rank, count, slot, file, patience])
        # of a byte for each process, which the system frees when the process ends
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)

    @staticmethod
    def size(count: int) -> int:
        """Bytes for `count` processes."""
        return count * (LINE + 2 * SharedMemory.slot(count))

    @staticmethod
    def slot(count: int) -> int:
        """Bytes of a slot of one of `count` processes."""
        return max(4096, min(LARGEST_SLOT, SLOTS // count) // 4096 * 4096)

    def sums(self, value: Tensor) -> bool:
        """Whether it takes such a tensor."""
        return value.device.type == "cpu" and value.dtype in TYPES

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes."""
        found: Tensor = torch.ops.pyrolvm.shared_sum(value.contiguous(), self._memory, self._place)
        return found

    def close(self) -> None:
        """Take part no more: who waits for this process hears that it has ended."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def shared_memory(processes: Processes) -> SharedMemory | None:
    """Memory that all `processes` share; None where one of them cannot have it.

    All call it together.
    """
    file = _made(processes.count) if processes.is_first else None
    told = processes.broadcast(file and file[1:])
    if told is None:
        return None
    name, token = told
    own = file[0] if file else _opened(name, token)
    able = all(processes.gather(own is not None and _is_ready()))
    found = SharedMemory(own, processes.rank, processes.count) if own is not None and able else None
    processes.barrier()  # who has no lock yet would count as ended
    if file is not None:
        os.unlink(name)
    if own is not None and found is None:
        os.close(own)
    return found


def _made(count: int) -> tuple[int, str, bytes] | None:
    """A file of the machine's memory: descriptor, name and its first bytes, which show others that it is the same."""
    token = secrets.token_bytes(LINE // 2)
    try:
        _library()
        file, name = tempfile.mkstemp(prefix="pyrolvm-", dir=FOLDER)
    except (OSError, native.CompilerError):
        return None
    try:
        os.posix_fallocate(file, 0, SharedMemory.size(count))
        os.pwrite(file, token, LINE // 2)
    except OSError:  # containers have little of it
        os.close(file)
        os.unlink(name)
        return None
    return file, name, token


def _opened(name: str, token: bytes) -> int | None:
    try:
        file = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    if os.pread(file, len(token), LINE // 2) == token:
        return file
    os.close(file)
    return None


def _is_ready() -> bool:
    with suppress(OSError, native.CompilerError):
        _function()
        return True
    return False


@functools.cache
def _function() -> Any:
    function = ctypes.CDLL(str(_library())).pyrolvm_shared_sum
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2
    return function


def _library() -> Path:
    """The sum as a library, compiled once on a machine."""
    return native.library(
        "\n".join(native.header_text(f"shared_sum{part}.h") for part in ("", "_eager")), OPTIONS
    )
