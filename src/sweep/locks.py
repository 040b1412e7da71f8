"""Locks among the processes of one machine, and how long this process has waited for them.

Waiting is no work. `working_seconds` is a clock that stands still meanwhile: what is measured between two of its readings
is this process's own work. Whoever limits a process (`on_wait`) is told when it begins to wait and when it goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass
class _Waits:
    """Of this process, so far."""

    seconds: float = 0.0
    tell: Callable[[bool], Any] | None = None


_waits = _Waits()


@contextmanager
def lock(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold `path` among all processes of this machine, exclusively or shared; released even when the holder is killed.

    The file stays when all have left: removed, it would part those who wait at it from those who come later.
    A network file system without locks gives none: what is guarded must then be right by its renames alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            _take(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        try:
            yield
        finally:  # closing it is not enough where a process that was forked meanwhile holds the file open
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)


def is_held(path: Path) -> bool:
    """Whether another holds `path` exclusively; False where there is no such file, or no locks."""
    try:
        with path.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in (*_NO_LOCKS, errno.ENOENT):
            raise
    return False


def _take(handle: IO[str], how: int) -> None:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        with _waiting():
            fcntl.flock(handle, how)


@contextmanager
def _waiting() -> Iterator[None]:
    started = time.perf_counter()
    if _waits.tell:
        _waits.tell(True)
    try:
        yield
    finally:
        _waits.seconds += time.perf_counter() - started
        if _waits.tell:
            _waits.tell(False)


def on_wait(tell: Callable[[bool], Any]) -> None:
    """Have `tell(True)` called when this process begins to wait for another, and `tell(False)` when it goes on."""
    _waits.tell = tell


def waited_seconds() -> float:
    """How long this process has waited for others, so far."""
    return _waits.seconds


def working_seconds() -> float:
    """A clock, in seconds from some moment, that stands still while this process waits for another."""
    return time.perf_counter() - _waits.seconds
