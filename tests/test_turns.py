"""Cells that run side by side work together and are timed alone."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import pytest

from sweep import turns

WORKER = """
import sys, time
from pathlib import Path
from sweep import turns
results, name, work = sys.argv[1], sys.argv[2], float(sys.argv[3])
log = Path(results) / name
with turns.working(results):
    log.write_text(f"{time.time()} ")
    time.sleep(work)
    worked = time.time()
    with turns.alone():
        begun = time.time()
        time.sleep(0.3)
        log.write_text(log.read_text() + f"{worked} {begun} {time.time()}")
"""


def test_no_cell_works_or_is_timed_while_another_is_timed(tmp_path: Path) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(i), str(work)])
               for i, work in enumerate((0.2, 1.0, 0.6))]  # fmt: skip
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0, 0]
    spans = [list(map(float, (tmp_path / str(i)).read_text().split())) for i in range(3)]
    for i, (_, _, begun, ended) in enumerate(spans):
        for j, (started, worked, other_begun, other_ended) in enumerate(spans):
            if i != j:
                assert ended <= started or worked <= begun  # the other was not at work
                assert ended <= other_begun + 0.01 or other_ended <= begun + 0.01  # nor being timed


def test_the_last_cell_to_leave_removes_the_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    results = str(tmp_path / "results")
    with turns.working(results):
        (file,) = tmp_path.glob("*.turns")
        with turns.working(results):
            assert list(tmp_path.glob("*.turns")) == [file]
        assert file.exists()
        file.unlink()  # as if the last cell had left between another's opening of the file and its lock
        with turns.working(results):
            newer = file.stat().st_ino
            with turns.working(results):
                assert file.stat().st_ino == newer
        file.touch()  # another cell's: not ours to remove
    assert list(tmp_path.glob("*.turns")) == [file]


def test_a_removed_file_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lock, removals = fcntl.flock, iter([True, False])

    def removed_before(handle: IO[str], how: int) -> None:
        if how == fcntl.LOCK_SH and next(removals):
            next(tmp_path.glob("*.turns")).unlink()
        lock(handle, how)

    monkeypatch.setattr(turns.fcntl, "flock", removed_before)
    with turns.working("results"):
        assert list(tmp_path.glob("*.turns"))
    assert not list(tmp_path.glob("*.turns"))


def test_what_others_do_meanwhile_is_measured(tmp_path: Path) -> None:
    with turns.working(str(tmp_path)):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            time.sleep(0.3)
            with turns.alone() as others:
                time.sleep(1.0)
        finally:
            busy.kill()
            busy.wait()
    assert others.cores is not None and others.cores > 0.2  # on a machine with more to do, less than one


def test_a_cell_outside_a_sweep_waits_for_nobody() -> None:
    with turns.alone() as others:
        pass
    assert others.cores is None or others.cores >= 0
