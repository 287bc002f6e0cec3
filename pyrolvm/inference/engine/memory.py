"""Sums over the processes of one machine through memory that they share, where gloo would send messages to itself.

A message of gloo goes through the sockets of the machine, at less than a tenth of the bandwidth of its memory, and
takes a third of a millisecond however short it is. `shared_memory` is a file in memory that all processes map; the sum
is `cpp/shared_sum.h`, an operator of torch, which the compiled step calls as C++; so are the sum of which each process
has its share alone, and the shares of all that each of them gets.

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
from collections.abc import Sequence
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
_operators.define(
    "shared_scatter(Tensor[] values, Tensor rest, float scale, int length, Tensor memory, Tensor place) -> Tensor"
)
_operators.define("shared_gather(Tensor[] like, Tensor share, Tensor memory, Tensor place) -> Tensor[]")
_operators.define("shared_gather_(Tensor(a!)[] into, Tensor share, Tensor memory, Tensor place) -> ()")


def _sum(value: Tensor, memory: Tensor, place: Tensor) -> Tensor:
    found = torch.empty_like(value)
    pointers = (t.data_ptr() for t in (memory, place, value, found))
    _call("pyrolvm_shared_sum", *pointers, value.numel(), TYPES.index(value.dtype))
    return found


def _scatter(
    values: Sequence[Tensor], rest: Tensor, scale: float, length: int, memory: Tensor, place: Tensor
) -> Tensor:
    found = rest.new_empty(length + len(rest))
    own, others = (_arrays(values), len(values), ctypes.c_double(scale)), (rest.data_ptr(), len(rest))
    to, kind = (found.data_ptr(), length), TYPES.index(rest.dtype)
    _call("pyrolvm_shared_scatter", memory.data_ptr(), place.data_ptr(), *own, *others, *to, kind)
    return found


def _gather_into(into: Sequence[Tensor], share: Tensor, memory: Tensor, place: Tensor) -> None:
    arrays, kind = (_arrays(into), len(into)), TYPES.index(share.dtype)
    pointers = (t.data_ptr() for t in (memory, place, share))
    _call("pyrolvm_shared_gather", *pointers, len(share), *arrays, kind)


def _gather(like: Sequence[Tensor], share: Tensor, memory: Tensor, place: Tensor) -> list[Tensor]:
    found = [share.new_empty(t.shape) for t in like]
    _gather_into(found, share, memory, place)
    return found


def _like_scattered(
    values: Sequence[Tensor], rest: Tensor, scale: float, length: int, *memory: Tensor
) -> Tensor:
    return rest.new_empty(length + len(rest))


_operators.impl("shared_sum", _sum, "CPU")
_operators.impl("shared_scatter", _scatter, "CPU")
_operators.impl("shared_gather", _gather, "CPU")
_operators.impl("shared_gather_", _gather_into, "CPU")
_operators.impl("shared_sum", lambda value, *memory: torch.empty_like(value), "Meta")
_operators.impl("shared_scatter", _like_scattered, "Meta")
_operators.impl(
    "shared_gather", lambda like, share, *memory: [share.new_empty(t.shape) for t in like], "Meta"
)
_operators.impl("shared_gather_", lambda *arguments: None, "Meta")


def _call(name: str, *arguments: Any) -> None:
    """Call a function of shared_sum_eager.h. Raises `RuntimeError` with what went wrong."""
    function = getattr(_library(), name)
    function.restype = ctypes.c_char_p
    error = function(*(ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments))
    if error is not None:
        raise RuntimeError(error.decode(errors="replace"))


class _Array(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("length", ctypes.c_int64))


def _arrays(tensors: Sequence[Tensor]) -> Any:
    return (_Array * len(tensors))(*(_Array(t.data_ptr(), t.numel()) for t in tensors))


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

    def scatter(self, values: Sequence[Tensor], rest: Tensor, scale: float, length: int) -> Tensor:
        """The own share of the sum of `scale` times the `values` in a row, and after it the sum of the `rest`."""
        values, rest = [value.contiguous() for value in values], rest.contiguous()
        found: Tensor = torch.ops.pyrolvm.shared_scatter(
            values, rest, scale, length, self._memory, self._place
        )
        return found

    def gather(self, share: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """The shares of all processes in a row, as tensors of these shapes."""
        found: list[Tensor] = torch.ops.pyrolvm.shared_gather(
            list(like), share.contiguous(), self._memory, self._place
        )
        return found

    def gather_into(self, into: Sequence[Tensor], share: Tensor) -> None:
        """Write the shares of all processes to such tensors."""
        torch.ops.pyrolvm.shared_gather_(list(into), share, self._memory, self._place)

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
        _path()
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
        _library()
        return True
    return False


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_path()))


def _path() -> Path:
    """The operators as a library, compiled once on a machine."""
    return native.library(
        "\n".join(native.header_text(f"shared_sum{part}.h") for part in ("", "_eager")), OPTIONS
    )
