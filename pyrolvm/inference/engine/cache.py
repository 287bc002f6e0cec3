"""Compiled steps on disk, in the user's own cache folder.

A cached step is native code that the next process loads and runs, so only the user may write to the folder;
otherwise this process uses a temporary one. A key covers all that the code depends on: the graph with its
shapes and types, the compiler and its flags, processor, threads, versions.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pyrolvm.files import cache_folder

KEPT = 200
"""The number of compiled steps kept, those used last."""


@functools.cache
def folder() -> Path:
    """`pyrolvm` in the user's cache folder (`PYROLVM_CACHE` overrides it), or a temporary one."""
    path = cache_folder()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        if _is_mine(path) and os.access(path, os.W_OK | os.X_OK):
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="pyrolvm-"))


def _is_mine(path: Path) -> bool:
    """Whether this user owns the path and nobody else may write to it; a link is not followed."""
    found = path.lstat()
    owner = os.getuid() if hasattr(os, "getuid") else found.st_uid
    return not stat.S_ISLNK(found.st_mode) and found.st_uid == owner and not found.st_mode & 0o022


def entry(key: str, suffix: str) -> Path:
    """The path of the file of `key`, which need not exist."""
    return folder() / f"{key}{suffix}"


def is_stored(path: Path) -> bool:
    """Whether `path` is a complete file that this user owns; marks it as used."""
    try:
        if not (path.is_file() and _is_mine(path)):
            return False
        os.utime(path)
    except OSError:
        return False
    return True


@contextmanager
def storing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed to it if the block succeeds."""
    temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=path.parent)) / path.name
    try:
        yield temporary
        temporary.chmod(0o700)
        os.replace(temporary, path)
        _prune(path)
    finally:
        shutil.rmtree(temporary.parent, ignore_errors=True)


def _prune(newest: Path) -> None:
    """Keep the `KEPT` files used last with the suffix of `newest`; two of precompiled headers, which are large."""
    kept = 2 if newest.suffix == ".gch" else KEPT
    try:
        found = sorted(newest.parent.glob(f"*{newest.suffix}"), key=lambda p: p.stat().st_mtime)
        for path in found[:-kept]:
            path.unlink(missing_ok=True)
    except OSError:
        pass


def digest(*parts: str) -> str:
    """A hash of `parts`, this machine and these versions."""
    text = "\0".join([*parts, _surroundings(), str(torch.get_num_threads())])
    return hashlib.sha256(text.encode()).hexdigest()[:40]


@functools.cache
def _surroundings() -> str:
    versions = [f"{name} {_version(name)}" for name in ("torch", "pyro-ppl", "pyrolvm")]
    return "\n".join(
        [sys.version, platform.machine(), processor(), str(torch.version.git_version), *versions]
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def processor() -> str:
    """The processor's model and features, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(named)))
