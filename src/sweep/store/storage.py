"""A folder of small files on a disk or on object storage: list, get, put, remove. A file appears whole or not at all.

On a disk a file is written beside its place, flushed, and renamed; on object storage one put is atomic by itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sweep.locks import lock
from sweep.settings import RequestError

STALE = 3600.0  # seconds after which a half-written file has no writer any more
_EXTRAS = {"s3": "s3", "s3a": "s3"}  # URL scheme: the extra of pyproject.toml that installs its fsspec driver


class Folder:
    """`place` is a path or a URL that fsspec opens. Names are relative, with `/` between folder and file.

    A class because the two kinds of place answer the same few questions; every caller would else ask which it is.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        text = os.fspath(place)
        self.fs: Any = None
        self.root = text.removeprefix("file://")
        if "://" in self.root:
            self.fs, self.root = _remote(text)

    @property
    def is_remote(self) -> bool:
        return self.fs is not None

    def is_same(self, other: Folder) -> bool:
        if self.is_remote or other.is_remote:
            return self.is_remote and other.is_remote and self.root == other.root
        return Path(self.root).resolve() == Path(other.root).resolve()

    def names(self, folder: str) -> list[str]:
        """The parquet files that readers see, sorted. Raises FileNotFoundError when there is no such folder."""
        if self.is_remote:
            return list(self.sizes(folder))
        with os.scandir(self._at(folder)) as entries:
            return sorted(entry.name for entry in entries if _is_seen(entry.name))

    def sizes(self, folder: str) -> dict[str, int]:
        """The same files with their sizes in bytes. Raises FileNotFoundError when there is no such folder."""
        if self.is_remote:
            self.fs.invalidate_cache()
            found = [
                (info["name"].rpartition("/")[2], info["size"]) for info in self.fs.ls(self._at(folder), detail=True)
            ]
        else:
            with os.scandir(self._at(folder)) as entries:
                found = [(entry.name, entry.stat().st_size) for entry in entries if _is_seen(entry.name)]
        return {name: size for name, size in sorted(found) if _is_seen(name)}

    def exists(self, name: str) -> bool:
        if self.is_remote:
            self.fs.invalidate_cache()
            return bool(self.fs.exists(self._at(name)))
        return Path(self._at(name)).exists()

    def get(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError."""
        return self.fs.cat_file(self._at(name)) if self.is_remote else Path(self._at(name)).read_bytes()

    def put(self, name: str, content: bytes | memoryview) -> None:
        """Write a file, replacing one of that name in one step. Raises OSError with nothing changed."""
        if self.is_remote:
            self.fs.pipe_file(self._at(name), bytes(content))
            return
        path = Path(self._at(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
        try:
            with half.open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            half.replace(path)
        finally:
            half.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens when there is none."""
        if self.is_remote:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._at(name))
        else:
            Path(self._at(name)).unlink(missing_ok=True)

    def move(self, name: str, to: str) -> None:
        """Move a file within the folder; nothing happens when there is none."""
        with contextlib.suppress(FileNotFoundError):
            if self.is_remote:
                self.fs.pipe_file(self._at(to), self.fs.cat_file(self._at(name)))
                self.fs.rm_file(self._at(name))
            else:
                target = Path(self._at(to))
                target.parent.mkdir(parents=True, exist_ok=True)
                Path(self._at(name)).replace(target)

    def stamp(self, name: str) -> str | None:
        """A text that changes when the file is written again; None when there is none."""
        try:
            if self.is_remote:
                self.fs.invalidate_cache()
                info = self.fs.info(self._at(name))
                return " ".join(str(info.get(key)) for key in ("ETag", "LastModified", "created", "size"))
            stat = Path(self._at(name)).stat()
            return f"{stat.st_ino} {stat.st_mtime_ns} {stat.st_size}"
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def locked(self, name: str, *, shared: bool = False) -> Iterator[None]:
        """Hold a lock of the folder. Object storage has none: callers must lose nothing without it."""
        if self.is_remote:
            yield
        else:
            with lock(Path(self._at(name)), shared=shared):
                yield

    def remove_half_written(self) -> None:
        """Remove what killed writers left, an hour after they did."""
        if self.is_remote or not Path(self.root).is_dir():
            return
        for half in Path(self.root).glob("*/.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - half.stat().st_mtime > STALE:
                    half.unlink()

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"


def _is_seen(name: str) -> bool:
    return name.endswith(".parquet") and not name.startswith(".")


def _remote(url: str) -> tuple[Any, str]:
    import fsspec

    scheme = url.partition("://")[0]
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        remedy = f"pip install 'sweep-pruning[{extra}]'" if extra else str(error)
        raise RequestError(f"results={url}: the package that opens {scheme}:// is not installed: {remedy}") from error
    except ValueError as error:  # of a scheme that fsspec does not know
        raise RequestError(f"results={url}: {error}") from error
    return fs, root.rstrip("/")
