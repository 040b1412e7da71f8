"""Cells of one sweep that run side by side on one machine work together but are timed alone.

A cell holds a lock shared while it works, and exclusively while it is timed: it then waits until the others are waiting
too or between cells. What other programs do at that time cannot be prevented, so it is measured.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_lock: ContextVar[IO[str] | None] = ContextVar("lock", default=None)  # of the cell that this process runs


@dataclass
class Others:
    """What all other processes of the machine used while this one was timed."""

    cores: float | None = None  # on average; None where the kernel does not tell


@contextmanager
def working(results: str) -> Iterator[None]:
    """While open, no cell of the same results folder on this machine is timed."""
    folder = results if "://" in results else str(Path(results).absolute())
    name = f"sweep-{os.getuid()}-{hashlib.sha256(folder.encode()).hexdigest()[:16]}.turns"
    path = Path(tempfile.gettempdir()) / name  # of this machine: a shared folder spans several
    with _entered(path) as handle:
        token = _lock.set(handle)
        try:
            yield
        finally:
            _lock.reset(token)
            _leave(path, handle)


def _entered(path: Path) -> IO[str]:
    """The file at `path`, made if need be, locked shared."""
    while True:
        handle = path.open("a")
        fcntl.flock(handle, fcntl.LOCK_SH)
        if _lies_at(path, handle):
            return handle
        handle.close()  # the last cell has left and removed it between the two lines above


def _leave(path: Path, handle: IO[str]) -> None:
    """Remove the file if no other cell is there."""
    with suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _lies_at(path, handle):
            path.unlink()


def _lies_at(path: Path, handle: IO[str]) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    return False


@contextmanager
def alone() -> Iterator[Others]:
    """While open, no other cell of the sweep works on this machine. Gives what other programs did meanwhile."""
    handle, others = _lock.get(), Others()
    if handle is not None:
        fcntl.flock(handle, fcntl.LOCK_EX)  # gives the shared lock up first, so that two cells cannot block each other
    before = _busy_seconds()
    started = time.perf_counter()
    try:
        yield others
        after, seconds = _busy_seconds(), time.perf_counter() - started
        if before and after and seconds > 0:
            whole, own = (b - a for a, b in zip(before, after, strict=True))
            others.cores = max(0.0, (whole - own) / seconds)
    finally:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_SH)


def _busy_seconds() -> tuple[float, float] | None:
    """CPU seconds that the machine has been busy, and that this process has used; None where it is not told."""
    if sys.platform != "linux":
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq + steal) / ticks, time.process_time()
