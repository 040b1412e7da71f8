"""The cache folder: things that are costly to make and the same for everyone who asks, made once.

`SWEEP_CACHE` names the folder; without it, the platform's user cache. An entry is a folder named by what it was made
from. It appears by one rename when it is complete, so that a reader never sees half of one, and a lock lets one
process make it while the others wait. Together entries, and what interrupted makers have left, take at most
`SWEEP_CACHE_LIMIT` (100GB): what was used longest ago goes first, and nothing that was used in the last hour.

    python -m sweep.cache list | verify | prune [--limit 20GB]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import platformdirs
from tabulate import tabulate

from sweep import messages
from sweep.locks import is_held, lock
from sweep.settings import RequestError, byte_size

_MANIFEST = ".sweep-entry.json"  # of each file its size and SHA-256, written when the entry was complete
_IN_USE = 3600.0  # seconds after its last use in which an entry may still be being read
_DEFAULT_LIMIT = "100GB"
_PROBE = 65536  # bytes: on a full disk empty files can still be made


@dataclass(frozen=True)
class Entry:
    path: Path
    size: int  # bytes
    used: float  # seconds since the epoch

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def is_whole(self) -> bool:
        return self.path.is_dir() and not self.path.name.startswith(".")


def folder() -> Path:
    """The cache folder, made if need be. Raises RequestError where it cannot be made."""
    path = Path(os.environ.get("SWEEP_CACHE") or platformdirs.user_cache_dir("sweep"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def check_writable() -> None:
    """Refuse a cache in which nothing new can be kept, as every cell must. Raises RequestError."""
    top = folder()
    for path in (top, *(kind for kind in top.iterdir() if kind.is_dir())):
        try:
            with tempfile.NamedTemporaryFile(prefix=".probe-", suffix=".lock", dir=path) as probe:
                probe.write(bytes(_PROBE))
                probe.flush()
        except OSError as error:
            raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RequestError:
    return RequestError(
        f"the cache, {path}, cannot be written to: {error.strerror}. Set SWEEP_CACHE=FOLDER to another one"
    )


def entry(kind: str, key: str, make: Callable[[Path], object], *, resumable: bool = False) -> Path:
    """The folder `kind/key`; `make(folder)` fills it when it is not there yet.

    kind, key  folder names; `key` must change with everything that changes the content
    make       fills a folder; an exception leaves no entry behind
    resumable  what an interrupted `make` has left is in the folder of the next, which must know whole files from parts:
               those that `write` has written are whole
    """
    path = folder() / kind / key
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.with_name(f".{key}.lock")):
            if not path.is_dir():  # else made by another process while this one waited
                half = path.with_name(f".{key}.part") if resumable else None
                half = half or Path(tempfile.mkdtemp(prefix=f".{key}.", dir=path.parent))
                half.mkdir(exist_ok=True)
                try:
                    make(half)
                    (half / _MANIFEST).write_text(json.dumps(_contents(half)))
                    try:
                        half.rename(path)
                    except OSError:
                        if not path.is_dir():  # else another was first, where there are no locks
                            raise
                finally:
                    if not resumable:
                        shutil.rmtree(half, ignore_errors=True)
        prune(byte_size("SWEEP_CACHE_LIMIT", os.environ.get("SWEEP_CACHE_LIMIT") or _DEFAULT_LIMIT))
    with contextlib.suppress(OSError):  # a cache that others own can be read all the same
        os.utime(path)  # used just now
    return path


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """A file in place of an earlier one, so that whoever looks at any moment sees one of the two, whole."""
    half = path.with_name(f".{path.name}.tmp")
    with half.open("wb") as handle:
        fill(handle)
        handle.flush()
        os.fsync(handle.fileno())
    half.replace(path)


def entries() -> list[Entry]:
    """All entries, the longest unused first."""
    return [found for found in _everything() if found.is_whole]


def _everything() -> list[Entry]:
    """Entries, what interrupted makers have left, and files that are none; the longest unused first."""
    found = []
    for path in folder().glob("*/*"):
        if path.name.endswith(".lock"):
            continue
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # removed by another process in this moment
            files = [file.stat() for file in (path, *path.rglob("*")) if file.is_file()]
            used = path.stat().st_mtime
            if path.name.startswith("."):  # nobody says when it was used, but when it was written to
                used = max([used, *(file.st_mtime for file in files)])
            found.append(Entry(path, sum(file.st_size for file in files), used))
    return sorted(found, key=lambda e: e.used)


def prune(limit: int) -> list[Entry]:
    """Remove the longest unused entries and remains until the rest takes at most `limit` bytes; returns what was removed.

    What was used or written to in the last hour stays: a cell may be reading it, or making it.
    """
    kept, removed = _everything(), []
    excess = sum(e.size for e in kept) - limit
    for found in kept:
        if excess <= 0 or time.time() - found.used < _IN_USE:
            break
        if not found.is_whole and (not found.size or is_held(found.path.with_suffix(".lock"))):
            continue  # it is being made
        discard(found.path)
        removed.append(found)
        excess -= found.size
    return removed


def damage(path: Path) -> str | None:
    """What is wrong with an entry, told by reading all of it; None when nothing is, or when it has no manifest."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return f"{_MANIFEST} is no JSON"
    found = _contents(path)
    for name, (size, digest) in manifest.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != [size, digest]:
            return f"{name} has changed"
    return None


def discard(path: Path) -> None:
    """Remove an entry in one step, so that it is made again when it is next asked for."""
    doomed = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed / "entry")
    shutil.rmtree(doomed, ignore_errors=True)


def _contents(path: Path) -> dict[str, list[int | str]]:
    """Of every file its size and SHA-256, under its relative name."""
    found: dict[str, list[int | str]] = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != _MANIFEST):
        with file.open("rb") as handle:
            found[str(file.relative_to(path))] = [
                file.stat().st_size,
                hashlib.file_digest(handle, "sha256").hexdigest(),
            ]
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command line. Exits 1 when an entry was damaged, 2 for a wrong request."""
    parser = argparse.ArgumentParser(prog="python -m sweep.cache", description=f"Care for the cache in {folder()}.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what is there, how large, and when it was last used")
    commands.add_parser("verify", help="read every entry, and remove those that are damaged")
    pruning = commands.add_parser("prune", help="remove what was used longest ago")
    pruning.add_argument("--limit", default="0", help="what may stay, such as 20GB (default: only what is in use)")
    options = parser.parse_args(arguments)
    damaged = 0
    match options.command:
        case "list":
            lines = [
                (e.name, f"{e.size / 1e6:.1f}", time.strftime("%Y-%m-%d %H:%M", time.localtime(e.used)))
                for e in _everything()
            ]
            print(tabulate(lines, headers=["entry", "MB", "last used"], disable_numparse=True))
            print(f"{sum(e.size for e in _everything()) / 1e6:.1f} MB in {folder()}")
        case "verify":
            for found in entries():
                if problem := damage(found.path):
                    damaged += 1
                    discard(found.path)
                    print(f"{found.name}: {problem}; removed, and made again when it is next asked for")
            print(f"{damaged} of {len(entries()) + damaged} entries were damaged")
        case "prune":
            try:
                removed = prune(byte_size("--limit", options.limit))
            except RequestError as error:
                sys.exit(messages.complain(error))
            print(f"removed {len(removed)} entries, {sum(e.size for e in removed) / 1e6:.1f} MB")
    sys.exit(1 if damaged else 0)


if __name__ == "__main__":
    sys.exit(messages.guard(main))
