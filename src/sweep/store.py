"""The results folder: one row a cell, in files that anything that reads parquet can open.

    cells/CELL.parquet     one row
    samples/CELL.parquet   one row an evaluated example and metric
    latency/CELL.parquet   every timed repeat

A file appears whole, by one rename of a dot-file that readers do not see. The row is written last: where it stands, the
rest stands too. pandas takes the columns of a folder from its first file, so `cells/0-schema.parquet`, which has no
rows and sorts first, carries every column that any row has.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sweep import cache
from sweep.config import RequestError

SCHEMA_VERSION = 1

_TEXT, _FLOAT, _INT = pa.string(), pa.float64(), pa.int64()
COLUMNS: dict[str, pa.DataType] = {
    "cell": _TEXT, "status": _TEXT, "error": _TEXT, "model": _TEXT, "method": _TEXT, "criterion": _TEXT,
    "sparsity": _FLOAT, "sparsity_achieved": _FLOAT, "sparsity_units": _FLOAT,
    "sparsity_block_parameters": _FLOAT, "sparsity_all_parameters": _FLOAT, "seed": _INT,
    "execution": _TEXT, "dtype": _TEXT, "device": _TEXT, "threads": _INT,
    "parameters": _INT, "nonzero_parameters": _INT, "weights_bytes": _INT, "stored_bytes": _INT,
    "macs_per_token": _INT, "nonzero_macs_per_token": _INT,
    "prefill_ms_p50": _FLOAT, "decode_ms_per_token_p50": _FLOAT,
    "prefill_speedup": _FLOAT, "prefill_speedup_low": _FLOAT, "prefill_speedup_high": _FLOAT,
    "decode_speedup": _FLOAT, "decode_speedup_low": _FLOAT, "decode_speedup_high": _FLOAT,
    "dense_prefill_ms_p50": _FLOAT, "dense_decode_ms_per_token_p50": _FLOAT,
    "tokens_per_second": _FLOAT, "peak_memory_bytes": _INT, "base_memory_bytes": _INT,
    "peak_device_memory_bytes": _INT, "load_seconds": _FLOAT, "prune_seconds": _FLOAT, "calibration_tokens": _INT,
    "cell_seconds": _FLOAT, "config": _TEXT, "schema_version": _INT,
    "command": _TEXT, "started_at": _TEXT, "git_commit": _TEXT, "packages": _TEXT, "python": _TEXT, "host": _TEXT,
    "cpu": _TEXT, "gpu": _TEXT, "model_fingerprint": _TEXT, "data_fingerprints": _TEXT,
}  # fmt: skip
TABLES = ("samples", "latency")
_SCHEMA_FILE = "0-schema.parquet"


def load(results: str | os.PathLike[str] = "results") -> pd.DataFrame:
    """All rows of a results folder, one a cell, task metrics last.

    Raises FileNotFoundError when there is no results folder.
    """
    folder = Path(results) / "cells"
    if not folder.is_dir():
        raise FileNotFoundError(f"{results} is no results folder: there is no {folder}")
    tables = [pq.read_table(path) for path in sorted(folder.glob("[!.]*.parquet"))]
    if not tables:
        return schema(()).empty_table().to_pandas()
    return pa.concat_tables(tables, promote_options="permissive").to_pandas()


def table(results: str | os.PathLike[str], name: str) -> pd.DataFrame:
    """The rows of all cells' `samples` or `latency`, with the column `cell`."""
    frames = [pd.read_parquet(path).assign(cell=path.stem)
              for path in sorted((Path(results) / name).glob("[!.]*.parquet"))]  # fmt: skip
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def read_row(results: str | os.PathLike[str], cell: str) -> dict[str, Any] | None:
    """The row of one cell, or None when it has none."""
    path = _path(results, "cells", cell)
    return pq.read_table(path).to_pylist()[0] if path.is_file() else None


def write(results: str | os.PathLike[str], row: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> None:
    """Write one cell: its tables first, its row last. A row of the same cell is replaced.

    row     `cell` and `status` at least; columns that it lacks are null; further columns are task metrics
    tables  by name, of TABLES
    """
    cell = row["cell"]
    metrics = [name for name in row if name not in COLUMNS]
    for name in metrics:
        if "/" not in name:
            raise ValueError(f"{name} is no column of schema {SCHEMA_VERSION} and no task metric (task/metric)")
    for name in TABLES:
        if name in tables:
            _write_atomically(_path(results, name, cell), pa.Table.from_pandas(tables[name], preserve_index=False))
        else:
            _path(results, name, cell).unlink(missing_ok=True)  # of an earlier run of the cell
    _widen_schema(results, metrics)
    row = {"schema_version": SCHEMA_VERSION, **row}
    _write_atomically(_path(results, "cells", cell), pa.Table.from_pylist([dict(row)], schema=schema(metrics)))


def schema(metrics: Iterable[str]) -> pa.Schema:
    """The fixed columns, then the given task metrics."""
    return pa.schema([*COLUMNS.items(), *((name, _FLOAT) for name in metrics)])


def check_writable(results: str | os.PathLike[str]) -> None:
    """Refuse a results folder that cannot receive rows. Raises RequestError."""
    path = Path(results)
    try:
        (path / "cells").mkdir(parents=True, exist_ok=True)
        probe = path / "cells" / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RequestError(f"results={results} cannot be written to: {error.strerror}") from error


def _path(results: str | os.PathLike[str], name: str, cell: str) -> Path:
    return Path(results) / name / f"{cell}.parquet"


def _widen_schema(results: str | os.PathLike[str], metrics: Iterable[str]) -> None:
    """Make the schema file name every column, so that pandas shows the new ones whichever file comes first."""
    path = Path(results) / "cells" / _SCHEMA_FILE
    with cache.lock(path.with_name(".schema.lock")):
        known = pq.read_schema(path).names if path.is_file() else []
        union = [name for name in known if name not in COLUMNS]
        union += [name for name in metrics if name not in known]
        if not known or len(union) > len(known) - len(COLUMNS):
            _write_atomically(path, schema(union).empty_table())


def _write_atomically(path: Path, content: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with half.open("wb") as handle:
            handle.write(buffer.getbuffer())
            handle.flush()
            os.fsync(handle.fileno())
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
