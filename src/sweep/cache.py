"""The cache folder: things that are costly to make and the same for everyone who asks, made once.

`SWEEP_CACHE` names the folder; without it, the platform's user cache. An entry is a folder named by what it was made
from. It appears by one rename when it is complete, so that a reader never sees half of one, and a lock lets one
process make it while the others wait.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs


def folder() -> Path:
    """The cache folder, made if need be."""
    path = Path(os.environ.get("SWEEP_CACHE") or platformdirs.user_cache_dir("sweep"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def entry(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder `kind/key`; `make(folder)` fills it when it is not there yet.

    kind, key  folder names; `key` must change with everything that changes the content
    make       fills an empty folder; an exception leaves no entry behind
    """
    path = folder() / kind / key
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.with_name(f".{key}.lock")):
        if path.is_dir():  # made by another process while this one waited
            return path
        half = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=path.parent))
        try:
            make(half)
            half.rename(path)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    return path


def discard(path: Path) -> None:
    """Remove an entry that turned out to be damaged, in one step, so that it is made again."""
    doomed = path.with_name(f".{path.name}.damaged")
    shutil.rmtree(doomed, ignore_errors=True)
    if path.exists():
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def lock(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold `path` among all processes of this machine, exclusively or shared; released even when the holder is killed.

    A network file system without locks gives none: what is guarded must then be right by its renames alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield
