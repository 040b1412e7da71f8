"""The results folder: whole files only, every column for every reader, rows that say what went wrong."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

import sweep
from sweep import store
from sweep.config import RequestError


def row(cell: str, **more: object) -> dict:
    return {"cell": cell, "status": "ok", "sparsity": 0.5, **more}


def test_pandas_alone_sees_every_column_whichever_row_came_first(tmp_path: Path) -> None:
    store.write(tmp_path, {"cell": "00", "status": "failed", "error": "because"}, {})
    store.write(tmp_path, row("11", **{"pydoc/acc": 0.25}), {})
    store.write(tmp_path, row("22", **{"other/f1": 0.75}), {})
    frame = pd.read_parquet(tmp_path / "cells").set_index("cell")
    assert len(frame) == 3
    assert list(frame.reset_index().columns[: len(store.COLUMNS)]) == list(store.COLUMNS)
    assert frame.loc["11", "pydoc/acc"] == 0.25
    assert frame.loc["22", "other/f1"] == 0.75
    assert pd.isna(frame.loc["00", "sparsity"])
    assert frame.loc["00", "error"] == "because"
    pd.testing.assert_frame_equal(
        sweep.load(tmp_path).set_index("cell")[sorted(frame.columns)], frame[sorted(frame.columns)], check_dtype=False
    )


def test_a_cell_written_again_replaces_its_row_and_its_tables(tmp_path: Path) -> None:
    samples = pd.DataFrame({"task": ["t"], "document": ["0"], "metric": ["acc"], "value": [1.0]})
    store.write(tmp_path, row("aa"), {"samples": samples})
    assert store.table(tmp_path, "samples").cell.tolist() == ["aa"]
    store.write(tmp_path, {"cell": "aa", "status": "timeout"}, {})
    assert sweep.load(tmp_path).status.tolist() == ["timeout"]
    assert store.table(tmp_path, "samples").empty
    assert store.read_row(tmp_path, "aa")["schema_version"] == store.SCHEMA_VERSION
    assert store.read_row(tmp_path, "bb") is None


def test_a_column_outside_the_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speling is no column of schema"):
        store.write(tmp_path, row("aa", speling=1), {})


def test_a_half_written_file_is_not_read(tmp_path: Path) -> None:
    store.write(tmp_path, row("aa"), {})
    (tmp_path / "cells" / ".bb.parquet.123.tmp").write_bytes(b"PAR1 half of a row")
    assert len(sweep.load(tmp_path)) == len(pd.read_parquet(tmp_path / "cells")) == 1


def test_a_reader_beside_writers_never_fails_and_never_miscounts(tmp_path: Path) -> None:
    store.write(tmp_path, row("first"), {})
    writers = [threading.Thread(target=store.write, args=(tmp_path, row(f"{i:02x}", **{f"task{i}/acc": 0.5}), {}))
               for i in range(20)]  # fmt: skip
    for writer in writers:
        writer.start()
    counts = []
    while any(writer.is_alive() for writer in writers):
        counts.append(len(sweep.load(tmp_path)))
    assert counts == sorted(counts)
    assert len(sweep.load(tmp_path)) == 21
    assert {f"task{i}/acc" for i in range(20)} <= set(pd.read_parquet(tmp_path / "cells").columns)
    assert not list((tmp_path / "cells").glob(".*.tmp"))


def test_no_results_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no results folder"):
        sweep.load(tmp_path / "nothing")
    (tmp_path / "cells").mkdir()
    assert sweep.load(tmp_path).empty


def test_a_results_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="results=.* cannot be written to: "):
        store.check_writable(tmp_path / "file")


def test_every_file_has_the_whole_schema(tmp_path: Path) -> None:
    store.write(tmp_path, {"cell": "aa", "status": "crashed"}, {})
    assert pq.read_schema(tmp_path / "cells" / "aa.parquet").names == list(store.COLUMNS)


def test_importing_sweep_imports_no_torch() -> None:
    code = "import sys, sweep; sweep.load; assert not {'torch', 'transformers', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
