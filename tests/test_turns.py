"""Cells that run side by side work together and are timed alone, whatever the order in which they come and go."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweep import locks, turns
from sweep.settings import RequestError

# Does what it is told, line by line, and writes down each moment from which and up to which it did it.
CELL = """
import contextlib, sys, time
from sweep import turns
log = open(sys.argv[1], "a", buffering=1)
working = alone = contextlib.ExitStack()
for line in sys.stdin:
    word, _, seconds = line.strip().partition(" ")
    if word == "enter":
        working.enter_context(turns.working())
        log.write(f"work {time.monotonic()}\\n")
    elif word == "time":
        log.write(f"rest {time.monotonic()}\\n")
        with turns.alone():
            log.write(f"timed {time.monotonic()}\\n")
            time.sleep(float(seconds))
            log.write(f"rest {time.monotonic()}\\n")
        log.write(f"work {time.monotonic()}\\n")
    elif word == "leave":
        log.write(f"rest {time.monotonic()}\\n")
        working.close()
    elif word == "work":
        time.sleep(float(seconds))
"""
SLACK = 1e-3  # seconds between what is done and what is written down


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWEEP_TURNS", str(tmp_path / "turns"))
    return tmp_path / "turns"


class Cell:
    """A process beside others; a class because it has its program and its log."""

    def __init__(self, log: Path, where: Path | None = None, **environment: str) -> None:
        self.log = log
        self.log.touch()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CELL, str(log)],
            stdin=subprocess.PIPE,
            text=True,
            cwd=where,
            env=os.environ | environment,
        )

    def do(self, *words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{word}\n" for word in words))
        self.process.stdin.flush()

    def states(self) -> list[str]:
        return [line.split()[0] for line in self.log.read_text().splitlines()]

    def await_state(self, state: str, times: int = 1) -> None:
        until(lambda: self.states().count(state) >= times)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=120) == 0

    def spans(self, state: str) -> list[tuple[float, float]]:
        """The stretches of time in which it was in a state."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [(float(start), float(end)) for (kind, start), (_, end) in itertools.pairwise(lines) if kind == state]


def until(happens: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def blocked(cell: Cell) -> bool:
    """Whether a process waits for a lock, as the kernel tells."""
    return f" {cell.process.pid} " in "".join(
        line for line in Path("/proc/locks").read_text().splitlines() if "->" in line
    )


def check_that_none_meet(cells: list[Cell]) -> None:
    for cell in cells:
        for begun, ended in cell.spans("timed"):
            for other in cells:
                for state in ("timed", "work"):
                    for since, until in other.spans(state) if other is not cell else []:
                        assert until <= begun + SLACK or ended <= since + SLACK, (state, begun, ended, since, until)


@pytest.mark.parametrize("comes", ["before the first leaves", "when the first has left"])
def test_one_leaves_while_another_waits_and_a_third_enters(comes: str, tmp_path: Path) -> None:
    """The third must not find a lock of its own: it would be timed beside the second."""
    a, b, c = cells = [Cell(tmp_path / name) for name in "abc"]
    a.do("enter")
    b.do("enter")
    a.await_state("work")
    b.await_state("work")
    b.do("time 1.5", "leave")
    until(lambda: blocked(b))
    if comes == "before the first leaves":
        c.do("enter", "time 0.5", "leave")
        until(lambda: blocked(c))
    assert "timed" not in b.states() + c.states()
    a.do("leave")
    b.await_state("timed")
    if comes == "when the first has left":
        c.do("enter", "time 0.5", "leave")
    for cell in cells:
        cell.end()
    assert len(b.spans("timed")) == len(c.spans("timed")) == 1
    check_that_none_meet(cells)


def test_a_cell_that_is_to_be_timed_does_not_wait_for_those_that_come_after_it(tmp_path: Path) -> None:
    a, b, *later = cells = [Cell(tmp_path / str(i)) for i in range(5)]
    a.do("enter")
    b.do("enter")
    a.await_state("work")
    b.await_state("work")
    b.do("time 0.2")
    until(lambda: blocked(b))
    for cell in later:
        cell.do("enter")
        until(lambda cell=cell: blocked(cell))
    a.do("leave")
    b.await_state("timed")  # though the later ones, once at work, stay there
    for cell in later:
        cell.await_state("work")
    for cell in cells:
        cell.end()
    check_that_none_meet(cells)


def test_cells_come_are_timed_and_go_in_any_order(tmp_path: Path) -> None:
    draw = random.Random(0)
    cells = []
    for i in range(10):
        cells.append(Cell(tmp_path / str(i)))
        for _ in range(3):
            words = [f"work {draw.uniform(0, 0.05)}", "enter", f"work {draw.uniform(0, 0.05)}"]
            words += [f"time {draw.uniform(0.01, 0.05)}", f"work {draw.uniform(0, 0.02)}"] * draw.randint(0, 2)
            cells[-1].do(*words, "leave")
        time.sleep(draw.uniform(0, 0.1))
    for cell in cells:
        cell.end()
    assert sum(len(cell.spans("timed")) for cell in cells) > 15
    assert any(
        since < start < until
        for one, other in itertools.permutations(cells, 2)
        for since, until in one.spans("work")
        for start, _ in other.spans("work")
    )  # else nobody was there to be met
    check_that_none_meet(cells)


def test_a_killed_cell_holds_nobody_up(tmp_path: Path) -> None:
    a, b = Cell(tmp_path / "a"), Cell(tmp_path / "b")
    a.do("enter", "time 600")
    a.await_state("timed")
    b.do("enter", "time 0.1", "leave")
    until(lambda: blocked(b))
    a.process.kill()
    a.process.wait()
    b.end()
    assert len(b.spans("timed")) == 1


def test_sweeps_of_other_folders_and_temporary_folders_take_turns_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SWEEP_TURNS")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "a job's own"))
    assert turns.folder() == Path("/tmp") / f"sweep-{os.getuid()}"  # where all of this machine look


def test_lock_files_stay_empty_in_one_folder_and_are_kept_from_tidying(folder: Path) -> None:
    with turns.working():
        for file in folder.iterdir():
            os.utime(file, (0, 0))
        with turns.alone():
            pass
    assert sorted(file.name for file in folder.iterdir()) == ["gate.lock", "room.lock"]
    assert all(file.stat().st_size == 0 and time.time() - file.stat().st_mtime < 60 for file in folder.iterdir())


def test_an_error_while_a_cell_is_timed_leaves_it_at_work(tmp_path: Path) -> None:
    other = Cell(tmp_path / "other")
    with turns.working():
        with pytest.raises(KeyError), turns.alone():
            raise KeyError
        other.do("enter", "time 0.1", "leave")
        until(lambda: blocked(other))
        assert other.spans("timed") == []
    other.end()
    assert len(other.spans("timed")) == 1


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SWEEP_TURNS", str(tmp_path / "file"))
    with pytest.raises(
        RequestError, match="where cells wait for their turn to be timed, cannot be written to.*SWEEP_TURNS"
    ):
        turns.check()


def test_waiting_for_a_turn_is_no_work(tmp_path: Path) -> None:
    other = Cell(tmp_path / "other")
    other.do("enter", "time 1.0", "leave")
    other.await_state("timed")
    waited, worked = locks.waited_seconds(), locks.working_seconds()
    with turns.working():
        pass
    other.end()
    assert 0.5 < locks.waited_seconds() - waited < 60
    assert locks.working_seconds() - worked < 0.5


def test_what_others_do_meanwhile_is_measured() -> None:
    with turns.working():
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
