"""Cells that run side by side on one machine work together but are timed alone.

There is one room, a lock that a working cell shares and a cell that is timed holds for itself, and a gate before it,
which must be held to enter. A cell that is to be timed leaves the room, and takes the gate and then the room: those at
work go on until they leave or are to be timed too, and nobody else enters meanwhile, so that it need not wait for ever.
Whoever enters holds the gate, in whichever way, hence no order of any number of cells lets two in that may not meet.

The room is one for all sweeps of a person on a machine, whatever their results folders: their cells share its cores. What
other programs do while a cell is timed cannot be prevented, so it is measured.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from sweep.locks import lock
from sweep.settings import RequestError

_presence: ContextVar[ExitStack | None] = ContextVar("presence", default=None)  # in the room, of this process's cell


@dataclass
class Others:
    """What all other processes of the machine used while this one was timed."""

    cores: float | None = None  # on average; None where the kernel does not tell


def folder() -> Path:
    """Where the lock files lie: on a disk of this machine, and the same for all cells, whatever a job's TMPDIR is."""
    named = os.environ.get("SWEEP_TURNS")
    return Path(named) if named else Path("/tmp") / f"sweep-{os.getuid()}"


def check() -> None:
    """Refuse a folder in which nothing can be locked. Raises RequestError."""
    try:
        with _lock("gate", shared=True):
            pass
    except OSError as error:
        raise RequestError(
            f"{folder()}, where cells wait for their turn to be timed, cannot be written to: "
            f"{error.strerror}. Set SWEEP_TURNS=FOLDER, on a disk of this machine"
        ) from error


@contextmanager
def working() -> Iterator[None]:
    """While open, no other cell on this machine is timed."""
    with ExitStack() as presence:
        with _lock("gate"):
            presence.enter_context(_lock("room", shared=True))
        token = _presence.set(presence)
        try:
            yield
        finally:
            _presence.reset(token)


@contextmanager
def alone() -> Iterator[Others]:
    """While open, no other cell on this machine works or is timed. Gives what other programs did meanwhile.

    Outside of `working` it waits for nobody, and nobody waits for it.
    """
    presence = _presence.get()
    if presence is None:
        with _watched() as others:
            yield others
        return
    presence.close()  # two cells that kept their places would wait for each other
    with _lock("gate"):
        try:
            with _lock("room"), _watched() as others:
                yield others
        finally:  # goes on working; the gate is still held, so that nobody was let in between
            presence.enter_context(_lock("room", shared=True))


@contextmanager
def _lock(name: str, *, shared: bool = False) -> Iterator[None]:
    path = folder() / f"{name}.lock"
    with lock(path, shared=shared):
        os.utime(path)  # just used: what tidies /tmp removes old files
        yield


@contextmanager
def _watched() -> Iterator[Others]:
    others = Others()
    before, started = _busy_seconds(), time.perf_counter()
    yield others
    after, seconds = _busy_seconds(), time.perf_counter() - started
    if before and after and seconds > 0:
        whole, own = (b - a for a, b in zip(before, after, strict=True))
        others.cores = max(0.0, (whole - own) / seconds)


def _busy_seconds() -> tuple[float, float] | None:
    """CPU seconds that the machine has been busy, and that this process has used; None where it is not told."""
    if sys.platform != "linux":
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq + steal) / ticks, time.process_time()
