"""The results folder: one row a cell, in files that anything that reads parquet can open.

    cells/CELL.parquet          one row
    cells/0-table-*.parquet     many rows, put together by `python -m sweep.store compact RESULTS`
    samples/CELL.parquet        one row an evaluated example and metric
    latency/CELL.parquet        every timed repeat
    layers/CELL.parquet         one row a matrix of a block: its weights, and how many of them are zero or gone
    units/CELL.parquet          one row a unit whose drop was asked for: its importance, and whether it was measured
    recipes/CELL.sweep          which units were removed: what method.replay=FILE reads

Files appear whole, and the row is written last: where it stands, the rest stands too. pandas takes the columns of a
folder from its first file, so `cells/0-schema.parquet`, which has no rows and sorts first, carries every column that
any row has. The folder may be any URL that fsspec opens, such as s3://bucket/prefix. Nothing is ever unpickled.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import socket
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sweep import messages
from sweep.settings import RequestError
from sweep.store.columns import COLUMNS, SCHEMA_VERSION
from sweep.store.storage import Folder

log = logging.getLogger(__name__)

TABLES = ("samples", "latency", "layers", "units")
RECIPES = "recipes"
UNREADABLE = "unreadable"  # the status of a cell whose file is no row of ours
_SCHEMA_FILE = "0-schema.parquet"  # sorts before all others
_COMPACT = "0-table-"
_VERSION, _FILES = b"sweep_schema_version", b"sweep_files"
_NAMELESS = range(1, 6)  # measuring versions whose rows do not tell it
_ALWAYS = ["cell", "status", "started_at", "schema_version"]  # read with any selection of columns
_LOCK, _COMPACTION_LOCK = "cells/.lock", "cells/.compaction"
_PROBE = 65536  # bytes: on a full disk empty files can still be made
Where = str | os.PathLike[str]


def load(results: Where = "results") -> pd.DataFrame:
    """All rows of a results folder, one a cell, task metrics last; rows of older versions in the columns of this one.

    A file that is no row of ours is named in a warning and left out.
    Raises FileNotFoundError when there is no results folder, RequestError when a newer version has written it.
    """
    rows = _rows(results)
    if not set(_metrics(rows.column_names)) <= set(_schema_file(Folder(results))[0]):
        with contextlib.suppress(OSError):  # a reader may not be allowed to write
            widen_schema(results, _metrics(rows.column_names))
    return rows.to_pandas()


def statuses(results: Where, cells: Iterable[str]) -> dict[str, str]:
    """The status of each of these cells that has a row, or UNREADABLE. Opens no other cell's file."""
    wanted = set(cells)
    damaged: list[str] = []
    found = _some_rows(results, wanted, ["status"], damaged)
    known = dict(zip(found["cell"].to_pylist(), found["status"].to_pylist(), strict=True))
    return {_cell(name): UNREADABLE for name in damaged} | {cell: known[cell] for cell in wanted if cell in known}


def read_rows(results: Where, cells: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The rows of these cells by name, without the cells that have none. Opens no other cell's file."""
    wanted = set(cells)
    found = _some_rows(results, wanted, None, [])
    return {row["cell"]: row for row in found.filter(pc.is_in(found["cell"], pa.array(wanted))).to_pylist()}


def read_row(results: Where, cell: str) -> dict[str, Any] | None:
    """The row of one cell, or None when it has none."""
    return read_rows(results, [cell]).get(cell)


def read_some(results: Where, columns: list[str], at_most: int = 200) -> pd.DataFrame:
    """These columns of compacted rows and of `at_most` others: enough to tell what cells cost, and quick to read."""
    try:
        singles = [name for name in Folder(results).names("cells") if not name.startswith("0-")][:at_most]
    except FileNotFoundError:
        singles = []
    return _some_rows(results, set(map(_cell, singles)), columns, []).select(columns).to_pandas()


def read_table(results: Where, name: str) -> pd.DataFrame:
    """The rows of one of TABLES, of all cells, with the column `cell`."""
    folder, frames = Folder(results), []
    for file in folder.names(name) if folder.exists(name) else []:
        with contextlib.suppress(FileNotFoundError):  # of a cell that is being measured again
            frames.append(pd.read_parquet(io.BytesIO(folder.get(f"{name}/{file}"))).assign(cell=_cell(file)))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def merge(into: Where, *others: Where) -> dict[str, tuple[int, int]]:
    """Bring the rows of other results folders into one, with their tables; the others stay as they are.

    A row is taken where its cell has none, only an older one, or one that is not ok while this one is. Each appears as
    if it had been measured there, its tables first: what is interrupted loses nothing and is finished by doing it again.
    returns  for each of the others (rows taken, rows that `into` had as good and as new)
    Raises RequestError for a folder that cannot be written to, that a newer version has written, or that is the same;
    FileNotFoundError for one that is no results folder.
    """
    for other in others:
        if Folder(other).is_same(Folder(into)):
            raise RequestError(f"merge: {other} and {into} are the same folder; give another one to merge from")
        if not Folder(other).exists("cells"):
            raise FileNotFoundError(_no_folder(other))
        check_version(other)
    check_writable(into)
    taken: dict[str, tuple[int, int]] = {}
    for other in others:
        rows = _rows(other)
        stood = 0
        for row in rows.to_pylist():
            known = {name: value for name, value in row.items() if value is not None}
            stood += write(into, known, _tables(Folder(other), row["cell"]), if_newer=True) is not None
        taken[str(other)] = (rows.num_rows - stood, stood)
    return taken


def _tables(folder: Folder, cell: str) -> dict[str, pa.Table | bytes]:
    """The tables of one cell, and its recipe."""
    found: dict[str, pa.Table | bytes] = {}
    for name in TABLES:
        with contextlib.suppress(FileNotFoundError):
            found[name] = pq.read_table(pa.BufferReader(folder.get(f"{name}/{cell}.parquet")))
    with contextlib.suppress(FileNotFoundError):
        found[RECIPES] = folder.get(f"{RECIPES}/{cell}.sweep")
    return found


def write(
    results: Where,
    row: Mapping[str, Any],
    tables: Mapping[str, pd.DataFrame | pa.Table | bytes],
    *,
    if_newer: bool = False,
) -> dict[str, Any] | None:
    """Write one cell: its tables first, its row last. A row of the same cell is replaced.

    row       `cell` and `status` at least; columns that it lacks are null; further columns are task metrics
    tables    by name, of TABLES; and as RECIPES the content of a recipe
    if_newer  replace only an older row, or one that is not ok by one that is
    returns   None; or, with nothing changed, the row that stands there and is not to be replaced: one of status ok by
              one that is not, or with if_newer one that is as good and as new
    Raises OSError when the folder does not take it; what other cells have there stays as it is.

    Object storage has no locks: of two processes that write one cell at the same moment the later wins there.
    """
    folder, cell = Folder(results), row["cell"]
    metrics = [name for name in row if name not in COLUMNS]
    for name in metrics:
        if "/" not in name:
            raise ValueError(f"{name} is no column of schema {SCHEMA_VERSION} and no task metric (task/metric)")
    widen_schema(results, metrics)
    content = pa.Table.from_pylist([{"schema_version": SCHEMA_VERSION, **row}], schema=schema(metrics))
    with folder.locked(_LOCK):  # no other row of this cell, and no compaction, comes in between
        standing = read_row(results, cell) if if_newer or row["status"] != "ok" else None
        if standing is not None and (_rank(standing) >= _rank(row) if if_newer else standing["status"] == "ok"):
            return standing
        for name in (*TABLES, RECIPES):
            file = f"{name}/{cell}.{'sweep' if name == RECIPES else 'parquet'}"
            if name in tables:
                beside = tables[name]
                folder.put(file, beside if isinstance(beside, bytes) else _bytes(_arrow(beside)))
            else:
                folder.remove(file)  # of an earlier run of the cell
        folder.put(f"cells/{cell}.parquet", _bytes(content))
    _drop_from_compact(folder, cell)
    return None


def _rank(row: Mapping[str, Any]) -> tuple[bool, str]:
    """Of two rows of one cell the higher counts: one that is ok, then the newer."""
    return row["status"] == "ok", row.get("started_at") or ""


def schema(metrics: Iterable[str]) -> pa.Schema:
    """The fixed columns, then the given task metrics."""
    columns = [*((name, column.type) for name, column in COLUMNS.items()), *((name, pa.float64()) for name in metrics)]
    return pa.schema(columns, metadata={_VERSION: str(SCHEMA_VERSION).encode()})


def widen_schema(results: Where, metrics: Iterable[str], files: Iterable[str] | None = None) -> None:
    """Make the schema file name every column, so that pandas shows the new ones whichever file comes first.

    files  marks of all files, when all their columns are among these or named already: see mend_schema

    Object storage has no locks: of two processes that add different columns at the same moment, one's may stay hidden
    from pandas (never from `load`) until a sweep, at its end, mends the schema.
    """
    folder = Folder(results)
    with folder.locked(_LOCK):
        known, marks = _schema_file(folder)
        union = [name for name in known if name not in COLUMNS]
        union += [name for name in dict.fromkeys(metrics) if name not in known and name not in COLUMNS]
        seen = marks if files is None else set(files)
        if [*COLUMNS, *union] != known or seen != marks:
            wide = schema(union)
            wide = wide.with_metadata({**wide.metadata, _FILES: " ".join(sorted(seen)).encode()})
            folder.put(f"cells/{_SCHEMA_FILE}", _bytes(wide.empty_table()))


def mend_schema(results: Where) -> None:
    """Make the schema file name the columns of all files, also of those that were copied in from another folder.

    The schema file keeps a mark of every file that it has the columns of (its name and size), and only others are opened.
    """
    folder = Folder(results)
    if not folder.exists("cells"):
        return
    marks = {name: _mark(name, size) for name, size in folder.sizes("cells").items() if name != _SCHEMA_FILE}
    _, seen = _schema_file(folder)
    found: dict[str, None] = {}
    for name, mark in marks.items():
        if mark not in seen:
            with contextlib.suppress(FileNotFoundError, pa.ArrowInvalid):  # gone meanwhile, or no row of ours
                found |= dict.fromkeys(pq.read_schema(pa.BufferReader(folder.get(f"cells/{name}"))).names)
    if seen != set(marks.values()):
        widen_schema(results, _metrics(found), marks.values())


def _metrics(columns: Iterable[str]) -> list[str]:
    return [name for name in columns if "/" in name]


def _schema_file(folder: Folder) -> tuple[list[str], set[str]]:
    """(columns, marks) of the schema file; nothing when there is none, or when it is damaged."""
    try:
        found = pq.read_schema(pa.BufferReader(folder.get(f"cells/{_SCHEMA_FILE}")))
    except (FileNotFoundError, pa.ArrowInvalid):  # written anew
        return [], set()
    return found.names, set((found.metadata or {}).get(_FILES, b"").decode().split())


def _mark(name: str, size: int) -> str:
    return hashlib.sha256(f"{name} {size}".encode()).hexdigest()[:8]


def check_writable(results: Where) -> None:
    """Refuse a results folder that cannot receive rows, or that a newer version has written. Raises RequestError."""
    try:
        folder = Folder(results)
        probe = f"cells/.probe-{socket.gethostname()}-{os.getpid()}"
        try:
            folder.put(probe, bytes(_PROBE))
        finally:
            folder.remove(probe)
    except RequestError:
        raise
    except Exception as error:  # what the drivers of object storage raise has no class in common
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise RequestError(f"results={results} cannot be written to: {reason}") from error
    check_version(results)


def check_version(results: Where) -> None:
    """Refuse a folder that a newer version of sweep has written, or that is a file. Raises RequestError."""
    if "://" not in str(results) and Path(results).is_file():
        raise RequestError(f"results={results} cannot be written to: it is a file; give a folder")
    try:
        metadata = pq.read_schema(pa.BufferReader(Folder(results).get(f"cells/{_SCHEMA_FILE}"))).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):  # no folder yet, or a damaged file: written anew by the next row
        return
    except RequestError:
        raise
    except Exception as error:  # what the drivers of object storage raise has no class in common
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise RequestError(f"results={results} cannot be read: {reason}") from error
    _refuse_newer(results, int(metadata.get(_VERSION, b"1")))


def set_aside(results: Where, cells: Iterable[str] = ()) -> list[str]:
    """Move files that are no rows of ours from `cells/` to `set_aside/`, where no reader stumbles over them.

    cells  whose files to look at, beside all files that are not named like a cell
    returns  the names of the files moved
    """
    folder, moved = Folder(results), []
    folder.remove_half_written()
    suspects = {f"{cell}.parquet" for cell in cells}
    for name in folder.names("cells") if folder.exists("cells") else []:
        foreign = not name.startswith("0-") and not _is_cell(_cell(name))
        if name != _SCHEMA_FILE and (foreign or name in suspects) and _read(folder, name, ["status"]) is None:
            folder.move(f"cells/{name}", f"set_aside/{name}")
            moved.append(name)
    return moved


def compact(results: Where) -> tuple[int, int]:
    """Put the rows of finished cells into one file; returns (rows in it, files that it replaced).

    Safe beside writers and readers: the new file is complete before an old one goes, and a reader that meets a row
    twice takes the newer. Cells that are not ok keep their own files, since those will be replaced. On object storage,
    which has no locks, a cell that is measured again in the very moment of its file's removal would be measured once
    more: do not compact there beside a sweep with resume=false.
    Raises FileNotFoundError when there is no results folder.
    """
    folder = Folder(results)
    check_version(results)
    if not folder.exists("cells"):
        raise FileNotFoundError(_no_folder(results))
    every = [_cell(name) for name in folder.names("cells")]
    for name in set_aside(results, every):
        log.warning("%s is no row of sweep: moved to %s/set_aside", name, results)
    with folder.locked(_COMPACTION_LOCK):
        names = [name for name in folder.names("cells") if name != _SCHEMA_FILE]
        stamps = {name: folder.stamp(f"cells/{name}") for name in names}
        tables = {name: found for name in names if (found := _read(folder, name, None)) is not None}
        widen_schema(results, [name for found in tables.values() for name in _metrics(found.column_names)])
        done = {
            name: found
            for name, found in tables.items()
            if name.startswith(_COMPACT) or set(found["status"].to_pylist()) == {"ok"}
        }
        finished = {
            row["cell"]
            for found in done.values()
            for row in found.select(["cell", "status"]).to_pylist()
            if row["status"] == "ok"
        }
        outdone = [name for name in tables if name not in done and _cell(name) in finished]
        if not done or (len(done) == 1 and next(iter(done)).startswith(_COMPACT) and not outdone):
            return sum(found.num_rows for found in done.values()), 0
        merged = _unified(results, done)
        folder.put(f"cells/{_COMPACT}{uuid.uuid4().hex[:12]}.parquet", _bytes(merged))
        removed = 0
        with folder.locked(_LOCK):
            for name in (*done, *outdone):
                if folder.stamp(f"cells/{name}") == stamps[name]:  # else measured again since it was read
                    folder.remove(f"cells/{name}")
                    removed += 1
    return merged.num_rows, removed


def _drop_from_compact(folder: Folder, cell: str) -> None:
    """Where a compact file holds an older row of this cell, write that file anew without it: pandas sees each cell once."""
    compacts = [name for name in folder.names("cells") if name.startswith(_COMPACT)]
    for name in compacts:
        with folder.locked(_COMPACTION_LOCK):
            found = _read(folder, name, None) if folder.exists(f"cells/{name}") else None
            if found is None or cell not in found["cell"].to_pylist():
                continue
            rest = found.filter(pc.not_equal(found["cell"], cell))
            if rest.num_rows:
                folder.put(f"cells/{_COMPACT}{uuid.uuid4().hex[:12]}.parquet", _bytes(rest))
            folder.remove(f"cells/{name}")


def _some_rows(results: Where, cells: set[str], columns: list[str] | None, damaged: list[str]) -> pa.Table:
    """The compacted rows and those of these cells; none when there is no folder."""
    try:
        return _rows(results, columns, lambda name: name.startswith(_COMPACT) or _cell(name) in cells, damaged)
    except FileNotFoundError:
        return schema(()).empty_table()


def _rows(
    results: Where,
    columns: list[str] | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
    damaged: list[str] | None = None,
) -> pa.Table:
    """The rows in the files whose name is wanted, each cell once. Names of files that are no rows go to `damaged`."""
    folder = Folder(results)
    if not folder.exists("cells"):
        raise FileNotFoundError(_no_folder(results))
    for _ in range(100):  # as often as a compaction has moved rows under the reader's eyes
        names = folder.names("cells")
        files = [name for name in names if name != _SCHEMA_FILE and wanted(name)]
        try:
            with ThreadPoolExecutor(16 if folder.is_remote else 2) as pool:
                read = list(pool.map(lambda name: _read(folder, name, columns), files))
        except FileNotFoundError:
            continue
        if [n for n in names if n.startswith(_COMPACT)] == [n for n in folder.names("cells") if n.startswith(_COMPACT)]:
            break
    else:
        raise RuntimeError(f"{results} was changing all the time while it was read")
    bad = [name for name, found in zip(files, read, strict=True) if found is None]
    if damaged is None:
        for name in bad:
            log.warning(
                "%s/cells/%s is no row of sweep and is left out; `python -m sweep.store compact %s` sets it aside",
                results,
                name,
                results,
            )
    else:
        damaged += bad
    return _unified(results, {name: found for name, found in zip(files, read, strict=True) if found is not None})


def _no_folder(results: Where) -> str:
    return f"{results} is no results folder: there is no {results}/cells. Give one that a sweep has written"


def _read(folder: Folder, name: str, columns: list[str] | None) -> pa.Table | None:
    """The rows of one file, or None when it is no file of ours. Raises FileNotFoundError when it is gone."""
    try:
        file = pq.ParquetFile(pa.BufferReader(folder.get(f"cells/{name}")))
        if not {"cell", "status"} <= set(file.schema_arrow.names):
            return None
        found = file.read(columns=None if columns is None else list(dict.fromkeys([*_ALWAYS, *columns])))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, IsADirectoryError, OSError) as error:
        if isinstance(error, FileNotFoundError) or (
            isinstance(error, OSError) and error.errno is not None and not isinstance(error, IsADirectoryError)
        ):
            raise
        return None
    return found if name.startswith(_COMPACT) or found.num_rows == 1 else None


def _unified(results: Where, tables: Mapping[str, pa.Table]) -> pa.Table:
    """Files of all versions as one table in this version's columns and types, by name.

    Of each cell the newest row, and an ok one before any other.
    """
    if not tables:
        return schema(()).empty_table()
    merged = pa.concat_tables([_typed(found) for found in tables.values()], promote_options="permissive")
    _refuse_newer(results, max(filter(None, merged["schema_version"].to_pylist()), default=1))
    metrics = [name for name in merged.column_names if name not in COLUMNS]
    missing = {
        name: pa.nulls(merged.num_rows, column.type)
        for name, column in COLUMNS.items()
        if name not in merged.column_names
    }
    for name, nulls in missing.items():
        merged = merged.append_column(name, nulls)
    merged = merged.select([*COLUMNS, *metrics]).replace_schema_metadata(schema(()).metadata)
    merged = _with_measuring_version(merged)
    alone = [not name.startswith(_COMPACT) for name, found in tables.items() for _ in range(found.num_rows)]
    best: dict[str, tuple[bool, str, bool, int]] = {}
    names, statuses, starts = (merged[column].to_pylist() for column in ("cell", "status", "started_at"))
    for index, (cell, status, started) in enumerate(zip(names, statuses, starts, strict=True)):
        found = (status == "ok", started or "", alone[index], index)
        best[cell] = max(best.get(cell, found), found)
    return merged.take([best[cell][-1] for cell in sorted(best)])


def _typed(found: pa.Table) -> pa.Table:
    """The columns in this version's types, whichever version or program wrote the file."""
    ours = schema(_metrics(found.column_names))
    wanted = [ours.field(f.name) if f.name in ours.names else f for f in found.schema]
    return found if [f.type for f in wanted] == found.schema.types else found.cast(pa.schema(wanted), safe=False)


def _with_measuring_version(rows: pa.Table) -> pa.Table:
    """The rows with the measuring version of those that were written before it had a column, where it can be told.

    Until version 5 a cell's name was the hash of its configuration, fingerprints and version: one version gives the name.
    """
    known = rows["measuring_version"].to_pylist()
    nameless = rows.filter(pc.is_null(rows["measuring_version"]))
    if not nameless.num_rows:
        return rows
    columns = [nameless[name].to_pylist() for name in ("cell", "config", "model_fingerprint", "data_fingerprints")]
    told = iter([_measuring_version(*row) for row in zip(*columns, strict=True)])
    versions = pa.array([next(told) if version is None else version for version in known], pa.int64())
    return rows.set_column(rows.column_names.index("measuring_version"), "measuring_version", versions)


def _measuring_version(cell: str, config: str | None, model: str | None, data: str | None) -> int | None:
    if not (config and model and data):
        return None
    content = {key: value for key, value in json.loads(config).items() if key != "data_root"}
    content |= {"model": model, "data": json.loads(data)}
    for version in reversed(_NAMELESS):
        text = json.dumps(content | {"measuring_version": version}, sort_keys=True)
        if hashlib.sha256(text.encode()).hexdigest()[:16] == cell:
            return version
    return None


def _refuse_newer(results: Where, version: int) -> None:
    if version > SCHEMA_VERSION:
        raise RequestError(
            f"results={results} was written by a newer version of sweep (schema {version}; this one "
            f"knows up to {SCHEMA_VERSION}): upgrade sweep, or give another folder"
        )


def _cell(file: str) -> str:
    return file.removesuffix(".parquet")


def _is_cell(name: str) -> bool:
    return len(name) == 16 and set(name) <= set("0123456789abcdef")


def _arrow(content: pd.DataFrame | pa.Table) -> pa.Table:
    return content if isinstance(content, pa.Table) else pa.Table.from_pandas(content, preserve_index=False)


def _bytes(content: pa.Table) -> memoryview:
    buffer = io.BytesIO()
    pq.write_table(content, buffer)
    return buffer.getbuffer()


def main(arguments: list[str] | None = None) -> None:
    """The command line. Exits 2 for a wrong request."""
    parser = argparse.ArgumentParser(prog="python -m sweep.store", description="Care for results folders.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("compact", help="put the rows of finished cells into one file")
    one.add_argument("results", nargs="?", default="results", help="results folder or URL (default: results)")
    several = commands.add_parser("merge", help="bring the rows of other results folders into one, with their tables")
    several.add_argument("into", metavar="INTO", help="results folder or URL that receives them, which may be new")
    several.add_argument("others", metavar="FROM", nargs="+", help="results folders or URLs, which stay as they are")
    options = parser.parse_args(arguments)
    try:
        if options.command == "compact":
            rows, removed = compact(options.results)
            print(f"{options.results}: {rows} finished cells in one file, which replaced {removed}")
        else:
            for other, (taken, stood) in merge(options.into, *options.others).items():
                print(f"{options.into}: {taken} rows from {other}" + (f"; it had {stood} as new" if stood else ""))
    except (RequestError, FileNotFoundError) as error:
        sys.exit(messages.complain(error))


if __name__ == "__main__":
    sys.exit(messages.guard(main))
