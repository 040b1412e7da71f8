"""A sweep as a person runs it: interrupted, resumed, on object storage, in a place that cannot be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import sweep
from sweep import store
from sweep.store import rows as store_rows
from test_cli import run
from test_launchers import QUICK


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> list[str]:
    return ["model=local", f"model.path={tiny_checkpoint}", *QUICK, "threads=1"]


def descendants_of_session(session: int) -> list[int]:
    """The processes of a session that still live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def test_ctrl_c_ends_the_running_cell_keeps_rows_and_says_how_to_go_on(tmp_path: Path, tiny: list[str]) -> None:
    sparsities = ",".join(f"0.{i}" for i in range(1, 10))
    words = ["-m", "+method=weight", f"sparsity={sparsities}", *tiny]
    with (tmp_path / "output").open("w") as output:
        running = subprocess.Popen(
            [sys.executable, "-m", "sweep", *words], cwd=tmp_path, stdout=output, stderr=output, start_new_session=True
        )
        while "[3/10]" not in (tmp_path / "output").read_text():
            assert running.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        assert running.wait(timeout=30) == 130
    text = (tmp_path / "output").read_text()
    assert "sweep: interrupted; finished rows are kept. To go on from here: python -m sweep -m +method=weight" in text
    assert "Traceback" not in text
    rows = sweep.load(tmp_path / "results")
    assert 2 <= len(rows) < 10 and set(rows.status) == {"ok"}
    deadline = time.monotonic() + 10
    while descendants_of_session(running.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not descendants_of_session(running.pid)
    assert f"{len(rows)} already done, {10 - len(rows)} to run" in run(*words, "plan=true", cwd=tmp_path)


def test_a_run_again_that_fails_is_told_and_leaves_the_row_it_had(tmp_path: Path, tiny: list[str]) -> None:
    long = ["efficiency.precision=0.0001", "efficiency.seconds=4"]  # the cell takes so long at least
    words = ["+method=weight", "sparsity=0.1", *tiny, *long]
    run(*words, cwd=tmp_path)
    before = sweep.load(tmp_path / "results")
    output = run(*words, "resume=false", "timeout=2", cwd=tmp_path, code=1)
    assert "timeout: not finished after timeout=2 seconds. The row of its earlier run, which is ok, stands" in output
    assert "in run_cell" in output  # the whole error: no row keeps it
    assert "2 of 2 cells were run again and are not ok; the rows above are of their earlier runs: dense (" in output
    pd.testing.assert_frame_equal(sweep.load(tmp_path / "results"), before)
    assert len(store.read_table(tmp_path / "results", "latency")) > 0
    assert "2 already done, 0 to run" in run(*words, cwd=tmp_path)


def test_a_plan_says_what_its_cells_will_take(tmp_path: Path, tiny: list[str]) -> None:
    run("-m", "+method=weight", "sparsity=0.1", *tiny, cwd=tmp_path)
    output = run("-m", "+method=weight", "sparsity=0.1,0.2", *tiny, "plan=true", cwd=tmp_path)
    assert "3 cells (dense baselines included), 2 already done, 1 to run" in output
    assert "expected: about" in output and "GiB a cell (from rows like 1 of the 1)" in output


def test_a_damaged_row_is_set_aside_and_its_cell_run_again(tmp_path: Path, tiny: list[str]) -> None:
    words = ["-m", "+method=weight", "sparsity=0.1", *tiny]
    run(*words, cwd=tmp_path)
    rows = sweep.load(tmp_path / "results").set_index("sparsity")
    damaged = tmp_path / "results" / "cells" / f"{rows.cell[0.1]}.parquet"
    damaged.write_bytes(b"PAR1 and no more")
    output = run(*words, cwd=tmp_path)
    assert "1 already done, 1 to run" in output
    assert f"{damaged.name} was no row of sweep: moved to results/set_aside" in output
    assert (tmp_path / "results" / "set_aside" / damaged.name).exists()
    assert len(sweep.load(tmp_path / "results")) == 2


def test_a_sweep_on_object_storage_runs_resumes_and_loads(tmp_path: Path, tiny: list[str], bucket: str) -> None:
    words = ["-m", "+method=weight", "sparsity=0.1,0.2", *tiny, f"results={bucket}"]
    assert f"rows: {bucket}/cells" in run(*words, cwd=tmp_path)
    rows = sweep.load(bucket)
    assert len(rows) == 3 and set(rows.status) == {"ok"}
    assert set(store.read_table(bucket, "latency").cell) == set(rows.cell)
    assert "3 already done, 0 to run" in run(*words, cwd=tmp_path)
    assert not list(tmp_path.iterdir())  # nothing of it lies here
    run(bucket, "--no-html", "--out", "figures", cwd=tmp_path, module="sweep.report")
    assert list((tmp_path / "figures").glob("*.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["results=file"], "sweep: results=file cannot be written to: "),
        (["results=newer"], "sweep: results=newer was written by a newer version of sweep"),
        (["timeout=0"], "sweep: timeout must be at least 1, got 0"),
        (["memory_limit=much"], "sweep: memory_limit must be a size such as 12GiB"),
        (["retry=sometimes"], "sweep: retry must be one of all, failed"),
        (["timeout=10,20"], "sweep: timeout says how the whole sweep is run and cannot be swept over; got 10.0, 20.0"),
        (["sparsity=interval(0,1)"], "sweep: sparsity=interval(0,1) has no list of values"),
        (["model=glob(nothing*)"], "sweep: model=glob(nothing*) matches nothing"),
        (["sparsity=range(0,1,1e-9)"], "sweep: the grid has 1000000000 cells, more than max_cells=1000"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(
    words: list[str], message: str, tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as newer:
        newer.setattr(store_rows, "SCHEMA_VERSION", store.SCHEMA_VERSION + 1)
        store.write(tmp_path / "newer", {"cell": "00", "status": "ok"}, {})
    settings = [word for word in tiny if not any(word.startswith(w.partition("=")[0]) for w in words)]
    output = run("-m", "+method=weight", *settings, *words, cwd=tmp_path, code=2)
    assert message in output and "Traceback" not in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "newer"]
