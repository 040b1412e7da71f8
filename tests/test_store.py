"""The results folder: whole files only, every column for every reader, rows that say what went wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sweep
from sweep import store
from sweep.settings import RequestError
from sweep.store import rows as store_rows
from sweep.store.storage import Folder


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
    assert store.read_table(tmp_path, "samples").cell.tolist() == ["aa"]
    assert store.write(tmp_path, row("aa", seed=7), {}) is None
    assert sweep.load(tmp_path).seed.tolist() == [7]
    assert store.read_table(tmp_path, "samples").empty
    assert store.read_row(tmp_path, "aa")["schema_version"] == store.SCHEMA_VERSION
    assert store.read_row(tmp_path, "bb") is None


@pytest.mark.parametrize("status", ["failed", "out_of_memory", "crashed", "timeout"])
@pytest.mark.parametrize("compacted", [False, True])
def test_an_ok_row_and_its_tables_are_never_replaced_by_one_that_is_not(
    status: str, compacted: bool, tmp_path: Path
) -> None:
    samples = pd.DataFrame({"task": ["t"], "document": ["0"], "metric": ["acc"], "value": [1.0]})
    failure = {"cell": cell_name(0), "status": status, "error": "because", "started_at": "2026-01-02T00:00:00+00:00"}
    assert store.write(tmp_path, failure, {}) is None
    store.write(tmp_path, row(cell_name(0), seed=7, started_at="2026-01-01T00:00:00+00:00"), {"samples": samples})
    if compacted:
        store.compact(tmp_path)
    standing = store.write(tmp_path, failure | {"new/acc": None}, {"samples": samples.assign(value=0.0)})
    assert standing is not None and (standing["status"], standing["seed"]) == ("ok", 7)
    for rows in (sweep.load(tmp_path), pd.read_parquet(tmp_path / "cells")):
        assert rows.status.tolist() == ["ok"] and rows.seed.tolist() == [7]
    assert store.read_table(tmp_path, "samples").value.tolist() == [1.0]


def test_of_two_writers_of_one_cell_the_one_that_is_ok_wins(tmp_path: Path) -> None:
    samples = pd.DataFrame({"task": ["t"], "document": ["0"], "metric": ["acc"], "value": [1.0]})
    for i in range(20):
        asked = [(row(cell_name(i)), {"samples": samples}), ({"cell": cell_name(i), "status": "crashed"}, {})]
        writers = [threading.Thread(target=store.write, args=(tmp_path, *each)) for each in asked]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
    assert sweep.load(tmp_path).status.tolist() == ["ok"] * 20
    assert len(store.read_table(tmp_path, "samples")) == 20


def test_where_files_of_both_kinds_lie_the_ok_row_is_read(tmp_path: Path) -> None:
    """As older versions, or copies from another folder, leave them."""
    store.write(tmp_path, row(cell_name(0), started_at="2026-01-01T00:00:00+00:00"), {})
    store.compact(tmp_path)
    store.write(
        tmp_path / "other", {"cell": cell_name(0), "status": "failed", "started_at": "2026-01-02T00:00:00+00:00"}, {}
    )
    (tmp_path / "other" / "cells" / f"{cell_name(0)}.parquet").rename(tmp_path / "cells" / f"{cell_name(0)}.parquet")
    assert sweep.load(tmp_path).status.tolist() == ["ok"]
    assert store.statuses(tmp_path, [cell_name(0)]) == {cell_name(0): "ok"}


def test_a_column_outside_the_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speling is no column of schema"):
        store.write(tmp_path, row("aa", speling=1), {})


def test_a_half_written_file_is_not_read(tmp_path: Path) -> None:
    store.write(tmp_path, row("aa"), {})
    (tmp_path / "cells" / ".bb.parquet.123.tmp").write_bytes(b"PAR1 half of a row")
    assert len(sweep.load(tmp_path)) == len(pd.read_parquet(tmp_path / "cells")) == 1


def test_a_reader_beside_writers_never_fails_and_never_miscounts(tmp_path: Path) -> None:
    store.write(tmp_path, row("first"), {})
    writers = [
        threading.Thread(target=store.write, args=(tmp_path, row(f"{i:02x}", **{f"task{i}/acc": 0.5}), {}))
        for i in range(20)
    ]
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


def cell_name(i: int) -> str:
    return f"{i:016x}"


def test_compaction_keeps_every_row_and_replaces_files(tmp_path: Path) -> None:
    for i in range(30):
        store.write(tmp_path, row(cell_name(i), seed=i, **{f"task{i % 3}/acc": i / 30}), {})
    store.write(tmp_path, {"cell": cell_name(99), "status": "timeout"}, {})  # will be replaced: stays by itself
    before = sweep.load(tmp_path)
    assert store.compact(tmp_path) == (30, 30)
    assert len(list((tmp_path / "cells").glob("[!.]*.parquet"))) == 3  # the schema, the rows, the one not ok
    pd.testing.assert_frame_equal(sweep.load(tmp_path), before)
    plain = pd.read_parquet(tmp_path / "cells").sort_values("cell").reset_index(drop=True)
    pd.testing.assert_frame_equal(plain[before.columns], before)
    assert store.compact(tmp_path) == (30, 0)  # nothing left to do
    assert store.statuses(tmp_path, [cell_name(3), cell_name(99), cell_name(77)]) == {
        cell_name(3): "ok",
        cell_name(99): "timeout",
    }
    assert store.read_row(tmp_path, cell_name(4))["seed"] == 4


def test_a_compacted_cell_measured_again_has_its_new_row_alone(tmp_path: Path) -> None:
    for i in range(3):
        store.write(tmp_path, row(cell_name(i), started_at="2026-01-01T00:00:00+00:00"), {})
    store.compact(tmp_path)
    store.write(tmp_path, row(cell_name(1), seed=7, started_at="2026-01-02T00:00:00+00:00"), {})
    for rows in (sweep.load(tmp_path), pd.read_parquet(tmp_path / "cells")):
        assert sorted(rows.cell) == [cell_name(i) for i in range(3)]
        assert rows.set_index("cell").seed[cell_name(1)] == 7
    assert store.compact(tmp_path)[0] == 3
    assert sweep.load(tmp_path).set_index("cell").seed[cell_name(1)] == 7


def test_a_row_in_two_compact_files_counts_once_and_the_newer_wins(tmp_path: Path) -> None:
    """What two compactions at once, or one killed before it removed anything, leave behind."""
    for seed, day in ((1, "02"), (2, "01")):
        store.write(tmp_path / day, row(cell_name(0), seed=seed, started_at=f"2026-01-{day}T00:00:00+00:00"), {})
        (tmp_path / "cells").mkdir(exist_ok=True)
        (tmp_path / day / "cells" / f"{cell_name(0)}.parquet").rename(tmp_path / "cells" / f"0-table-{day}.parquet")
    assert sweep.load(tmp_path).seed.tolist() == [1]
    store.compact(tmp_path)
    assert pd.read_parquet(tmp_path / "cells").seed.tolist() == [1]


def test_compaction_beside_writers_and_readers_loses_nothing(tmp_path: Path) -> None:
    done = threading.Event()
    problems: list[str] = []

    def write(worker: int) -> None:
        for i in range(20):
            store.write(tmp_path, row(cell_name(100 * worker + i)), {})

    def compact() -> None:
        while not done.is_set():
            store.compact(tmp_path)

    def read() -> None:
        last = 0
        while not done.is_set():
            rows = sweep.load(tmp_path)
            if len(rows) < last or rows.cell.duplicated().any():
                problems.append(f"{last} rows, then {len(rows)}")
            last = len(rows)

    store.write(tmp_path, row(cell_name(9999)), {})
    workers = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    others = [threading.Thread(target=compact), threading.Thread(target=compact), threading.Thread(target=read)]
    for thread in (*workers, *others):
        thread.start()
    for worker in workers:
        worker.join()
    done.set()
    for other in others:
        other.join()
    assert not problems
    store.compact(tmp_path)
    assert len(sweep.load(tmp_path)) == len(pd.read_parquet(tmp_path / "cells")) == 81


def test_rows_of_an_older_version_come_in_the_columns_of_this_one(tmp_path: Path) -> None:
    store.write(tmp_path, row(cell_name(0), seed=1), {})
    old = pa.table(
        {
            "cell": [cell_name(1)],
            "status": ["ok"],
            "sparsity": pa.array([1], pa.int32()),
            "seed": [2.0],
            "schema_version": [1],
            "t/acc": pa.array([0.5], pa.float32()),
        }
    )
    pq.write_table(old, tmp_path / "cells" / f"{cell_name(1)}.parquet")
    for _ in range(2):  # as they lie, and compacted
        rows = sweep.load(tmp_path).set_index("cell")
        assert list(rows.reset_index().columns) == [*store.COLUMNS, "t/acc"]
        assert rows.sparsity[cell_name(1)] == 1.0 and rows.seed[cell_name(1)] == 2
        assert pd.isna(rows.error[cell_name(1)]) and rows["t/acc"][cell_name(1)] == 0.5
        store.compact(tmp_path)


def test_a_folder_of_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(store_rows, "SCHEMA_VERSION", store.SCHEMA_VERSION + 1)
        store.write(tmp_path, row(cell_name(0)), {})
    for refuses in (store.check_writable, store.check_version, sweep.load, store.compact):
        with pytest.raises(RequestError, match="was written by a newer version of sweep .* upgrade sweep, or give"):
            refuses(tmp_path)


def test_damaged_and_foreign_files_are_named_and_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(3):
        store.write(tmp_path, row(cell_name(i)), {})
    cells = tmp_path / "cells"
    whole = (cells / f"{cell_name(1)}.parquet").read_bytes()
    (cells / f"{cell_name(1)}.parquet").write_bytes(whole[: len(whole) // 2])
    (cells / f"{cell_name(5)}.parquet").write_bytes(b"")
    pq.write_table(pa.table({"other": [1]}), cells / "notes.parquet")
    assert len(sweep.load(tmp_path)) == 2
    for name in (cell_name(1), cell_name(5), "notes"):
        assert f"cells/{name}.parquet is no row of sweep and is left out" in caplog.text
    assert store.statuses(tmp_path, [cell_name(0), cell_name(1)]) == {
        cell_name(0): "ok",
        cell_name(1): store.UNREADABLE,
    }
    assert sorted(store.set_aside(tmp_path, [cell_name(1)])) == [f"{cell_name(1)}.parquet", "notes.parquet"]
    store.compact(tmp_path)  # looks at every file
    assert sorted(file.stem for file in (tmp_path / "set_aside").iterdir()) == [cell_name(1), cell_name(5), "notes"]
    assert len(pd.read_parquet(cells)) == 2


def test_what_a_killed_writer_left_is_removed_after_an_hour(tmp_path: Path) -> None:
    store.write(tmp_path, row(cell_name(0)), {})
    old, new = tmp_path / "cells" / ".aa.parquet.host-1.tmp", tmp_path / "cells" / ".bb.parquet.host-2.tmp"
    for half in (old, new):
        half.write_bytes(b"PAR1")
    os.utime(old, (0, 0))
    store.set_aside(tmp_path)
    assert not old.exists() and new.exists()


def test_the_command_line_compacts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store.write(tmp_path, row(cell_name(0)), {})
    store_rows.main(["compact", str(tmp_path)])
    assert "1 finished cells in one file, which replaced 1" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["compact"], ["merge", "new"]])
def test_a_folder_that_is_none_is_a_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        store_rows.main([*command, "nowhere"])
    said = "sweep: nowhere is no results folder: there is no nowhere/cells. Give one that a sweep has written\n"
    assert capsys.readouterr().err == said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_a_results_folder_on_object_storage(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bucket = f"memory://{tmp_path.name}" if kind == "memory" else request.getfixturevalue("bucket")
    store.check_writable(bucket)
    assert store.statuses(bucket, ["aa"]) == {}
    samples = pd.DataFrame({"task": ["t"], "document": ["0"], "metric": ["acc"], "value": [1.0]})
    for i in range(5):
        store.write(bucket, row(cell_name(i), seed=i, **{f"t{i}/acc": 0.5}), {"samples": samples})
    store.write(bucket, {"cell": cell_name(9), "status": "failed", "error": "because"}, {})
    assert store.read_row(bucket, cell_name(2))["seed"] == 2
    assert store.read_table(bucket, "samples").cell.tolist() == [cell_name(i) for i in range(5)]
    before = sweep.load(bucket)
    assert len(before) == 6
    assert store.compact(bucket) == (5, 5)
    pd.testing.assert_frame_equal(sweep.load(bucket), before)
    assert set(pd.read_parquet(f"{bucket}/cells").columns) == set(before.columns)
    store.write(bucket, row(cell_name(1), seed=70, started_at="2026-01-02T00:00:00+00:00"), {})
    assert sweep.load(bucket).set_index("cell").seed[cell_name(1)] == 70
    assert store.statuses(bucket, [cell_name(1), cell_name(9)]) == {cell_name(1): "ok", cell_name(9): "failed"}


def test_places_that_cannot_be_are_refused(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="results=s3://nobody/x cannot be written to"):
        store.check_writable("s3://nobody/x")
    with pytest.raises(RequestError, match="results=nosuch://x"):
        store.check_writable("nosuch://x")


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(RequestError, match=r"pip install 'sweep-pruning\[s3\]'"):
        store.check_writable("s3://bucket/prefix")


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), RuntimeError("Unable to locate credentials")]
)
def test_a_folder_that_cannot_be_read_is_refused(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: Folder, name: str) -> bytes:
        raise error

    monkeypatch.setattr(Folder, "get", refuses)
    with pytest.raises(RequestError, match=r"results=.* cannot be read: (Permission denied|RuntimeError: Unable to)"):
        store.check_version(tmp_path)


def copied(source: Path, into: Path) -> None:
    """What `cp -r source/cells into/` does."""
    shutil.copytree(source / "cells", into / "cells", dirs_exist_ok=True)


@pytest.fixture
def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two results folders with a task each, and a cell that both have."""
    for name, day in (("a", 1), ("b", 2)):
        at = f"2026-01-0{day}T00:00:00+00:00"
        for i in (day, 9):
            samples = pd.DataFrame({"task": name, "document": ["0"], "metric": ["acc"], "value": [day / 4]})
            store.write(
                tmp_path / name, row(cell_name(i), started_at=at, **{f"{name}/acc": day / 4}), {"samples": samples}
            )
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize("mend", [sweep.load, store.compact, store.mend_schema])
def test_a_folder_that_another_was_copied_into_shows_all_columns(mend: Any, two_folders: tuple[Path, Path]) -> None:
    a, b = two_folders
    copied(b, a)  # with the other folder's schema file over its own
    mend(a)
    plain = pd.read_parquet(a / "cells").set_index("cell")
    assert plain["a/acc"][cell_name(1)] == 0.25 and plain["b/acc"][cell_name(2)] == 0.5
    store.write(a, row(cell_name(7), **{"c/acc": 0.75}), {})
    copied(b, a)
    mend(a)
    assert {"a/acc", "b/acc", "c/acc"} <= set(pd.read_parquet(a / "cells").columns)


def test_a_schema_that_names_all_columns_is_told_without_opening_rows(
    two_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = two_folders
    store.mend_schema(a)
    opened: list[str] = []
    read = Folder.get
    monkeypatch.setattr(Folder, "get", lambda self, name: (opened.append(name), read(self, name))[1])
    store.mend_schema(a)
    assert opened == ["cells/0-schema.parquet"]
    (b / "cells" / f"{cell_name(2)}.parquet").rename(a / "cells" / f"{cell_name(2)}.parquet")
    opened.clear()
    store.mend_schema(a)
    assert sorted(set(opened)) == ["cells/0-schema.parquet", f"cells/{cell_name(2)}.parquet"]
    assert "b/acc" in pd.read_parquet(a / "cells")


def test_a_reader_who_may_not_write_reads_a_merged_folder(
    two_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = two_folders
    copied(b, a)

    def refuses(self: Folder, name: str, content: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Folder, "put", refuses)
    assert {"a/acc", "b/acc"} <= set(sweep.load(a).columns)


def test_compaction_drops_a_failure_that_was_copied_beside_a_finished_row(tmp_path: Path) -> None:
    store.write(tmp_path / "a", row(cell_name(1), started_at="2026-01-01"), {})
    store.compact(tmp_path / "a")
    store.write(tmp_path / "b", {"cell": cell_name(1), "status": "failed", "started_at": "2026-01-02"}, {})
    copied(tmp_path / "b", tmp_path / "a")
    store.compact(tmp_path / "a")
    assert pd.read_parquet(tmp_path / "a" / "cells").status.tolist() == ["ok"]


def test_merging_takes_what_is_better_or_newer_with_its_tables(
    two_folders: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    a, b = two_folders
    store.write(a, row(cell_name(3), started_at="2026-01-01", seed=1), {})
    store.write(b, {"cell": cell_name(3), "status": "failed", "started_at": "2026-01-03", "error": "later"}, {})
    store.write(a, {"cell": cell_name(4), "status": "timeout", "started_at": "2026-01-05"}, {})
    store.write(b, row(cell_name(4), started_at="2026-01-01", seed=2), {})
    store.compact(b)
    before = sweep.load(b)
    store_rows.main(["merge", str(a), str(b)])
    assert f"{a}: 3 rows from {b}; it had 1 as new" in capsys.readouterr().out
    rows = sweep.load(a).set_index("cell")
    assert (rows.status == "ok").all() and rows.seed[cell_name(3)] == 1 and rows.seed[cell_name(4)] == 2
    assert rows["b/acc"][cell_name(9)] == 0.5 and pd.isna(rows["a/acc"][cell_name(9)])  # the newer row, and it alone
    tables = store.read_table(a, "samples").set_index("cell")
    assert tables.value.to_dict() == {cell_name(1): 0.25, cell_name(2): 0.5, cell_name(9): 0.5}
    plain = pd.read_parquet(a / "cells").set_index("cell").sort_index()
    pd.testing.assert_frame_equal(plain[rows.columns], rows, check_dtype=False)
    pd.testing.assert_frame_equal(sweep.load(b), before)  # as it was
    assert store.merge(a, b) == {str(b): (0, 4)} and store.merge(b, a)[str(a)] == (2, 3)
    pd.testing.assert_frame_equal(sweep.load(b)[sorted(rows)], rows.reset_index()[sorted(rows)], check_dtype=False)


def test_an_interrupted_merge_loses_nothing_and_goes_on(
    two_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = two_folders
    put, left = Folder.put, 4

    def dies(self: Folder, name: str, content: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        put(self, name, content)

    both = {cell_name(i) for i in (1, 2, 9)}
    for allowed in range(8):
        left = allowed
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "put", dies)
            try:
                store.merge(a, b)
            except KeyboardInterrupt:
                assert {cell_name(1), cell_name(9)} <= set(sweep.load(a).cell) and len(sweep.load(b)) == 2
                continue
    assert set(sweep.load(a).cell) == both and set(store.read_table(a, "samples").cell) == both
    assert store.merge(a, b) == {str(b): (0, 2)}


def test_a_merge_that_cannot_be_is_refused_before_anything_is_taken(
    two_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = two_folders
    with pytest.raises(RequestError, match="are the same folder"):
        store.merge(a, b, tmp_path / "b" / ".." / "a")
    with pytest.raises(FileNotFoundError, match="nowhere is no results folder"):
        store.merge(a, b, tmp_path / "nowhere")
    assert len(sweep.load(a)) == 2
    store.merge(tmp_path / "new", a, b)
    assert len(sweep.load(tmp_path / "new")) == 3


def test_polars_and_duckdb_read_the_rows_as_the_readme_says(two_folders: tuple[Path, Path]) -> None:
    import duckdb
    import polars

    a, b = two_folders
    store.write(a, {"cell": cell_name(5), "status": "failed", "error": "because"}, {})
    store.merge(a, b)
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    lines = [line.partition("  #")[0] for line in readme.splitlines() if "results/cells/*.parquet" in line]
    assert [line.split("(")[0] for line in lines] == ["polars.read_parquet", "duckdb.sql"]
    expected = pd.read_parquet(a / "cells").sort_values("cell").reset_index(drop=True)
    for line in lines:
        found = eval(line.replace("results/cells", f"{a}/cells"), {"polars": polars, "duckdb": duckdb})
        rows = pd.DataFrame(found.to_dicts()) if hasattr(found, "to_dicts") else found.df()
        rows = rows.sort_values("cell").reset_index(drop=True)
        assert set(rows.columns) == set(expected.columns)
        for name in ("cell", "status", "error", "a/acc", "b/acc"):
            assert [None if pd.isna(v) else v for v in rows[name]] == [
                None if pd.isna(v) else v for v in expected[name]
            ]
